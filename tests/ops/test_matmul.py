"""Proves that products are the same on oneDNN and on torch's own library, and that the processor decides between them.

Run: pytest tests/ops/test_matmul.py
"""

import pytest
import torch
import torch.nn.functional as F

from prismer.costs.counting import CostCounter
from prismer.kernels import matmul
from prismer.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from prismer.kernels.dispatch import use_backend
from prismer.kernels.linear import linears
from prismer.kernels.mlp import mlp

pytestmark = pytest.mark.cpu

INTEL = "vendor_id : GenuineIntel\nflags : avx2 avx512f\n"
AMD = "vendor_id : AuthenticAMD\nflags : avx2 avx512f\n"


@pytest.fixture(params=(True, False), ids=("onednn", "torch"))
def library(request, monkeypatch):
    """Use this library, regardless of the processor."""
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch gives no access to oneDNN's product")
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: request.param)
    return request.param


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


@pytest.mark.parametrize(
    ("cpuinfo", "asked", "expected"),
    ((AMD, "auto", True), (INTEL, "auto", False), (AMD.replace("avx512f", ""), "auto", False), (AMD, "torch", False)),
)
def test_the_processor_decides(monkeypatch, tmp_path, cpuinfo, asked, expected):
    file = tmp_path / "cpuinfo"
    file.write_text(cpuinfo)
    monkeypatch.setattr(matmul, "Path", lambda name: file)
    monkeypatch.setattr(matmul, "_asked", asked)
    matmul.onednn_is_faster.cache_clear()
    try:
        known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        assert matmul.onednn_is_faster() == (expected and known)
    finally:
        monkeypatch.undo()
        matmul.onednn_is_faster.cache_clear()


def test_onednn_multiplies_fp32_with_data_alone(monkeypatch):
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    assert matmul.on_onednn(torch.randn(2, 2))
    assert not matmul.on_onednn(torch.randn(2, 2, dtype=torch.float64))
    assert not matmul.on_onednn(torch.randn(2, 2, dtype=torch.bfloat16))
    assert not matmul.on_onednn(torch.randn(2, 2, device="meta"))
