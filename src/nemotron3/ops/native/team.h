// Threads that do an operation together and meet at its end.
//
// An operation is a function that every thread of a team calls with the same arguments; it takes its
// own part of the work from `share` or `next`. One operation may have a team to itself (`together`),
// and many may be done one after another by the same team (program.cpp): that is what makes a
// decoding step of a hundred small operations cheap, since a meeting takes a fraction of the time in
// which threads are started. What a thread writes before `wait` all threads see after it.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

struct Range {
  int64_t first, last;
};

// A number that only grows, and that threads wait for.
struct alignas(64) Signal {
  std::atomic<uint32_t> count{0};
  std::atomic<uint32_t> sleepers{0};
  std::atomic<int64_t> raised_at{0};  // when somebody slept
};

// What the threads of a team share.
struct Meeting {
  Signal held;  // meetings so far
  alignas(64) std::atomic<int64_t> arrived{0};
  alignas(64) std::atomic<int64_t> taken{0};
};

// What a thread did with its time in an operation, in nanoseconds, beside its work.
struct Waiting {
  int64_t spun = 0;   // on a processor, looking
  int64_t slept = 0;  // without one, until what it waited for had come
};

class Team;
typedef void (*TeamBody)(void* context, Team& team);

// team.cpp has them, in a library that all others share.
extern "C" {
void nemotron3_raise(Signal& signal);
void nemotron3_await(Signal& signal, uint32_t count, Waiting& waiting);
void nemotron3_together(int64_t threads, TeamBody body, void* context);
}

class Team {
 public:
  Team(int64_t thread, int64_t threads, Meeting& meeting)
      : thread(thread), threads(threads), meeting(meeting), held(meeting.held.count.load()) {}

  // This thread's part of n pieces of equal work, in multiples of `grain`.
  Range share(int64_t n, int64_t grain = 1) const {
    const int64_t blocks = (n + grain - 1) / grain;
    const int64_t first = (blocks * thread + threads - 1) / threads * grain;
    const int64_t last = (blocks * (thread + 1) + threads - 1) / threads * grain;
    return {first, last < n ? last : n};
  }

  // The next piece that nobody has begun, counted from the last meeting: for unequal work.
  int64_t next() { return meeting.taken.fetch_add(1, std::memory_order_relaxed); }

  // Go on when all have come here.
  void wait() {
    if (threads == 1) {
      meeting.taken.store(0, std::memory_order_relaxed);
      return;
    }
    held++;
    if (meeting.arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      meeting.arrived.store(0, std::memory_order_relaxed);
      meeting.taken.store(0, std::memory_order_relaxed);
      nemotron3_raise(meeting.held);
      return;
    }
    if (meeting.held.count.load(std::memory_order_acquire) != held)
      nemotron3_await(meeting.held, held, waiting);
  }

  const int64_t thread, threads;
  Waiting waiting;

 private:
  Meeting& meeting;
  uint32_t held;
};

// Give a piece of work a team of so many threads, or fewer: `body` asks the team how many it has.
template <class Body>
static void together(int64_t threads, const Body& body) {
  if (threads == 1) {
    Meeting meeting;
    Team team(0, 1, meeting);
    body(team);
    return;
  }
  nemotron3_together(
      threads, [](void* context, Team& team) { (*(const Body*)context)(team); }, (void*)&body);
}

// An argument as it comes from Python: eight bytes, a floating-point number as a double.
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

// Make `body(Team&, ...)` known to Python: NAME as an operation of its own, NAME_shared as one of a
// program.
#define SHARED(NAME, body)                                                    \
  extern "C" void NAME##_shared(Team* team, const int64_t* words) {           \
    call(body, *team, words);                                                 \
  }                                                                           \
  extern "C" void NAME(const int64_t* words, int64_t threads) {               \
    together(threads, [&](Team& team) { call(body, team, words); });          \
  }
