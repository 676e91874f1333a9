// The extension prismer._C: schemas and CPU implementations of the native ops. It uses the stable
// ABI of torch, so that one binary serves Python >= 3.10 and torch >= 2.10. The fake
// implementations are beside each op in kernels/.

#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace prismer {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_cpu(
    const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, double eps);
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cpu(
    const Tensor& dy, const std::optional<Tensor>& dtotal, const Tensor& x,
    const std::optional<Tensor>& weight, const Tensor& mean, const Tensor& rstd, bool affine);
Tensor bias_activation_cpu(
    const Tensor& h, const std::optional<Tensor>& bias, const std::string& activation);
Tensor bias_activation_backward_cpu(
    const Tensor& dy, const Tensor& h, const std::optional<Tensor>& bias,
    const std::string& activation);
void logit_statistics_cpu(
    const Tensor& logits, const Tensor& bias, const Tensor& targets, int64_t first, Tensor state);
Tensor philox_kept_cpu(
    const Tensor& seed, int64_t heads, int64_t row, int64_t rows, int64_t keys,
    int64_t threshold);
Tensor label_map_cpu(const Tensor& ids, const Tensor& rows, const Tensor& features, int64_t size);
Tensor label_map_backward_cpu(
    const Tensor& dy, const Tensor& ids, const Tensor& rows, int64_t num_rows);
void attention_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& key_mask,
    bool causal, double scale, Tensor out, Tensor lse);
void attention_backward_cpu(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
    const std::optional<Tensor>& key_mask, const Tensor& out, const Tensor& lse, bool causal,
    double scale, std::optional<Tensor> dq, std::optional<Tensor> dk, std::optional<Tensor> dv);
Tensor decode_attention_cpu(
    const Tensor& q, const Tensor& shared_k, const Tensor& shared_v, const Tensor& shared_mask,
    const Tensor& suffix_k, const Tensor& suffix_v, const Tensor& ancestors);
Tensor few_rows_linear_cpu(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& bias);
void augment_photo_cpu(
    const Tensor& pixels, const std::optional<Tensor>& matrix, bool flip, bool autocontrast,
    bool equalized, Tensor out);
void augment_maps_cpu(
    std::vector<Tensor> maps, std::vector<int64_t> fills, const Tensor& window,
    const std::optional<Tensor>& matrix, bool flip, const std::optional<Tensor>& turn,
    std::vector<Tensor> out);
void undifference_cpu(Tensor rows);
Tensor values_in_use_cpu(const Tensor& values);
std::string cpu_capability();

}  // namespace prismer

// all tensors are contiguous, but for the q, k and v of attention and the x and weight of
// few_rows_linear; the op's file in kernels/ gives shapes and dtypes
STABLE_TORCH_LIBRARY(prismer_native, m) {
  m.def(
      "layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps) -> "
      "(Tensor y, Tensor total, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor? weight, Tensor mean, "
      "Tensor rstd, bool affine) -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def("bias_activation(Tensor h, Tensor? bias, str activation) -> Tensor");
  m.def(
      "bias_activation_backward(Tensor dy, Tensor h, Tensor? bias, str activation) -> Tensor");
  m.def(
      "logit_statistics(Tensor logits, Tensor bias, Tensor targets, int first, Tensor(a!) state) -> "
      "()");
  m.def(
      "philox_kept(Tensor seed, int heads, int row, int rows, int keys, int threshold) -> Tensor");
  m.def("label_map(Tensor ids, Tensor rows, Tensor features, int size) -> Tensor");
  m.def("label_map_backward(Tensor dy, Tensor ids, Tensor rows, int num_rows) -> Tensor");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, bool causal, float scale, "
      "Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor out, "
      "Tensor lse, bool causal, float scale, Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv) -> ()");
  m.def(
      "decode_attention(Tensor q, Tensor shared_k, Tensor shared_v, Tensor shared_mask, "
      "Tensor suffix_k, Tensor suffix_v, Tensor ancestors) -> Tensor");
  m.def("few_rows_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias) -> Tensor");
  // ops of the loader, see dataloading/feed/native_pixels.py
  m.def(
      "augment_photo(Tensor pixels, Tensor? matrix, bool flip, bool autocontrast, bool equalize, "
      "Tensor(a!) out) -> ()");
  m.def(
      "augment_maps(Tensor[] maps, int[] fills, Tensor window, Tensor? matrix, bool flip, "
      "Tensor? turn, Tensor(a!)[] out) -> ()");
  m.def("undifference(Tensor(a!) rows) -> ()");
  m.def("values_in_use(Tensor values) -> Tensor");
  // the instruction set that CPU ops use: baseline, avx2 or avx512
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(prismer_native, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&prismer::layer_norm_cpu));
  m.impl("layer_norm_backward", TORCH_BOX(&prismer::layer_norm_backward_cpu));
  m.impl("bias_activation", TORCH_BOX(&prismer::bias_activation_cpu));
  m.impl("bias_activation_backward", TORCH_BOX(&prismer::bias_activation_backward_cpu));
  m.impl("logit_statistics", TORCH_BOX(&prismer::logit_statistics_cpu));
  m.impl("philox_kept", TORCH_BOX(&prismer::philox_kept_cpu));
  m.impl("label_map", TORCH_BOX(&prismer::label_map_cpu));
  m.impl("label_map_backward", TORCH_BOX(&prismer::label_map_backward_cpu));
  m.impl("attention", TORCH_BOX(&prismer::attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&prismer::attention_backward_cpu));
  m.impl("decode_attention", TORCH_BOX(&prismer::decode_attention_cpu));
  m.impl("few_rows_linear", TORCH_BOX(&prismer::few_rows_linear_cpu));
  m.impl("augment_photo", TORCH_BOX(&prismer::augment_photo_cpu));
  m.impl("augment_maps", TORCH_BOX(&prismer::augment_maps_cpu));
  m.impl("undifference", TORCH_BOX(&prismer::undifference_cpu));
  m.impl("values_in_use", TORCH_BOX(&prismer::values_in_use_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(prismer_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&prismer::cpu_capability));
}

// an empty module: importing it loads this library, which registers the ops above
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
