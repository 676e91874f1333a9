"""Proves that a word table that is both embedding and head gets one gradient, the sum of both uses, and that no second
gradient of its size is formed.

Run: pytest tests/model/test_tied.py
"""

import pytest
import torch
from torch import nn

import prismer.text
from prismer.batch import TextBatch
from prismer.config import prismer_tiny
from prismer.kernels.cross_entropy import linear_cross_entropy
from prismer.kernels.dispatch import use_backend
from prismer.text import TextDecoder
from prismer.tied_embedding import embed_tied
from tests.ops.live_bytes import peak_bytes

V, D, PAD = 50, 8, 1
IDS = torch.tensor([[3, 7, 7, PAD], [7, 49, PAD, PAD]])


@pytest.fixture
def table():
    return nn.Embedding(V, D, padding_idx=PAD, dtype=torch.float64)


def both_uses(embedding, ids=IDS, labels=5):
    """The loss of a head that reads the embedding's rows, both through one node."""
    rows, weight = embed_tied(embedding, ids)
    return head(rows, weight, labels)


def apart(embedding, ids=IDS, labels=5):
    """The same loss, whose two gradients autograd adds."""
    return head(embedding(ids), embedding.weight, labels)


def head(rows, weight, labels):
    hidden = rows.tanh().flatten(0, 1)
    targets = torch.full((len(hidden),), labels)
    return linear_cross_entropy(hidden, weight, weight.new_zeros(len(weight)), targets, reduction="sum")


def gradient(loss, embedding):
    return torch.autograd.grad(loss, embedding.weight)[0]


def test_the_gradient_is_the_sum_of_both_uses(table):
    """With repeated rows, and pads that get no gradient from the look-up but one from the head."""
    ours, plain = gradient(both_uses(table), table), gradient(apart(table), table)
    torch.testing.assert_close(ours, plain)
    # the look-up's part is not zero
    assert not torch.allclose(gradient(head(table(IDS).detach(), table.weight, 5), table), plain)


def test_gradients_of_several_batches_add_up(table):
    """Two graphs in one backward pass, and one graph twice."""
    others = torch.tensor([[9, 3]])
    ours = gradient(both_uses(table) + 2 * both_uses(table, others, 6), table)
    torch.testing.assert_close(ours, gradient(apart(table) + 2 * apart(table, others, 6), table))
    loss = both_uses(table)
    for times in (1, 2):
        loss.backward(retain_graph=times == 1)
        torch.testing.assert_close(table.weight.grad, times * gradient(apart(table), table))


def test_either_use_alone_gets_its_gradient(table):
    rows, _ = embed_tied(table, IDS)
    (alone,) = torch.autograd.grad(rows.square().sum(), table.weight)
    torch.testing.assert_close(alone, gradient(table(IDS).square().sum(), table))
    assert not alone[PAD].any()
    rows, weight = embed_tied(table, IDS)
    apart_too = gradient(head(rows.detach(), table.weight, 5), table)
    torch.testing.assert_close(gradient(head(rows.detach(), weight, 5), table), apart_too)


def test_no_second_gradient_is_formed():
    """Beside the gradient from the step before, a step forms one."""
    embedding = nn.Embedding(20_000, 64, padding_idx=PAD)
    embedding.weight.grad = torch.zeros_like(embedding.weight)
    size = embedding.weight.nbytes
    peaks = {}
    for way in (both_uses, apart):
        way(embedding).backward()
        peaks[way] = peak_bytes(lambda way=way: way(embedding).backward())
    logits = 4 * IDS.numel() * len(embedding.weight)
    assert size <= peaks[both_uses] <= size + 3 * logits < 2 * size <= peaks[apart]


def test_elsewhere_autograd_adds_two_gradients(table):
    """Without gradients, frozen, on another device, or with a backend asked for."""

    def autograd_adds(embedding, ids=IDS):
        rows, weight = embed_tied(embedding, ids)
        return weight is embedding.weight and (rows.is_meta or torch.equal(rows, embedding(ids)))

    assert not autograd_adds(table)
    with torch.no_grad():
        assert autograd_adds(table)
    assert autograd_adds(table.to("meta"), IDS.to("meta"))
    assert autograd_adds(nn.Embedding(V, D).requires_grad_(False))
    with use_backend("torch"):
        assert autograd_adds(nn.Embedding(V, D))


def test_the_decoder_uses_the_tied_embedding(monkeypatch):
    """A training step goes through the node once, and its gradients are those without it."""
    torch.manual_seed(0)
    decoder = TextDecoder(prismer_tiny(dropout=0.0, text_depth=2))
    ids = torch.randint(3, 40, (2, 1, 6))
    ids[1, 0, 4:] = decoder.config.pad_id
    texts = TextBatch(ids=ids, labels=ids.clone(), weights=torch.ones(2, 1))
    context = torch.randn(2, 5, decoder.config.vision_width)

    def step():
        decoder.zero_grad()
        decoder(texts, context).backward()
        return {name: p.grad.clone() for name, p in decoder.named_parameters()}

    calls = []
    monkeypatch.setattr(prismer.text, "embed_tied", lambda *call: calls.append(1) or embed_tied(*call))
    ours = step()
    monkeypatch.setattr(prismer.text, "embed_tied", lambda embedding, ids: (embedding(ids), embedding.weight))
    for name, wanted in step().items():
        torch.testing.assert_close(ours[name], wanted, msg=lambda text, name=name: f"{name}: {text}")
    assert calls == [1]
