// Work shared between XLA's own threads and the calling one.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace jaxprune {

// Runs work(0), ..., work(n - 1) on the pool and on the calling thread, and returns when all are done. The caller takes
// its share and waits only for tasks that somebody has begun, so a pool that is busy, or has none, holds nothing up.
inline void ForEach(xla::ffi::ThreadPool& pool, int64_t n, const std::function<void(int64_t)>& work) {
  if (n == 1) return work(0);
  struct Progress {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto progress = std::make_shared<Progress>();
  // `work` is only touched while tasks are left, and then the caller is still here.
  auto run = [progress, n, work = &work] {
    int64_t mine = 0;
    for (int64_t i; (i = progress->next.fetch_add(1)) < n; ++mine) (*work)(i);
    if (mine && progress->done.fetch_add(mine) + mine == n) {
      std::lock_guard<std::mutex> lock(progress->mutex);
      progress->all_done.notify_all();
    }
  };
  const int64_t helpers = std::min(pool.num_threads(), n) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([run] { run(); });
  run();
  // Shares are equal, so the others are nearly done: look a while before sleeping, which costs more than a product.
  for (int i = 0; i < 2000 && progress->done.load() < n; ++i) {
#if defined(JAXPRUNE_X86)
    __builtin_ia32_pause();
#endif
  }
  if (progress->done.load() == n) return;
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->all_done.wait(lock, [&] { return progress->done.load() == n; });
}

}  // namespace jaxprune
