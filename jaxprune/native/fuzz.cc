// Plays XLA: calls the handler with operands that fit and with operands that do not, under the sanitizers. Every buffer
// is an allocation of exactly its bytes. What is accepted must equal a plain product, a refusal must name its argument,
// and operands that fit must not be refused. Run as: fuzz CALLS SEED
#include <sanitizer/common_interface_defs.h>

#include <cmath>
#include <cstdio>
#include <map>
#include <string>
#include <thread>

#include "fuzz_problem.h"

extern "C" XLA_FFI_Error* jaxprune_product(XLA_FFI_CallFrame* frame);
extern "C" XLA_FFI_Error* jaxprune_transposed(XLA_FFI_CallFrame* frame);
extern "C" XLA_FFI_Error* jaxprune_codes(XLA_FFI_CallFrame* frame);
extern "C" XLA_FFI_Error* jaxprune_sampled(XLA_FFI_CallFrame* frame);
extern "C" XLA_FFI_Error* jaxprune_permuted(XLA_FFI_CallFrame* frame);
extern "C" const char* jaxprune_isa();
extern "C" int64_t jaxprune_spread(const uint8_t*, int64_t, const char*, int64_t, int64_t, void*);
extern "C" int64_t jaxprune_gather(const void*, int64_t, int64_t, uint8_t*, void*);
extern "C" int64_t jaxprune_gaps(const uint8_t*, int64_t, int64_t, uint8_t*);
extern "C" int64_t jaxprune_bits_of_gaps(const uint8_t*, int64_t, int64_t, int64_t, int64_t, uint8_t*, int64_t*);
extern "C" int64_t jaxprune_csr(const uint8_t*, int64_t, int64_t, int64_t, uint32_t*, void*);
extern "C" int64_t jaxprune_bits_of_csr(const char*, const char*, int64_t, int64_t, int64_t, int64_t, uint8_t*);
// More scratch than a machine has is asked for, and must not be had.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "max_allocation_size_mb=4096:allocator_may_return_null=1:quarantine_size_mb=8";
}

struct XLA_FFI_Error {
  std::string message;
};

namespace {

long number = 0;  // of the case at hand

// ---- XLA ----

enum class Pool { kInline, kThreads, kLate, kNone } pool;  // kLate: begins tasks after the call; kNone: takes none
int64_t pool_size;
std::vector<std::pair<XLA_FFI_Task*, void*>> late;
std::vector<std::thread> threads;

XLA_FFI_Error* Schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  if (pool == Pool::kNone) return new XLA_FFI_Error{"no threads"};
  if (pool == Pool::kInline) args->task(args->data);
  if (pool == Pool::kLate) late.emplace_back(args->task, args->data);
  if (pool == Pool::kThreads) threads.emplace_back(args->task, args->data);
  return nullptr;
}

XLA_FFI_Api MakeApi() {
  XLA_FFI_Api api = {};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.XLA_FFI_Error_Create = [](auto* args) { return new XLA_FFI_Error{args->message}; };
  api.XLA_FFI_Error_GetMessage = [](auto* args) { args->message = args->error->message.c_str(); };
  api.XLA_FFI_Error_Destroy = [](auto* args) { delete args->error; };
  api.XLA_FFI_ThreadPool_Schedule = &Schedule;
  api.XLA_FFI_ThreadPool_NumThreads = [](auto* args) -> XLA_FFI_Error* {
    *args->num_threads = pool_size;
    return nullptr;
  };
  return api;
}

// The handler's answer: "" if it accepted.
std::string Call(const Problem& p) {
  static const XLA_FFI_Api api = MakeApi();
  std::vector<int64_t> dims[kOperands], numbers = p.window;  // copies are exact allocations
  XLA_FFI_Buffer buffers[kOperands];
  std::vector<void*> pointers;
  for (const int i : p.order()) {
    dims[i] = std::vector<int64_t>(p[i].dims);
    const int64_t rank = dims[i].size();
    buffers[i] = {XLA_FFI_Buffer_STRUCT_SIZE, nullptr, p[i].type, p[i].data.get(), rank, dims[i].data()};
    pointers.push_back(&buffers[i]);
  }
  int64_t tile = p.tile, group = p.group;
  bool relu = p.relu;
  XLA_FFI_Scalar scalars[] = {
      {XLA_FFI_DataType_S64, &group}, {XLA_FFI_DataType_PRED, &relu}, {XLA_FFI_DataType_S64, &tile}};
  XLA_FFI_Array window = {XLA_FFI_DataType_S64, numbers.size(), numbers.data()};
  if (p.bad_attribute >= 0) (p.bad_attribute < 3 ? scalars[p.bad_attribute].dtype : window.dtype) = kS32;
  const XLA_FFI_AttrType scalar = XLA_FFI_AttrType_SCALAR;
  XLA_FFI_ByteSpan spans[] = {{"group", 5}, {"relu", 4}, {"tile", 4}, {"window", 6}};
  std::vector<XLA_FFI_ByteSpan*> names = {&spans[0], &spans[1], &spans[2], &spans[3]};
  std::vector<XLA_FFI_AttrType> types = {scalar, scalar, scalar, XLA_FFI_AttrType_ARRAY};
  std::vector<void*> attrs = {&scalars[0], &scalars[1], &scalars[2], &window};
  const auto [first, last] = p.attributes();
  if (const int gone = p.missing_attribute; gone >= 0) {
    names.erase(names.begin() + gone), types.erase(types.begin() + gone), attrs.erase(attrs.begin() + gone);
  }
  const int64_t n_results = p.results(), n_args = pointers.size() - n_results - p.missing_arguments;
  const auto place = [gone = p.missing_attribute](int i) { return i - (gone >= 0 && gone < i); };
  const int64_t skipped = place(first), n_attrs = place(last) - skipped;
  std::vector<XLA_FFI_ArgType> arg_types(n_args, XLA_FFI_ArgType_BUFFER);
  XLA_FFI_RetType ret_types[] = {XLA_FFI_RetType_BUFFER, XLA_FFI_RetType_BUFFER, XLA_FFI_RetType_BUFFER};
  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, n_args, arg_types.data(), pointers.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, n_results, ret_types, &pointers[pointers.size() - n_results]};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, n_attrs, types.data() + skipped, names.data() + skipped,
                 attrs.data() + skipped};
  const auto handler = p.sampled ? jaxprune_sampled : p.permuted ? jaxprune_permuted : p.transposed ? jaxprune_transposed : p.codes ? jaxprune_codes : jaxprune_product;
  const std::unique_ptr<XLA_FFI_Error> error(handler(&frame));
  for (const auto& [task, data] : late) task(data);
  for (std::thread& thread : threads) thread.join();
  late.clear(), threads.clear();
  return error ? error->message : "";
}

// ---- what must come out ----

// The same of x W.
std::string WrongTransposed(const Problem& p) {
  const Array &x = p[kX], &y = p[kY];
  const int64_t rows = x.dims[0], out = x.dims[1], in = y.dims[1], words = (in + 63) / 64;
  std::vector<double> sums(in), sizes(in);
  for (int64_t row = 0; row < rows && in; ++row) {
    std::fill(sums.begin(), sums.end(), 0), std::fill(sizes.begin(), sizes.end(), 0);
    for (int64_t o = 0; o < out; ++o) {
      int64_t at = p[kBounds].at<int32_t>(o);
      for (int64_t i = 0; i < words * 64; ++i) {
        if (!(p[kIndex].at<uint8_t>(o * words * 8 + i / 8) >> (i % 8) & 1)) continue;
        if (i >= in) return "accepted a bit beyond the inputs";
        if (at < 0 || at >= p[kValues].count()) return "accepted bits that lead outside";
        const double term = p[kValues].Number(at++) * x.Number(row * out + o) * (p[kScale].count() ? p[kScale].Number(o) : 1);
        sums[i] += term, sizes[i] += std::abs(term);
      }
      if (at != p[kBounds].at<int32_t>(o + 1)) return "accepted bits that do not end at a bound";
    }
    for (int64_t i = 0; i < in; ++i) {
      const double got = y.Number(row * in + i);
      if (sizes[i] < 1e37 && !(std::abs(got - sums[i]) <= 1e-5 * sizes[i] + 1e-30)) {
        return "result " + std::to_string(row * in + i) + " is " + std::to_string(got) + ", not " + std::to_string(sums[i]);
      }
    }
  }
  return "";
}

// The same of derivatives in the non-zeros.
std::string WrongSampled(const Problem& p) {
  const Array &x = p[kX], &dy = p[kDy], &bounds = p[kBounds];
  const int64_t rows = x.dims[0], in = x.dims[1], out = dy.dims[1];
  for (int64_t i = 0; rows == 0 && i < p[kY].count(); ++i) {  // of nothing no index is looked at
    if (p[kY].Number(i) != 0) return "a sum of nothing is " + std::to_string(p[kY].Number(i));
  }
  int64_t i = 0;
  for (int64_t run = 0; run < (rows ? bounds.count() : 0); ++run) {
    const int64_t tile = run / (out + 1), o = run % (out + 1);
    if (bounds.at<int32_t>(run) != i) return "accepted bounds with gaps";
    if (o == out) continue;
    for (; i < bounds.at<int32_t>(run + 1); ++i) {
      if (i >= p[kIndex].count()) return "accepted bounds that lead outside";
      const int64_t input = tile * p.tile + p[kIndex].Whole(i);
      if (input >= std::min(tile * p.tile + p.tile, in)) return "accepted an index that leads outside";
      double sum = 0, size = 0;
      for (int64_t row = 0; row < rows; ++row) {
        const double term = x.Number(row * in + input) * dy.Number(row * out + o);
        sum += term, size += std::abs(term);
      }
      const double got = p[kY].Number(i);
      if (size < 1e37 && !(std::abs(got - sum) <= 1e-5 * size + 1e-30)) {
        return "result " + std::to_string(i) + " is " + std::to_string(got) + ", not " + std::to_string(sum);
      }
    }
  }
  return !rows || i == p[kIndex].count() ? "" : "accepted bounds that leave something out";
}

std::string WrongPermuted(const Problem& p) {
  const Array &values = p[kValues], &order = p[kBounds];
  for (int64_t i = 0; i < order.count(); ++i) {
    const int64_t from = order.at<int32_t>(i), width = values.width();
    if (from < 0 || from >= values.count()) return "accepted an order that leads outside";
    if (std::memcmp(values.data.get() + from * width, p[kY].data.get() + i * width, width)) return "another value";
  }
  return "";
}

// Where the inputs of a pixel of the result lie in x.
struct Places {
  std::vector<int64_t> win, xs, ys;

  explicit Places(const Problem& p) : win(p.window), xs(p[kX].dims), ys(p[kY].dims) {
    if (!win.empty()) return;
    win = {1, 1, 1, 1, 0, 0, 1, 1, 1, 1};
    xs = {xs[0], 1, 1, xs[1]}, ys = {ys[0], 1, 1, ys[1]};
  }
  int64_t pool() const { return win[8] * win[9]; }
  // Of a pool's neighbour `within`; -1 outside.
  int64_t Of(int64_t pixel, int64_t within, int64_t tap, int64_t channel) const {
    const int64_t ow = pixel % ys[2] * win[9] + within % win[9];
    const int64_t oh = pixel / ys[2] % ys[1] * win[8] + within / win[9], image = pixel / ys[2] / ys[1];
    const int64_t h = oh * win[2] - win[4] + tap / win[1] * win[6];
    const int64_t w = ow * win[3] - win[5] + tap % win[1] * win[7];
    const bool inside = h >= 0 && h < xs[1] && w >= 0 && w < xs[2] && channel < xs[3];
    return inside ? ((image * xs[1] + h) * xs[2] + w) * xs[3] + channel : -1;
  }
};

// The same of products of codes, whose results have no error.
std::string WrongCodes(const Problem& p) {
  const Array &x = p[kX], &y = p[kY], &codes = p[kCodesOfY];
  const Places places(p);
  const int64_t runs = (places.xs[3] + 3) / 4, in = places.win[0] * places.win[1] * runs, out = p[kScale].count();
  const int64_t pixels = out ? places.ys[0] * places.ys[1] * places.ys[2] : 0, padded = (out + 3) / 4 * 4;
  const auto code_of = [](float number, float steps, float zero) {
    const float code = std::nearbyint(number * steps) + zero;
    return (code != code ? 0 : static_cast<int64_t>(std::clamp(code, -128.0f, 127.0f))) + 128;
  };
  const float x_scale = p[kGrid].at<float>(0), zero = p[kGrid].at<float>(1), steps = 1 / x_scale;
  std::vector<int64_t> row(4 * in);
  std::vector<float> largest(out);
  for (int64_t step = 0; step < pixels * places.pool(); ++step) {
    const int64_t pixel = step / places.pool(), within = step % places.pool();
    for (int64_t i = 0; i < 4 * in; ++i) {
      const int64_t place = places.Of(pixel, within, i / 4 / runs, i % (4 * runs));
      row[i] = place >= 0 && x.type == kU8 ? x.at<uint8_t>(place)
                                           : code_of(place < 0 ? 0.0f : static_cast<float>(x.Number(place)), steps, zero);
    }
    for (int64_t o = 0; o < out; ++o) {
      int64_t sum = 0;
      for (int64_t t = 0; t * p.tile < in; ++t) {
        const int32_t* run = &p[kBounds].at<int32_t>(t * (out + 1) + o);
        if (run[0] < 0 || run[0] > run[1] || run[1] > p[kIndex].count()) return "accepted bounds that lead outside";
        for (int64_t i = 4 * int64_t{run[0]}; i < 4 * int64_t{run[1]}; ++i) {
          const int64_t input = t * p.tile + p[kIndex].Whole(i / 4);
          if (input >= std::min(t * p.tile + p.tile, in)) return "accepted an index that leads outside";
          sum += p[kValues].at<int8_t>(i) * row[4 * input + i % 4];
        }
      }
      sum -= (static_cast<int64_t>(zero) + 128) * p[kTotals].at<int32_t>(o);
      volatile float product = static_cast<float>(static_cast<int32_t>(sum)) * (p[kScale].at<float>(o) * x_scale);
      largest[o] = within && !(largest[o] < product) ? largest[o] : product;
      if (within < places.pool() - 1) continue;
      float want = largest[o];
      const int64_t at = pixel * out + o;
      if (p[kBias].count()) want += p[kBias].at<float>(o);
      if (p[kResidual].count()) want += static_cast<float>(p[kResidual].Number(at));
      if (p.relu) want = std::max(want, 0.0f);
      const float slack = y.type == kBF16 ? std::abs(want) / 256 : 0;
      if (!(std::abs(want) < 1e37f)) continue;
      if (y.count() && !(std::abs(y.Number(at) - want) <= slack)) {
        return "result " + std::to_string(at) + " is " + std::to_string(y.Number(at)) + ", not " + std::to_string(want);
      }
      if (!codes.count()) continue;
      const float steps_of_y = 1 / p[kGridOfY].at<float>(0), zero_of_y = p[kGridOfY].at<float>(1);
      const int64_t got = codes.at<uint8_t>(pixel * padded + o);
      if (got < code_of(want - slack, steps_of_y, zero_of_y) || got > code_of(want + slack, steps_of_y, zero_of_y)) {
        return "the code of result " + std::to_string(at) + " is " + std::to_string(got) + ", of " + std::to_string(want);
      }
    }
    for (int64_t o = out; codes.count() && within == places.pool() - 1 && o < padded; ++o) {
      if (codes.at<uint8_t>(pixel * padded + o) != 128 + p[kGridOfY].at<float>(1)) return "a code beyond the outputs";
    }
  }
  return "";
}

// What is wrong with what was accepted, "" if nothing.
std::string Wrong(const Problem& p) {
  const Array &x = p[kX], &y = p[kY];
  if (p.codes) return WrongCodes(p);
  if (y.count() == 0) return "";
  if (p.sampled) return WrongSampled(p);
  if (p.permuted) return WrongPermuted(p);
  if (p.transposed) return WrongTransposed(p);
  const Places places(p);
  const std::vector<int64_t> &win = places.win, &xs = places.xs, &ys = places.ys;
  const int64_t in = win[0] * win[1] * xs[3], out = ys[3], groups = out / p.group;
  const int64_t pool = places.pool();
  std::vector<double> row(in), sums(out), sizes(out), largest(out), sizes_of_all(out);
  for (int64_t step = 0; step < y.count() * pool; step += out) {
    const int64_t at = step / out / pool * out, within = step / out % pool;
    for (int64_t i = 0; i < in; ++i) {
      const int64_t place = places.Of(at / out, within, i / xs[3], i % xs[3]);
      row[i] = place < 0 ? 0 : x.Number(place);
    }
    std::fill(sums.begin(), sums.end(), 0), std::fill(sizes.begin(), sizes.end(), 0);
    double largest_x = 0;
    for (double x : row) largest_x = std::max(largest_x, std::abs(x));
    const int64_t words = (in + 63) / 64;
    for (int64_t o = 0; p.tile == 0 && o < out; ++o) {
      int64_t at = p[kBounds].at<int32_t>(o);
      for (int64_t i = 0; i < words * 64; ++i) {
        if (!(p[kIndex].at<uint8_t>(o * words * 8 + i / 8) >> (i % 8) & 1)) continue;
        if (i >= in) return "accepted a bit beyond the inputs";
        if (at < 0 || at >= p[kValues].count()) return "accepted bits that lead outside";
        const double weight = p[kValues].Number(at++);
        sums[o] += weight * row[i];
        // 24 bits of the largest activation, where weights are integers
        sizes[o] += std::abs(weight) * (std::abs(row[i]) + (p[kValues].type == kS8 ? 0.03 * largest_x : 0));
      }
      if (at != p[kBounds].at<int32_t>(o + 1)) return "accepted bits that do not end at a bound";
    }
    for (int64_t t = 0; p.tile && t * p.tile < in; ++t) {
      for (int64_t g = 0; g < groups; ++g) {
        const int32_t* run = &p[kBounds].at<int32_t>(t * (groups + 1) + g);
        if (run[0] < 0 || run[0] > run[1] || run[1] > p[kIndex].count()) return "accepted bounds that lead outside";
        for (int64_t i = run[0]; i < run[1]; ++i) {
          const int64_t input = t * p.tile + p[kIndex].Whole(i);
          if (input >= std::min(t * p.tile + p.tile, in)) return "accepted an index that leads outside";
          for (int64_t o = 0; o < p.group; ++o) {
            const double term = p[kValues].Number(i * p.group + o) * row[input];
            sums[g * p.group + o] += term, sizes[g * p.group + o] += std::abs(term);
          }
        }
      }
    }
    for (int64_t o = 0; o < out; ++o) {
      double& want = largest[o], &size = sizes_of_all[o];
      const double scale = p[kScale].count() ? p[kScale].at<float>(o) : 1;
      want = within && want >= sums[o] * scale ? want : sums[o] * scale;
      size = (within ? size : 0) + sizes[o] * (1 + std::abs(scale));
      if (within < pool - 1) continue;
      const double bias = p[kBias].count() ? p[kBias].Number(o) : 0;
      const double residual = p[kResidual].count() ? p[kResidual].Number(at + o) : 0;
      want += bias + residual, size += std::abs(bias) + std::abs(residual);
      if (p.relu) want = std::max(want, 0.0);
      const double slack = 1e-5 * size + (y.type == kBF16 ? std::abs(want) / 256 : 0) + 1e-30, got = y.Number(at + o);
      // Where infinities or no numbers were handed in, only memory counts.
      if (size < 1e37 && !(std::abs(got - want) <= slack)) {
        return "result " + std::to_string(at + o) + " is " + std::to_string(got) + ", not " + std::to_string(want);
      }
    }
  }
  return "";
}

bool Names(const std::string& why) {
  bool named = why.find("the result") != std::string::npos;
  for (const char* name : {"values", "index", "bounds", "scale", "bias", "residual", "x", "tile", "group", "window",
                           "totals", "grid", "grid_of_y", "y", "order"}) {
    named |= why.find('`' + std::string(name) + '`') != std::string::npos;
  }
  return named && why.rfind("jaxprune_product: ", 0) == 0;
}

// One case; what is wrong with it, or "", and then also the handler's answer.
std::string Case(bool fits, std::string* why) {
  Problem p = Valid();
  fits |= p.vast;
  for (int64_t n = fits ? 0 : Draw(1, 3); n > 0; --n) Mutate(p);
  pool = Any({Pool::kInline, Pool::kThreads, Pool::kLate, Pool::kNone});
  pool_size = p.vast ? 1 : Any({0, 1, 3, 8});  // shared out, it would fit after all, and take minutes
  *why = Call(p);
  if (why->empty()) return p.vast ? "accepted what fits no memory" : Wrong(p);
  if (fits && !p.vast) return "refused what fits: " + *why;
  const bool no_attribute = p.has_attribute(p.bad_attribute) || p.has_attribute(p.missing_attribute);
  const bool wrapper = no_attribute || p.missing_arguments;
  if (wrapper ? (*why)[0] != '[' : !Names(*why)) return "names nothing: " + *why;
  if (wrapper) *why = "XLA's own";
  return "";
}

using Bytes = std::vector<uint8_t>;

// The same bytes at an odd address, up to the end of an allocation; some of them changed where they are to be damaged.
struct Moved {
  int64_t odd = Draw(0, 7);
  Bytes all;
  Moved(const void* from, int64_t bytes, bool damaged) : all(odd + bytes) {
    std::copy_n(static_cast<const uint8_t*>(from), bytes, all.data() + odd);
    for (int64_t n = damaged && bytes ? Draw(1, 3) : 0; n > 0; --n) all[odd + Draw(0, bytes - 1)] = Draw(0, 255);
  }
  const uint8_t* data() const { return all.data() + odd; }
  const char* chars() const { return reinterpret_cast<const char*>(data()); }
};

// An array taken apart and put together again in all ways, each buffer just so large; what is wrong, or "". Damaged
// codes may mean anything, but lead nowhere outside.
std::string Codecs() {
  const int64_t rows = Size(30), cols = Draw(1, Chance(8) ? 300 : 20), count = rows * cols;
  const int64_t size = Any({1, 2, 4, 8}), dead = Draw(0, 8), width = Draw(2, 16), wide = Any({2, 4});
  const bool damaged = Chance(2);
  std::vector<char> dense(count * size), values((count + 16) * size), back(count * size, 'x');
  for (int64_t i = 0; i < count; ++i)
    if (Draw(1, 8) > dead) dense[i * size + Draw(0, size - 1)] = 'w';
  Bytes bits((count + 7) / 8, 255);
  const int64_t stored = jaxprune_gather(dense.data(), count, size, bits.data(), values.data());
  jaxprune_spread(bits.data(), count, Moved(values.data(), stored * size, false).chars(), stored, size, back.data());
  if (dense != back) return "an array comes back as another";

  Bytes codes(((stored + count / ((1 << width) - 1)) * width + 7) / 8 + 8), made(bits.size());
  const int64_t bytes = jaxprune_gaps(bits.data(), count, width, codes.data());
  int64_t used = 0;
  const Moved gaps(codes.data(), bytes, damaged);
  if (jaxprune_bits_of_gaps(gaps.data(), bytes, width, stored, count, made.data(), &used) > stored) return "many gaps";
  if (!damaged && made != bits) return "gaps come back as others";

  std::vector<uint32_t> ends(rows);
  Bytes columns(stored * wide);
  jaxprune_csr(bits.data(), rows, cols, wide, ends.data(), columns.data());
  const Moved some_ends(ends.data(), 4 * rows, damaged), some_columns(columns.data(), stored * wide, damaged);
  made.assign(bits.size(), 0);
  if (!jaxprune_bits_of_csr(some_ends.chars(), some_columns.chars(), rows, cols, wide, stored, made.data())) {
    return damaged ? "" : "rows are refused";
  }
  return damaged || made == bits ? "" : "rows come back as others";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "fuzz CALLS SEED\n"), 2;
  const long calls = std::atol(argv[1]), seed = std::atol(argv[2]);
  __sanitizer_set_death_callback([] { std::fprintf(stderr, "case %ld\n", number); });
  std::map<std::string, long> answers;
  long fitting = 0;
  for (number = 0; number < calls; ++number) {
    rng.seed(seed + number);  // so that `fuzz 1 SEED+NUMBER` repeats a case
    const bool fits = Chance(4);
    std::string why;
    std::string wrong = Codecs();
    if (wrong.empty()) wrong = Case(fits, &why);
    if (!wrong.empty()) {
      return std::fprintf(stderr, "case %ld: %s\n", number, wrong.c_str()), 1;
    }
    fitting += fits;
    ++answers[why];
  }
  const long accepted = answers[""];
  std::printf("isa %s, seed %ld, calls %ld, fitting %ld, accepted %ld, refused %ld", jaxprune_isa(), seed, calls,
              fitting, accepted, calls - accepted);
  for (const auto& [why, count] : answers) {
    if (!why.empty()) std::printf("; %ld %s", count, why.c_str());
  }
  return std::printf("\n"), 0;
}
