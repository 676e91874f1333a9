"""Proves the architecture: exact parameter counts and freeze modes of the published models, the tokens of the encoder,
and the training loss and its gradients. Run: pytest tests/model/test_model.py"""

import dataclasses

import pytest
import torch

import prismer.text
from prismer.batch import Batch, ImageBatch, TextBatch
from prismer.config import PrismerConfig, preset, prismer_base, prismer_tiny
from prismer.experts import EXPERTS
from prismer.freezing import freeze
from prismer.model import Prismer
from prismer.texts import collate
from tests.model.teacher_forcing import plain_text_losses, text_losses

TOTALS = {
    "base": (327_468_729, 153_123_936, 174_344_793),
    "base-z": (274_335_321, 99_990_528, 174_344_793),
    "large": (967_146_713, 447_897_728, 519_248_985),
    "large-z": (872_856_665, 353_607_680, 519_248_985),
    "huge": (1_414_786_297, 882_954_400, 531_831_897),
    "huge-z": (1_267_616_857, 735_784_960, 531_831_897),
}
# in the order of MODES
TRAINABLE = {
    "base": (327_468_729, 242_414_265, 242_414_265, 157_359_801),
    "base-z": (274_335_321, 189_280_857, 189_280_857, 104_226_393),
    "large": (967_146_713, 664_837_337, 664_837_337, 362_527_961),
    "large-z": (872_856_665, 570_547_289, 570_547_289, 268_237_913),
    "huge": (1_414_786_297, 1_112_476_921, 785_108_217, 482_798_841),
    "huge-z": (1_267_616_857, 965_307_481, 637_938_777, 335_629_401),
}
MODES = ("none", "freeze_lang", "freeze_vision", "freeze_lang_vision")


def build(config: PrismerConfig) -> Prismer:
    with torch.device("meta"):
        return Prismer(config)


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", TOTALS)
def test_parameter_counts_are_the_published_ones(name):
    model = build(preset(name))
    assert (count(model), count(model.encoder), count(model.decoder)) == TOTALS[name]
    for mode, expected in zip(MODES, TRAINABLE[name], strict=True):
        freeze(model, mode)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected, mode


@pytest.mark.parametrize(
    "name, size, grid",
    [("base", 480, 30), ("base", 384, 24), ("large", 480, 34), ("large", 384, 27), ("huge", 224, 16)],
)
def test_token_counts(name, size, grid):
    config = preset(name, image_size=size)
    assert config.grid == grid
    assert config.num_context_tokens == grid**2 + 64
    assert config.label_grid == (14 if name == "base" else 16)


def test_parameter_counts_of_the_parts():
    model = build(prismer_base())
    stems = model.encoder.stems
    assert count(stems["rgb"]) == 589_824
    assert count(stems["depth"]) == count(stems["edge"]) == 4_077_216
    assert count(stems["normal"]) == 4_078_944
    assert count(stems["seg"]) == count(stems["obj_detection"]) == count(stems["ocr_detection"]) == 4_131_648
    assert count(model.encoder.resampler) == 28_406_784
    assert count(model.decoder.extra) == 7_087_872
    assert count(model.decoder.head) == 642_393


def test_stems_have_no_biases_and_there_is_no_class_token():
    model = build(prismer_base())
    assert not [n for n, _ in model.encoder.stems.named_parameters() if "bias" in n and "norms" not in n]
    assert model.encoder.positional_embedding.shape == (196, 768)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    config = prismer_tiny(
        vision_depth=2,
        text_depth=2,
        vision_width=32,
        text_width=32,
        text_mlp_width=64,
        image_size=64,
        label_size=64,
        vocab_size=40,
    )
    model = Prismer(config)
    for p in model.parameters():
        # large enough that forgetting one shows
        torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else torch.nn.init.normal_(p, mean=0.5, std=0.5)
    return model.eval()


def make_images(config, seed=0, batch=2):
    g = torch.Generator().manual_seed(seed)
    rgb = torch.randint(0, 256, (batch, 3, config.image_size, config.image_size), generator=g, dtype=torch.uint8)
    labels, rows = {}, {}
    for name in config.experts:
        shape = (batch, EXPERTS[name].planes, config.label_size, config.label_size)
        high = 6 if EXPERTS[name].is_ids else 256
        labels[name] = torch.randint(0, high, shape, generator=g, dtype=torch.uint8)
        if EXPERTS[name].is_ids:
            rows[name] = torch.randint(0, 9, (batch, 256), generator=g)
    return ImageBatch(rgb=rgb, labels=labels, rows=rows, features=torch.randn(9, 64, generator=g))


def test_every_expert_counts_and_their_order_does_not(tiny):
    """The context has RGB tokens and latents; it depends on each expert's labels, not on the experts' order."""
    images = make_images(tiny.config)
    context = tiny.encode(images)
    assert context.shape == (2, tiny.config.num_context_tokens, 32)
    config = tiny.config.replace(experts=tuple(reversed(tiny.config.experts)))
    other = Prismer(config).eval()
    other.load_state_dict(tiny.state_dict())
    torch.testing.assert_close(other.encode(images), context, rtol=2e-4, atol=2e-4)
    for name in tiny.config.experts:
        changed = make_images(tiny.config)
        changed.labels[name] = changed.labels[name].flip(-1)
        assert (tiny.encode(changed) - context).abs().max() > 1e-3, name


def test_every_parameter_reaches_the_loss(tiny):
    """No bias, norm or table is forgotten: every parameter has a gradient."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (2, 3, 7), generator=g)
    ids[..., 0] = 0
    ids[0, 0, 5:] = 1
    ids[1, 1, 3] = 1
    labels = torch.where(ids.eq(1), -100, ids)
    batch = Batch(
        images=make_images(tiny.config),
        keys=["a", "b"],
        meta=[{}, {}],
        texts=TextBatch(ids=ids, labels=labels, weights=torch.rand(2, 3, generator=g)),
    )
    tiny.train()
    tiny(batch).backward()
    silent = [n for n, p in tiny.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # a key's bias shifts every score of a query alike and cancels in the softmax
    assert [n for n in silent if not n.endswith(("key.bias",))] == []


def test_instance_rows_are_deterministic_and_used(tiny):
    images = make_images(tiny.config)
    context = tiny.encode(images)
    torch.testing.assert_close(tiny.encode(images), context, rtol=0, atol=0)
    images.instance_rows = torch.arange(256) % 128
    torch.testing.assert_close(tiny.encode(images), context, rtol=0, atol=0)
    images.instance_rows = torch.arange(256).flip(0) % 128
    assert (tiny.encode(images) - context).abs().max() > 1e-4


def test_texts_of_an_image_do_not_see_each_other(tiny):
    """G texts packed for an image have the losses of one text at a time."""
    context = tiny.encode(make_images(tiny.config))
    ids = torch.randint(3, 40, (2, 3, 6))
    ids[..., 0] = 0
    together = text_losses(tiny.decoder, TextBatch(ids=ids, labels=ids, weights=torch.ones(2, 3)), context)
    for b in range(2):
        for g in range(3):
            one = ids[b : b + 1, g : g + 1]
            alone = tiny.decoder(TextBatch(ids=one, labels=one, weights=torch.ones(1, 1)), context[b : b + 1])
            torch.testing.assert_close(together[b, g], alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("split", [0, 1, 3])
def test_packed_parts_have_the_losses_of_the_padded_whole(tiny, split):
    """Captions and questions, each part as wide as its own longest text; losses and gradients are the same."""
    draw = torch.Generator().manual_seed(3)
    groups = [
        [
            ([0, *ids[:2], 1, *ids[2:]], [-100, *ids[:2], -100, *ids[2:]], 1.0)
            for length in row
            for ids in [torch.randint(3, 40, (length,), generator=draw).tolist()]
        ]
        for row in ((9, 4, 5), (12, 3, 6))
    ]
    packed, padded = collate(groups, split=split), collate(groups)
    padded.lengths, padded.packing = (), None
    in_parts = dataclasses.replace(packed, packing=None)
    assert [ids.shape[2] for ids, _ in packed.parts()] == ([14, 8] if split == 1 else [14])
    # 51 tokens, and one pad for all
    assert packed.packing.tokens.shape == (52,)
    found = []
    for texts in (packed, padded, in_parts):
        context = tiny.encode(make_images(tiny.config)).detach().requires_grad_()
        losses = text_losses(tiny.decoder, texts, context)
        tiny.zero_grad()
        (losses * torch.tensor([[1.0, 2.0, 3.0], [-1.0, 5.0, 0.5]])).sum().backward()
        grads = {n: p.grad for n, p in tiny.decoder.named_parameters()}
        found.append({"losses": losses.detach(), "dcontext": context.grad, **grads})
    for name, ours in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(ours, other[name], rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def question(length, weight=1.0, start=3):
    """A text of `length` tokens, the last two of which are targets."""
    ids = [0, *range(start, start + length - 1)]
    return ids, [-100] * (length - 2) + ids[-2:], weight


def test_the_decoder_computes_tokens_alone_and_its_last_layer_targets_alone(tiny):
    """The rows that each layer sees: tokens and one pad; a row an image in cross-attention; targets at the end."""
    texts = collate([[question(12), question(5), question(6)], [question(9), question(4)]], split=1)
    seen = {}
    for name, module in tiny.decoder.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: tuple(out.shape[:2])}))
    tiny.decoder(texts, torch.randn(2, 5, 32))
    # 36 tokens, the `<s>` of the missing text, and a pad; two targets for each of five texts
    assert seen["layers.0.mlp"] == seen["layers.1.attention"] == seen["layers.1.cross"] == (1, 38)
    assert seen["extra.attention"] == seen["extra.mlp"] == seen["head"] == (1, 10)
    packing = texts.packing
    assert packing.rows.shape == (2, 24) and packing.rows[1].tolist()[14:] == [37] * 10
    assert packing.slots[packing.tokens].tolist() == list(range(38))
    assert packing.rows.flatten()[packing.places].tolist() == list(range(38))
    # on a GPU every slot is computed
    assert texts.to("meta").packing is None and texts.to("cpu").packing is not None


def test_texts_of_one_length_are_not_packed(tiny):
    """With little padding nothing is moved; the last layer still computes targets alone."""
    for groups in ([[question(9)], [question(9)]], [[question(10)] * 2, [question(9), question(10)]]):
        texts = collate(groups)
        assert texts.packing.tokens is texts.packing.rows is None
        assert len(texts.packing.targets) == 2 * sum(map(len, groups))
        context = torch.randn(2, 5, 32)
        plain = (texts.weights * plain_text_losses(tiny.decoder, texts, context)).mean()
        torch.testing.assert_close(tiny.decoder(texts, context), plain, rtol=1e-4, atol=1e-4)


def test_texts_without_targets_have_no_loss(tiny):
    """A batch of ignored labels is worth 0 and gives gradients of zero."""
    groups = [[([0, 3, 4, 5], [-100] * 4, 1.0), ([0], [-100], 1.0)]] * 2
    loss = tiny.decoder(collate(groups), torch.randn(2, 5, 32))
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in tiny.decoder.parameters())


@pytest.mark.parametrize("split", [0, 1])
def test_training_loss_is_the_weighted_mean_of_the_texts(tiny, split):
    """It is mean(weight * summed loss) by torch's own cross entropy, in value and every gradient."""
    draw = torch.Generator().manual_seed(4)
    groups = [
        [
            ([0, *ids], [-100, *ids], weight)
            for length, weight in row
            for ids in [torch.randint(3, 40, (length,), generator=draw).tolist()]
        ]
        for row in (((9, 0.3), (4, 2.0), (5, 0.0)), ((12, 1.0), (3, 0.7)))
    ]
    batch = Batch(images=make_images(tiny.config), texts=collate(groups, split=split), keys=["a", "b"], meta=[{}, {}])
    found = []
    for loss in (
        lambda: tiny(batch),
        lambda: (batch.texts.weights * plain_text_losses(tiny.decoder, batch.texts, tiny.encode(batch.images))).mean(),
    ):
        tiny.zero_grad()
        value = loss()
        value.backward()
        found.append({"loss": value.detach(), **{n: p.grad for n, p in tiny.named_parameters()}})
    for name, ours in found[0].items():
        torch.testing.assert_close(ours, found[1][name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_dropout_is_where_roberta_has_it(tiny, monkeypatch):
    """In training every dropout of the decoder acts at its rate, on states and probabilities; in evaluation none."""
    drop = prismer.text.Dropout(0.25).train()
    x = torch.ones(40_000)
    y = drop(x)
    torch.testing.assert_close(y.unique(), torch.tensor([0, 4 / 3]))
    assert y.eq(0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(drop.eval()(x), x)

    config = tiny.config.replace(dropout=0.5)
    decoder = Prismer(config).decoder
    # embeddings; self-attention, cross-attention and MLP of each layer; self-attention and MLP of the extra one
    drops = {name: m for name, m in decoder.named_modules() if isinstance(m, prismer.text.Dropout)}
    assert len(drops) == 1 + 3 * config.text_depth + 2
    called, rates = [], []
    for name, module in drops.items():
        module.register_forward_hook(lambda *_, name=name: called.append(name))

    def recording(run):
        def recorded(*arguments, dropout, **options):
            rates.append(dropout)
            return run(*arguments, dropout=dropout, **options)

        return recorded

    for op in ("attention", "cross_attention"):
        monkeypatch.setattr(prismer.text, op, recording(getattr(prismer.text, op)))
    ids, context = torch.randint(3, 40, (2, 1, 6)), torch.randn(2, 5, config.vision_width)
    texts = TextBatch(ids=ids, labels=ids, weights=torch.ones(2, 1))
    first = decoder.train()(texts, context)
    assert sorted(called) == sorted(drops)
    assert rates == [0.5] * (2 * config.text_depth + 1)
    assert not torch.equal(first, decoder(texts, context))
    rates.clear()
    assert torch.equal(decoder.eval()(texts, context), decoder(texts, context))
    assert set(rates) == {0.0}


def test_wrong_input_is_refused_in_one_sentence(tiny):
    images = make_images(tiny.config)
    del images.labels["depth"]
    with pytest.raises(ValueError, match="labels of depth are missing"):
        tiny.encode(images)
    with pytest.raises(ValueError, match="resize them"):
        tiny.encode(make_images(tiny.config.replace(image_size=32)))
    with pytest.raises(ValueError, match="unknown expert 'smell'"):
        prismer_base(experts=("smell",))
    with pytest.raises(ValueError, match="not a multiple"):
        prismer_base(vision_heads=7)
    with pytest.raises(ValueError, match="unknown preset"):
        preset("enormous")
