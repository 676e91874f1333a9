"""Proves that products are the same on oneDNN and on torch's own library, and that the processor decides between them.

Run: pytest tests/ops/test_matmul.py
"""

import pytest
import torch
import torch.nn.functional as F

from prismer.costs.counting import CostCounter
from prismer.kernels import matmul, tuning
from prismer.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from prismer.kernels.dispatch import use_backend
from prismer.kernels.linear import linears
from prismer.kernels.mlp import mlp
from prismer.kernels.tuning import tables

pytestmark = pytest.mark.cpu


@pytest.fixture(params=(True, False), ids=("onednn", "torch"))
def library(request):
    """Use this library, regardless of the processor."""
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch gives no access to oneDNN's product")
    with use_backend("linear:onednn" if request.param else "linear:torch"):
        yield request.param


@pytest.mark.parametrize("shape", ((1, 7, 5), (3, 64, 48), (0, 4, 3), (4, 0, 3), (33, 17, 100)), ids=str)
@pytest.mark.parametrize("bias", (True, False))
def test_linear(library, shape, bias, assert_no_worse):
    M, N, K = shape
    x, weight, offset = torch.randn(M, K), torch.randn(N, K), 5 * torch.randn(N) if bias else None
    high = x.double(), weight.double(), None if offset is None else offset.double()
    assert_no_worse("y", matmul.linear(x, weight, offset), F.linear(x, weight, offset), lambda: F.linear(*high))


def test_operands_may_have_any_strides(library):
    """Transposed, sliced and expanded operands, and more than two dimensions."""
    a, b, wide = torch.randn(6, 5), torch.randn(6, 9), torch.randn(4, 30)[:, 3:9]
    exact = {"dtype": torch.float64}
    for ours, theirs in (
        (matmul.mm(a.T, b), a.to(**exact).T @ b.to(**exact)),
        (matmul.mm(wide, b), wide.to(**exact) @ b.to(**exact)),
        (matmul.linear(wide, a.T[:, :6]), wide.to(**exact) @ a.to(**exact)),
        (matmul.linear(torch.ones(1, 6).expand(3, -1), a.T), torch.ones(3, 6, **exact) @ a.to(**exact)),
        (matmul.linear(torch.ones(2, 3, 6), a.T), torch.ones(2, 3, 6, **exact) @ a.to(**exact)),
    ):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs.float())


def test_ops_that_consist_of_products(library):
    """Every gradient of them too."""
    x = torch.randn(7, 12, dtype=torch.float64)
    shapes = ((20, 12), (20,), (12, 20), (12,), (50, 12), (50,))
    weights = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    labels = torch.randint(50, (7,))

    def run(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, *weights)]
        t, fc, fc_bias, proj, proj_bias, head, head_bias = leaves
        hidden = mlp(t, fc, fc_bias, proj, proj_bias, activation="quick_gelu")
        both = linears(hidden, [(proj @ fc, proj_bias), (fc, None)])
        loss = linear_cross_entropy(both[0], head, head_bias, labels, reduction="mean") + both[1].square().mean()
        return loss, *torch.autograd.grad(loss, leaves)

    with use_backend("reference"):
        expected = run(torch.float64)
    for ours, truth in zip(run(torch.float32), expected, strict=True):
        torch.testing.assert_close(ours, truth.float(), rtol=1e-4, atol=1e-4 * truth.abs().max().item())


def test_loss_without_gradients(library):
    x, weight, bias, labels = torch.randn(9, 8), torch.randn(300, 8), torch.randn(300), torch.randint(300, (9,))
    with torch.no_grad():
        ours = linear_cross_entropy(x, weight, bias, labels)
    torch.testing.assert_close(ours, linear_cross_entropy_reference(x, weight, bias, labels))


def test_the_counter_counts_both_libraries_alike(library):
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    with CostCounter() as counter:
        linears(x, [(weight, None)])
    assert counter.flops == 2 * 3 * 5 * 8


def library_of(dtype=torch.float32, rows=3):
    matmul._pick.cache_clear()
    try:
        return matmul.library_of(torch.empty(rows, 8, dtype=dtype), 4)
    finally:
        matmul._pick.cache_clear()


@pytest.mark.parametrize(
    ("vendor", "flags", "slow"),
    (("AuthenticAMD", "avx2 avx512f", True), ("GenuineIntel", "avx2 avx512f", False), ("AuthenticAMD", "avx2", False)),
)
def test_the_processor_decides_until_it_is_measured(monkeypatch, vendor, flags, slow):
    monkeypatch.setattr(tables, "_cpu", lambda: dict(device=f"{vendor} 26 68", instructions=flags))
    assert library_of() == ("onednn" if slow and hasattr(torch.ops.mkldnn, "_linear_pointwise") else "torch")


def test_a_measured_choice_precedes_the_processor(monkeypatch):
    for slow, choice in ((True, "torch"), (False, "onednn")):
        monkeypatch.setattr(matmul, "mkl_is_slow", lambda slow=slow: slow)
        with tuning.forcing({("linear", torch.float32, False, (4, 8, 4)): choice}):
            assert library_of() == choice
            assert library_of(rows=5) == ("onednn" if slow else "torch")


def test_onednn_multiplies_fp32_with_data_alone(monkeypatch):
    monkeypatch.setattr(matmul, "mkl_is_slow", lambda: True)
    assert library_of() == "onednn"
    assert library_of(torch.float64) == "torch" == library_of(torch.bfloat16)
    assert matmul.library_of(torch.empty(3, 8, device="meta"), 4) == "torch"
    with torch.backends.mkldnn.flags(enabled=False):
        assert library_of() == "torch"
