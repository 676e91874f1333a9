"""Proves that a patched `nn.MultiheadAttention` equals torch's, for every mask, layout and kind of cross-attention, and
that it runs its original forward for the calls that the fused attention does not serve.

Run: pytest tests/ops/test_patch_multihead_attention.py
"""

import copy

import pytest
import torch
from torch import nn

from prismer.kernels.patch import apply_to
from tests.ops.patching import assert_same, randomise, step

B, T, D = 2, 7, 32
CAUSAL = torch.full((T, T), float("-inf")).triu(1)
PADDING = torch.zeros(B, T, dtype=torch.bool)
PADDING[0, 5:] = True
MASK_OF_HEADS = torch.randn(B * 4, T, T, generator=torch.Generator().manual_seed(5))
CALLS = {
    # name: options of the module, options of the call, whether the call is fused
    "self": ({}, {}, True),
    "sequence_first": (dict(batch_first=False), {}, True),
    "no_bias": (dict(bias=False), {}, True),
    "causal_float": ({}, dict(attn_mask=CAUSAL), True),
    "causal_bool": ({}, dict(attn_mask=CAUSAL < 0), True),
    "causal_promised": ({}, dict(attn_mask=CAUSAL, is_causal=True), True),
    "mask_of_heads": ({}, dict(attn_mask=MASK_OF_HEADS), True),
    "mask_of_heads_sequence_first": (dict(batch_first=False), dict(attn_mask=MASK_OF_HEADS), True),
    "padded": ({}, dict(key_padding_mask=PADDING), True),
    "padded_sequence_first": (dict(batch_first=False), dict(key_padding_mask=PADDING), True),
    "padded_floats": ({}, dict(key_padding_mask=torch.randn(B, T)), False),
    "padded_and_causal": ({}, dict(key_padding_mask=PADDING, attn_mask=CAUSAL < 0), False),
    "weights": ({}, dict(need_weights=True), False),
    "weights_of_heads": ({}, dict(need_weights=True, average_attn_weights=False), False),
    "dropout": (dict(dropout=0.4), {}, False),
}


def build_pair(**options):
    plain = randomise(nn.MultiheadAttention(D, 4, **{"batch_first": True, **options}))
    patched = copy.deepcopy(plain)
    apply_to(patched)
    return plain, patched


@pytest.mark.parametrize("name", CALLS)
def test_self_attention_equals_torchs(name, count_calls):
    options, call, is_fused = CALLS[name]
    plain, patched = build_pair(**options)
    x = torch.randn(B, T, D) if plain.batch_first else torch.randn(T, B, D)

    def run(module):
        def forward(x):
            torch.manual_seed(3)
            return module(x, x, x, **{"need_weights": False, **call})

        return forward

    for mode in (True, False):
        patched.train(mode), plain.train(mode)
        assert_same(step(patched, dict(x=x), run(patched)), step(plain, dict(x=x), run(plain)))
    patched.train()
    with count_calls() as calls:
        run(patched)(x)
    assert ("prismer::linears" in calls) == is_fused


@pytest.mark.parametrize("form", ("cross", "key_is_not_value", "other_widths", "unbatched", "cross_causal"))
def test_cross_attention_equals_torchs(form):
    options = dict(kdim=24, vdim=24) if form == "other_widths" else {}
    plain, patched = build_pair(**options)
    inputs = dict(query=torch.randn(B, T, D), key=torch.randn(B, 5, 24 if options else D))
    if form == "key_is_not_value":
        inputs["value"] = torch.randn(B, 5, D)
    if form == "unbatched":
        inputs = {name: x[0] for name, x in inputs.items()}
    extra = dict(attn_mask=torch.zeros(T, 5), is_causal=True) if form == "cross_causal" else {}

    def run(module):
        return lambda query, key, value=None: module(
            query, key, key if value is None else value, need_weights=False, **extra
        )

    assert_same(step(patched, inputs, run(patched)), step(plain, inputs, run(plain)))


def test_a_sample_that_is_all_padding_gives_what_torch_gives():
    """Zeros or NaN, as its version decides."""
    plain, patched = build_pair()
    x, mask = torch.randn(B, T, D), torch.zeros(B, T, dtype=torch.bool)
    mask[1] = True
    got, expected = (m(x, x, x, key_padding_mask=mask, need_weights=False)[0] for m in (patched, plain))
    torch.testing.assert_close(got, expected, equal_nan=True)
