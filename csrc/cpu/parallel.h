// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The parallel loop that a CPU kernel is given.

#ifndef JAX_ATTN_CSRC_CPU_PARALLEL_H_
#define JAX_ATTN_CSRC_CPU_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

namespace jax_attn::cpu {

// Lets a thread that waits in a loop rest for some tens of cycles.
inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// About 100 us, which is more than most waits for the last iteration, and than waking up takes.
inline constexpr int kPausesBeforeSleep = 2000;

// Somewhere to run tasks, such as XLA's thread pool.
class Executor {
 public:
  virtual ~Executor() = default;
  // Threads worth using at once, the caller included.
  virtual int64_t num_threads() const = 0;
  // Runs `task` on another thread, at some time, perhaps after the caller is done.
  virtual void Schedule(std::function<void()> task) = 0;
};

// Calls body(i, worker) for all i in [0, n), on at most `num_threads` threads. No two threads have
// the same `worker`, a number in [0, num_threads), so it can index scratch memory.
//
// The caller works too and only waits for iterations that another thread has begun. It may be a
// thread of the pool itself: if all others are busy, or wait in loops of their own, it does all
// the work, so nested and concurrent loops cannot deadlock.
template <typename Body>
void ParallelFor(Executor& executor, int64_t num_threads, int64_t n, const Body& body) {
  num_threads = std::min(num_threads, n);
  if (num_threads <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i, 0);
    return;
  }
  // Outlives the call: a helper may start when the loop is over. It then finds no iteration left
  // and does not touch `body`.
  struct Loop {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
    std::atomic<int64_t> num_workers{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto loop = std::make_shared<Loop>();
  auto work = [loop, n, &body] {
    const int64_t worker = loop->num_workers.fetch_add(1);
    int64_t finished = 0;
    for (int64_t i; (i = loop->next.fetch_add(1)) < n; ++finished) body(i, worker);
    if (finished != 0 && loop->done.fetch_add(finished) + finished == n) {
      std::lock_guard<std::mutex> lock(loop->mutex);
      loop->all_done.notify_all();
    }
  };
  for (int64_t helper = 1; helper < num_threads; ++helper) executor.Schedule(work);
  work();
  for (int i = 0; i < kPausesBeforeSleep && loop->done.load() != n; ++i) Pause();
  if (loop->done.load() == n) return;
  std::unique_lock<std::mutex> lock(loop->mutex);
  loop->all_done.wait(lock, [&] { return loop->done.load() == n; });
}

}  // namespace jax_attn::cpu

#endif  // JAX_ATTN_CSRC_CPU_PARALLEL_H_
