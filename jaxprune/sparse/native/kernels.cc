// The loops. Compiled once for each instruction set: KERNELS names the table, VECTOR_BYTES the width of a vector.
#include "kernels.h"

#include <cstring>

namespace jaxprune {
namespace {

typedef float Vec __attribute__((vector_size(VECTOR_BYTES), aligned(4)));
constexpr int kLanes = VECTOR_BYTES / sizeof(float);
constexpr int kMaxVecs = kPanel / kLanes;

inline Vec Load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
inline void Store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }

// One tile's runs times a packed panel of kVecs vectors a row. Sums stay in registers for a run, and come from and go
// to y, which the second-level cache holds.
template <int kVecs>
void TileTimesPanel(const Weight& w, int64_t tile, const Task& task, const float* panel, float* y, int64_t stride) {
  const int32_t* ptr = w.ptr + tile * (w.n_out + 1);
  for (int64_t o = task.first; o < task.last; ++o) {
    float* out = y + (o - task.first) * stride;
    Vec sum[kVecs];
    for (int v = 0; v < kVecs; ++v) sum[v] = tile == 0 ? Vec{} : Load(out + v * kLanes);
    for (int32_t i = ptr[o]; i < ptr[o + 1]; ++i) {
      const float* row = panel + int64_t{w.index[i]} * (kVecs * kLanes);
      const float value = w.values[i];
      for (int v = 0; v < kVecs; ++v) sum[v] += value * Load(row + v * kLanes);
    }
    for (int v = 0; v < kVecs; ++v) Store(out + v * kLanes, sum[v]);
  }
}

using TileLoop = void (*)(const Weight&, int64_t, const Task&, const float*, float*, int64_t);

template <int kVecs>
TileLoop LoopFor(int64_t vecs) {
  if constexpr (kVecs > kMaxVecs) {
    return nullptr;
  } else {
    return vecs == kVecs ? &TileTimesPanel<kVecs> : LoopFor<kVecs + 1>(vecs);
  }
}

// A tile's rows of x, side by side, so that they fill the first-level cache evenly whatever the batch is.
void Pack(const Weight& w, int64_t tile, const Task& task, const float* x, float* panel, int64_t padded) {
  const int64_t begin = tile * w.tile;
  const int64_t rows = begin + w.tile < w.n_in ? w.tile : w.n_in - begin;
  for (int64_t r = 0; r < rows; ++r) {
    float* to = panel + r * padded;
    std::memcpy(to, x + (begin + r) * task.batch + task.column, task.width * sizeof(float));
    for (int64_t c = task.width; c < padded; ++c) to[c] = 0;
  }
}

void Product(const Weight& w, const Task& task, const float* x, float* y, float* panel, float* spill) {
  const int64_t padded = (task.width + kLanes - 1) / kLanes * kLanes;
  const bool direct = SumsInPlace(task, kLanes);
  float* rows = y + task.first * task.batch + task.column;
  float* out = direct ? rows : spill;
  const int64_t stride = direct ? task.batch : padded;
  const TileLoop loop = LoopFor<1>(padded / kLanes);
  for (int64_t tile = 0; tile < w.n_tiles; ++tile) {
    Pack(w, tile, task, x, panel, padded);
    loop(w, tile, task, panel, out, stride);
  }
  if (direct) return;
  for (int64_t o = 0; o < task.last - task.first; ++o) {
    std::memcpy(rows + o * task.batch, spill + o * padded, task.width * sizeof(float));
  }
}

// Bound by memory: four sums, so that additions do not wait for each other.
float Dot(const float* values, const uint16_t* index, int64_t n, const float* x) {
  float a = 0, b = 0, c = 0, d = 0;
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    a += values[i] * x[index[i]];
    b += values[i + 1] * x[index[i + 1]];
    c += values[i + 2] * x[index[i + 2]];
    d += values[i + 3] * x[index[i + 3]];
  }
  for (; i < n; ++i) a += values[i] * x[index[i]];
  return (a + b) + (c + d);
}

void Vector(const Weight& w, const float* x, float* y, int64_t first, int64_t last) {
  for (int64_t tile = 0; tile < w.n_tiles; ++tile) {
    const int32_t* ptr = w.ptr + tile * (w.n_out + 1);
    for (int64_t o = first; o < last; ++o) {
      const float sum = Dot(w.values + ptr[o], w.index + ptr[o], ptr[o + 1] - ptr[o], x + tile * w.tile);
      y[o] = tile == 0 ? sum : y[o] + sum;
    }
  }
}

}  // namespace

const Kernels KERNELS = {&Product, &Vector, ISA_NAME, kLanes};

}  // namespace jaxprune
