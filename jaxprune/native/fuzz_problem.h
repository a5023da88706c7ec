// Problems for the fuzzer: calls that must be accepted, and what may be done to them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace {

enum Operand { kValues, kIndex, kBounds, kScale, kBias, kResidual, kX, kY, kTotals, kGrid, kGridOfY, kCodesOfY, kCodes, kDy, kOperands };
constexpr XLA_FFI_DataType kF32 = XLA_FFI_DataType_F32, kBF16 = XLA_FFI_DataType_BF16, kS8 = XLA_FFI_DataType_S8,
                           kU8 = XLA_FFI_DataType_U8, kU16 = XLA_FFI_DataType_U16, kS32 = XLA_FFI_DataType_S32, kF16 = XLA_FFI_DataType_F16;

std::mt19937_64 rng;

int64_t Draw(int64_t low, int64_t high) { return low + static_cast<int64_t>(rng() % (high - low + 1)); }
bool Chance(int64_t one_in) { return Draw(1, one_in) == 1; }
template <class T>
T Any(std::initializer_list<T> of) {
  return of.begin()[Draw(0, of.size() - 1)];
}
// Up to `most`, mostly tiny.
int64_t Size(int64_t most) { return Draw(0, Chance(32) ? most : std::min<int64_t>(most, Chance(8) ? 40 : 9)); }

// ---- operands ----

struct Free {
  void operator()(char* data) const { std::free(data); }
};

struct Array {
  XLA_FFI_DataType type = kF32;
  std::vector<int64_t> dims;
  std::unique_ptr<char, Free> data;
  bool huge = false;  // a single byte then, which nobody may touch

  int64_t count() const {
    int64_t count = 1;
    for (int64_t dim : dims) count *= dim;
    return count;
  }
  int64_t width() const {
    if (type == kF32 || type == kS32) return 4;
    return type == kBF16 || type == kF16 || type == kU16 ? 2 : type == kS8 || type == kU8 ? 1 : 8;
  }
  int64_t bytes() const { return count() * width(); }
  void Allocate(int fill = 0) {
    // What XLA hands over for nothing may be null or not.
    data.reset(bytes() == 0 && Chance(2) ? nullptr : static_cast<char*>(std::malloc(bytes())));
    if (bytes()) std::memset(data.get(), fill, bytes());
  }
  template <class T>
  T& at(int64_t i) const {
    return reinterpret_cast<T*>(data.get())[i];
  }
  int64_t Whole(int64_t i) const { return type == kU8 ? at<uint8_t>(i) : at<uint16_t>(i); }
  double Number(int64_t i) const {
    if (type == kF16) return static_cast<double>(Half(at<uint16_t>(i)));
    if (type != kBF16) return type == kF32 ? at<float>(i) : at<int8_t>(i);
    const uint32_t bits = uint32_t{at<uint16_t>(i)} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  static double Half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, digits = bits & 1023;
    const double size = exponent == 31 ? (digits ? std::nan("") : INFINITY)
                        : exponent     ? std::ldexp(1024 + digits, exponent - 25)
                                       : std::ldexp(digits, -24);
    return bits >> 15 ? -size : size;
  }
  void Put(int64_t i, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (type == kF32) at<float>(i) = value;
    if (type == kBF16) at<uint16_t>(i) = bits >> 16;
    if (type == kF16) {  // for numbers that it holds, none of them subnormal
      at<uint16_t>(i) = value == 0 ? 0 : (bits >> 16 & 0x8000) | ((bits >> 13 & 0x3ffff) - (112 << 10));
    }
    if (type == kS8) at<int8_t>(i) = static_cast<int8_t>(value);
    if (type == kU8) at<uint8_t>(i) = static_cast<int64_t>(value) & 0xff;
    if (type == kU16) at<uint16_t>(i) = static_cast<int64_t>(value);
    if (type == kS32) at<int32_t>(i) = static_cast<int32_t>(value);
  }
};

struct Problem {
  Array operands[kOperands];
  int64_t tile = 1, group = 1;
  std::vector<int64_t> window;
  bool relu = false, vast = false;
  bool transposed = false;  // a call of jaxprune_transposed: no attributes, bias or residual
  bool codes = false;       // a call of jaxprune_codes: no `group`, totals, grids and three results
  bool sampled = false;     // a call of jaxprune_sampled: no values, and a number for each of the index as a result
  bool permuted = false;    // a call of jaxprune_permuted: values, an order in the place of bounds, as many as a result
  int bad_attribute = -1, missing_attribute = -1, missing_arguments = 0;

  std::vector<Operand> order() const {
    if (transposed) return {kValues, kIndex, kBounds, kScale, kX, kY};
    if (sampled) return {kIndex, kBounds, kX, kDy, kY};
    if (permuted) return {kValues, kBounds, kY};
    if (codes) return {kValues, kIndex, kBounds, kScale, kTotals, kGrid, kGridOfY, kBias, kResidual, kX, kY, kCodesOfY, kCodes};
    return {kValues, kIndex, kBounds, kScale, kBias, kResidual, kX, kY};
  }
  int results() const { return codes ? 3 : 1; }
  // Of group, relu, tile and window those of the call.
  std::pair<int, int> attributes() const {
    return transposed || permuted ? std::pair(4, 4) : sampled ? std::pair(2, 3) : std::pair(codes ? 1 : 0, 4);
  }
  bool has_attribute(int i) const { return attributes().first <= i && i < attributes().second; }

  const Array& operator[](int i) const { return operands[i]; }
  Array& operator[](int i) { return operands[i]; }
};

// The derivatives of a problem's product: in its non-zeros, or what the other one needs.
void Derive(Problem& p) {
  p.sampled = Chance(2), p.permuted = !p.sampled;
  Array &x = p[kX], &y = p[kY], &dy = p[kDy], &bounds = p[kBounds];
  if (p.sampled) {
    dy.type = Any({kF32, kBF16}), dy.dims = y.dims;
    if (Chance(20)) x.dims[0] = dy.dims[0] = Draw(500, 1100);
    y.type = kF32, y.dims = p[kIndex].dims;
    return;
  }
  const int64_t n = p[kValues].dims[0];
  p[kValues].type = y.type = Any({kF32, kBF16});
  bounds.dims = y.dims = {n ? Size(Chance(30) ? 40000 : 300) : 0};
}

// A call that must be accepted. Positions beyond the window's formula read zeros.
Problem Valid() {
  Problem p;
  const bool wide = Chance(300), full = Chance(300), far = Chance(2000), vast = Chance(20000);
  int64_t in = full ? 300 : wide ? Draw(1, 40) : Size(300), most = full ? 300 : vast ? 0 : Size(6);
  int64_t out = full ? 40 : wide ? Draw(120, 1200) : vast ? 520 : far ? Draw(1, 5) : Size(40);
  p.vast = vast;  // the packed inputs of its window fit no memory
  p.group = vast ? 1 : Any({1, 4});
  p.tile = far || vast ? 65536 : Chance(8) ? Any({256, 257, 65535, 65536}) : Chance(4) ? Draw(1, 300) : Draw(1, 12);
  out -= out % p.group;
  if (vast || far || Chance(2)) {
    const int64_t channels = full ? 75 : far || vast ? 1 : Size(24), images = vast || full ? 1 : Draw(0, 3);
    p.window = {Draw(1, 3), Draw(1, 3), Draw(1, 3), Draw(1, 3), Draw(0, 3), Draw(0, 3), Draw(1, 3), Draw(1, 3), 1, 1};
    if (!vast && Chance(3)) p.window[8] = Draw(1, 3), p.window[9] = Draw(1, Chance(9) ? 8 : 3);
    if (full) p.window[0] = p.window[1] = 2;
    if (far) p.window[1] = Draw(65000, 140000), p.window[5] = Draw(0, p.window[1]);
    if (vast) p.window[0] = 1000, p.window[1] = 1 << 20;
    p[kX].dims = {images, Size(9), Size(9), channels};
    p[kY].dims = {images, full ? 9 : Draw(vast, 6), full ? 9 : Draw(vast, 6), out};
    in = p.window[0] * p.window[1] * channels;
  } else {
    const int64_t n = Chance(8) ? 1 : full ? 70 : Size(70);
    p[kX].dims = {n, in};
    p[kY].dims = {n, out};
  }
  const bool bits = p.window.empty() && !wide && Chance(3);
  if (bits) p.group = 1, p.tile = 0, p.transposed = Chance(3);
  // 16 of every 32 or 64 inputs, for which a single position has loops of its own.
  const int64_t span = !bits && !wide && !full && p.window.empty() && p[kX].dims[0] == 1 && Chance(2) ? Any({32, 64}) : 0;
  if (span) p.group = 1, p.tile = span * Draw(1, 256 / span), p[kX].dims[1] = in = span * Draw(0, 10);
  p.codes = !bits && !span && !far && !vast && Chance(3);
  bool encoded = false;  // x
  if (p.codes) {
    const int64_t channels = p[kX].dims.back(), taps = p.window.empty() ? 1 : p.window[0] * p.window[1];
    p.group = 1, in = taps * ((channels + 3) / 4);
    p[kCodes].dims = p[kX].dims;
    p[kCodes].dims.back() = (channels + 3) / 4 * 4;
    encoded = Chance(3);
    if (encoded) std::swap(p[kX].dims, p[kCodes].dims), p[kCodes].dims = {0};
  }
  std::vector<int32_t> bounds;
  std::vector<int> index;
  const int64_t words = (in + 63) / 64;
  for (int64_t o = 0, stored = 0; bits && o <= out; ++o) {  // the bytes of the words are the index
    bounds.push_back(stored);
    const int64_t one_in = Any({1, 2, 9, 1000});
    for (int64_t byte = 0; o < out && byte < words * 8; ++byte) {
      index.push_back(0);
      for (int bit = 0; bit < 8; ++bit) {
        if (byte * 8 + bit < in && Chance(one_in)) index.back() |= 1 << bit, ++stored;
      }
    }
  }
  for (int64_t begin = 0; begin < (bits ? 0 : in); begin += p.tile) {
    const int64_t rows = std::min(p.tile, in - begin);
    for (int64_t g = 0; g < out / p.group; ++g) {
      bounds.push_back(index.size());
      for (int64_t i = 0; span && i < rows / span * 16; ++i) index.push_back(i / 16 * span + Draw(0, span - 1));
      if (span) continue;
      for (int64_t k = std::min(rows, full ? most : Draw(0, most)); k > 0; --k) index.push_back(Draw(0, rows - 1));
    }
    bounds.push_back(index.size());
  }
  const bool derived = !bits && !span && !p.codes && p.group == 1 && p.window.empty() && Chance(2);
  if (!bits && !derived && Chance(8)) index.resize(index.size() + Draw(1, 3), 65535);  // beyond the last bound, and so nobody's
  const int64_t indices = index.size(), n_bounds = bounds.size();
  p[kIndex].type = p.tile <= 256 && (bits || span || Chance(2)) ? kU8 : kU16;
  p[kIndex].dims = {indices};
  p[kBounds].type = kS32;
  p[kBounds].dims = {n_bounds};
  p[kValues].type = p.codes ? kS8 : bits ? Any({kF32, kBF16, kF16, kS8}) : Any({kF32, kBF16, kS8});
  p[kValues].dims = {bits ? bounds.back() + (Chance(8) ? Draw(0, 90) : 0) : indices * (p.codes ? 4 : p.group)};
  p[kScale].dims = {Chance(2) && !p.codes ? 0 : out};
  p[kTotals].type = kS32, p[kCodesOfY].type = p[kCodes].type = kU8;
  p[kTotals].dims = {out};
  p[kGrid].dims = {2};
  p[kBias].dims = {Chance(2) ? 0 : out};
  p[kX].type = encoded ? kU8 : Any({kF32, kBF16});
  p[kY].type = p[kResidual].type = Any({kF32, kBF16});
  p[kResidual].dims = Chance(2) ? std::vector<int64_t>{0} : p[kY].dims;
  p.relu = Chance(2);
  p[kGridOfY].dims = p[kCodesOfY].dims = {0};
  if (p.codes && Chance(2)) {
    p[kGridOfY].dims = {2};
    p[kCodesOfY].dims = p[kY].dims;
    p[kCodesOfY].dims.back() = (out + 3) / 4 * 4;
    if (Chance(2)) p[kY].dims.back() = 0;
  }
  if (p.transposed) {
    p[kX].type = p[kY].type = p[kResidual].type = kF32;
    std::swap(p[kX].dims, p[kY].dims);
    p[kResidual].dims = {0};
  }
  if (derived) Derive(p);
  for (Array& array : p.operands) array.Allocate(0xff);  // the result is no number until it is written
  for (int64_t i = 0; i < indices; ++i) p[kIndex].Put(i, index[i]);
  for (int64_t i = 0; i < (p.permuted ? 0 : n_bounds); ++i) p[kBounds].at<int32_t>(i) = bounds[i];
  for (int64_t i = 0, n = p.permuted ? p[kBounds].count() : 0; i < n; ++i) {
    p[kBounds].at<int32_t>(i) = Draw(0, p[kValues].count() - 1);
  }
  for (int which : {kValues, kScale, kBias, kResidual, kX, kDy}) {  // numbers that bfloat16 holds exactly
    Array& array = p[which];
    for (int64_t i = 0, n = array.count(); i < n; ++i) array.Put(i, Draw(-64, 64) / (array.width() == 1 ? 0.5f : 64.0f));
  }
  for (int64_t i = 0; i < out; ++i) p[kTotals].Put(i, Draw(-3000, 3000));
  for (int which : {kGrid, kGridOfY}) {
    if (!p[which].count()) continue;
    p[which].Put(0, Any({0.25f, 0.01f, 0.003f, 1e-7f}));
    p[which].Put(1, Any({Draw(-128, 127), -128L, 127L}));
  }
  return p;
}

// ---- what is done to them ----

// Another shape, the old contents as far as they reach.
void Resize(Array& array, std::vector<int64_t> dims) {
  const int64_t before = array.bytes();
  const std::unique_ptr<char, Free> old = std::move(array.data);
  array.dims = std::move(dims);
  array.Allocate(Any({0, 0xff, 0x3c}));
  if (const int64_t kept = std::min(before, array.bytes())) std::memcpy(array.data.get(), old.get(), kept);
}

// More than any memory holds, or nothing for all its length, or negative.
void MakeHuge(Array& array) {
  constexpr int64_t kSizes[] = {0, 1, 3, 1 << 20, 1LL << 31, 1LL << 40, 1LL << 62, INT64_MAX, -1, INT64_MIN};
  if (Chance(2)) array.dims.resize(Draw(1, 4));
  double product = 1;
  for (int64_t& dim : array.dims) product *= dim = kSizes[Draw(0, 9)];
  if (product > 0 && product <= 1LL << 40) array.dims.insert(array.dims.end(), {1LL << 40, 1LL << 40});
  array.data.reset(static_cast<char*>(std::malloc(1)));
  array.huge = true;
}

void Mutate(Problem& p) {
  Array &array = p[Draw(0, kOperands - 1)], &bounds = p[kBounds], &index = p[kIndex];
  const bool whole = bounds.type == kS32 && index.width() <= 2 && !bounds.huge && !index.huge && !array.huge;
  const int64_t n_bounds = whole ? bounds.count() : 0, indices = whole ? index.count() : 0;
  std::vector<int64_t> dims = array.dims;
  switch (array.huge ? Draw(6, 9) : Draw(0, 9)) {
    case 0:
      array.type = Chance(2) ? Any({kF32, kBF16, kU8, kU16, kS8, kS32}) : static_cast<XLA_FFI_DataType>(Draw(0, 33));
      return array.Allocate(Any({0, 0xff, 0x3c}));
    case 1:  // the rank
      if (!dims.empty() && Chance(2)) return dims.erase(dims.begin() + Draw(0, dims.size() - 1)), Resize(array, dims);
      if (array.bytes() < 50000) dims.insert(dims.begin() + Draw(0, dims.size()), Draw(0, 2)), Resize(array, dims);
      return;
    case 2:  // sizes
      for (int64_t& dim : dims) {
        if (Chance(dims.size())) dim = std::max<int64_t>(0, Any({dim - 1, dim + 1, dim + 4, dim / 2, Draw(0, 12)}));
      }
      return Resize(array, dims);
    case 3:
      for (int64_t n = n_bounds ? Draw(1, 2) : 0; n > 0; --n) {
        int32_t& at = bounds.at<int32_t>(Draw(0, n_bounds - 1));
        const int32_t last = indices, near = Any({-1, 1}) + std::clamp(at, -1, last + 1);
        at = Any({-1, INT32_MIN, INT32_MAX, last, last + 1, last - 1, near, near});
      }
      return;
    case 4:
      if (!indices) return;
      index.Put(Draw(0, indices - 1), (Any({p.tile & 0xffff, Draw(0, 300), 65536L}) - Draw(0, 1)) & 0xffff);
      return;
    case 5:  // all contents
      if (!Chance(4)) return;
      for (Array* each : {&bounds, &index}) {
        for (int64_t i = 0; whole && i < each->bytes(); ++i) each->data.get()[i] = Draw(0, Any({1, 3, 255}));
      }
      return;
    case 6:
      if (Chance(2)) return void(p.group = Any({0L, 1L, 2L, 3L, 4L, 8L, -1L, -4L, INT64_MIN, INT64_MAX}));
      p.tile = Any({0L, -1L, 1L, 256L, 257L, 65536L, 65537L, 1L << 40, INT64_MIN, INT64_MAX, Draw(1, 300)});
      return;
    case 7:
      if (Chance(2)) p.window.resize(Any({0, 1, 8, 9, 10, 11, 16}), 1);
      for (int64_t& n : p.window) {
        if (Chance(6)) n = Any({0L, -1L, 1L, 2L, 3L, 1L << 20, (1L << 20) + 1, 1L << 40, INT64_MIN, INT64_MAX});
      }
      return;
    case 8:
      return MakeHuge(array);
    default:  // what XLA's own wrapper finds
      if (!Chance(4)) return;
      (Chance(2) ? p.bad_attribute : p.missing_attribute) = Draw(0, 3);
      p.missing_arguments = Chance(4);
  }
}

}  // namespace
