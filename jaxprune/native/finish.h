// Sums out: (output, position) -> (position, output), and what is done to them on the way.
#pragma once

#include <algorithm>

#include "codes.h"
#include "kernels.h"
#include "vectors.h"

namespace jaxprune {
namespace {

// The result, as it is written.
template <class Y>
float Finish(float sum, const Stored& w, const Operands& ops, int64_t position, int64_t o) {
  if (w.scale) sum *= w.scale[o];
  if (ops.bias) sum += ops.bias[o];
  const int64_t at = position * w.n_out + o;
  if (ops.residual) sum += Widen(static_cast<const Y*>(ops.residual)[at]);
  Y result;
  Narrow(ops.relu && !(sum > 0) && sum == sum ? 0.0f : sum, &result);
  if (ops.y) static_cast<Y*>(ops.y)[at] = result;
  return Widen(result);
}

inline void FinishOne(float sum, const Stored& w, const Operands& ops, int64_t position, int64_t o) {
  ops.y_type == Type::kF32 ? Finish<float>(sum, w, ops, position, o) : Finish<BF16>(sum, w, ops, position, o);
}

template <class Y>
Vec FinishVec(Vec sum, const Stored& w, const Operands& ops, int64_t position, int64_t o) {
  if (w.scale) sum *= Load(w.scale + o);
  if (ops.bias) sum += Load(ops.bias + o);
  const int64_t at = position * w.n_out + o;
  if (ops.residual) sum += Load(static_cast<const Y*>(ops.residual) + at);
  if (ops.relu) sum = (Vec)((Bits)sum & ~(Bits)(sum <= 0));  // a NaN stays one
  if (ops.y) Store(static_cast<Y*>(ops.y) + at, sum);
  if constexpr (sizeof(Y) < sizeof(float)) {
    Y rounded[kLanes];
    Store(rounded, sum);
    return Load(rounded);
  } else {
    return sum;
  }
}

template <class Y>
void WriteOut(const Weight& w, const Operands& ops, const Task& task, int64_t first, int64_t last, const float* sums,
              int64_t stride) {
  const Encoder encoder(ops.grid);
  const int64_t padded = WholeRuns(w.n_out);
  const int64_t squares = first + (last - first) / kLanes * kLanes;
  for (int64_t p = 0; p < task.count; p += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, task.count - p);
    for (int64_t o = first; o < squares; o += kLanes) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = Load(sums + (o - first + i) * stride + p);
      Transpose(square);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t position = task.position + p + i;
        const Vec result = FinishVec<Y>(square[i], w, ops, position, o);
        if (ops.codes) encoder.Write(result, ops.codes + position * padded + o);
      }
    }
  }
  for (int64_t o = squares; o < last; ++o) {
    for (int64_t p = 0; p < task.count; ++p) {
      const int64_t position = task.position + p;
      const float result = Finish<Y>(sums[(o - first) * stride + p], w, ops, position, o);
      if (ops.codes) EncodeRow(encoder, &result, 1, ops.codes + position * padded + o);
    }
  }
  if (!ops.codes || last < w.n_out) return;
  for (int64_t p = 0; p < task.count; ++p) {
    std::fill_n(ops.codes + (task.position + p) * padded + last, padded - last, static_cast<uint8_t>(ops.grid.zero));
  }
}

}  // namespace
}  // namespace jaxprune
