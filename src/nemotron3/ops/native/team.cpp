// The threads of teams: where they come from, how they wait, and how many an operation uses.
//
// On idle processors a team uses PyTorch's own threads for this caller (openmp.h). Where processors
// are contended, or PyTorch uses another runtime, each calling thread has its own helper threads.
// It starts them when it first needs them, and they end with it; so callers share nothing, and a
// forked child, which does not inherit the threads, starts others. A thread waits by spinning
// briefly and then sleeping: if it waits for long, another program has the processor of the thread
// it waits for, and its own processor should be free for that program.
//
// On contended processors a team may lose more by waiting than it gains, since each operation takes
// as long as its slowest thread. So a team measures its work per time, in units of one processor's.
// If its threads are kept from running it tries fewer threads, and keeps the number that does more
// work; later it tries more threads again (class Size). Results do not depend on it: an operation
// gives the same bits for any number of threads.
#include "team.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#include "openmp.h"

namespace {
#if defined(__x86_64__)
inline void relax() { __builtin_ia32_pause(); }
#elif defined(__aarch64__)
inline void relax() { asm volatile("yield" ::: "memory"); }
#else
inline void relax() { asm volatile("" ::: "memory"); }
#endif

constexpr int64_t MICROSECOND = 1000, MILLISECOND = 1000 * MICROSECOND;  // of nanoseconds
// How long to spin for the other threads of a team: on contended processors, and on idle ones,
// where waking a thread costs more than its sleep gains.
constexpr int64_t SPIN_CONTENDED = 50 * MICROSECOND, SPIN_IDLE = 2 * MILLISECOND;
constexpr int64_t SPIN_FOR_WORK = 200 * MICROSECOND;  // of a helper thread
constexpr int64_t SPINS_A_LOOK = 16;  // between two looks at the clock
constexpr int64_t PROMPT = 100 * MICROSECOND;  // waking up faster is no sign of contention

int64_t now(clockid_t clock = CLOCK_MONOTONIC) {
  timespec t;
  clock_gettime(clock, &t);
  return t.tv_sec * 1000 * MILLISECOND + t.tv_nsec;
}

void raise(Signal& signal) {
  signal.count.fetch_add(1, std::memory_order_seq_cst);
  if (signal.sleepers.load(std::memory_order_seq_cst) == 0) return;
  signal.raised_at.store(now(), std::memory_order_relaxed);
  syscall(SYS_futex, &signal.count, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

// Return when `count` is reached; counts wrap around.
void await(Signal& signal, uint32_t count, int64_t spin, Waiting& waiting) {
  const auto reached = [&](uint32_t seen) { return (int32_t)(seen - count) >= 0; };
  const int64_t start = now();
  int64_t end = start;
  for (; end - start < spin; end = now())
    for (int64_t i = 0; i < SPINS_A_LOOK; i++, relax())
      if (reached(signal.count.load(std::memory_order_acquire))) {
        waiting.spun += now() - start;
        return;
      }
  waiting.spun += end - start;
  signal.sleepers.fetch_add(1, std::memory_order_seq_cst);
  for (uint32_t seen; !reached(seen = signal.count.load(std::memory_order_seq_cst));)
    syscall(SYS_futex, &signal.count, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
  signal.sleepers.fetch_sub(1, std::memory_order_relaxed);
  const int64_t woken = now(), raised = signal.raised_at.load(std::memory_order_relaxed);
  const bool late = raised > end && woken - raised > PROMPT;
  waiting.slept += (late ? raised : woken) - end;
}

// Processor time of an operation, in nanoseconds.
struct Share {
  int64_t lasted = 0;  // from its start to its end
  int64_t worked = 0;  // of all threads
  int64_t kept_out = 0;  // of all threads: ready, but without a processor
};

// Time of one thread in an operation.
class Stopwatch {
 public:
  // The slower clock is read outside the interval of the other: reading it would look like
  // contention.
  Stopwatch() : used(now(CLOCK_THREAD_CPUTIME_ID)), start(now()) {}
  void stop(const Waiting& waiting, Share& share) const {
    const int64_t lasted = now() - start, on_processor = now(CLOCK_THREAD_CPUTIME_ID) - used;
    share.worked += std::max<int64_t>(0, on_processor - waiting.spun);
    share.kept_out += std::max<int64_t>(0, lasted - on_processor - waiting.slept);
  }
  const int64_t used, start;
};

std::atomic<int64_t> forks{0};

// Whether other programs, or several callers of this process, compete for its processors.
class Contention {
 public:
  static bool lasts() { return now() < until.load(std::memory_order_relaxed); }

  static void note(int64_t time) {
    until.store(time + LASTS, std::memory_order_relaxed);
    OpenMP* openmp = OpenMP::loaded();
    if (openmp && forks.load(std::memory_order_relaxed) == 0) openmp->sleep_until(time + LASTS);
  }

 private:
  static constexpr int64_t LASTS = 1000 * MILLISECOND;  // after it was seen last
  static inline std::atomic<int64_t> until{0};
};

int64_t spin_in_team() { return Contention::lasts() ? SPIN_CONTENDED : SPIN_IDLE; }

// How many threads the teams of one caller use if `wanted` threads would be best on idle
// processors.
class Size {
 public:
  explicit Size(int64_t wanted) : wanted(wanted), most(wanted) {}

  int64_t threads() const { return most; }

  // Whether the next operation should be measured, which costs microseconds.
  bool asks() { return is_trial || ++unmeasured % MEASURED == 0; }

  void learn(const Share& share, int64_t time) {
    seen.lasted += share.lasted;
    seen.worked += share.worked;
    seen.kept_out += share.kept_out;
    if (seen.lasted >= ENOUGH) decide(time);
  }

 private:
  static constexpr int64_t MEASURED = 5;  // one operation in five
  static constexpr int64_t ENOUGH = 12 * MILLISECOND;  // some time slices of the scheduler
  static constexpr int64_t FIRST_PAUSE = 50 * MILLISECOND, LAST_PAUSE = 2000 * MILLISECOND;
  static constexpr double CONTENDED = 0.05;  // share of its time in which a thread is kept from running
  static constexpr double BETTER = 1.1;

  void decide(int64_t time) {
    const double power = (double)seen.worked / seen.lasted;  // in processors
    const double lost = (double)seen.kept_out / seen.lasted;
    seen = Share();
    const bool is_contended = lost > CONTENDED * most;
    if (is_contended || most < wanted) Contention::note(time);
    if (is_trial) {
      // More threads must be better by some margin, or the number would change with the noise.
      const bool stays = most > before ? power > BETTER * power_before : BETTER * power > power_before;
      is_trial = false;
      pause = stays ? FIRST_PAUSE : std::min(2 * pause, LAST_PAUSE);
      next_trial = time + pause;
      if (!stays) most = before;
      return;
    }
    if (time < next_trial) return;
    int64_t trial = most;
    if (most > 1 && is_contended) trial = most - std::max<int64_t>(1, lost);
    else if (most < wanted) trial = std::min(wanted, 2 * most);
    if (trial == most) return;
    before = most;
    power_before = power;
    most = std::max<int64_t>(1, trial);
    is_trial = true;
  }

  const int64_t wanted;
  int64_t most, before = 0;
  double power_before = 0;
  bool is_trial = false;
  int64_t unmeasured = 0;
  int64_t pause = FIRST_PAUSE, next_trial = 0;
  Share seen;
};

// The helper threads of one calling thread.
class Helpers {
 public:
  ~Helpers() {
    is_over = true;
    for (auto& helper : helpers) raise(helper->called);
    for (auto& helper : helpers) helper->thread.join();
  }

  void run(int64_t wanted, TeamBody body, void* context) {
    while ((int64_t)sizes.size() <= wanted) sizes.emplace_back(sizes.size());
    Size& size = sizes[wanted];
    this->body = body;
    this->context = context;
    is_measured = size.asks();
    began = is_measured ? now() : 0;
    barrier.taken.store(0, std::memory_order_relaxed);
    const int64_t most = size.threads();
    shares.assign(is_measured ? most : 0, Share());
    ended.store(0, std::memory_order_relaxed);
    OpenMP* openmp = OpenMP::loaded();
    if (most > 1 && openmp && !Contention::lasts() && forks.load(std::memory_order_relaxed) == 0) {
      threads = most;
      openmp->parallel(most, [](void* self) { ((Helpers*)self)->take_part(); }, this);
    } else {
      threads = present(most);
      for (int64_t i = 0; i < threads - 1; i++) raise(helpers[i]->called);
      lead();
    }
    if (!is_measured) return;
    Share all;
    for (const Share& share : shares) {
      all.worked += share.worked;
      all.kept_out += share.kept_out;
    }
    const int64_t time = now();
    all.lasted = time - began;
    size.learn(all, time);
  }

 private:
  struct Helper {
    Signal called;
    std::thread thread;
  };

  // The part of an OpenMP thread. OpenMP may provide more threads than requested, or fewer. All
  // wait for each other at the end of the region.
  void take_part() {
    const OpenMP& openmp = *OpenMP::loaded();
    const int64_t thread = openmp.thread(), count = std::min(threads, openmp.threads());
    if (thread < count) work(thread, count, [](Team&) {});
  }

  // The caller's part with helper threads: its share of the work, then waiting for the helpers.
  void lead() {
    work(0, threads, [&](Team& team) {
      if (threads > 1 && all_ended.count.load(std::memory_order_acquire) != ++operations)
        await(all_ended, operations, spin_in_team(), team.waiting);
    });
  }

  // The part of each helper thread.
  void help(int64_t thread) {
    const int64_t others = threads - 1;  // read first: when all have ended, `threads` may change
    work(thread, threads, [](Team&) {});
    if (ended.fetch_add(1, std::memory_order_acq_rel) == others - 1) raise(all_ended);
  }

  // A thread's share of the operation, then `then`; timed if this operation is measured.
  template <class Then>
  void work(int64_t thread, int64_t count, const Then& then) {
    Team team(thread, count, barrier);
    if (!is_measured) {
      body(context, team);
      return then(team);
    }
    const Stopwatch watch;
    Share& share = shares[thread];
    if (thread && watch.start - began > PROMPT) share.kept_out += watch.start - began;
    body(context, team);
    then(team);
    watch.stop(team.waiting, share);
  }

  // Start helpers for a team of `threads`; returns its size, which the system may limit.
  int64_t present(int64_t threads) {
    while ((int64_t)helpers.size() < threads - 1) {
      auto helper = std::make_unique<Helper>();
      Helper* at = helper.get();
      const int64_t number = helpers.size() + 1;
      const NoSignals while_it_starts;
      try {
        helper->thread = std::thread([this, number, at] { serve(number, *at); });
      } catch (const std::system_error&) {
        break;
      }
      helpers.push_back(std::move(helper));
    }
    return std::min<int64_t>(threads, helpers.size() + 1);
  }

  void serve(int64_t thread, Helper& helper) {
    pthread_setname_np(pthread_self(), "nemotron3-team");
    Waiting between;
    for (uint32_t calls = 1;; calls++) {
      await(helper.called, calls, SPIN_FOR_WORK, between);
      if (is_over) return;
      help(thread);
    }
  }

  std::vector<std::unique_ptr<Helper>> helpers;
  std::vector<Size> sizes;  // by the number of wanted threads
  bool is_over = false;
  // The running operation.
  TeamBody body = nullptr;
  void* context = nullptr;
  int64_t threads = 0;
  bool is_measured = false;
  int64_t began = 0;
  std::vector<Share> shares;  // by thread, if the operation is measured
  Barrier barrier;
  alignas(64) std::atomic<int64_t> ended{0};  // threads other than the caller
  Signal all_ended;
  uint32_t operations = 0;  // of more than one thread
};

// A caller's helpers. After a fork the child abandons the parent's, whose threads do not exist
// there.
struct Caller {
  std::unique_ptr<Helpers> helpers;
  int64_t forked = 0;
  Helpers& present() {
    const int64_t now_forked = forks.load(std::memory_order_relaxed);
    if (forked != now_forked) (void)helpers.release();
    forked = now_forked;
    if (!helpers) helpers = std::make_unique<Helpers>();
    return *helpers;
  }
  ~Caller() {
    if (forked != forks.load(std::memory_order_relaxed)) (void)helpers.release();
  }
};

thread_local Caller caller;

__attribute__((constructor)) void note_forks() {
  pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });
}

}  // namespace

extern "C" {

void nemotron3_raise(Signal& signal) { raise(signal); }

void nemotron3_await(Signal& signal, uint32_t count, Waiting& waiting) {
  await(signal, count, spin_in_team(), waiting);
}

void nemotron3_parallel_region(int64_t threads, TeamBody body, void* context) {
  caller.present().run(threads, body, context);
}
}
