// Sums out: (output, position) -> (position, output), and what is done to them on the way.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "vectors.h"

namespace jaxprune {
namespace {

template <class Y>
void Finish(float sum, const Stored& w, const Operands& ops, int64_t position, int64_t o) {
  if (w.scale) sum *= w.scale[o];
  if (ops.bias) sum += ops.bias[o];
  const int64_t at = position * w.n_out + o;
  if (ops.residual) sum += Widen(static_cast<const Y*>(ops.residual)[at]);
  Narrow(ops.relu && !(sum > 0) && sum == sum ? 0.0f : sum, static_cast<Y*>(ops.y) + at);
}

inline void FinishOne(float sum, const Stored& w, const Operands& ops, int64_t position, int64_t o) {
  ops.y_type == Type::kF32 ? Finish<float>(sum, w, ops, position, o) : Finish<BF16>(sum, w, ops, position, o);
}

template <class Y>
void FinishVec(Vec sum, const Stored& w, const Operands& ops, int64_t position, int64_t o) {
  if (w.scale) sum *= Load(w.scale + o);
  if (ops.bias) sum += Load(ops.bias + o);
  const int64_t at = position * w.n_out + o;
  if (ops.residual) sum += Load(static_cast<const Y*>(ops.residual) + at);
  if (ops.relu) sum = (Vec)((Bits)sum & ~(Bits)(sum <= 0));  // a NaN stays one
  Store(static_cast<Y*>(ops.y) + at, sum);
}

template <class Y>
void WriteOut(const Weight& w, const Operands& ops, const Task& task, int64_t first, int64_t last, const float* sums,
              int64_t stride) {
  const int64_t squares = first + (last - first) / kLanes * kLanes;
  for (int64_t p = 0; p < task.count; p += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, task.count - p);
    for (int64_t o = first; o < squares; o += kLanes) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = Load(sums + (o - first + i) * stride + p);
      Transpose(square);
      for (int64_t i = 0; i < n; ++i) FinishVec<Y>(square[i], w, ops, task.position + p + i, o);
    }
  }
  for (int64_t o = squares; o < last; ++o) {
    for (int64_t p = 0; p < task.count; ++p) {
      Finish<Y>(sums[(o - first) * stride + p], w, ops, task.position + p, o);
    }
  }
}

}  // namespace
}  // namespace jaxprune
