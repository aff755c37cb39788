// PyTorch's threads on Linux, which are those of GCC's OpenMP runtime (libgomp).
//
// An idle thread of that runtime spins for milliseconds before it sleeps. On idle processors the
// next operation therefore starts within a microsecond, so teams use the same threads: helper
// threads of their own would compete with them for the processors. Where other programs need the
// processors, the spinning costs most of the speed. The runtime reads the spin time from the
// environment when it is loaded, which is before this library; but it spins only briefly while it
// has more threads than there are processors. So while processors are contended, a thread keeps an
// OpenMP team of that size alive, which sleeps.
#pragma once
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

// Threads that are started while this object lives get no signals, which other threads handle.
class NoSignals {
 public:
  NoSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
  }
  ~NoSignals() { pthread_sigmask(SIG_SETMASK, &before, nullptr); }

 private:
  sigset_t before;
};

class OpenMP {
 public:
  // The libgomp that PyTorch has loaded; null if it uses another runtime.
  static OpenMP* loaded() {
    static OpenMP runtime;
    return runtime.region ? &runtime : nullptr;
  }

  // Call `body` on as many threads as PyTorch's operations use, and on at least `threads` unless
  // the system refuses. With another number than PyTorch's, the runtime would end and restart
  // threads.
  void parallel(int64_t threads, void (*body)(void*), void* context) const {
    region(body, context, std::max<unsigned>(threads, most_threads()), 0);
  }

  int64_t thread() const { return thread_number(); }
  int64_t threads() const { return thread_count(); }

  // Make idle threads sleep, without spinning, until `time` of the monotonic clock in nanoseconds.
  void sleep_until(int64_t time) {
    quiet_at.store(time, std::memory_order_relaxed);
    if (is_calm.exchange(true)) return;
    const NoSignals while_it_starts;
    pthread_t thread;
    if (pthread_create(&thread, nullptr, keep_idle_team, this) == 0)
      pthread_detach(thread);
    else
      is_calm = false;
  }

 private:
  OpenMP() {
    void* library = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD);
    if (!library) return;
    const auto find = [&](auto& function, const char* name) {
      function = (std::remove_reference_t<decltype(function)>)dlsym(library, name);
      return function != nullptr;
    };
    if (find(processors, "omp_get_num_procs") && find(most_threads, "omp_get_max_threads") &&
        find(thread_number, "omp_get_thread_num") && find(thread_count, "omp_get_num_threads"))
      find(region, "GOMP_parallel");
  }

  // An OpenMP team ends with the thread that started it.
  static void* keep_idle_team(void* self) {
    OpenMP& runtime = *(OpenMP*)self;
    runtime.region([](void*) {}, nullptr, runtime.processors() + 1, 0);
    const auto end = [&] { return runtime.quiet_at.load(std::memory_order_relaxed); };
    timespec time;
    for (int64_t until; clock_gettime(CLOCK_MONOTONIC, &time),
                        time.tv_sec * 1000000000 + time.tv_nsec < (until = end());) {
      time = {until / 1000000000, until % 1000000000};
      clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, nullptr);
    }
    runtime.is_calm = false;
    return nullptr;
  }

  void (*region)(void (*body)(void*), void* context, unsigned threads, unsigned flags) = nullptr;
  int (*processors)() = nullptr;
  int (*most_threads)() = nullptr;
  int (*thread_number)() = nullptr;
  int (*thread_count)() = nullptr;
  std::atomic<int64_t> quiet_at{0};
  std::atomic<bool> is_calm{false};
};
