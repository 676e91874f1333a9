// The extension prismer._C_cuda: the native ops of csrc/ops.cpp for CUDA tensors, on the stable ABI
// of torch. Each op checks its arguments, allocates its results and launches on torch's current
// stream; none waits for the device.

#include <Python.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "launchers.h"

namespace prismer {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kInt = 0x7fffffff;  // the limit of 32-bit indices and of a grid

std::string text_of(const std::vector<int64_t>& shape) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << ')';
  return text.str();
}

std::vector<int64_t> shape_of(const Tensor& tensor) {
  std::vector<int64_t> shape(tensor.dim());
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = tensor.size(i);
  return shape;
}

Element element_of(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kHalf;
    default:
      STD_TORCH_CHECK(
          false, op, ": ", name, " has an unknown dtype; convert it to float32, 16 or bfloat16");
  }
}

// the checks of one op; every argument must be on the device of the first one
struct Check {
  const char* op;
  const Tensor& first;

  void operator()(
      const char* name, const Tensor& tensor, const std::vector<int64_t>& shape,
      std::optional<ScalarType> type = {}) const {
    STD_TORCH_CHECK(
        shape_of(tensor) == shape, op, ": ", name, " is ", text_of(shape_of(tensor)),
        "; expected ", text_of(shape));
    STD_TORCH_CHECK(
        !type || tensor.scalar_type() == *type, op, ": ", name,
        " is in another dtype than this argument takes; see the op's room in prismer.kernels");
    STD_TORCH_CHECK(
        tensor.is_contiguous(), op, ": ", name, " is not contiguous; call .contiguous() first");
    STD_TORCH_CHECK(
        tensor.is_cuda() && tensor.get_device_index() == first.get_device_index(), op, ": ", name,
        " is on another device than the first argument; move them to one");
  }

  void operator()(
      const char* name, const Optional& tensor, const std::vector<int64_t>& shape,
      std::optional<ScalarType> type = {}) const {
    if (tensor) (*this)(name, *tensor, shape, type);
  }
};

const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
const void* data(const Optional& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T = void>
T* out(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Tensor floats(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

// makes the device of a tensor the current one, and holds that device's stream
struct Stream {
  explicit Stream(const Tensor& tensor) : guard(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  }

  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};

void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(
      error == 0, op, ": CUDA refused the launch with error ", error,
      "; run with CUDA_LAUNCH_BLOCKING=1, or ask for another backend");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(
    const Tensor& x, const Optional& residual, const Optional& weight, const Optional& bias,
    double eps) {
  constexpr const char* op = "layer_norm";
  STD_TORCH_CHECK(x.dim() == 2, op, ": x has ", x.dim(), " dimensions; expected (rows, width)");
  const int64_t rows = x.size(0), width = x.size(1);
  const Check check{op, x};
  check("x", x, {rows, width});
  check("residual", residual, {rows, width}, x.scalar_type());
  check("weight", weight, {width});
  check("bias", bias, {width});
  STD_TORCH_CHECK(rows <= kInt, op, ": x has ", rows, " rows; at most ", kInt, " are served");
  const Stream stream(x);
  const Tensor y = torch::stable::empty_like(x);
  const Tensor total =
      residual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  const Tensor mean = floats(x, {rows}), rstd = floats(x, {rows});
  const LayerNorm args{
      .x = data(x),
      .residual = data(residual),
      .weight = data(weight),
      .bias = data(bias),
      .type = element_of(op, "x", x),
      .weight_type = weight ? element_of(op, "weight", *weight) : Element::kFloat,
      .bias_type = bias ? element_of(op, "bias", *bias) : Element::kFloat,
      .y = out(y),
      .total = residual ? out(total) : nullptr,
      .mean = out<float>(mean),
      .rstd = out<float>(rstd),
      .rows = rows,
      .width = width,
      .eps = static_cast<float>(eps)};
  check_launch(op, layer_norm_cuda(args, stream.stream));
  return {y, total, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& dy, const Optional& dtotal, const Tensor& x, const Optional& weight,
    const Tensor& mean, const Tensor& rstd, bool affine) {
  constexpr const char* op = "layer_norm_backward";
  STD_TORCH_CHECK(x.dim() == 2, op, ": x has ", x.dim(), " dimensions; expected (rows, width)");
  const int64_t rows = x.size(0), width = x.size(1);
  const Check check{op, x};
  check("x", x, {rows, width});
  check("dy", dy, {rows, width}, x.scalar_type());
  check("dtotal", dtotal, {rows, width}, x.scalar_type());
  check("weight", weight, {width});
  check("mean", mean, {rows}, ScalarType::Float);
  check("rstd", rstd, {rows}, ScalarType::Float);
  STD_TORCH_CHECK(rows <= kInt, op, ": x has ", rows, " rows; at most ", kInt, " are served");
  const Stream stream(x);
  const Tensor dx = torch::stable::empty_like(x);
  const Tensor dweight = floats(x, {affine ? width : 0}), dbias = floats(x, {affine ? width : 0});
  const Tensor partial = floats(x, {affine ? layer_norm_parts(rows) : 0, 2, width});
  const LayerNormBackward args{
      .dy = data(dy),
      .dtotal = data(dtotal),
      .x = data(x),
      .weight = data(weight),
      .type = element_of(op, "x", x),
      .weight_type = weight ? element_of(op, "weight", *weight) : Element::kFloat,
      .mean = data<float>(mean),
      .rstd = data<float>(rstd),
      .dx = out(dx),
      .dweight = affine ? out<float>(dweight) : nullptr,
      .dbias = affine ? out<float>(dbias) : nullptr,
      .partial = out<float>(partial),
      .rows = rows,
      .width = width};
  check_launch(op, layer_norm_backward_cuda(args, stream.stream));
  return {dx, dweight, dbias};
}

// positions are computed in 32 bits
void check_map(const char* op, const Tensor& ids, int64_t size, int64_t width, int64_t num_rows) {
  const int64_t side = ids.size(1) > ids.size(2) ? ids.size(1) : ids.size(2);
  STD_TORCH_CHECK(
      size >= 1 && ids.size(1) >= 1 && ids.size(2) >= 1, op, ": cannot resize a map of ",
      text_of(shape_of(ids)), " to side ", size, "; both need at least one pixel");
  STD_TORCH_CHECK(
      size <= kInt / side && size <= kInt / (width + 1) && num_rows <= kInt &&
          ids.size(0) <= kInt / size,
      op, ": ids ", text_of(shape_of(ids)), " to side ", size, " with ", num_rows, " rows of ",
      width, " numbers exceed 2^31; split the batch");
}

Tensor label_map(const Tensor& ids, const Tensor& rows, const Tensor& features, int64_t size) {
  constexpr const char* op = "label_map";
  STD_TORCH_CHECK(
      ids.dim() == 3 && features.dim() == 2, op, ": ids are ", text_of(shape_of(ids)),
      " and features ", text_of(shape_of(features)), "; expected (B, h, w) and (F, C)");
  const int64_t batch = ids.size(0), h = ids.size(1), w = ids.size(2);
  const int64_t num_rows = features.size(0), width = features.size(1);
  const Check check{op, ids};
  check("ids", ids, {batch, h, w}, ScalarType::Byte);
  check("rows", rows, {batch, 256}, ScalarType::Long);
  check("features", features, {num_rows, width});
  check_map(op, ids, size, width, num_rows);
  const Stream stream(ids);
  const Tensor result = torch::stable::new_empty(features, {batch, size, size, width});
  const LabelMap args{
      .ids = data<uint8_t>(ids),
      .rows = data<int64_t>(rows),
      .features = data(features),
      .out = out(result),
      .type = element_of(op, "features", features),
      .batch = batch,
      .h = h,
      .w = w,
      .size = size,
      .width = width,
      .num_rows = num_rows};
  check_launch(op, label_map_cuda(args, stream.stream));
  return result;
}

Tensor label_map_backward(
    const Tensor& dy, const Tensor& ids, const Tensor& rows, int64_t num_rows) {
  constexpr const char* op = "label_map_backward";
  STD_TORCH_CHECK(
      ids.dim() == 3 && dy.dim() == 4, op, ": ids are ", text_of(shape_of(ids)), " and dy ",
      text_of(shape_of(dy)), "; expected (B, h, w) and (B, size, size, C)");
  const int64_t batch = ids.size(0), h = ids.size(1), w = ids.size(2);
  const int64_t size = dy.size(1), width = dy.size(3);
  const Check check{op, ids};
  check("ids", ids, {batch, h, w}, ScalarType::Byte);
  check("rows", rows, {batch, 256}, ScalarType::Long);
  check("dy", dy, {batch, size, size, width});
  check_map(op, ids, size, width, num_rows);
  const Stream stream(ids);
  const Tensor dfeatures = floats(dy, {num_rows, width});
  const Tensor partial =
      floats(dy, {label_map_parts(batch * size, num_rows, width), num_rows, width});
  const LabelMapBackward args{
      .ids = data<uint8_t>(ids),
      .rows = data<int64_t>(rows),
      .dy = data(dy),
      .dfeatures = out<float>(dfeatures),
      .partial = out<float>(partial),
      .type = element_of(op, "dy", dy),
      .batch = batch,
      .h = h,
      .w = w,
      .size = size,
      .width = width,
      .num_rows = num_rows};
  check_launch(op, label_map_backward_cuda(args, stream.stream));
  return dfeatures;
}

// a copy if the tensor is not aligned: a contiguous view may start anywhere, but the kernel moves
// 16 bytes at a time
Tensor at_16_bytes(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(data(tensor)) % 16 ? torch::stable::clone(tensor) : tensor;
}

Tensor decode_attention(
    const Tensor& q_any, const Tensor& shared_k_any, const Tensor& shared_v_any,
    const Tensor& shared_mask, const Tensor& suffix_k_any, const Tensor& suffix_v_any,
    const Tensor& ancestors) {
  constexpr const char* op = "decode_attention";
  STD_TORCH_CHECK(
      q_any.dim() == 4 && shared_k_any.dim() == 4 && suffix_k_any.dim() == 4 &&
          shared_mask.dim() == 3 && ancestors.dim() == 3,
      op, ": expected q, shared and suffix of 4 dimensions, mask and ancestors of 3; see its room");
  const int64_t rows = q_any.size(0), heads = q_any.size(1), queries = q_any.size(2);
  const int64_t head = q_any.size(3), keys = shared_k_any.size(2), slots = suffix_k_any.size(2);
  const int64_t mask_queries = shared_mask.size(1), num_ancestors = ancestors.size(2);
  const auto type = q_any.scalar_type();
  const Check check{op, q_any};
  check("q", q_any, {rows, heads, queries, head});
  check("shared_k", shared_k_any, {rows, heads, keys, head}, type);
  check("shared_v", shared_v_any, {rows, heads, keys, head}, type);
  check("suffix_k", suffix_k_any, {rows, heads, slots, head}, type);
  check("suffix_v", suffix_v_any, {rows, heads, slots, head}, type);
  check(
      "shared_mask", shared_mask, {rows, mask_queries == 1 ? 1 : queries, keys}, ScalarType::Bool);
  check("ancestors", ancestors, {rows, queries, num_ancestors}, ScalarType::Long);
  const Stream stream(q_any);
  const Tensor q = at_16_bytes(q_any);
  const Tensor shared_k = at_16_bytes(shared_k_any), shared_v = at_16_bytes(shared_v_any);
  const Tensor suffix_k = at_16_bytes(suffix_k_any), suffix_v = at_16_bytes(suffix_v_any);
  const Tensor result = torch::stable::new_empty(q, {rows, queries, heads, head});
  const int64_t splits = decode_attention_splits(keys, slots, num_ancestors);
  const Tensor partial_out = floats(q, {splits, rows, heads, queries, head});
  const Tensor partial_max = floats(q, {splits, rows, heads, queries});
  const Tensor partial_sum = floats(q, {splits, rows, heads, queries});
  const DecodeAttention args{
      .q = data(q),
      .shared_k = data(shared_k),
      .shared_v = data(shared_v),
      .mask = data<uint8_t>(shared_mask),
      .suffix_k = data(suffix_k),
      .suffix_v = data(suffix_v),
      .ancestors = data<int64_t>(ancestors),
      .out = out(result),
      .partial_out = out<float>(partial_out),
      .partial_max = out<float>(partial_max),
      .partial_sum = out<float>(partial_sum),
      .type = element_of(op, "q", q),
      .rows = rows,
      .heads = heads,
      .queries = queries,
      .head = head,
      .keys = keys,
      .mask_queries = mask_queries,
      .slots = slots,
      .num_ancestors = num_ancestors};
  const char* refused = decode_attention_refused(args);
  STD_TORCH_CHECK(refused == nullptr, op, ": ", refused ? refused : "");
  check_launch(op, decode_attention_cuda(args, stream.stream));
  return result;
}

}  // namespace
}  // namespace prismer

STABLE_TORCH_LIBRARY_IMPL(prismer_native, CUDA, m) {
  m.impl("layer_norm", TORCH_BOX(&prismer::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&prismer::layer_norm_backward));
  m.impl("label_map", TORCH_BOX(&prismer::label_map));
  m.impl("label_map_backward", TORCH_BOX(&prismer::label_map_backward));
  m.impl("decode_attention", TORCH_BOX(&prismer::decode_attention));
}

// an empty module: importing it loads this library, which registers the ops above
PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
