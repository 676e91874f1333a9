"""Proves that attention over a context is its definition, forward and every gradient, in both orders: with dropout, in
several dtypes and layouts; that its FLOPs are those of the formula; and how many bytes it saves.

Run: pytest tests/ops/test_cross_attention.py
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from prismer.costs.counting import CostCounter
from prismer.kernels.cross_attention import cheaper_order, cross_attention, cross_attention_reference, flops
from prismer.kernels.dispatch import use_backend
from prismer.kernels.philox import survivors
from tests.ops.live_bytes import kept_bytes

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASES = {  # B, N, L, D, E, H, dropout, biases
    "one": (1, 1, 1, 4, 4, 1, 0.0, True),
    "caption": (3, 5, 23, 24, 24, 3, 0.0, True),
    "narrow-context": (2, 4, 17, 32, 20, 4, 0.25, True),
    "wide-context": (2, 7, 9, 16, 40, 2, 0.25, True),
    "no-bias": (2, 3, 11, 16, 16, 2, 0.25, False),
}
NAMES = ("q", "context", "k_weight", "k_bias", "v_weight", "v_bias")
SEED = torch.tensor([-0x123456789ABCDEF])


def draw(B, N, L, D, E, H, dropout, biases):
    """Tensors by name, float64, and the options of the call."""
    shapes = dict(q=(B, N, D), context=(B, L, E), k_weight=(D, E), k_bias=(D,), v_weight=(D, E), v_bias=(D,))
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for name in ("k_weight", "v_weight"):
        tensors[name] *= E**-0.5
    tensors["context"] += 0.3
    if not biases:
        tensors["k_bias"] = tensors["v_bias"] = None
    return tensors, dict(num_heads=H, dropout=dropout, seed=SEED if dropout else None)


def plain(q, context, k_weight, k_bias, v_weight, v_bias, num_heads, dropout, seed):
    """What a user would write, in the dtype of the tensors."""

    def heads(x):
        return x.unflatten(2, (num_heads, -1)).transpose(1, 2)

    k, v = heads(F.linear(context, k_weight, k_bias)), heads(F.linear(context, v_weight, v_bias))
    q = heads(q)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    if dropout:
        B, H, N, L = weights.shape
        weights = weights * survivors(seed, B, H, 0, N, L, dropout) / (1 - dropout)
    return (weights @ v).transpose(1, 2).flatten(2)


def results(op, tensors, dout, dtype, frozen=(), **options):
    leaves = {
        name: None if t is None else t.detach().to(dtype).requires_grad_(name not in frozen)
        for name, t in tensors.items()
    }
    out = op(**leaves, **options)
    trained = {name: leaf for name, leaf in leaves.items() if leaf is not None and name not in frozen}
    grads = torch.autograd.grad(out, list(trained.values()), dout.to(dtype))
    return {"out": out.detach(), **{"d" + name: g for name, g in zip(trained, grads, strict=True)}}


@pytest.mark.parametrize("order", ("absorbed", "ordinary"))
@pytest.mark.parametrize("case", CASES)
def test_both_orders_are_the_definition(case, order):
    """In float64; the gradient of the keys' bias is zero up to rounding."""
    tensors, options = draw(*CASES[case])
    dout = torch.randn_like(tensors["q"])
    wanted = results(plain, tensors, dout, torch.float64, **options)
    for op, choice in ((cross_attention, dict(order=order)), (cross_attention_reference, {})):
        got = results(op, tensors, dout, torch.float64, **options, **choice)
        assert got.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_low_precision(case, dtype, assert_no_worse):
    tensors, options = draw(*CASES[case])
    low = {name: None if t is None else t.to(dtype) for name, t in tensors.items()}
    dout = torch.randn(low["q"].shape).to(dtype)
    got = results(cross_attention, low, dout, dtype, **options, order="absorbed")
    expected = results(plain, low, dout, dtype, **options)
    assert all(value.dtype == dtype for value in got.values())
    if "dk_bias" in got:
        assert not got.pop("dk_bias").any()
    assert_no_worse("", got, expected, lambda: results(plain, low, dout, torch.float64, **options), factor=2.0)


@pytest.mark.parametrize("dropout", (0.0, 0.25))
def test_frozen_arguments(dropout):
    """For every set of frozen arguments the other gradients do not change, and FLOPs are those of the formula."""
    B, N, L, D, E, H = 2, 3, 7, 8, 12, 2
    tensors, options = draw(B, N, L, D, E, H, dropout, True)
    dout = torch.randn_like(tensors["q"])
    everything = results(cross_attention, tensors, dout, torch.float64, **options, order="absorbed")
    for n in range(len(NAMES)):
        for frozen in itertools.combinations(NAMES, n):
            with CostCounter() as counter:
                got = results(cross_attention, tensors, dout, torch.float64, frozen, **options, order="absorbed")
            for name, value in got.items():
                torch.testing.assert_close(value, everything[name])
            grads = set(NAMES) - set(frozen)
            assert counter.flops == flops("absorbed", B, N, L, D, E, H, grads), frozen


@pytest.mark.parametrize("frozen", ((), ("q",), ("context",), ("k_weight", "v_weight"), NAMES[:5]), ids=str)
def test_flops_of_the_ordinary_order(frozen):
    """Attention runs on torch's operators; its backward pass forms the scores again."""
    B, N, L, D, E, H = 2, 3, 7, 8, 12, 2
    tensors, options = draw(B, N, L, D, E, H, 0.0, True)
    with use_backend("torch"), CostCounter() as counter:
        results(cross_attention, tensors, torch.ones(B, N, D), torch.float64, frozen, **options, order="ordinary")
    assert counter.flops == flops("ordinary", B, N, L, D, E, H, set(NAMES) - set(frozen))


@pytest.mark.cpu
def test_which_order_is_chosen():
    """Absorbed for few queries on a CPU; ordinary for many queries, on other devices and for other backends."""
    B, L, D, H = 2, 40, 64, 4
    for N, order in ((2, "absorbed"), (40, "ordinary")):
        assert cheaper_order(B, N, L, D, D, H, NAMES) == order
        tensors, options = draw(B, N, L, D, D, H, 0.0, True)
        tensors = {name: t.float().requires_grad_() for name, t in tensors.items()}
        for backend, absorbed in ((None, order == "absorbed"), ("torch", order == "absorbed"), ("sdpa", False)):
            with use_backend(backend), CostCounter() as counter:
                cross_attention(**tensors, **options)
            assert ("prismer::cross_attention" in counter.issued) == absorbed, (N, backend)
    meta = {name: t.to("meta") for name, t in tensors.items()}
    with CostCounter() as counter:
        cross_attention(**(meta | dict(q=meta["q"][:, :2])), **options)
    assert "prismer::cross_attention" not in counter.issued
    # a caption of 20 tokens at BASE, as in the docstring
    for L, ratio in ((964, 0.38), (260, 0.43)):
        absorbed, ordinary = (flops(order, 1, 20, L, 768, 768, 12, NAMES) for order in ("absorbed", "ordinary"))
        assert abs(absorbed / ordinary - ratio) < 0.02


def test_without_a_seed_torchs_generator_decides():
    tensors, options = draw(*CASES["wide-context"])
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(cross_attention(**tensors, **(options | dict(seed=None)), order="absorbed"))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.cpu
def test_saved_bytes():
    """Queries and probabilities are saved, but no keys, values or mask; nothing without gradients."""
    B, N, L, D, H = 2, 4, 50, 32, 4
    tensors, options = draw(B, N, L, D, D, H, 0.25, True)
    tensors = {name: t.float().requires_grad_() for name, t in tensors.items()}
    call = dict(**tensors, **options, order="absorbed")
    cross_attention(**call)
    assert kept_bytes(lambda: cross_attention(**call)) == 4 * (B * N * D + B * H * N * L)
    with torch.no_grad():
        assert kept_bytes(lambda: cross_attention(**call)) == 4 * B * N * D


def test_layouts():
    """A transposed context, queries that are a slice, an expanded gradient."""
    tensors, options = draw(*CASES["caption"])
    dense = results(cross_attention, tensors, torch.ones_like(tensors["q"]), torch.float64, **options, order="absorbed")
    q, context = tensors["q"], tensors["context"]
    tensors["q"] = torch.cat([q, q], 1)[:, : q.shape[1]]
    tensors["context"] = context.transpose(0, 1).contiguous().transpose(0, 1)
    got = results(
        cross_attention,
        tensors,
        torch.ones((), dtype=torch.float64).expand(q.shape),
        torch.float64,
        **options,
        order="absorbed",
    )
    for name, value in dense.items():
        torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize(("B", "N", "L"), ((0, 2, 3), (2, 0, 3), (2, 2, 0)))
@pytest.mark.parametrize("order", (None, "absorbed"))
def test_no_images_queries_or_tokens(B, N, L, order):
    tensors, options = draw(B, N, L, 8, 8, 2, 0.0, True)
    for name, value in results(cross_attention, tensors, tensors["q"], torch.float64, **options, order=order).items():
        assert not value.isnan().any() and not value[..., :0].any(), name
        assert not value.any() or name == "out"


def test_compiled():
    """One graph serves several sizes and gives the same gradients."""
    compiled = torch.compile(cross_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for N in (2, 4, 5):
        tensors, options = draw(6, N, 40, 24, 24, 3, 0.25, True)
        dout = torch.randn_like(tensors["q"])
        with torch._dynamo.config.patch(error_on_recompile=N > 2):
            got = results(compiled, tensors, dout, torch.float64, **options)
        for name, value in results(cross_attention, tensors, dout, torch.float64, **options).items():
            torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize("keep", (False, True))
def test_opcheck(keep):
    tensors, options = draw(*CASES["narrow-context"])
    tensors = [t.float().requires_grad_(keep) for t in tensors.values()]
    arguments = *tensors, SEED, options["num_heads"], options["dropout"], keep
    opcheck(torch.ops.prismer.cross_attention.default, arguments)


@pytest.mark.parametrize("needs", ((True,) * 6, (True, False, False, True, True, False)), ids=str)
def test_opcheck_backward(needs):
    tensors, options = draw(*CASES["narrow-context"])
    q, context, k_weight, _, v_weight, v_bias = (t.float() for t in tensors.values())
    probs = torch.rand(q.shape[0], options["num_heads"] * q.shape[1], context.shape[1])
    saved = q, context, k_weight, v_weight, v_bias, SEED, probs, options["num_heads"], options["dropout"]
    opcheck(torch.ops.prismer.cross_attention_backward.default, (torch.randn_like(q), *saved, list(needs)))


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(q=torch.zeros(2, 3)), "q is torch.float32 of shape"),
        (dict(context=torch.zeros(3, 4, 8)), "context is torch.float32 of shape"),
        (dict(k_weight=torch.zeros(7, 8)), "key_weight is"),
        (dict(v_bias=torch.zeros(7)), "value_bias is"),
        (dict(num_heads=3), "divisor of the width 8"),
        (dict(dropout=1.0), "below 1"),
        (dict(order="fast"), "'absorbed', 'ordinary'"),
    ),
)
def test_bad_arguments(change, message):
    tensors, options = draw(2, 3, 4, 8, 8, 2, 0.0, True)
    tensors = {name: t.float() for name, t in tensors.items()}
    with pytest.raises(ValueError, match=message):
        cross_attention(**(tensors | options | change))
