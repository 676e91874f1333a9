// Products of few rows with a matrix on the CPU, as kernels/few_rows.py defines them.
//
// Each weight is read once, from where it lies. A task is 16 rows of weights, a tile is four or
// eight of them with up to six rows of x: its sums stay in registers over the whole width. Every
// number of y has one vector of sums of its own, and so its bits depend neither on the other rows
// of x nor on the number of threads. x is copied once, in the format of the sums, padded with zeros.

#include <cmath>
#include <limits>

#include "dispatch.h"

namespace prismer {
namespace {

constexpr int64_t kMostRows = 64;
constexpr int64_t kMostBytes = 65536;  // width up to which the sums of int8 products fit 32 bits
constexpr int64_t kGrain = 32768;      // a thread gets at least this many weights
constexpr int64_t kLine = 64;          // bytes of a cache line
constexpr int64_t kMostSums = kMostRows * 4 * kLanes;

template <typename Value, int Width>
PRISMER_INLINE Tree<Value, Width, Width> read(const void* p) {
  return {leaf::read<leaf::Native<Value, Width>>(p)};
}

// ---- formats ------------------------------------------------------------------------------------

// How weights are multiplied: `step` numbers of a row are a vector, and x is stored as `Kept`.

// x in fp32, and weights widened to it
template <typename Stored>
struct Wide {
  static constexpr bool avx512 = false;  // the only set that it runs on
  using Weight = Stored;
  using Kept = float;
  using Value = float;

  template <int Width>
  struct At {
    using Vector = Tree<float, Width, Width>;
    static constexpr int64_t step = Width;
    static constexpr int halves = 1;

    PRISMER_INLINE static Vector kept(const float* p) { return load<Vector>(p); }
    PRISMER_INLINE static Vector weights(const Stored* p, int) {
      // in a register: otherwise the compiler loads the same weights for each row of x
      return rounded(load<Vector>(p));
    }
    PRISMER_INLINE static Vector plus(const Vector& sum, const Vector& x, const Vector& w) {
      return sum + x * w;
    }
  };
};

// The same for bf16. A word of 32 bits holds two neighbours, and one instruction makes fp32 of all
// first ones, or of all second ones: x is kept in that order. (On processors of Intel a product of
// pairs, AVX512-BF16, takes the time of four fused multiply-adds.)
struct Halves {
  static constexpr bool avx512 = false;
  using Weight = Bf16;
  using Kept = float;
  using Value = float;

  template <int Width>
  struct At {
    using Vector = Tree<float, Width, Width>;
    static constexpr int64_t step = 2 * Width;
    static constexpr int halves = 2;

    PRISMER_INLINE static Vector kept(const float* p) { return load<Vector>(p); }
    PRISMER_INLINE static Vector weights(const Bf16* p, int half) {
      const auto words = read<int32_t, Width>(p);
      const auto mask = static_cast<int32_t>(0xffff0000);
      return float_of_bits(half == 0 ? shift_left(words, 16) : words & mask);
    }
    PRISMER_INLINE static Vector plus(const Vector& sum, const Vector& x, const Vector& w) {
      return sum + x * w;
    }
  };
};

// pairs of 16-bit integers
struct Words {
  static constexpr bool avx512 = false;
  using Weight = int8_t;
  using Kept = int16_t;
  using Value = int32_t;
  static constexpr int32_t shift = 0;

  template <int Width>
  struct At {
    using Vector = Tree<int32_t, Width, Width>;
    static constexpr int64_t step = 2 * Width;
    static constexpr int halves = 1;

    PRISMER_INLINE static Vector kept(const int16_t* p) { return read<int32_t, Width>(p); }
    PRISMER_INLINE static Vector weights(const int8_t* p, int) {
      Vector result;
#if defined(__x86_64__)
      if constexpr (Width > 4) {
        const auto* bytes = reinterpret_cast<const leaf::Run<Width>*>(p);
        asm("vpmovsxbw %1, %0" : "=v"(result.v) : "m"(*bytes));
        return result;
      }
#endif
      int16_t words[step];
      for (int i = 0; i < step; ++i) words[i] = p[i];
      return read<int32_t, Width>(words);
    }
    PRISMER_INLINE static Vector plus(const Vector& sum, const Vector& x, const Vector& w) {
#if defined(__x86_64__)
      if constexpr (Width > 4) {
        Vector products;
        asm("vpmaddwd %2, %1, %0" : "=v"(products.v) : "v"(w.v), "v"(x.v));
        return sum + products;
      }
#endif
      const auto low = ((x.v << 16) >> 16) * ((w.v << 16) >> 16);
      return {sum.v + low + (x.v >> 16) * (w.v >> 16)};
    }
  };
};

// four bytes at a time (AVX512-VNNI). The instruction wants one side without a sign: weights are
// shifted by 128, and 128 times the sum of x is subtracted in the end.
struct Bytes {
  static constexpr bool avx512 = true;
  using Weight = int8_t;
  using Kept = int8_t;
  using Value = int32_t;
  static constexpr int32_t shift = 128;

  template <int Width>
  struct At {
    using Vector = Tree<int32_t, Width, Width>;
    static constexpr int64_t step = 4 * Width;
    static constexpr int halves = 1;

    PRISMER_INLINE static Vector kept(const int8_t* p) { return read<int32_t, Width>(p); }
    PRISMER_INLINE static Vector weights(const int8_t* p, int) {
      return {read<int32_t, Width>(p).v ^ static_cast<int32_t>(0x80808080)};
    }
    PRISMER_INLINE static Vector plus(Vector sum, const Vector& x, const Vector& w) {
#if defined(__x86_64__)
      if constexpr (Width == kLanes) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(w.v), "v"(x.v));
      }
#endif
      return sum;
    }
  };
};

// ---- x ------------------------------------------------------------------------------------------

// what the int8 products of a row of x are multiplied with, and the sum of its numbers
struct Scale {
  float step;
  int32_t total;
};

// bytes of a row in the copy of x: whole cache lines, whatever the format, and an odd number of
// them, because rows that are a multiple of 4 KB apart evict each other
int64_t kept_bytes(int64_t width, int64_t size) {
  const int64_t lines = ((width + kLine - 1) / kLine * kLine * size) / kLine;
  return (lines + 1 - lines % 2) * kLine;
}

// copies rows of x in the format of the sums
template <typename Format, typename Stored>
struct Keep {
  using Kept = typename Format::Kept;

  const Stored* x;
  int64_t x_row, width;
  Kept* kept;
  int64_t kept_row;
  Scale* scales;

  template <int Width>
  PRISMER_INLINE static void run(const Keep& job, const int64_t& begin, const int64_t& end) {
    for (int64_t row = begin; row < end; ++row) {
      const Stored* from = job.x + row * job.x_row;
      Kept* to = job.kept + row * job.kept_row;
      std::fill(to + job.width, to + job.kept_row, Kept{});
      if constexpr (std::is_same_v<Kept, float>) {
        widened<Width>(to, from, job.width);
      } else {
        job.scales[row] = quantised<Floats<Width>>(to, from, job.width);
      }
    }
  }

 private:
  template <int Width>
  PRISMER_INLINE static void widened(float* to, const Stored* from, int64_t width) {
    using At = typename Format::template At<Width>;
    const auto copy = [](float* out, const Stored* in) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int half = 0; half < At::halves; ++half) {
        store(out + half * Width, At::weights(in, half));
      }
    };
    int64_t c = 0;
    for (; c + At::step <= width; c += At::step) copy(to + c, from + c);
    if (c < width) {
      Stored padded[At::step] = {};
      std::copy(from + c, from + width, padded);
      copy(to + c, padded);
    }
  }

  // x in steps of its largest number / 127, as prismer/quantise.py rounds it
  template <typename Vector>
  PRISMER_INLINE static Scale quantised(Kept* to, const Stored* from, int64_t width) {
    // compared as integers, a NaN is larger than all numbers
    auto most = bits_of(broadcast<Vector>(0.0f));
    for_columns(width, [&](int64_t c, auto part) __attribute__((always_inline)) {
      const auto bits = bits_of(abs(load<Vector>(from + c, part)));
      most = select(less(most, bits), bits, most);
    });
    int32_t bits[kLanes];
    __builtin_memcpy(bits, &most, sizeof(most));
    const int32_t largest = *std::max_element(bits, bits + kLanes);
    float step;
    __builtin_memcpy(&step, &largest, sizeof(step));
    step /= 127.0f;
    if (step < std::numeric_limits<float>::min()) step = std::numeric_limits<float>::min();
    if (!(step <= std::numeric_limits<float>::max())) {
      // such a row becomes NaN when the step is multiplied with its products
      std::fill(to, to + width, Kept{});
      return {step, 0};
    }
    // exact: 65,536 times 127 is less than 2^24
    Vector total = broadcast<Vector>(0.0f);
    for_columns(width, [&](int64_t c, auto part) __attribute__((always_inline)) {
      const Vector whole = round(load<Vector>(from + c, part) / broadcast<Vector>(step));
      total = total + whole;
      float lanes[kLanes];
      store(lanes, whole);
      Kept integers[kLanes];
      for (int i = 0; i < kLanes; ++i) integers[i] = static_cast<Kept>(lanes[i]);
      if constexpr (std::is_same_v<decltype(part), Full>) {
        __builtin_memcpy(to + c, integers, sizeof(integers));
      } else {
        __builtin_memcpy(to + c, integers, part.count * sizeof(Kept));
      }
    });
    return {step, static_cast<int32_t>(sum(total))};
  }
};

// ---- products -----------------------------------------------------------------------------------

template <typename Format, typename Stored, typename Bias>
struct Product {
  using Weight = typename Format::Weight;
  using Kept = typename Format::Kept;
  using Value = typename Format::Value;

  const Kept* x;  // (rows, width)
  int64_t x_row, rows, width;
  const Weight* w;  // (outputs, width)
  int64_t w_row, outputs;
  const Bias* bias;     // (outputs) or null
  const float* scale;   // of int8 alone: (outputs), and (rows) below
  const Scale* scales;
  Stored* y;  // (rows, outputs)

  template <int Width>
  PRISMER_INLINE static void run(const Product& job, const int64_t& begin, const int64_t& end) {
    if constexpr (Format::avx512 && Width != kLanes) return;
    // with few rows, more rows of weights, so that no addition waits for the one before it
    const bool few = job.rows <= (Width == kLanes ? 3 : 1);
    if (few) {
      job.tasks<Width, 8>(begin, end);
    } else {
      job.tasks<Width, 4>(begin, end);
    }
  }

 private:
  // `count` groups of rows of weights; rows of a group are `apart`, and the next group is `advance`
  // further. Likewise for the place of their sums.
  struct Walk {
    int64_t first, count, apart, advance;
    int64_t to, to_apart, to_advance;
  };

  template <int Width, int Columns>
  PRISMER_INLINE void tasks(int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end;) {
      const int64_t first = task * kLanes;
      // where there are enough tasks, a group has one row of each of `Columns` tasks: then memory
      // is read as a few long streams, which the processor prefetches
      const bool streams = end - task >= Columns && (task + Columns) * kLanes <= outputs;
      const int64_t here = std::min(kLanes, outputs - first), whole = here / Columns;
      const int64_t done = whole * Columns;
      const Walk walks[2] = {
          streams ? Walk{first, kLanes, kLanes, 1, 0, kLanes, 1}
                  : Walk{first, whole, 1, Columns, 0, 1, Columns},
          // the last rows one by one, each as if it stood there `Columns` times
          Walk{first + done, streams ? 0 : here - done, 0, 1, done, 1, 1}};
      Value sums[kMostSums];
      for (const Walk& walk : walks) {
        for (int64_t i = 0; i < walk.count; ++i) {
          const int64_t row = walk.first + i * walk.advance;
          const int64_t next = i + 1 < walk.count ? row + walk.advance
                                                  : walk.first + walk.count * Columns;
          group<Width, Columns>(
              sums + walk.to + i * walk.to_advance, walk.to_apart, w + row * w_row,
              w + next * w_row, walk.apart * w_row);
        }
      }
      for (int64_t i = 0; i < (streams ? Columns : 1); ++i, ++task) {
        for (int64_t row = 0; row < rows; ++row) {
          const Value* of = sums + row * kLanes * Columns + i * kLanes;
          if (outputs - task * kLanes >= kLanes) {
            finish<Floats<Width>>(of, row, task * kLanes, Full{});
          } else {
            finish<Floats<Width>>(of, row, task * kLanes, Tail{here});
          }
        }
      }
    }
  }

  // all rows of x with `Columns` rows of weights
  template <int Width, int Columns>
  PRISMER_INLINE void group(
      Value* sums, int64_t apart, const Weight* weights, const Weight* following,
      int64_t step) const {
    constexpr int64_t most = Width == kLanes ? 6 : 3;
    const int64_t tiles = (rows + most - 1) / most;
    for (int64_t i = 0, row = 0; i < tiles; ++i) {
      // as even as possible
      const int64_t here = (rows - row + tiles - i - 1) / (tiles - i);
      // each tile prefetches its share of the next weights
      const int64_t ahead = Columns * i / tiles;
      const Weight* next = following + ahead * step;
      const int64_t many = Columns * (i + 1) / tiles - ahead;
      const auto with = [&](auto count) __attribute__((always_inline)) {
        tile<Width, decltype(count)::value, Columns>(
            sums + row * kLanes * Columns, apart, x + row * x_row, weights, step, next, many);
      };
      if constexpr (Columns == 8) {
        if (here == 1) with(Constant<1>{});
        if constexpr (Width == kLanes) {
          if (here == 2) with(Constant<2>{});
          if (here == 3) with(Constant<3>{});
        }
      } else {
        if (here == 3) with(Constant<3>{});
        if constexpr (Width != kLanes) {
          if (here == 2) with(Constant<2>{});
        } else {
          if (here == 4) with(Constant<4>{});
          if (here == 5) with(Constant<5>{});
          if (here == 6) with(Constant<6>{});
        }
      }
      row += here;
    }
  }

  template <int value>
  using Constant = std::integral_constant<int, value>;

  template <int Width, int Rows, int Columns>
  PRISMER_INLINE void tile(
      Value* sums, int64_t apart, const Kept* kept, const Weight* weights, int64_t step,
      const Weight* next, int64_t many) const {
    using At = typename Format::template At<Width>;
    using Vector = typename At::Vector;
    constexpr int64_t line = kLine / sizeof(Weight);
    Vector sum[Rows][Columns] = {};
    const auto meet = [&](const Kept* x, const Weight* w, int64_t w_step)
        __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int half = 0; half < At::halves; ++half) {
        Vector left[Rows];
#pragma GCC unroll 6
        for (int i = 0; i < Rows; ++i) left[i] = At::kept(x + i * x_row + half * Width);
#pragma GCC unroll 8
        for (int j = 0; j < Columns; ++j) {
          const Vector right = At::weights(w + j * w_step, half);
#pragma GCC unroll 6
          for (int i = 0; i < Rows; ++i) sum[i][j] = At::plus(sum[i][j], left[i], right);
        }
      }
    };
    int64_t c = 0;
    for (; c + line <= width; c += line) {
#pragma GCC unroll 8
      for (int j = 0; j < Columns; ++j) {
        if (j < many) __builtin_prefetch(next + j * step + c, 0, 2);
      }
      for (int64_t part = 0; part < line; part += At::step) {
        meet(kept + c + part, weights + c + part, step);
      }
    }
    if (c < width) {
      Weight padded[Columns * line] = {};
      for (int j = 0; j < Columns; ++j) {
        std::copy(weights + j * step + c, weights + j * step + width, padded + j * line);
      }
      for (int64_t part = 0; part < line; part += At::step) {
        meet(kept + c + part, padded + part, line);
      }
    }
    across<Width, Rows, Columns>(sums, apart, sum);
  }

  // the sums over the lanes of each vector
  template <int Width, int Rows, int Columns, typename Vector>
  PRISMER_INLINE static void across(
      Value* sums, int64_t apart, const Vector (&sum)[Rows][Columns]) {
    if constexpr (Width == kLanes) {
      constexpr int lines = Rows * Columns / 4;
      four<0, std::min(lines, 4), Rows, Columns>(sums, apart, sum);
      if constexpr (lines > 4) four<4, lines - 4, Rows, Columns>(sums, apart, sum);
    } else {
      for (int i = 0; i < Rows; ++i) {
        for (int j = 0; j < Columns; ++j) {
          sums[i * kLanes * Columns + j * apart] = prismer::sum(sum[i][j]);
        }
      }
    }
  }

  // of `Used` times four vectors at once
  template <int First, int Used, int Rows, int Columns, typename Vector>
  PRISMER_INLINE static void four(
      Value* sums, int64_t apart, const Vector (&sum)[Rows][Columns]) {
    constexpr int parts = Columns / 4;
    Vector all[kLanes];
#pragma GCC unroll 4
    for (int line = 0; line < Used; ++line) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        all[4 * j + line] = sum[(First + line) / parts][(First + line) % parts * 4 + j];
      }
    }
    const Vector total = prismer::sums<Used>(all);
    Value lanes[kLanes];
    __builtin_memcpy(lanes, &total, sizeof(total));
    for (int line = 0; line < Used; ++line) {
      Value* to = sums + (First + line) / parts * kLanes * Columns;
      const int part = (First + line) % parts;
      for (int j = 0; j < 4; ++j) to[(4 * part + j) * apart] = lanes[4 * j + line];
    }
  }

  // 16 numbers of a row of y from their sums
  template <typename Vector, typename Part>
  PRISMER_INLINE void finish(const Value* sums, int64_t row, int64_t first, Part part) const {
    Vector result;
    if constexpr (std::is_same_v<Value, float>) {
      result = load<Vector>(sums);
    } else {
      float exact[kLanes];
      const int32_t excess = Format::shift * scales[row].total;
      for (int i = 0; i < kLanes; ++i) exact[i] = static_cast<float>(sums[i] - excess);
      result = load<Vector>(exact) * load<Vector>(scale + first, part) * scales[row].step;
    }
    if (bias != nullptr) result = result + load<Vector>(bias + first, part);
    store(y + row * outputs + first, result, part);
  }
};

// ---- tensors ------------------------------------------------------------------------------------

struct Call {
  const Tensor& x;
  const Tensor& weight;
  const std::optional<Tensor>& scale;
  const std::optional<Tensor>& bias;
  const Tensor& y;
};

template <typename Format, typename Stored, typename Bias>
void multiply_as(const Call& call) {
  using Job = Product<Format, Stored, Bias>;
  using Kept = typename Format::Kept;
  const int64_t rows = call.x.size(0), width = call.x.size(1), outputs = call.weight.size(0);
  const int64_t row_bytes = kept_bytes(width, sizeof(Kept));
  const Buffer buffer(rows * row_bytes / sizeof(float));
  auto* kept = reinterpret_cast<Kept*>(buffer.data());
  const int64_t kept_row = row_bytes / sizeof(Kept);
  Scale scales[kMostRows];
  using Copy = Keep<Format, Stored>;
  const Copy copy{data<Stored>(call.x), call.x.stride(0), width, kept, kept_row, scales};
  const auto keep = runner<Copy, Copy, int64_t, int64_t>();
  torch::stable::parallel_for(
      0, rows, kGrain / width + 1, [&](int64_t begin, int64_t end) { keep(copy, begin, end); });
  const Job job{
      kept, kept_row, rows, width, data<typename Format::Weight>(call.weight),
      call.weight.stride(0), outputs, call.bias ? data<Bias>(*call.bias) : nullptr,
      call.scale ? data<float>(*call.scale) : nullptr, scales, mutable_data<Stored>(call.y)};
  const auto body = runner<Job, Job, int64_t, int64_t>();
  torch::stable::parallel_for(
      0, (outputs + kLanes - 1) / kLanes, kGrain / (kLanes * width) + 1,
      [&](int64_t begin, int64_t end) { body(job, begin, end); });
}

// `Format` is that of weights in the dtype of x
template <typename Format, typename Stored>
void multiply(const Call& call) {
  if (!call.scale) return multiply_as<Format, Stored, Stored>(call);
#if defined(__x86_64__)
  if (isa() == Isa::avx512 && __builtin_cpu_supports("avx512vnni")) {
    return multiply_as<Bytes, Stored, float>(call);
  }
#endif
  multiply_as<Words, Stored, float>(call);
}

void check_vector(
    const char* op, const char* name, const std::optional<Tensor>& given, const Tensor& weight,
    ScalarType type, const char* expected) {
  if (!given) return;
  STD_TORCH_CHECK(
      given->dim() == 1 && given->size(0) == weight.size(0) && given->scalar_type() == type, op,
      ": ", name, " is ", shape_of(*given), " ", dtype_of(*given), "; expected (", weight.size(0),
      ") ", expected);
  check_contiguous(op, name, *given);
}

}  // namespace

Tensor few_rows_linear_cpu(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& bias) {
  constexpr const char* op = "few_rows_linear";
  STD_TORCH_CHECK(
      x.dim() == 2 && x.size(0) <= kMostRows && x.size(1) >= 1 && is_fp32_or_16(x) &&
          (x.stride(1) == 1 || x.size(1) == 1),
      op, ": x is ", shape_of(x), " ", dtype_of(x), "; expected (up to ", kMostRows,
      " rows, width >= 1) of float32, bfloat16 or float16, with a dense last dimension");
  const bool int8 = weight.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(
      weight.dim() == 2 && weight.size(1) == x.size(1) &&
          (int8 || weight.scalar_type() == x.scalar_type()) &&
          (weight.stride(1) == 1 || weight.size(1) == 1),
      op, ": weight is ", shape_of(weight), " ", dtype_of(weight), "; expected (outputs, ",
      x.size(1), ") int8 or ", dtype_of(x), ", with a dense last dimension");
  STD_TORCH_CHECK(
      int8 == scale.has_value(), op, ": weight is ", dtype_of(weight),
      "; int8 has a scale, and no other dtype has one");
  STD_TORCH_CHECK(
      !int8 || x.size(1) <= kMostBytes, op, ": the width is ", x.size(1), "; int8 serves up to ",
      kMostBytes);
  check_vector(op, "scale", scale, weight, ScalarType::Float, "float32");
  check_vector(
      op, "bias", bias, weight, int8 ? ScalarType::Float : x.scalar_type(),
      int8 ? "float32" : "like x");
  const Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  if (x.size(0) == 0 || weight.size(0) == 0) return y;
  const Call call{x, weight, scale, bias, y};
  switch (x.scalar_type()) {
    case ScalarType::Float:
      multiply<Wide<float>, float>(call);
      break;
    case ScalarType::BFloat16:
      multiply<Halves, Bf16>(call);
      break;
    default:
      multiply<Wide<Fp16>, Fp16>(call);
  }
  return y;
}

}  // namespace prismer
