// Bias and activation on the CPU, forward and backward; formulas in shared/activation.h.

#include "../shared/activation.h"

#include "dispatch.h"

namespace prismer {
namespace {

constexpr int64_t kGrain = 32768;

template <typename Stored, typename Activation, bool Gradient>
struct Epilogue {
  const Stored* dy;  // used with Gradient only
  const Stored* h;
  const float* bias;  // zeros where there is none
  Stored* out;
  int64_t width;

  static constexpr bool full = std::is_same_v<Stored, float>;

  template <int Width>
  PRISMER_INLINE static void run(const Epilogue& job, const int64_t& begin, const int64_t& end) {
    using Vector = Floats<Width>;
    const float* bias = job.bias;
    for (int64_t row = begin; row < end; ++row) {
      const Stored* h = job.h + row * job.width;
      const Stored* dy = job.dy + row * job.width;
      Stored* out = job.out + row * job.width;
      for_columns(job.width, [=](int64_t c, auto part) __attribute__((always_inline)) {
        const Vector x = load<Vector>(h + c, part) + load<Vector>(bias + c, part);
        if constexpr (Gradient) {
          const auto slope = Activation::template derivative<full>(x);
          store(out + c, load<Vector>(dy + c, part) * slope, part);
        } else {
          store(out + c, Activation::template value<full>(x), part);
        }
      });
    }
  }
};

template <typename Body>
void with_activation(const char* op, const std::string& activation, const Body& body) {
  if (activation == "quick_gelu") return body(QuickGelu{});
  if (activation == "gelu") return body(Gelu{});
  if (activation == "squared_relu") return body(SquaredRelu{});
  STD_TORCH_CHECK(
      false, op, ": activation is '", activation, "'; choose quick_gelu, gelu or squared_relu");
}

template <bool Gradient>
Tensor epilogue(
    const char* op, const Tensor* dy, const Tensor& h, const std::optional<Tensor>& bias,
    const std::string& activation) {
  STD_TORCH_CHECK(
      h.dim() == 2 && h.size(1) >= 1 && is_fp32_or_16(h), op, ": h is ", shape_of(h), " ",
      dtype_of(h), "; expected (rows, width >= 1) of float32, bfloat16 or float16");
  check_contiguous(op, "h", h);
  const int64_t rows = h.size(0), width = h.size(1);
  if constexpr (Gradient) {
    STD_TORCH_CHECK(
        dy->dim() == 2 && dy->size(0) == rows && dy->size(1) == width &&
            dy->scalar_type() == h.scalar_type(),
        op, ": dy is ", shape_of(*dy), " ", dtype_of(*dy), "; expected ", shape_of(h), " ",
        dtype_of(h), " like h");
    check_contiguous(op, "dy", *dy);
  }
  const Affine affine(op, std::nullopt, bias, width);
  const Tensor out = torch::stable::new_empty(h, {rows, width});
  with_activation(op, activation, [&](auto formula) {
    with_stored_type(h, [&](auto* type) {
      using Stored = Pointee<decltype(type)>;
      using Job = Epilogue<Stored, decltype(formula), Gradient>;
      const Job job{
          Gradient ? data<Stored>(*dy) : nullptr, data<Stored>(h), affine.bias(),
          mutable_data<Stored>(out), width};
      const auto body = runner<Job, Job, int64_t, int64_t>();
      torch::stable::parallel_for(
          0, rows, kGrain / width + 1,
          [&](int64_t begin, int64_t end) { body(job, begin, end); });
    });
  });
  return out;
}

}  // namespace

Tensor bias_activation_cpu(
    const Tensor& h, const std::optional<Tensor>& bias, const std::string& activation) {
  return epilogue<false>("bias_activation", nullptr, h, bias, activation);
}

Tensor bias_activation_backward_cpu(
    const Tensor& dy, const Tensor& h, const std::optional<Tensor>& bias,
    const std::string& activation) {
  return epilogue<true>("bias_activation_backward", &dy, h, bias, activation);
}

}  // namespace prismer
