// The statistics of a chunk of logits that softmax cross entropy needs, taken in one pass while the
// logits are in the cache.

#include <cmath>
#include <limits>

#include "dispatch.h"

namespace prismer {
namespace {

// columns of a block; each is read twice, the second time from the first-level cache
constexpr int64_t kBlock = 4096;
constexpr int64_t kGrain = 65536;

template <typename Stored>
struct Statistics {
  const Stored* logits;  // (rows, columns)
  const float* bias;
  const int64_t* targets;
  // (rows, 4): largest logit, sum of exp(logit - largest), logit of the target, sum of the logits
  float* state;
  int64_t columns, first;

  template <int Width>
  PRISMER_INLINE static void run(const Statistics& job, const int64_t& begin, const int64_t& end) {
    for (int64_t row = begin; row < end; ++row) job.one_row<Floats<Width>>(row);
  }

  template <typename Vector>
  PRISMER_INLINE void one_row(int64_t row) const {
    const Stored* z = logits + row * columns;
    float* out = state + row * 4;
    float largest = out[0];
    // sums of blocks are added in fp64: over a whole vocabulary, fp32 would lose small terms
    double exp_sum = out[1], total = out[3];
    for (int64_t start = 0; start < columns; start += kBlock) {
      const int64_t stop = std::min(columns, start + kBlock);
      const int64_t full = start + (stop - start) / kLanes * kLanes;
      const float before = largest;
      Vector highest = broadcast<Vector>(-std::numeric_limits<float>::infinity());
      Vector lanes = broadcast<Vector>(0.0f);
      for (int64_t c = start; c < full; c += kLanes) {
        const Vector value = load<Vector>(z + c) + load<Vector>(bias + c);
        highest = max(highest, value);
        lanes = lanes + value;
      }
      float lane[kLanes];
      store(lane, highest);
      for (float value : lane) largest = std::max(largest, value);
      double block = sum(lanes);
      for (int64_t c = full; c < stop; ++c) {
        largest = std::max(largest, at<Vector>(z, c));
        block += at<Vector>(z, c);
      }
      total += block;
      // the exponential of vectors limits its argument, and would make finite numbers of these
      if (largest == std::numeric_limits<float>::infinity() || std::isnan(block)) {
        exp_sum = std::numeric_limits<double>::quiet_NaN();
        continue;
      }
      // all logits so far are -inf: the difference below would be NaN
      if (largest == -std::numeric_limits<float>::infinity()) continue;
      exp_sum *= std::exp(static_cast<double>(before) - largest);
      lanes = broadcast<Vector>(0.0f);
      for (int64_t c = start; c < full; c += kLanes) {
        lanes = lanes + exp(load<Vector>(z + c) + load<Vector>(bias + c) - largest);
      }
      exp_sum += sum(lanes);
      for (int64_t c = full; c < stop; ++c) exp_sum += std::exp(at<Vector>(z, c) - largest);
    }
    out[0] = largest;
    out[1] = static_cast<float>(exp_sum);
    out[3] = static_cast<float>(total);
    const int64_t target = targets[row] - first;
    if (target >= 0 && target < columns) out[2] = at<Vector>(z, target);
  }

  template <typename Vector>
  PRISMER_INLINE float at(const Stored* z, int64_t c) const {
    float lane[kLanes];
    store(lane, load<Vector>(z + c, Tail{1}));
    return lane[0] + bias[c];
  }
};

}  // namespace

void logit_statistics_cpu(
    const Tensor& logits, const Tensor& bias, const Tensor& targets, int64_t first,
    Tensor state) {
  constexpr const char* op = "logit_statistics";
  STD_TORCH_CHECK(
      logits.dim() == 2 && is_fp32_or_16(logits), op, ": logits are ", shape_of(logits), " ",
      dtype_of(logits), "; expected (rows, columns) of float32, bfloat16 or float16");
  check_contiguous(op, "logits", logits);
  const int64_t rows = logits.size(0), columns = logits.size(1);
  STD_TORCH_CHECK(
      targets.dim() == 1 && targets.size(0) == rows && targets.scalar_type() == ScalarType::Long,
      op, ": targets are ", shape_of(targets), " ", dtype_of(targets), "; expected (", rows,
      ") of int64");
  check_contiguous(op, "targets", targets);
  STD_TORCH_CHECK(
      state.dim() == 2 && state.size(0) == rows && state.size(1) == 4 &&
          state.scalar_type() == ScalarType::Float,
      op, ": state is ", shape_of(state), " ", dtype_of(state), "; expected (", rows,
      ", 4) of float32");
  check_contiguous(op, "state", state);
  if (columns == 0) return;
  const Affine affine(op, std::nullopt, bias, columns);
  with_stored_type(logits, [&](auto* type) {
    using Stored = Pointee<decltype(type)>;
    using Job = Statistics<Stored>;
    const Job job{
        data<Stored>(logits),        affine.bias(), data<int64_t>(targets),
        mutable_data<float>(state), columns,       first};
    const auto body = runner<Job, Job, int64_t, int64_t>();
    torch::stable::parallel_for(
        0, rows, kGrain / columns + 1,
        [&](int64_t begin, int64_t end) { body(job, begin, end); });
  });
}

}  // namespace prismer
