"""Proves that resampler_projections equals its definition (weight and bias of a norm, concatenation, three products),
forward and every gradient, and that frozen tensors cost nothing.

Run: pytest tests/ops/test_resampler_projections.py
"""

import pytest
import torch
from torch.library import opcheck

from prismer.kernels.dispatch import use_backend
from prismer.kernels.patch.resampler_projections import resampler_projections, resampler_projections_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = ("z", "x_hat", "gamma", "beta", "w_q", "w_k", "w_v")


def draw_tensors(dtype=torch.float64, B=3, M=4, L=7, D=12, I=6, J=5, packed=False, affine="both"):  # noqa: E741
    shapes = (B, M, D), (B, L, D), (D,), (D,), (I, D), (2 * J if packed else J, D), (J, D)
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in zip(NAMES, shapes, strict=True)}
    if packed:
        tensors["w_v"] = None
    if affine != "both":
        tensors["beta"] = None
    if affine == "none":
        tensors["gamma"] = None
    return tensors


def step(op, tensors, trained, dys):
    leaves = {n: None if t is None else t.detach().requires_grad_(n in trained) for n, t in tensors.items()}
    outputs = op(*leaves.values())
    wanted = [n for n in trained if leaves[n] is not None]
    # if only some inputs train, some outputs have no gradient
    used = [(y, dy) for y, dy in zip(outputs, dys, strict=True) if y.requires_grad]
    grads = torch.autograd.grad([y for y, _ in used], [leaves[n] for n in wanted], [dy for _, dy in used])
    return dict(zip("qkv", (y.detach() for y in outputs), strict=True)) | dict(zip(wanted, grads, strict=True))


SUBSETS = (NAMES, ("z",), ("x_hat",), ("gamma",), ("beta",), ("w_q",), ("w_k",), ("z", "beta", "w_v"))


@pytest.mark.parametrize("trained", SUBSETS, ids="-".join)
@pytest.mark.parametrize("affine", ("both", "gamma", "none"))
@pytest.mark.parametrize("packed", (False, True), ids=("separate", "packed"))
@pytest.mark.parametrize("J", (5, 13), ids=("many-inputs", "many-keys"))
def test_resampler_projections_equal_their_definition(J, packed, affine, trained):
    tensors = draw_tensors(packed=packed, affine=affine, J=J)
    if all(tensors[n] is None for n in trained):
        pytest.skip("none of the trained tensors is given")
    dys = [torch.randn_like(y) for y in resampler_projections_reference(*tensors.values())]
    plain = step(resampler_projections_reference, tensors, trained, dys)
    ours = step(resampler_projections, tensors, trained, dys)
    for name, expected in plain.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("packed", (False, True), ids=("separate", "packed"))
@pytest.mark.parametrize("J", (24, 80), ids=("many-inputs", "many-keys"))
def test_resampler_projections_round_no_worse_than_torch(J, packed, dtype, assert_no_worse):
    tensors = draw_tensors(dtype, B=2, M=16, L=65, D=96, I=32, J=J, packed=packed)

    def plain(z, x_hat, gamma, beta, w_q, w_k, w_v):
        # like the original, rounded after every operator
        keys = torch.cat([x_hat * gamma + beta, z], 1)
        w_k, w_v = w_k.chunk(2) if w_v is None else (w_k, w_v)
        return [torch.nn.functional.linear(t, w) for t, w in ((z, w_q), (keys, w_k), (keys, w_v))]

    dys = [torch.randn_like(y) for y in plain(*tensors.values())]
    high = {n: None if t is None else t.double() for n, t in tensors.items()}
    theirs, ours = (step(op, tensors, NAMES, dys) for op in (plain, resampler_projections))
    assert all(value.dtype == dtype for value in ours.values())

    def exact():
        results = step(resampler_projections_reference, high, NAMES, [dy.double() for dy in dys])
        return {name if name in "qkv" else f"d{name}": value for name, value in results.items()}

    named = ({name if name in "qkv" else f"d{name}": t for name, t in f.items()} for f in (ours, theirs))
    assert_no_worse("", *named, exact)


def test_frozen_tensors_are_not_saved():
    tensors = draw_tensors()
    saved = []

    def pack(t):
        saved.append(t.data_ptr())
        return t

    for trained, absent in ((("x_hat",), ("z", "x_hat")), (("gamma",), ("z",)), (("w_q",), ("x_hat",))):
        saved.clear()
        leaves = {n: t.detach().requires_grad_(n in trained) for n, t in tensors.items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            resampler_projections(*leaves.values())
        assert not {leaves[n].data_ptr() for n in absent} & set(saved), trained


def test_strided_inputs_are_taken_and_opcheck_passes():
    tensors = draw_tensors(torch.float32)
    tensors["x_hat"] = torch.randn(3, 12, 7).mT
    tensors["z"] = torch.randn(1, 4, 12).expand(3, -1, -1)
    ours, plain = (op(*tensors.values()) for op in (resampler_projections, resampler_projections_reference))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
    with use_backend("reference"):
        assert torch.equal(resampler_projections(*tensors.values())[1], plain[1])
    trained = [t.detach().requires_grad_() for t in draw_tensors(torch.float32).values()]
    opcheck(torch.ops.prismer.resampler_projections.default, tuple(trained))


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(z=torch.zeros(4, 12)), "z is"),
        (dict(x_hat=torch.zeros(2, 7, 12)), "x_hat is"),
        (dict(gamma=torch.zeros(11)), "gamma is"),
        (dict(w_q=torch.zeros(6, 11)), "q_weight is"),
        (dict(w_v=torch.zeros(4, 12)), "v_weight is"),
        (dict(w_v=None), "w_k has 5 rows"),
    ),
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        resampler_projections(*(draw_tensors(torch.float32) | change).values())
