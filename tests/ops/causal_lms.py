"""Tiny causal language models of transformers whose loss `apply_to` fuses, or keeps, and inputs for them."""

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from prismer.kernels.patch import apply_to
from tests.ops.patching import randomise

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

B, T, V, D = 2, 7, 61, 32
SPECIAL = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)
SIZES = dict(vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=24)
WIDE = dict(**SIZES, intermediate_size=48, **SPECIAL)
BERT = dict(**WIDE, is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
GPT2 = dict(
    vocab_size=V,
    n_embd=D,
    n_layer=2,
    n_head=4,
    n_positions=24,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=0,
    eos_token_id=2,
)
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", WIDE),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", dict(**WIDE, tie_word_embeddings=True)),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", dict(**WIDE, num_key_value_heads=2)),
    "mistral": ("MistralForCausalLM", "MistralConfig", dict(**WIDE, num_key_value_heads=2)),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", WIDE),
    "phi": ("PhiForCausalLM", "PhiConfig", WIDE),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        dict(**WIDE, num_key_value_heads=2, num_local_experts=3, output_router_logits=True),
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", dict(**SIZES, **SPECIAL, ffn_dim=48, word_embed_proj_dim=D, dropout=0.0)),
    "roberta": ("RobertaForCausalLM", "RobertaConfig", BERT),
    "xlmr": ("XLMRobertaForCausalLM", "XLMRobertaConfig", BERT),
    "bert": ("BertLMHeadModel", "BertConfig", BERT),
    "electra": ("ElectraForCausalLM", "ElectraConfig", dict(**BERT, embedding_size=24)),
}
# models that change their logits
CHANGE_LOGITS = {
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", dict(**WIDE, num_key_value_heads=2, head_dim=8)),
    "cohere": ("CohereForCausalLM", "CohereConfig", dict(**WIDE, num_key_value_heads=2)),
    "granite": ("GraniteForCausalLM", "GraniteConfig", dict(**WIDE, num_key_value_heads=2, logits_scaling=3.0)),
}


def build_causal_lm(name: str) -> nn.Module:
    kind, config, options = {**MODELS, **CHANGE_LOGITS}[name]
    torch.manual_seed(0)
    # the eps stay those of the config, with which a saved model is loaded
    return randomise(getattr(transformers, kind)(getattr(transformers, config)(**options)), eps=None)


def build_pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A model, and a copy with the fused loss."""
    plain = build_causal_lm(name)
    patched = copy.deepcopy(plain)
    report = apply_to(patched, "loss", strict=True)
    assert [row.part for row in report.rows] == ["loss"]
    return plain, patched


def random_ids() -> Tensor:
    return torch.randint(3, V, (B, T))


def labelled_inputs() -> dict[str, Tensor]:
    """Inputs with labels, of which some are ignored, the last of a sample among them."""
    words = random_ids()
    labels = words.clone()
    labels[0, :3] = -100
    labels[1, -1] = -100
    return dict(input_ids=words, labels=labels)


def only_loss(model: nn.Module) -> Callable[..., dict[str, Tensor]]:
    """Call the model and return its loss alone: the unpatched model has logits too."""
    return lambda **kwargs: {"loss": model(**kwargs).loss}
