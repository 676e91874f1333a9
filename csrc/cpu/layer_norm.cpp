// LayerNorm on the CPU, with an optional residual added first. Formulas: shared/norm.h. A row is
// read three times (mean, variance, output) but fits the first-level cache, so only the first read
// goes to memory. Statistics and sums are fp32.

#include <tuple>

#include "../shared/norm.h"
#include "dispatch.h"

namespace prismer {
namespace {

// a thread gets at least this many numbers: waking it for fewer does not pay
constexpr int64_t kGrain = 32768;

// dweight and dbias are summed over the rows of each of this many blocks, then over the blocks: the
// order does not depend on the number of threads
constexpr int64_t kBlocks = 64;

template <typename Stored>
struct Forward {
  const Stored* x;
  const Stored* residual;  // or null
  const float* weight;     // weight and bias are ones and zeros if there is no affine
  const float* bias;
  Stored* y;
  Stored* total;
  float* mean;
  float* rstd;
  int64_t width;
  float eps;

  template <int Width>
  PRISMER_INLINE static void run(const Forward& job, const int64_t& begin, const int64_t& end) {
    for (int64_t row = begin; row < end; ++row) job.one_row<Floats<Width>>(row);
  }

  template <typename Vector>
  PRISMER_INLINE void one_row(int64_t row) const {
    const Stored* in = x + row * width;
    Vector lanes[2] = {broadcast<Vector>(0.0f), broadcast<Vector>(0.0f)};
    if (residual != nullptr) {
      const Stored* added = residual + row * width;
      Stored* out = total + row * width;
      for_columns_in_two(width, [&](int64_t c, auto part, int i) __attribute__((always_inline)) {
        store(out + c, load<Vector>(in + c, part) + load<Vector>(added + c, part), part);
        // load the rounded sum: the op normalises exactly the total that it returns
        lanes[i] = lanes[i] + load<Vector>(out + c, part);
      });
      in = out;
    } else {
      for_columns_in_two(width, [&](int64_t c, auto part, int i) __attribute__((always_inline)) {
        lanes[i] = lanes[i] + load<Vector>(in + c, part);
      });
    }
    const float row_mean = sum(lanes[0] + lanes[1]) / static_cast<float>(width);
    lanes[0] = lanes[1] = broadcast<Vector>(0.0f);
    for_columns_in_two(width, [&](int64_t c, auto part, int i) __attribute__((always_inline)) {
      const Vector distance = keep(load<Vector>(in + c, part) - row_mean, part);
      lanes[i] = lanes[i] + distance * distance;
    });
    const float row_rstd = rstd_of(sum(lanes[0] + lanes[1]), width, eps);
    for_columns(width, [&](int64_t c, auto part) __attribute__((always_inline)) {
      const Vector x_hat = normalised(load<Vector>(in + c, part), row_mean, row_rstd);
      const auto w = load<Vector>(weight + c, part), b = load<Vector>(bias + c, part);
      store(y + row * width + c, affine(x_hat, w, b), part);
    });
    mean[row] = row_mean;
    rstd[row] = row_rstd;
  }
};

template <typename Stored>
struct Backward {
  const Stored* dy;
  const Stored* dtotal;  // or null
  const Stored* x;
  const float* weight;
  const float* mean;
  const float* rstd;
  Stored* dx;
  float* sums;  // (blocks, 2, width), zeros at first: dweight and dbias of each block; or null
  int64_t rows, width, block_rows;

  template <int Width>
  PRISMER_INLINE static void run(const Backward& job, const int64_t& begin, const int64_t& end) {
    for (int64_t block = begin; block < end; ++block) {
      float* dweight = job.sums == nullptr ? nullptr : job.sums + block * 2 * job.width;
      const int64_t last = std::min(job.rows, (block + 1) * job.block_rows);
      for (int64_t row = block * job.block_rows; row < last; ++row) {
        job.one_row<Floats<Width>>(row, dweight);
      }
    }
  }

  template <typename Vector>
  PRISMER_INLINE void one_row(int64_t row, float* dweight) const {
    const Stored* in = x + row * width;
    const Stored* grad = dy + row * width;
    const float row_mean = mean[row], row_rstd = rstd[row];
    const Vector zero = broadcast<Vector>(0.0f);
    Vector lanes_g[2] = {zero, zero}, lanes_gx[2] = {zero, zero};
    float* dbias = dweight + width;
    for_columns_in_two(width, [&](int64_t c, auto part, int i) __attribute__((always_inline)) {
      const auto grad_here = load<Vector>(grad + c, part);
      // dy and weight load as zeros past the end of a row, so x_hat needs no mask there
      const Vector x_hat = normalised(load<Vector>(in + c, part), row_mean, row_rstd);
      const Vector g = grad_here * load<Vector>(weight + c, part);
      lanes_g[i] = lanes_g[i] + g;
      lanes_gx[i] = lanes_gx[i] + g * x_hat;
      if (dweight != nullptr) {
        store(dweight + c, load<Vector>(dweight + c, part) + grad_here * x_hat, part);
        store(dbias + c, load<Vector>(dbias + c, part) + grad_here, part);
      }
    });
    const float mean_g = sum(lanes_g[0] + lanes_g[1]) / static_cast<float>(width);
    const float mean_gx = sum(lanes_gx[0] + lanes_gx[1]) / static_cast<float>(width);
    for_columns(width, [&](int64_t c, auto part) __attribute__((always_inline)) {
      const Vector x_hat = normalised(load<Vector>(in + c, part), row_mean, row_rstd);
      // mean_g is the mean of rounded products; round here too, so that g - mean_g is exactly 0 if
      // all g are equal
      const Vector g = rounded(load<Vector>(grad + c, part) * load<Vector>(weight + c, part));
      Vector out = input_gradient(g, x_hat, mean_g, mean_gx, row_rstd);
      if (dtotal != nullptr) out = out + load<Vector>(dtotal + row * width + c, part);
      store(dx + row * width + c, out, part);
    });
  }
};

// adds the sums of all blocks, in their order
struct Reduce {
  const float* sums;
  float* dweight;
  float* dbias;
  int64_t blocks, width;

  template <int Width>
  PRISMER_INLINE static void run(const Reduce& job) {
    for_columns(job.width, [&](int64_t c, auto part) __attribute__((always_inline)) {
      auto dweight = broadcast<Floats<Width>>(0.0f), dbias = dweight;
      for (int64_t block = 0; block < job.blocks; ++block) {
        const float* here = job.sums + block * 2 * job.width + c;
        dweight = dweight + load<Floats<Width>>(here, part);
        dbias = dbias + load<Floats<Width>>(here + job.width, part);
      }
      store(job.dweight + c, dweight, part);
      store(job.dbias + c, dbias, part);
    });
  }
};

void check_like_x(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(
      tensor.dim() == 2 && tensor.size(0) == x.size(0) && tensor.size(1) == x.size(1) &&
          tensor.scalar_type() == x.scalar_type(),
      op, ": ", name, " is ", shape_of(tensor), " ", dtype_of(tensor), "; expected ", shape_of(x),
      " ", dtype_of(x), " like x");
  check_contiguous(op, name, tensor);
}

void check_x(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(
      x.dim() == 2 && x.size(1) >= 1 && is_fp32_or_16(x), op, ": x is ", shape_of(x), " ",
      dtype_of(x), "; expected (rows, width >= 1) of float32, bfloat16 or float16");
  check_contiguous(op, "x", x);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_cpu(
    const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, double eps) {
  constexpr const char* op = "layer_norm";
  check_x(op, x);
  if (residual) check_like_x(op, "residual", *residual, x);
  const int64_t rows = x.size(0), width = x.size(1);
  const Affine affine(op, weight, bias, width);
  const Tensor y = torch::stable::new_empty(x, {rows, width});
  const Tensor total =
      residual ? torch::stable::new_empty(x, {rows, width}) : nothing_like(x);
  const Tensor mean = new_floats(rows);
  const Tensor rstd = new_floats(rows);
  with_stored_type(x, [&](auto* type) {
    using Stored = Pointee<decltype(type)>;
    const Forward<Stored> job{
        data<Stored>(x),
        residual ? data<Stored>(*residual) : nullptr,
        affine.weight(),
        affine.bias(),
        mutable_data<Stored>(y),
        mutable_data<Stored>(total),
        mutable_data<float>(mean),
        mutable_data<float>(rstd),
        width,
        static_cast<float>(eps)};
    const auto body = runner<Forward<Stored>, Forward<Stored>, int64_t, int64_t>();
    torch::stable::parallel_for(
        0, rows, kGrain / width + 1,
        [&](int64_t begin, int64_t end) { body(job, begin, end); });
  });
  return {y, total, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cpu(
    const Tensor& dy, const std::optional<Tensor>& dtotal, const Tensor& x,
    const std::optional<Tensor>& weight, const Tensor& mean, const Tensor& rstd, bool affine) {
  constexpr const char* op = "layer_norm_backward";
  check_x(op, x);
  check_like_x(op, "dy", dy, x);
  if (dtotal) check_like_x(op, "dtotal", *dtotal, x);
  const int64_t rows = x.size(0), width = x.size(1);
  for (const auto* statistic : {&mean, &rstd}) {
    STD_TORCH_CHECK(
        statistic->dim() == 1 && statistic->size(0) == rows &&
            statistic->scalar_type() == ScalarType::Float,
        op, ": mean or rstd is ", shape_of(*statistic), " ", dtype_of(*statistic), "; expected (",
        rows, ") float32 as layer_norm returned them");
    check_contiguous(op, "mean or rstd", *statistic);
  }
  const Affine scale(op, weight, std::nullopt, width);
  const Tensor dx = torch::stable::new_empty(x, {rows, width});
  const int64_t affine_width = affine ? width : 0;
  const Tensor dweight = new_floats(affine_width);
  const Tensor dbias = new_floats(affine_width);
  const int64_t block_rows = rows / kBlocks + 1;
  const int64_t blocks = (rows + block_rows - 1) / block_rows;
  const Buffer sums(affine ? blocks * 2 * width : 0);
  std::fill_n(sums.data(), affine ? blocks * 2 * width : 0, 0.0f);
  with_stored_type(x, [&](auto* type) {
    using Stored = Pointee<decltype(type)>;
    const Backward<Stored> job{
        data<Stored>(dy),
        dtotal ? data<Stored>(*dtotal) : nullptr,
        data<Stored>(x),
        scale.weight(),
        data<float>(mean),
        data<float>(rstd),
        mutable_data<Stored>(dx),
        affine ? sums.data() : nullptr,
        rows,
        width,
        block_rows};
    const auto body = runner<Backward<Stored>, Backward<Stored>, int64_t, int64_t>();
    torch::stable::parallel_for(
        0, blocks, kGrain / (width * block_rows) + 1,
        [&](int64_t begin, int64_t end) { body(job, begin, end); });
  });
  if (affine) {
    runner<Reduce, Reduce>()(
        {sums.data(), mutable_data<float>(dweight), mutable_data<float>(dbias), blocks, width});
  }
  return {dx, dweight, dbias};
}

}  // namespace prismer
