// What may be trusted of a weight: that its runs and indices lead nowhere outside.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace jaxprune {
namespace {

template <class Index>
bool Within(const Index* index, int64_t n, int64_t rows) {
  Index largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, index[i]);
  return n <= 0 || largest < rows;
}

// Whether the runs of groups [first, last) of a tile stay within the index, and the index within the tile.
bool Sound(const Weight& w, int64_t tile, int64_t first, int64_t last) {
  const int32_t* bounds = w.bounds + tile * (w.groups() + 1);
  bool climbs = bounds[first] >= 0 && bounds[last] <= w.inputs;
  for (int64_t g = first; g < last; ++g) climbs &= bounds[g] <= bounds[g + 1];
  if (!climbs) return false;
  const int64_t rows = std::min(w.tile, w.n_in - tile * w.tile), begin = bounds[first], n = bounds[last] - begin;
  return w.wide ? Within(static_cast<const uint16_t*>(w.index) + begin, n, rows)
                : Within(static_cast<const uint8_t*>(w.index) + begin, n, rows);
}

bool SoundTiles(const Weight& w, int64_t first, int64_t last) {
  for (int64_t tile = 0; tile < w.n_tiles; ++tile) {
    if (!Sound(w, tile, first, last)) return false;
  }
  return true;
}

}  // namespace
}  // namespace jaxprune
