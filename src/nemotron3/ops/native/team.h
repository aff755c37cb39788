// Threads that run an operation as a team, with a barrier at its end.
//
// An operation is a function that every thread of a team calls with the same arguments; each thread
// gets its part of the work from `share` or `next`. A team runs one operation (`parallel_region`),
// or many one after another (program.cpp). The latter makes a decoding step of a hundred small
// operations cheap, since a barrier takes a fraction of the time of starting a team. Writes of a
// thread before `wait` are visible to all threads after it.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

struct Range {
  int64_t first, last;
};

// A counter that threads wait for; it only grows.
struct alignas(64) Signal {
  std::atomic<uint32_t> count{0};
  std::atomic<uint32_t> sleepers{0};
  std::atomic<int64_t> raised_at{0};  // set only if a thread slept
};

// The barrier of a team, and the next piece of work that no thread has taken.
struct Barrier {
  Signal held;  // how often all threads have arrived
  alignas(64) std::atomic<int64_t> arrived{0};
  alignas(64) std::atomic<int64_t> taken{0};
};

// The time in nanoseconds that a thread waited in an operation.
struct Waiting {
  int64_t spun = 0;   // spinning on a processor
  int64_t slept = 0;  // asleep, until the event happened
};

class Team;
typedef void (*TeamBody)(void* context, Team& team);

// Defined in team.cpp, in a library that all others share.
extern "C" {
void nemotron3_raise(Signal& signal);
void nemotron3_await(Signal& signal, uint32_t count, Waiting& waiting);
void nemotron3_parallel_region(int64_t threads, TeamBody body, void* context);
}

class Team {
 public:
  Team(int64_t thread, int64_t threads, Barrier& barrier)
      : thread(thread), threads(threads), barrier(barrier), held(barrier.held.count.load()) {}

  // This thread's part of n pieces of equal work, in multiples of `grain`.
  Range share(int64_t n, int64_t grain = 1) const {
    const int64_t blocks = (n + grain - 1) / grain;
    const int64_t first = (blocks * thread + threads - 1) / threads * grain;
    const int64_t last = (blocks * (thread + 1) + threads - 1) / threads * grain;
    return {first, last < n ? last : n};
  }

  // The next piece that no thread has begun, counted from the last wait: for pieces of unequal
  // work.
  int64_t next() { return barrier.taken.fetch_add(1, std::memory_order_relaxed); }

  // Return when all threads of the team have called it.
  void wait() {
    if (threads == 1) {
      barrier.taken.store(0, std::memory_order_relaxed);
      return;
    }
    held++;
    if (barrier.arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      barrier.arrived.store(0, std::memory_order_relaxed);
      barrier.taken.store(0, std::memory_order_relaxed);
      nemotron3_raise(barrier.held);
      return;
    }
    if (barrier.held.count.load(std::memory_order_acquire) != held)
      nemotron3_await(barrier.held, held, waiting);
  }

  const int64_t thread, threads;
  Waiting waiting;

 private:
  Barrier& barrier;
  uint32_t held;
};

// Run `body` on a team of `threads` threads or fewer; the team knows the actual number.
template <class Body>
static void parallel_region(int64_t threads, const Body& body) {
  if (threads == 1) {
    Barrier barrier;
    Team team(0, 1, barrier);
    body(team);
    return;
  }
  nemotron3_parallel_region(
      threads, [](void* context, Team& team) { (*(const Body*)context)(team); }, (void*)&body);
}

// Decode an argument from Python: eight bytes, a floating-point number as a double.
template <class T>
static T argument(int64_t word) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(word);
  } else if constexpr (std::is_floating_point_v<T>) {
    double number;
    memcpy(&number, &word, 8);
    return (T)number;
  } else {
    return word;
  }
}

template <class... T, size_t... I>
static void call(void (*body)(Team&, T...), Team& team, const int64_t* words,
                 std::index_sequence<I...>) {
  body(team, argument<T>(words[I])...);
}

template <class... T>
static void call(void (*body)(Team&, T...), Team& team, const int64_t* words) {
  call(body, team, words, std::index_sequence_for<T...>{});
}

// Export `body(Team&, ...)` to Python: NAME is a single operation, NAME_node one of a program.
#define PARALLEL_KERNEL(NAME, body)                                                    \
  extern "C" void NAME##_node(Team* team, const int64_t* words) {           \
    call(body, *team, words);                                                 \
  }                                                                           \
  extern "C" void NAME(const int64_t* words, int64_t threads) {               \
    parallel_region(threads, [&](Team& team) { call(body, team, words); });          \
  }
