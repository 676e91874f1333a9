"""Models of other people, patched by `apply_to` and unpatched: pytest benchmarks/test_drop_in.py --benchmark-only

One realistic size of each family of docs/drop-in.md, with one or two of its layers, since all layers are alike. On
a CPU in fp32, on a GPU in bf16, with --full in both.
"""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.conftest import skip_slow_dtype
from benchmarks.harness import DEVICE, OURS, Contender, time_contenders
from prismer.kernels.patch import apply_to

# a model, its inputs that get a gradient, and a call of the model with them
Family = tuple[nn.Module, list[Tensor], Callable[..., Tensor]]
VIT_B = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=12)
ONE_LAYER = VIT_B | dict(num_hidden_layers=1)
NO_DROPOUT = dict(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)


def open_clip_frozen() -> Family:
    """ViT-B/16 at 224 px, frozen except for its norms, as under trained adaptors."""
    import open_clip

    vision = dict(image_size=224, patch_size=16, width=768, layers=2, head_width=64)
    text = dict(context_length=16, vocab_size=100, width=64, heads=1, layers=1)
    model = open_clip.model.CLIP(512, vision, text, quick_gelu=True).visual
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("ln_" in name)
    return model, [torch.randn(1, 3, 224, 224)], lambda m, x: m(x)


def clip() -> Family:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(CLIPVisionConfig(**VIT_B, image_size=224, patch_size=16))
    return model, [torch.randn(1, 3, 224, 224)], lambda m, x: m(x).pooler_output


def siglip() -> Family:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    model = SiglipVisionModel(SiglipVisionConfig(**VIT_B, image_size=224, patch_size=16))
    return model, [torch.randn(1, 3, 224, 224)], lambda m, x: m(x).pooler_output


def roberta_decoder() -> Family:
    """A captioner: two captions of 20 tokens over 260 image tokens each, with the loss of 50,265 words."""
    from transformers import RobertaConfig, RobertaForCausalLM

    config = RobertaConfig(**ONE_LAYER, **NO_DROPOUT, vocab_size=50265, is_decoder=True, add_cross_attention=True)
    ids = torch.randint(3, 50000, (2, 20), device=DEVICE)

    def run(model: nn.Module, context: Tensor) -> Tensor:
        return model(ids, encoder_hidden_states=context, labels=ids, use_cache=False).loss

    return RobertaForCausalLM(config), [torch.randn(2, 260, 768)], run


def bert_encoder() -> Family:
    from transformers import BertConfig, BertModel

    config = BertConfig(**VIT_B, **NO_DROPOUT)
    mask = (torch.arange(64) < torch.tensor([[64], [40]])).long().to(DEVICE)

    def run(model: nn.Module, embeddings: Tensor) -> Tensor:
        return model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state

    model = BertModel(config, add_pooling_layer=False)
    # the embeddings are inputs
    model.embeddings.word_embeddings.requires_grad_(False)
    return model, [torch.randn(2, 64, 768)], run


def blip_text_decoder() -> Family:
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    config = BlipTextConfig(**VIT_B, **NO_DROPOUT, encoder_hidden_size=768, is_decoder=True)
    ids = torch.randint(3, 30000, (2, 20), device=DEVICE)

    def run(model: nn.Module, context: Tensor) -> Tensor:
        return model(ids, encoder_hidden_states=context, is_decoder=True, use_cache=False).last_hidden_state

    return BlipTextModel(config, add_pooling_layer=False), [torch.randn(2, 197, 768)], run


def blip2_qformer() -> Family:
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    config = Blip2QFormerConfig(**VIT_B, **NO_DROPOUT, encoder_hidden_size=1408)

    def run(model: nn.Module, queries: Tensor, context: Tensor) -> Tensor:
        return model(query_embeds=queries, encoder_hidden_states=context).last_hidden_state

    return Blip2QFormerModel(config), [torch.randn(1, 32, 768), torch.randn(1, 257, 1408)], run


def idefics_resampler() -> Family:
    """As in IDEFICS 9B: 257 tokens of ViT-H."""
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    config = IdeficsConfig(vision_config=dict(embed_dim=1280))
    model = IdeficsPerceiverResampler(config, 1280, depth=2, n_heads=16, head_dim=96, n_latents=64)
    return model, [torch.randn(1, 257, 1280)], lambda m, x: m(x)


def idefics2_resampler() -> Family:
    """As in Idefics2 8B at a quarter of the width, and half the side of its largest image."""
    from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

    config = Idefics2PerceiverConfig(hidden_size=1024, resampler_depth=2)
    config._attn_implementation = "sdpa"
    mask = torch.ones(1, 1225, dtype=torch.int64, device=DEVICE)
    return Idefics2PerceiverResampler(config), [torch.randn(1, 1225, 1024)], lambda m, x: m(x, mask)


def flamingo_pytorch() -> Family:
    package = pytest.importorskip("flamingo_pytorch", reason="pip install --no-deps flamingo-pytorch einops-exts")
    model = package.PerceiverResampler(dim=1024, depth=2)
    return model, [torch.randn(1, 256, 1024)], lambda m, x: m(x)


def open_flamingo() -> Family:
    """As in OpenFlamingo: 256 tokens of a frozen ViT-L."""
    pytest.importorskip("open_flamingo", reason="pip install --no-deps open-flamingo einops-exts")
    from open_flamingo.src.helpers import PerceiverResampler

    media = torch.randn(1, 1, 1, 256, 1024, device=DEVICE)
    return PerceiverResampler(dim=1024, depth=2), [], lambda m: m(media.to(m.latents))


def causal_lm() -> Family:
    """Width and vocabulary of SmolLM 135M, one layer, 64 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    ids = torch.randint(3, 49000, (1, 64), device=DEVICE)
    return LlamaForCausalLM(config), [], lambda m: m(ids, labels=ids).loss


FAMILIES: tuple[Callable[[], Family], ...] = (
    open_clip_frozen,
    clip,
    siglip,
    roberta_decoder,
    bert_encoder,
    blip_text_decoder,
    blip2_qformer,
    idefics_resampler,
    idefics2_resampler,
    flamingo_pytorch,
    open_flamingo,
    causal_lm,
)


@functools.lru_cache(maxsize=1)
def build_calls(family: Callable[[], Family], dtype: torch.dtype) -> dict[str, Contender]:
    """The unpatched model and a patched copy, checked against each other."""
    torch.manual_seed(0)
    plain, inputs, run = family()
    plain = plain.to(DEVICE, dtype).train()
    patched = copy.deepcopy(plain)
    apply_to(patched)
    found = {OURS: build_call(patched, inputs, run, dtype), "eager": build_call(plain, inputs, run, dtype)}
    for part in ("forward", "forward+backward"):
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        if family is idefics_resampler and part != "forward":
            # rounding switches a ReLU whose input is almost zero, and with it a row of a gradient
            tolerance = max(tolerance, 2e-3)
        ours, theirs = (c[part]() for c in (found[OURS], found["eager"]))
        pairs = list(zip(*([t] if isinstance(t, Tensor) else t for t in (ours, theirs)), strict=True))
        # of all gradients together, since that of a key's bias is rounding
        error, size = (
            sum(t.square().sum().item() for t in tensors) ** 0.5
            for tensors in ([a - b for a, b in pairs], [b for _, b in pairs])
        )
        if not error < tolerance * size:
            pytest.fail(f"{part} is off by {error / size:.1e}, more than {tolerance:.1e}: not timed")
    return found


def build_call(module: nn.Module, inputs: list[Tensor], run: Callable, dtype: torch.dtype) -> Contender:
    """A call with gradients of the inputs and of the parameters that train."""
    trained = [p for p in module.parameters() if p.requires_grad]
    leaves = [x.to(DEVICE, dtype).requires_grad_() for x in inputs]

    def forward(*tensors: Tensor) -> Tensor:
        return run(module, *tensors[: len(leaves)])

    return Contender(run=forward, inputs=[*leaves, *trained])


# in this order, each model is built once
@pytest.mark.parametrize("part", ("forward", "forward+backward"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_drop_in(benchmark, family, dtype, part, everything, full):
    skip_slow_dtype(dtype, full)
    if not everything and (family not in (clip, flamingo_pytorch) or dtype != torch.float32 or part == "forward"):
        pytest.skip("without --full, a CPU times a training step of two families in fp32")
    time_contenders(
        benchmark,
        build_calls(family, dtype),
        room="drop_in",
        shape=family.__name__,
        dtype=dtype,
        part=part,
        seconds=0.6,
    )
