// The product W @ x as an XLA custom call: checks what it is handed, cuts the work up, and runs it on XLA's own threads.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxprune {

const Kernels& BestKernels() {
  static const Kernels* best = [] {
    const char* wish = std::getenv("JAXPRUNE_ISA");
    const Kernels* sets[] = {
#if defined(JAXPRUNE_X86)
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") ? &kAvx512 : nullptr,
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kAvx2 : nullptr,
#endif
        &kPortable};
    for (const Kernels* set : sets) {
      if (set && wish && std::strcmp(wish, set->name) == 0) return set;
    }
    for (const Kernels* set : sets) {
      if (set) return set;
    }
    return &kPortable;
  }();
  return *best;
}

namespace {

// Runs work(0), ..., work(n - 1) on the pool and on the calling thread, and returns when all are done. The caller takes
// its share and waits only for tasks that somebody has begun, so a pool that is busy, or has no thread, holds nothing up.
void ForEach(ffi::ThreadPool& pool, int64_t n, const std::function<void(int64_t)>& work) {
  struct Progress {
    std::atomic<int64_t> next{0};
    int64_t done = 0;  // under `mutex`
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto progress = std::make_shared<Progress>();
  // `work` is only touched while tasks are left, and then the caller is still here.
  auto run = [progress, n, work = &work] {
    int64_t mine = 0;
    for (int64_t i; (i = progress->next.fetch_add(1)) < n; ++mine) (*work)(i);
    std::lock_guard<std::mutex> lock(progress->mutex);
    progress->done += mine;
    if (progress->done == n) progress->all_done.notify_all();
  };
  const int64_t helpers = std::min(pool.num_threads(), n) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([run] { run(); });
  run();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->all_done.wait(lock, [&] { return progress->done == n; });
}

constexpr int64_t kAlign = 64;

// Scratch on a cache line's boundary.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : bytes_(new char[floats * sizeof(float) + kAlign]) {}
  float* get() {
    const auto address = reinterpret_cast<uintptr_t>(bytes_.get());
    return reinterpret_cast<float*>((address + kAlign - 1) / kAlign * kAlign);
  }

 private:
  std::unique_ptr<char[]> bytes_;
};

void VectorProduct(ffi::ThreadPool& pool, const Kernels& kernels, const Weight& w, const float* x, float* y) {
  const int64_t chunks = std::clamp<int64_t>(w.n_out / 64, 1, 4 * std::max<int64_t>(pool.num_threads(), 1));
  const int64_t rows = (w.n_out + chunks - 1) / chunks;
  ForEach(pool, chunks, [&](int64_t c) {
    kernels.vector(w, x, y, std::min(c * rows, w.n_out), std::min((c + 1) * rows, w.n_out));
  });
}

void PanelProduct(ffi::ThreadPool& pool, const Kernels& kernels, const Weight& w, int64_t batch, const float* x,
                  float* y) {
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t panels = (batch + kPanel - 1) / kPanel;
  // Panels are packed once for each split, so outputs are split only where panels alone leave threads idle.
  const int64_t splits = panels % threads == 0 ? 1 : std::min(threads, w.n_out);
  const int64_t rows = (w.n_out + splits - 1) / splits;
  ForEach(pool, panels * splits, [&](int64_t t) {
    Task task;
    task.batch = batch;
    task.column = t / splits * kPanel;
    task.width = std::min(kPanel, batch - task.column);
    task.first = std::min(t % splits * rows, w.n_out);
    task.last = std::min(task.first + rows, w.n_out);
    Scratch panel(std::min(w.tile, w.n_in) * kPanel);
    Scratch spill(SumsInPlace(task, kernels.lanes) ? 0 : (task.last - task.first) * kPanel);
    kernels.product(w, task, x, y, panel.get(), spill.get());
  });
}

ffi::Error Refuse(const std::string& why) { return ffi::Error::InvalidArgument("jaxprune_product: " + why); }

ffi::Error Product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> values, ffi::Buffer<ffi::U16> index,
                   ffi::Buffer<ffi::S32> ptr, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> y, int64_t tile) {
  if (x.dimensions().size() != 2) return Refuse("`x` must be (in, batch)");
  if (y->dimensions().size() != 2) return Refuse("the result must be (out, batch)");
  const int64_t batch = x.dimensions()[1], n_in = x.dimensions()[0], n_out = y->dimensions()[0];
  if (y->dimensions()[1] != batch) return Refuse("`x` and the result must have the same batch");
  if (tile < 1 || tile > 65536) return Refuse("`tile` must be in [1, 65536]");
  if (values.element_count() != index.element_count()) return Refuse("`values` and `index` must be of one length");
  const int64_t n_tiles = (n_in + tile - 1) / tile;
  if (static_cast<int64_t>(ptr.element_count()) != n_tiles * (n_out + 1)) {
    return Refuse("`ptr` must have ceil(in / tile) * (out + 1) bounds");
  }
  float* out = y->typed_data();
  if (n_out == 0 || batch == 0) return ffi::Error::Success();
  if (n_in == 0) {
    std::fill_n(out, n_out * batch, 0.0f);
    return ffi::Error::Success();
  }
  const Weight w{values.typed_data(), index.typed_data(), ptr.typed_data(), n_in, n_out, tile, n_tiles};
  const Kernels& kernels = BestKernels();
  if (batch == 1) {
    VectorProduct(pool, kernels, w, x.typed_data(), out);
  } else {
    PanelProduct(pool, kernels, w, batch, x.typed_data(), out);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxprune

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxprune_product, jaxprune::Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U16>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("tile"));

// Name of the instruction set that runs.
extern "C" const char* jaxprune_isa() { return jaxprune::BestKernels().name; }

#pragma GCC visibility pop
