// Vectors of sixteen fp32 lanes, written once and compiled for each instruction set.
//
// A Floats<Width> is a binary tree whose leaves are the compiler's vectors of Width floats: one
// leaf of 16 on AVX-512, two of 8 on AVX2, four of 4 elsewhere. Sums over lanes have the same order
// for every Width, so that instruction sets differ only in the rounding of fused multiply-adds.

#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

// everything here is inlined, so that no vector is ever passed between functions
#define PRISMER_INLINE [[gnu::always_inline]] inline

namespace prismer {

constexpr int64_t kLanes = 16;

// the 16-bit floating types, as bits in memory
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
// the same as Bf16, for processors that can round to it in one instruction (AVX512-BF16)
struct FastBf16 : Bf16 {};

template <typename Value, int Lanes, int Width>
struct Tree {
  using Half = Tree<Value, Lanes / 2, Width>;
  static constexpr bool leaf = false;
  Half low, high;
};

template <typename Value, int Width>
struct Tree<Value, Width, Width> {
  using Native [[gnu::vector_size(Width * sizeof(Value))]] = Value;
  static constexpr bool leaf = true;
  Native v;
};

template <int Width>
using Floats = Tree<float, kLanes, Width>;
template <int Width>
using Ints = Tree<int32_t, kLanes, Width>;

// all lanes equal
template <typename Vector, typename Value>
PRISMER_INLINE Vector broadcast(Value value) {
  if constexpr (Vector::leaf) {
    typename Vector::Native result{};
    if (__builtin_constant_p(value) && value == 0) return {result};
#if defined(__x86_64__)
    // for plain C++ the compiler emits one insertion per lane
    if constexpr (sizeof(Vector) > 16) {
      asm("vbroadcastss %1, %0" : "=v"(result) : "vm"(value));
      return {result};
    }
#endif
    return {value - result};
  } else {
    const auto half = broadcast<typename Vector::Half>(value);
    return {half, half};
  }
}

#define PRISMER_OPERATOR(op)                                                                       \
  template <typename Value, int Lanes, int Width>                                                  \
  PRISMER_INLINE Tree<Value, Lanes, Width> operator op(                                            \
      const Tree<Value, Lanes, Width>& a, const Tree<Value, Lanes, Width>& b) {                    \
    if constexpr (Lanes == Width) {                                                                \
      return {a.v op b.v};                                                                         \
    } else {                                                                                       \
      return {a.low op b.low, a.high op b.high};                                                   \
    }                                                                                              \
  }                                                                                                \
  template <typename Value, int Lanes, int Width>                                                  \
  PRISMER_INLINE Tree<Value, Lanes, Width> operator op(                                            \
      const Tree<Value, Lanes, Width>& a, std::type_identity_t<Value> b) {                         \
    return a op broadcast<Tree<Value, Lanes, Width>>(b);                                           \
  }                                                                                                \
  template <typename Value, int Lanes, int Width>                                                  \
  PRISMER_INLINE Tree<Value, Lanes, Width> operator op(                                            \
      std::type_identity_t<Value> a, const Tree<Value, Lanes, Width>& b) {                         \
    return broadcast<Tree<Value, Lanes, Width>>(a) op b;                                           \
  }
PRISMER_OPERATOR(+)
PRISMER_OPERATOR(-)
PRISMER_OPERATOR(*)
PRISMER_OPERATOR(/)
PRISMER_OPERATOR(&)
PRISMER_OPERATOR(|)
#undef PRISMER_OPERATOR

template <int Lanes, int Width>
PRISMER_INLINE Tree<int32_t, Lanes, Width> shift_left(
    const Tree<int32_t, Lanes, Width>& a, int places) {
  if constexpr (Lanes == Width) {
    return {a.v << places};
  } else {
    return {shift_left(a.low, places), shift_left(a.high, places)};
  }
}

// -1 in the lanes where a < b, else 0; a NaN is not less than anything
template <typename Value, int Lanes, int Width>
PRISMER_INLINE Tree<int32_t, Lanes, Width> less(
    const Tree<Value, Lanes, Width>& a, const Tree<Value, Lanes, Width>& b) {
  if constexpr (Lanes == Width) {
    return {a.v < b.v};
  } else {
    return {less(a.low, b.low), less(a.high, b.high)};
  }
}

template <typename Value, int Lanes, int Width>
PRISMER_INLINE Tree<Value, Lanes, Width> select(
    const Tree<int32_t, Lanes, Width>& mask, const Tree<Value, Lanes, Width>& yes,
    const Tree<Value, Lanes, Width>& no) {
  if constexpr (Lanes == Width) {
    return {mask.v ? yes.v : no.v};
  } else {
    return {select(mask.low, yes.low, no.low), select(mask.high, yes.high, no.high)};
  }
}

template <typename Value, int Lanes, int Width>
PRISMER_INLINE Tree<int32_t, Lanes, Width> less(
    const Tree<Value, Lanes, Width>& a, std::type_identity_t<Value> b) {
  return less(a, broadcast<Tree<Value, Lanes, Width>>(b));
}

template <typename Value, int Lanes, int Width>
PRISMER_INLINE Tree<Value, Lanes, Width> select(
    const Tree<int32_t, Lanes, Width>& mask, std::type_identity_t<Value> yes,
    const Tree<Value, Lanes, Width>& no) {
  return select(mask, broadcast<Tree<Value, Lanes, Width>>(yes), no);
}

// the larger number; `a` if one of them is NaN
template <typename Value, int Lanes, int Width>
PRISMER_INLINE Tree<Value, Lanes, Width> max(
    const Tree<Value, Lanes, Width>& a, const Tree<Value, Lanes, Width>& b) {
  if constexpr (Lanes != Width) {
    return {max(a.low, b.low), max(a.high, b.high)};
  } else {
#if defined(__x86_64__)
    if constexpr (Width > 4) {
      // for plain C++ the compiler emits two instructions, a comparison and a selection
      typename Tree<Value, Lanes, Width>::Native result;
      asm("vmaxps %1, %2, %0" : "=v"(result) : "v"(a.v), "v"(b.v));
      return {result};
    }
#endif
    return {a.v < b.v ? b.v : a.v};
  }
}

template <typename Value, int Lanes, int Width>
PRISMER_INLINE Tree<Value, Lanes, Width> min(
    const Tree<Value, Lanes, Width>& a, const Tree<Value, Lanes, Width>& b) {
  if constexpr (Lanes != Width) {
    return {min(a.low, b.low), min(a.high, b.high)};
  } else {
#if defined(__x86_64__)
    if constexpr (Width > 4) {
      typename Tree<Value, Lanes, Width>::Native result;
      asm("vminps %1, %2, %0" : "=v"(result) : "v"(a.v), "v"(b.v));
      return {result};
    }
#endif
    return {b.v < a.v ? b.v : a.v};
  }
}

template <typename Vector>
PRISMER_INLINE Vector max(const Vector& a, float b) {
  return max(a, broadcast<Vector>(b));
}

template <typename Vector>
PRISMER_INLINE Vector min(const Vector& a, float b) {
  return min(a, broadcast<Vector>(b));
}

template <int Lanes, int Width>
PRISMER_INLINE Tree<int32_t, Lanes, Width> bits_of(const Tree<float, Lanes, Width>& a) {
  using Result = Tree<int32_t, Lanes, Width>;
  if constexpr (Lanes == Width) {
    return {(typename Result::Native)a.v};
  } else {
    return {bits_of(a.low), bits_of(a.high)};
  }
}

template <int Lanes, int Width>
PRISMER_INLINE Tree<float, Lanes, Width> float_of_bits(const Tree<int32_t, Lanes, Width>& a) {
  using Result = Tree<float, Lanes, Width>;
  if constexpr (Lanes == Width) {
    return {(typename Result::Native)a.v};
  } else {
    return {float_of_bits(a.low), float_of_bits(a.high)};
  }
}

template <typename Vector>
PRISMER_INLINE Vector abs(const Vector& a) {
  return float_of_bits(bits_of(a) & 0x7fffffff);
}

// returns `a`, rounded to fp32: keeps the compiler from fusing a product with a later addition
template <int Lanes, int Width>
PRISMER_INLINE Tree<float, Lanes, Width> rounded(Tree<float, Lanes, Width> a) {
  if constexpr (Lanes == Width) {
#if defined(__x86_64__)
    asm("" : "+v"(a.v));
#endif
    return a;
  } else {
    return {rounded(a.low), rounded(a.high)};
  }
}

// ---- loads and stores, with conversion ----------------------------------------------------------

namespace leaf {

template <typename To, typename From>
PRISMER_INLINE To read(const From* p) {
  To result;
  __builtin_memcpy(&result, p, sizeof(To));
  return result;
}

template <typename Value, int Width>
using Native = typename Tree<Value, Width, Width>::Native;

// 16-bit numbers at any address, for memory operands of assembly. Not templates: these lose the
// attribute may_alias, and the compiler may then drop stores of another type to this memory.
struct [[gnu::may_alias]] Run8 {
  uint16_t bits[8];
};
struct [[gnu::may_alias]] Run16 {
  uint16_t bits[16];
};
template <int Width>
using Run = std::conditional_t<Width == 16, Run16, Run8>;

template <int Width>
PRISMER_INLINE Native<float, Width> widen(const float* p) {
  return read<Native<float, Width>>(p);
}

template <int Width>
PRISMER_INLINE Native<float, Width> widen(const Bf16* p) {
#if defined(__x86_64__)
  // assembly, here and below: an intrinsic is inlined only into functions that declare its
  // instruction set, and for plain C++ the compiler emits five instructions instead of this one
  if constexpr (Width > 4) {
    Native<uint32_t, Width> wide;
    asm("vpmovzxwd %1, %0" : "=v"(wide) : "m"(*reinterpret_cast<const Run<Width>*>(p)));
    return (Native<float, Width>)(wide << 16);
  }
#endif
  const auto bits = read<Native<uint16_t, Width>>(p);
  return (Native<float, Width>)(__builtin_convertvector(bits, Native<uint32_t, Width>) << 16);
}

template <int Width>
PRISMER_INLINE Native<float, Width> widen(const FastBf16* p) {
  return widen<Width>(static_cast<const Bf16*>(p));
}

template <int Width>
PRISMER_INLINE Native<float, Width> widen(const Fp16* p) {
  Native<float, Width> result;
#if defined(__x86_64__)
  // F16C comes with AVX2
  if constexpr (Width > 4) {
    asm("vcvtph2ps %1, %0" : "=v"(result) : "m"(*reinterpret_cast<const Run<Width>*>(p)));
    return result;
  }
#endif
  for (int i = 0; i < Width; ++i) {
    result[i] = torch::headeronly::detail::fp16_ieee_to_fp32_value(p[i].bits);
  }
  return result;
}

template <int Width>
PRISMER_INLINE void narrow(float* p, Native<float, Width> value) {
  __builtin_memcpy(p, &value, sizeof(value));
}

// rounds to nearest, ties to even; a NaN is kept, because rounding could carry its bits to infinity
template <int Width>
PRISMER_INLINE void narrow(Bf16* p, Native<float, Width> value) {
  using Bits = Tree<uint32_t, Width, Width>;
  const auto bits = (Native<uint32_t, Width>)value;
  const auto odd = (bits >> 16) & broadcast<Bits>(1u).v;
  const auto rounded = (bits + broadcast<Bits>(0x7fffu).v + odd) >> 16;
  const auto kept = value == value ? rounded : broadcast<Bits>(0x7fc0u).v;
#if defined(__x86_64__)
  if constexpr (Width == 16) {
    asm("vpmovdw %1, %0" : "=m"(*reinterpret_cast<Run<Width>*>(p)) : "v"(kept));
    return;
  }
#endif
  const auto result = __builtin_convertvector(kept, Native<uint16_t, Width>);
  __builtin_memcpy(p, &result, sizeof(result));
}

template <int Width>
PRISMER_INLINE void narrow(FastBf16* p, Native<float, Width> value) {
#if defined(__x86_64__)
  if constexpr (Width == 16) {
    // the instruction flushes denormals to zero: vectors with denormals take the slow path below,
    // so that every instruction set gives the same result
    uint16_t denormal;
    asm("vfpclassps $0x20, %1, %0" : "=k"(denormal) : "v"(value));
    if (__builtin_expect(denormal == 0, 1)) {
      Native<uint16_t, Width> bits;
      asm("vcvtneps2bf16 %1, %0" : "=v"(bits) : "v"(value));
      __builtin_memcpy(p, &bits, sizeof(bits));
      return;
    }
  }
#endif
  narrow<Width>(static_cast<Bf16*>(p), value);
}

template <int Width>
PRISMER_INLINE void narrow(Fp16* p, Native<float, Width> value) {
#if defined(__x86_64__)
  if constexpr (Width > 4) {
    asm("vcvtps2ph $0, %1, %0" : "=m"(*reinterpret_cast<Run<Width>*>(p)) : "v"(value));
    return;
  }
#endif
  for (int i = 0; i < Width; ++i) {
    p[i].bits = torch::headeronly::detail::fp16_ieee_from_fp32_value(value[i]);
  }
}

}  // namespace leaf

// the lanes of a vector that lie in the row: all of them, or the first `count` at its end
struct Full {};
struct Tail {
  int64_t count;
};

template <typename Vector, typename Stored>
PRISMER_INLINE Vector load(const Stored* p, Full = {}) {
  if constexpr (Vector::leaf) {
    return {leaf::widen<sizeof(Vector) / 4>(p)};
  } else {
    using Half = typename Vector::Half;
    return {load<Half>(p), load<Half>(p + sizeof(Half) / 4)};
  }
}

// lanes past the end are zeros
template <typename Vector, typename Stored>
PRISMER_INLINE Vector load(const Stored* p, Tail tail) {
  Stored padded[kLanes] = {};
  for (int64_t i = 0; i < tail.count; ++i) padded[i] = p[i];
  return load<Vector>(padded);
}

template <typename Stored, int Lanes, int Width>
PRISMER_INLINE void store(Stored* p, const Tree<float, Lanes, Width>& value, Full = {}) {
  if constexpr (Lanes == Width) {
    leaf::narrow<Width>(p, value.v);
  } else {
    store(p, value.low);
    store(p + Lanes / 2, value.high);
  }
}

template <typename Stored, typename Vector>
PRISMER_INLINE void store(Stored* p, const Vector& value, Tail tail) {
  Stored padded[kLanes];
  store(padded, value);
  for (int64_t i = 0; i < tail.count; ++i) p[i] = padded[i];
}

// `value`, with zeros in the lanes past the end
template <typename Vector>
PRISMER_INLINE Vector keep(const Vector& value, Full) {
  return value;
}

template <typename Vector>
PRISMER_INLINE Vector keep(const Vector& value, Tail tail) {
  float lanes[kLanes];
  store(lanes, value);
  for (int64_t i = tail.count; i < kLanes; ++i) lanes[i] = 0.0f;
  return load<Vector>(lanes);
}

// calls body(first column, Full or Tail) for every vector of a row
template <typename Body>
PRISMER_INLINE void for_columns(int64_t width, const Body& body) {
  int64_t column = 0;
  for (; column + kLanes <= width; column += kLanes) body(column, Full{});
  if (column < width) body(column, Tail{width - column});
}

// the same, and passes the index of the accumulator to use: with two, an addition need not wait for
// the one before it
template <typename Body>
PRISMER_INLINE void for_columns_in_two(int64_t width, const Body& body) {
  int64_t column = 0;
  for (; column + 2 * kLanes <= width; column += 2 * kLanes) {
    body(column, Full{}, 0);
    body(column + kLanes, Full{}, 1);
  }
  if (column + kLanes <= width) {
    body(column, Full{}, 0);
    column += kLanes;
  }
  if (column < width) body(column, Tail{width - column}, 1);
}

}  // namespace prismer
