// Shared by the forward and backward pass of attention on the CPU: the layout of tensors, the
// packing of their blocks for `multiply.h`, and the checks of arguments.

#pragma once

#include <limits>

#include "multiply.h"

namespace prismer {

constexpr int64_t kBlock = 96;  // a multiple of the rows and columns of a tile of products
constexpr float kLog2e = 1.44269504088896341f;
// the place of a key that no query sees, and the log-sum-exp of a query that sees no key
constexpr float kNever = std::numeric_limits<float>::infinity();
constexpr int64_t kMaxWidth = 256;
constexpr int64_t kGrain = 65536;  // a thread gets at least this many products
constexpr float kMost = std::numeric_limits<float>::max();
constexpr float kLeastExponent = -200.0f;  // 2^-200 is 0 in fp32, as is every lower power

inline int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }
inline int64_t even(int64_t n) { return n + n % 2; }
inline int64_t lanes_of(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// (samples, heads, tokens, width), the last dimension dense
template <typename Stored>
struct Rows {
  Stored* first;
  int64_t sample, head, token;  // strides

  PRISMER_INLINE Rows at(int64_t s, int64_t h, int64_t t) const {
    return {first + s * sample + h * head + t * token, sample, head, token};
  }
  PRISMER_INLINE Stored* operator[](int64_t t) const { return first + t * token; }
};

// Packs numbers into words: a pair of `Stored` where the processor multiplies pairs, else one fp32.
template <typename Stored>
struct Pack {
  static constexpr bool paired = std::is_same_v<std::remove_const_t<Stored>, FastBf16>;
  static constexpr int64_t per_word = paired ? 2 : 1;

  // words (token, pair of columns) of `count` tokens, then zeros up to `padded` tokens
  template <typename Vector>
  PRISMER_INLINE static void rows(
      float* out, const Rows<Stored>& x, int64_t count, int64_t padded, int64_t width) {
    const int64_t words = width / per_word;
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (paired) {
        __builtin_memcpy(out + i * words, x[i], words * sizeof(float));
      } else {
        for (int64_t c = 0; c < width; c += kLanes) {
          store(out + i * words + c, load<Vector>(x[i] + c));
        }
      }
    }
    std::fill(out + count * words, out + padded * words, 0.0f);
  }

  // words (pair of tokens, column); the same as rows() where a word is one number
  template <typename Vector>
  PRISMER_INLINE static void steps(
      float* out, const Rows<Stored>& x, int64_t count, int64_t padded, int64_t width) {
    if constexpr (!paired) {
      rows<Vector>(out, x, count, padded, width);
    } else {
      for (int64_t i = 0; i < count; i += 2) {
        const auto* low = reinterpret_cast<const uint16_t*>(x[i]);
        const auto* high = reinterpret_cast<const uint16_t*>(x[i + 1]);
        interleave(out + i / 2 * width, low, i + 1 < count ? high : nullptr, width);
      }
      std::fill(out + even(count) / 2 * width, out + padded / 2 * width, 0.0f);
    }
  }

  PRISMER_INLINE static void interleave(
      float* out, const uint16_t* low, const uint16_t* high, int64_t count) {
    auto* words = reinterpret_cast<uint32_t*>(out);
    if (high == nullptr) {
      for (int64_t c = 0; c < count; ++c) words[c] = low[c];
    } else {
      for (int64_t c = 0; c < count; ++c) words[c] = low[c] | uint32_t{high[c]} << 16;
    }
  }

  // (rows, words) -> (words, kBlock), with zeros for the rows up to kBlock
  PRISMER_INLINE static void transpose(
      float* out, const float* rows, int64_t count, int64_t words) {
    for (int64_t w = 0; w < words; ++w) {
      float* line = out + w * kBlock;
      for (int64_t i = 0; i < count; ++i) line[i] = rows[i * words + w];
      std::fill(line + count, line + kBlock, 0.0f);
    }
  }

  // stores a vector at number `at` of a line, narrowed to 16 bits where words are pairs
  template <typename Vector>
  PRISMER_INLINE static void line(float* out, int64_t at, const Vector& value) {
    if constexpr (paired) {
      store(reinterpret_cast<FastBf16*>(out) + at, value);
    } else {
      store(out + at, value);
    }
  }
};

// 2^x, and 0 for x = -inf; accurate to 2^-18 if the result is rounded to 16 bits anyway
template <typename Stored, typename Vector>
PRISMER_INLINE Vector weight(const Vector& x) {
  return exp2<std::is_same_v<Stored, float>>(max(x, kLeastExponent));
}

struct Sizes {
  int64_t samples, heads, queries, keys, width;
  bool causal;
  float scale;

  // true if no query up to `last` sees this key or a later one
  PRISMER_INLINE bool beyond(int64_t key, int64_t last) const { return causal && key > last; }
};

using Multiplier = void (*)(const Factors&);

// ---- tensors ------------------------------------------------------------------------------------

template <typename Stored>
Rows<Stored> rows_of(const Tensor& x) {
  // the stride of a dimension of size 1 may be anything in torch: it is multiplied by 0 only
  auto* first = const_cast<Stored*>(data<std::remove_const_t<Stored>>(x));
  return {first, x.stride(0), x.stride(1), x.stride(2)};
}

// (samples, tokens, heads, width), contiguous
template <typename Stored>
Rows<Stored> tokens_first(const Tensor& x) {
  const int64_t heads = x.size(2), width = x.size(3);
  auto* first = const_cast<Stored*>(data<std::remove_const_t<Stored>>(x));
  return {first, x.size(1) * heads * width, width, heads * width};
}

inline void check_result(
    const char* op, const char* name, const Tensor& x, const Tensor& q, int64_t samples,
    int64_t tokens, int64_t heads, int64_t width) {
  STD_TORCH_CHECK(
      x.dim() == 4 && x.size(0) == samples && x.size(1) == tokens && x.size(2) == heads &&
          x.size(3) == width && x.scalar_type() == q.scalar_type(),
      op, ": ", name, " is ", shape_of(x), " ", dtype_of(x), "; expected (", samples, ", ", tokens,
      ", ", heads, ", ", width, ") ", dtype_of(q));
  check_contiguous(op, name, x);
}

inline void check_lse(const char* op, const Tensor& lse, const Sizes& n) {
  STD_TORCH_CHECK(
      lse.dim() == 3 && lse.size(0) == n.samples && lse.size(1) == n.heads &&
          lse.size(2) == n.queries && lse.scalar_type() == ScalarType::Float,
      op, ": lse is ", shape_of(lse), " ", dtype_of(lse), "; expected (", n.samples, ", ", n.heads,
      ", ", n.queries, ") float32");
  check_contiguous(op, "lse", lse);
}

inline void check_call(
    const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
    const std::optional<Tensor>& key_mask, bool causal) {
  STD_TORCH_CHECK(
      q.dim() == 4 && is_fp32_or_16(q) && q.size(3) % kLanes == 0 && q.size(3) >= kLanes &&
          q.size(3) <= kMaxWidth,
      op, ": q is ", shape_of(q), " ", dtype_of(q),
      "; expected (samples, heads, queries, a multiple of 16 up to ", kMaxWidth,
      ") of float32, bfloat16 or float16");
  STD_TORCH_CHECK(
      k.dim() == 4 && k.size(0) == q.size(0) && k.size(1) == q.size(1) && k.size(3) == q.size(3) &&
          k.size(2) < (1 << 22) && q.size(2) < (1 << 22),
      op, ": k is ", shape_of(k), " beside q ", shape_of(q),
      "; expected the same but for the tokens, of which there may be 2^22");
  const Tensor* const all[] = {&q, &k, &v};
  for (const Tensor* x : all) {
    STD_TORCH_CHECK(
        x->dim() == 4 && x->scalar_type() == q.scalar_type() && x->stride(3) == 1 &&
            (x == &q || (x->size(2) == k.size(2) && x->size(3) == k.size(3) &&
                         x->size(0) == k.size(0) && x->size(1) == k.size(1))),
        op, ": got ", shape_of(*x), " ", dtype_of(*x), " beside k ", shape_of(k),
        "; expected q, k and v of one dtype, with a dense last dimension");
  }
  STD_TORCH_CHECK(
      !causal || q.size(2) == k.size(2), op, ": ", q.size(2), " causal queries of ", k.size(2),
      " keys; expected as many");
  if (!key_mask) return;
  STD_TORCH_CHECK(
      key_mask->dim() == 2 && key_mask->size(0) == q.size(0) && key_mask->size(1) == k.size(2) &&
          key_mask->scalar_type() == ScalarType::Bool,
      op, ": key_mask is ", shape_of(*key_mask), " ", dtype_of(*key_mask), "; expected (",
      q.size(0), ", ", k.size(2), ") bool");
  check_contiguous(op, "key_mask", *key_mask);
}

inline Sizes sizes_of(const Tensor& q, const Tensor& k, bool causal, double scale) {
  return {q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), causal, static_cast<float>(scale)};
}

inline const uint8_t* mask_of(const std::optional<Tensor>& key_mask) {
  return key_mask ? data<uint8_t>(*key_mask) : nullptr;
}

}  // namespace prismer
