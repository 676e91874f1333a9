// The extension prismer._C: schemas of the native ops and their registration, on the stable ABI of
// torch, so that one binary serves Python >= 3.10 and torch >= 2.10. Fake implementations live
// beside each op in kernels/.

#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace prismer {

torch::stable::Tensor label_map_cpu(
    const torch::stable::Tensor& ids, const torch::stable::Tensor& rows,
    const torch::stable::Tensor& features, int64_t size);

}  // namespace prismer

STABLE_TORCH_LIBRARY(prismer, m) {
  m.def("label_map(Tensor ids, Tensor rows, Tensor features, int size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(prismer, CPU, m) {
  m.impl("label_map", TORCH_BOX(&prismer::label_map_cpu));
}

// importing the module is what loads the library above; it has no Python contents of its own
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
