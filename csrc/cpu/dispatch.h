// Shared by the CPU kernels: the choice of an instruction set and of a type, and checks of tensors.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>

#include "vector_math.h"

namespace prismer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- instruction sets ---------------------------------------------------------------------------

enum class Isa { baseline, avx2, avx512 };

inline Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return Isa::avx2;
  }
#endif
  return Isa::baseline;
}

// the best instruction set of this machine, or a lower one chosen with the environment variable
// PRISMER_CPU_ISA
inline Isa isa() {
  static const Isa best = best_isa();
  const char* asked = std::getenv("PRISMER_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return best;
  const std::string_view name = asked;
  const Isa chosen = name == "avx512" ? Isa::avx512 : name == "avx2" ? Isa::avx2 : Isa::baseline;
  STD_TORCH_CHECK(
      chosen != Isa::baseline || name == "baseline", "PRISMER_CPU_ISA is '", asked,
      "'; choose baseline, avx2 or avx512, or leave it unset");
  STD_TORCH_CHECK(
      chosen <= best, "PRISMER_CPU_ISA is '", asked, "', which this processor does not have");
  return chosen;
}

// The next three functions compile a kernel for one instruction set each: Kernel::run<Width> is
// inlined into them, together with everything that it calls.
template <typename Kernel, typename... Args>
void run_baseline(const Args&... args) {
  Kernel::template run<4>(args...);
}

#if defined(__x86_64__)
template <typename Kernel, typename... Args>
[[gnu::target("avx2,fma,f16c")]] void run_avx2(const Args&... args) {
  Kernel::template run<8>(args...);
}

template <typename Kernel, typename... Args>
[[gnu::target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")]] void
run_avx512(const Args&... args) {
  Kernel::template run<16>(args...);
}
#endif

template <typename Kernel, typename... Args>
using Runner = void (*)(const Args&...);

// the function to call with (Args...); an op chooses it once and calls it in every thread
template <typename Kernel, typename... Args>
Runner<Kernel, Args...> runner() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512:
      return &run_avx512<Kernel, Args...>;
    case Isa::avx2:
      return &run_avx2<Kernel, Args...>;
    case Isa::baseline:
      break;
  }
#else
  isa();
#endif
  return &run_baseline<Kernel, Args...>;
}

// ---- tensors ------------------------------------------------------------------------------------

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ')';
  return text.str();
}

inline const char* dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    default:
      return "of another dtype";
  }
}

inline void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.is_contiguous(), op, ": ", name, " ", shape_of(tensor),
      " is not contiguous; call .contiguous() first");
}

inline bool is_fp32_or_16(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

template <typename Stored>
const Stored* data(const Tensor& tensor) {
  return static_cast<const Stored*>(tensor.const_data_ptr());
}

template <typename Stored>
Stored* mutable_data(const Tensor& tensor) {
  return static_cast<Stored*>(tensor.mutable_data_ptr());
}

// A small output (n,). Bypasses torch's dispatcher, which takes longer than normalising a row.
inline Tensor new_small(int64_t n, int32_t dtype) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      1, &n, &stride, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor new_floats(int64_t n) { return new_small(n, aoti_torch_dtype_float32()); }

// what an op returns for an optional output that the caller did not ask for
inline Tensor nothing_like(const Tensor& tensor) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return new_small(0, dtype);
}

template <typename Pointer>
using Pointee = std::remove_pointer_t<Pointer>;

// calls `body` with a null pointer to the stored type of `tensor`: float, Bf16, FastBf16 or Fp16
template <typename Body>
void with_stored_type(const Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return body(static_cast<float*>(nullptr));
    case ScalarType::BFloat16:
#if defined(__x86_64__)
      if (isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16")) {
        return body(static_cast<FastBf16*>(nullptr));
      }
#endif
      return body(static_cast<Bf16*>(nullptr));
    default:
      return body(static_cast<Fp16*>(nullptr));
  }
}

// an uninitialised array of fp32, aligned to a cache line so that no vector crosses one
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<float*>(::operator new(count * sizeof(float), kLine))) {}

  float* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(float* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<float, Free> data_;
};

struct Widen {
  template <int Width, typename Stored>
  PRISMER_INLINE static void run(float* out, const Stored* in, int64_t count) {
    for_columns(count, [&](int64_t c, auto part) __attribute__((always_inline)) {
      store(out + c, load<Floats<Width>>(in + c, part), part);
    });
  }
};

// weight and bias of a row, converted to fp32 from any stored type; by default ones and zeros
class Affine {
 public:
  Affine(
      const char* op, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
      int64_t width)
      : weight_(widened(op, "weight", weight, width, 1.0f)),
        bias_(widened(op, "bias", bias, width, 0.0f)) {}

  const float* weight() const { return weight_.data(); }
  const float* bias() const { return bias_.data(); }

 private:
  static Buffer widened(
      const char* op, const char* name, const std::optional<Tensor>& given, int64_t width,
      float otherwise) {
    Buffer result(width);
    if (!given) {
      std::fill_n(result.data(), width, otherwise);
      return result;
    }
    STD_TORCH_CHECK(
        given->dim() == 1 && given->size(0) == width && is_fp32_or_16(*given), op, ": ", name,
        " is ", shape_of(*given), " ", dtype_of(*given), "; expected (", width,
        ") of float32, bfloat16 or float16");
    check_contiguous(op, name, *given);
    with_stored_type(*given, [&](auto* type) {
      const auto* stored = data<Pointee<decltype(type)>>(*given);
      runner<Widen, float*, decltype(stored), int64_t>()(result.data(), stored, width);
    });
    return result;
  }

  Buffer weight_, bias_;
};

}  // namespace prismer
