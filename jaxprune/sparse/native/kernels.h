// A weight in tiles, and the loops over it; one set of loops for each instruction set, chosen at run time.
#pragma once

#include <cstdint>

namespace jaxprune {

constexpr int64_t kPanel = 64;  // columns of the batch worked on at once

// W (out, in), cut into tiles of `tile` inputs. The non-zeros lie tile by tile, within a tile output by output, within an
// output by input; those of tile t and output o are the slots ptr[t * (n_out + 1) + o] up to the next bound.
struct Weight {
  const float* values;
  const uint16_t* index;  // input, counted from the tile's first
  const int32_t* ptr;
  int64_t n_in, n_out, tile, n_tiles;
};

// What a task needs beside the weight; `columns` of x and y are `batch` apart from row to row.
struct Task {
  int64_t batch;
  int64_t column, width;  // columns [column, column + width), width <= kPanel
  int64_t first, last;    // outputs [first, last)
};

// Whether sums can live in y itself: where a panel is all of the batch, and its width fills whole vectors. The rows of a
// wider y are far apart, often by a power of two, and would fall on few sets of the cache.
inline bool SumsInPlace(const Task& task, int64_t lanes) {
  return task.width == task.batch && task.width % lanes == 0;
}

struct Kernels {
  // y[first:last, column:column+width] = W[first:last] @ x[:, column:column+width]
  // panel: tile * kPanel floats of scratch; spill: (last - first) * kPanel, unless SumsInPlace.
  void (*product)(const Weight&, const Task&, const float* x, float* y, float* panel, float* spill);
  // y[first:last] = W[first:last] @ x, for a single column.
  void (*vector)(const Weight&, const float* x, float* y, int64_t first, int64_t last);
  const char* name;
  int64_t lanes;
};

extern const Kernels kPortable;
#if defined(JAXPRUNE_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// The widest set this processor has, or the one that JAXPRUNE_ISA names ("portable", "avx2", "avx512") if it has it.
const Kernels& BestKernels();

}  // namespace jaxprune
