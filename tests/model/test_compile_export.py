"""Proves that torch.compile and torch.export take the encoder, the loss and the step of beam search whole, with the
results of the eager model. How often each is compiled is proven in test_inference_work.py.

Run: pytest tests/model/test_compile_export.py
"""

import dataclasses
import io
import logging

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from prismer.batch import Batch, TextBatch
from prismer.freezing import freeze
from prismer.text import TextDecoder
from tests.model.test_generation import CONFIG, build_decoder, draw_context, draw_prompts
from tests.model.test_inference_work import begin, draw_images, tiny


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw_batch(config, length=9):
    ids = torch.randint(3, 40, (2, 1, length))
    texts = TextBatch(ids=ids, labels=ids.clone(), weights=torch.tensor([[1.0], [0.5]]))
    return Batch(images=draw_images(config), texts=texts, keys=["a", "b"], meta=[])


def search_of(decoder, dtype=torch.float32, seed=0):
    return begin(decoder, draw_context(2, seed, dtype), draw_prompts([[4], [6]], seed))


def copied(tensors):
    return tree_map(torch.Tensor.clone, tensors)


def assert_same(ours, expected):
    for mine, theirs in zip(tree_leaves(ours), tree_leaves(expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_compiled_model_encodes():
    model = tiny().eval()
    encode = torch.compile(model.encode, fullgraph=True, backend="aot_eager")
    images = draw_images(model.config)
    assert_same(encode(images), model.encode(images))


@pytest.mark.parametrize("mode", (pytest.param("freeze_lang_vision", marks=pytest.mark.long), "none"))
def test_a_compiled_model_has_the_loss_and_gradients_of_the_eager_one(mode):
    """In evaluation mode, so that nothing is drawn."""
    model = tiny().eval()
    freeze(model, mode)
    batch = draw_batch(model.config)
    found = []
    for loss_of in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
        loss = loss_of(batch)
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    (ours, gradients), (expected, theirs) = found
    assert_same(ours, expected)
    assert gradients.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.long
@torch.inference_mode()
def test_a_step_through_inductor():
    """The default backend of torch.compile, with one layer: most of the time is that of the C++ compiler."""
    torch.manual_seed(0)
    decoder = TextDecoder(dataclasses.replace(CONFIG, text_depth=1, init_std=0.3)).eval()
    search, memory, state = search_of(decoder)
    own = copied(memory)
    step = torch.compile(search, fullgraph=True)
    expected = state
    for _ in range(3):
        state, expected = step(own, state), search(memory, expected)
        assert_same(state, expected)
    assert_same(own, memory)


@torch.no_grad()
def test_an_exported_encoder_encodes():
    """It takes the batch itself, and may be saved."""
    model = tiny().eval()
    file = io.BytesIO()
    torch.export.save(torch.export.export(model.encoder, (draw_images(model.config),)), file)
    file.seek(0)
    # torch 2.14 logs a warning there with a wrong format
    logging.raiseExceptions, before = False, logging.raiseExceptions
    try:
        exported = torch.export.load(file).module()
    finally:
        logging.raiseExceptions = before
    images = draw_images(model.config)
    assert_same(exported(images), model.encode(images))


@torch.no_grad()
def test_an_exported_model_has_the_loss_of_the_eager_one():
    model = tiny().eval()
    exported = torch.export.export(model, (draw_batch(model.config),)).module()
    batch = draw_batch(model.config)
    assert_same(exported(batch), model(batch))


@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_an_exported_step_searches(dtype):
    """All steps of another search than the exported one; the caches are written in place."""
    decoder = build_decoder(3, dtype)
    program = torch.export.export(search_of(decoder, dtype)[0], search_of(decoder, dtype)[1:])
    exported = program.module()
    search, memory, state = search_of(decoder, dtype, seed=1)
    own, expected = copied(memory), copied(state)
    for _ in range(5):
        state, expected = exported(own, state), search(memory, expected)
        assert_same(state, expected)
    assert_same(own.keys, memory.keys)
    assert any(node.target is torch.ops.prismer.decode_attention.default for node in program.graph.nodes)
