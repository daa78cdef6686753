// Runs a list of kernel calls, one after the other, in one parallel region.
//
// An op by itself starts a parallel region of its own, and its threads are woken up for it. Here the threads stay. They
// share the tasks of each call and meet at a barrier after it. The results have the bits of the single calls, because
// no result of a kernel depends on which thread runs which task.
#pragma once
#include <ATen/Parallel.h>
#include <omp.h>
#include <unistd.h>

#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../cpu/dispatch.h"

namespace gpt2fast {

// One kernel call, cut into tasks as in csrc/cpu/dispatch.h.
struct Phase {
  virtual ~Phase() = default;
  virtual int64_t tasks() const = 0;
  virtual void run(int64_t begin, int64_t end) const = 0;
};

template <class Args>
struct KernelPhase final : Phase {
  KernelPhase(const cpu::Kernel<Args>& kernel, const Args& args) : kernel(kernel), args(args) {}
  int64_t tasks() const override { return kernel.tasks(args); }
  void run(int64_t begin, int64_t end) const override { kernel.run(args, begin, end); }

  cpu::Kernel<Args> kernel;
  Args args;
};

using Phases = std::vector<std::unique_ptr<Phase>>;

// A barrier for the threads of one region. A thread that waits spins for a bounded time. Then it gives up its core
// again and again, so that a thread without a core gets one, and at last it sleeps.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait() {
    unsigned now = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(now + 1, std::memory_order_release);
      generation_.notify_all();
      return;
    }
    for (int i = 0; i < kSpins; ++i) {
      if (generation_.load(std::memory_order_acquire) != now) return;
      pause();
    }
    for (int i = 0; i < kYields; ++i) {
      if (generation_.load(std::memory_order_acquire) != now) return;
      std::this_thread::yield();
    }
    generation_.wait(now, std::memory_order_acquire);
  }

 private:
  static constexpr int kSpins = 2000;  // some 50 microseconds: as long as threads with a core each wait for each other
  static constexpr int kYields = 100;

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const int threads_;
  std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> generation_{0};
};

// Whether this process was forked after it had run phases on several threads. Those threads do not exist in the child,
// and OpenMP would wait for them for ever.
inline bool lost_threads(bool starts_threads) {
  static std::atomic<pid_t> user{0};
  if (pid_t before = user.load()) return before != getpid();
  if (starts_threads) user.store(getpid());
  return false;
}

// Runs the first `count` phases in order, on torch's threads or, inside another parallel region, on the calling thread.
// The first exception of a kernel is thrown again after all threads have left.
inline void run_phases(const Phases& phases, size_t count) {
  int wanted = omp_in_parallel() ? 1 : at::get_num_threads();
  if (wanted == 1 || lost_threads(wanted > 1)) {
    for (size_t i = 0; i < count; ++i) phases[i]->run(0, phases[i]->tasks());
    return;
  }
  std::unique_ptr<Barrier> barrier;
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  std::mutex mutex;
#pragma omp parallel num_threads(wanted)
  {
    int thread = omp_get_thread_num(), threads = omp_get_num_threads();  // those that did start
#pragma omp single
    barrier = std::make_unique<Barrier>(threads);
    for (size_t i = 0; i < count; ++i) {
      if (!failed.load(std::memory_order_relaxed)) {
        try {
          int64_t tasks = phases[i]->tasks();
          phases[i]->run(tasks * thread / threads, tasks * (thread + 1) / threads);
        } catch (...) {
          std::lock_guard<std::mutex> lock(mutex);
          if (!error) error = std::current_exception();
          failed.store(true, std::memory_order_relaxed);
        }
      }
      barrier->wait();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace gpt2fast
