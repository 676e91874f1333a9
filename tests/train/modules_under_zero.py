"""Train a model of fused or of patched modules under ZeRO-3 with every parameter sharded, and an unpatched copy without
ZeRO-3, and report both; launched by test_modules_zero.py.

    torchrun --nproc_per_node N modules_under_zero.py OUT.json modules|patched
"""

import copy
import json
import sys
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
import transformers
from torch import nn

from prismer.kernels.modules import MLP, Adaptor, LayerNorm, LinearCrossEntropy, MultiheadAttention, PerceiverResampler
from prismer.kernels.patch import apply_to
from prismer.training import zero as engines
from prismer.training.config import TrainConfig

D, V, STEPS, ROWS = 32, 61, 4, 4
# every parameter is sharded, gathered and released, however small
EVERYTHING = dict.fromkeys(
    (
        "stage3_param_persistence_threshold",
        "stage3_max_reuse_distance",
        "stage3_max_live_parameters",
        "stage3_prefetch_bucket_size",
    ),
    0,
)


class FusedModel(nn.Module):
    """Every module of prismer.kernels.modules once, some frozen, behind an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.norm = LayerNorm(D)
        self.attention = MultiheadAttention(D, 4)
        self.frozen_mlp = MLP(D, 2 * D, "quick_gelu").requires_grad_(False)
        self.adaptor = Adaptor(D, late=False)
        self.resampler = PerceiverResampler(D, 2, 4, 5)
        self.cross = MultiheadAttention(D, 4, names=("q_proj", "k_proj", "v_proj", "out_proj"))
        self.late = Adaptor(D, late=True)
        self.mlp = MLP(D, 2 * D, "gelu", names=("up", "down"))
        self.head = LinearCrossEntropy(D, V, label_smoothing=0.1)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.attention(self.norm(x), causal=True)
        x = self.adaptor(x + self.frozen_mlp(x))
        x = self.late(x + self.cross(x, self.resampler(x)))
        return self.head(x + self.mlp(x), labels)


class PatchedModel(nn.Module):
    """Layers of open_clip and transformers before a causal LM with tied weights, which computes the loss."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.RobertaConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=2 * D,
            num_attention_heads=4,
            num_hidden_layers=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        )
        clip = transformers.CLIPVisionConfig(
            hidden_size=D, intermediate_size=2 * D, num_attention_heads=4, attn_implementation="sdpa"
        )
        gpt2 = transformers.GPT2Config(
            vocab_size=V,
            n_embd=D,
            n_layer=1,
            n_head=4,
            n_positions=16,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
        self.embed = nn.Embedding(V, D)
        self.block = open_clip.transformer.ResidualAttentionBlock(D, 4, ls_init_value=0.5)
        self.frozen = transformers.models.clip.modeling_clip.CLIPEncoderLayer(clip).requires_grad_(False)
        self.layer = transformers.models.roberta.modeling_roberta.RobertaLayer(config)
        self.gpt2 = transformers.GPT2LMHeadModel(gpt2)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.layer(self.frozen(self.block(self.embed(ids)), None))
        return self.gpt2(inputs_embeds=x, labels=labels).loss


def make_batch(step: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    ids, labels = torch.randint(0, V, (2, ROWS, 7), generator=draw)
    return ids[rows], labels[rows]


def main() -> None:
    torch.set_num_threads(1)
    engines.start_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    plain = dict(modules=FusedModel, patched=PatchedModel)[sys.argv[2]]()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    start, sharded = copy.deepcopy(plain), copy.deepcopy(plain)
    if sys.argv[2] == "patched":
        apply_to(sharded, strict=True)
    settings = TrainConfig(batch_size=ROWS, learning_rate=3e-3, gradient_clipping=1.0)
    zero = dict(stage=3, memory_efficient_linear=False, **EVERYTHING)
    engines.SMALL_MODEL = 0
    engine = engines.build_engine(sharded, settings, dict(zero_optimization=zero), "fp32")
    part = ROWS // world
    losses = []
    for step in range(STEPS):
        loss = engine(*make_batch(step, slice(rank * part, (rank + 1) * part)))
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / world)
    weights = copy.deepcopy(start)
    engines.copy_weights(engine, weights)
    dist.barrier()
    dist.destroy_process_group()
    if rank:
        return

    optimizer = engines.build_optimizer(plain, settings)
    expected = []
    for step in range(STEPS):
        loss = plain(*make_batch(step, slice(None)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        expected.append(float(loss))
    report = {"losses": losses, "expected": expected, "difference": {}, "step": {}}
    for name, value in plain.state_dict().items():
        report["difference"][name] = float((weights.state_dict()[name] - value).abs().max())
        report["step"][name] = float((value - start.state_dict()[name]).abs().max())
    Path(sys.argv[1]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
