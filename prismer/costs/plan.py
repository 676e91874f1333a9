"""The needs of a training run, for every way to shard it: bytes of each GPU by component, FLOPs, bytes sent.

A GPU is fullest at one of two moments: somewhere in the forward and backward pass, which fake_step.py measures on the
real model, or in the optimizer's step, which has no activations but copies gradients to fp32. For P parameters of w
bytes, T of them trained, on N processes, DeepSpeed holds (measured on version 0.19.8; tests/test_plan.py compares this
file with running engines):

    ZeRO    parameters             optimizer (fp32 master, two moments)    gradients                  sent each step
    0       w P                    12 T, in fp32 training 8 T              w T                        2 w T
    1       w P                    12 T / N                                w T, then w T / N          2 w T
    2       w P                    12 T / N                                w T / N                    2 w T
    3       w P / N, small whole   12 T / N                                w T / N                    w T + w P or 2 w P

It also holds buckets in which it reduces gradients. ZeRO 3 holds the parameters that it has gathered: all of them if
stage3_max_live_parameters and stage3_max_reuse_distance allow it, and then it gathers once a step instead of twice.
Not included: the memory of CUDA, cuDNN and NCCL, and fragmentation. The command's --reserve is for those.
"""

from dataclasses import dataclass, fields, replace
from functools import cache

from torch import nn

from prismer.config import PrismerConfig
from prismer.costs.fake_step import DTYPES, FakeStep, FakeTrainer, Moment, Texts
from prismer.errors import InputError
from prismer.evaluation.text_kinds import CAPTIONS, CLASSES, QUESTIONS
from prismer.texts import MAX_CAPTION_TOKENS, MAX_QUESTION_TOKENS
from prismer.training.config import TrainConfig

# assumed length of an answer, with `</s>`; few are longer
_ANSWER_TOKENS = 6
# bytes of the fp32 weight and AdamW's two moments for each trained parameter
_MASTER_AND_MOMENTS = 12
# elements of the flat copies in which DeepSpeed reduces gradients without ZeRO
_ALLREDUCE_BUCKET = 500_000_000


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """The engine settings that decide about memory; sizes are in elements, and defaults are DeepSpeed's.

    Attributes:
        overlap_comm: the default of stages 0 to 2; stage 3 has one bucket in any case.
    """

    reduce_bucket_size: int = 500_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_param_persistence_threshold: int = 100_000
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    contiguous_gradients: bool = True
    overlap_comm: bool = False

    @classmethod
    def from_engine(cls, engine: dict) -> "ZeroSettings":
        """Select them from the engine settings that `engine_settings.read_config` returns; "auto" is the default.

        Raises:
            ValueError: if a size is not a number of elements.
        """
        section = engine.get("zero_optimization", {})
        given = {f.name: section[f.name] for f in fields(cls) if section.get(f.name, "auto") != "auto"}
        for name, value in given.items():
            if isinstance(getattr(cls, name), bool):
                given[name] = bool(value)
            elif isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0:
                given[name] = int(value)
            else:
                raise InputError(f"{name} is {value!r}; give a number of elements, 0 or more")
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One way to run.

    Attributes:
        stage: of ZeRO, 0 to 3.
        offload: whether the optimizer is on the host.
        checkpointing: whether the backward pass recomputes each block.
    """

    stage: int
    offload: bool = False
    checkpointing: bool = False


SETUPS = tuple(
    Setup(stage=stage, offload=offload, checkpointing=checkpointing)
    for stage in range(4)
    # DeepSpeed offloads only an optimizer that it shards
    for offload in ((False, True) if stage else (False,))
    for checkpointing in (False, True)
)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU at one moment.

    Attributes:
        parameters: weights that stay, and buffers of the model.
        gradients: of parameters.
        optimizer: fp32 master weights and moments.
        kept: activations that the backward pass reads.
        logits: the loss's chunk of logits, with its gradient.
        working: temporaries, gradients of activations, and fp32 copies of gradients in the optimizer's step.
        communication: parameters gathered by ZeRO 3, and buckets of gradients.
        batch: images, expert labels, texts.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    kept: int = 0
    logits: int = 0
    working: int = 0
    communication: int = 0
    batch: int = 0

    @property
    def total(self) -> int:
        """The sum of all components."""
        return sum(getattr(self, field.name) for field in fields(self))


class Weights:
    """The parameters of a model as ZeRO shards them.

    Args:
        model: frozen as it will train; its tensors need no data.
        precision: "bf16" or "fp32".
    """

    def __init__(self, model: nn.Module, precision: str):
        parameters = list(model.parameters())
        self.bytes_each = DTYPES[precision].itemsize
        self.sizes = [p.numel() for p in parameters]
        self.trained = [p.numel() for p in parameters if p.requires_grad]
        self.buffers = sum(b.nbytes for b in model.buffers())
        # ZeRO 3 gathers a leaf module whole, and any other module without its children
        self.largest_module = max(
            sum(p.numel() for p in module.parameters(recurse=hasattr(module, "_z3_leaf"))) for module in model.modules()
        )

    def held(self, stage: int, world: int, zero: ZeroSettings) -> Memory:
        """The bytes that DeepSpeed holds on one process between two steps, without offload."""
        w, trained = self.bytes_each, sum(self.trained)
        memory = Memory(parameters=w * sum(self.sizes) + self.buffers)
        if stage == 0:
            # in fp32 the weights are the master weights
            return replace(memory, optimizer=(_MASTER_AND_MOMENTS if w < 4 else 8) * trained)
        if stage < 3:
            return replace(memory, optimizer=_MASTER_AND_MOMENTS * self.shard(stage, world))
        small = [n for n in self.sizes if n <= zero.stage3_param_persistence_threshold]
        whole = w * sum(small) if world > 1 else 0
        return Memory(
            parameters=w * sum(-(-n // world) for n in self.sizes) + whole + self.buffers,
            gradients=w * self.shard(stage, world),
            optimizer=_MASTER_AND_MOMENTS * self.shard(stage, world),
            communication=w * zero.reduce_bucket_size * zero.contiguous_gradients,
        )

    def shard(self, stage: int, world: int) -> int:
        """The number of trained parameters that one process updates."""
        if stage == 0:
            return sum(self.trained)
        if stage == 3:
            return sum(-(-n // world) for n in self.trained)
        # one flat tensor, padded so that every shard starts at an even element
        return 2 * -(-sum(self.trained) // (2 * world))

    def gathered(self, world: int, zero: ZeroSettings) -> int:
        """The most parameters of other shards that a process of ZeRO 3 holds at once.

        If the limits are too low to keep all of them, DeepSpeed may release them late: with both limits at 0 a model of
        44 MB held up to 20 MB, where this returns 5 (DeepSpeed 0.19.8, two processes on a CPU).
        """
        if world == 1:
            return 0
        large = sum(n for n in self.sizes if n > zero.stage3_param_persistence_threshold)
        stay = min(zero.stage3_max_live_parameters, zero.stage3_max_reuse_distance)
        return min(large, max(stay, self.largest_module + zero.stage3_prefetch_bucket_size))

    def sent(self, stage: int, world: int, zero: ZeroSettings, accumulation: int = 1) -> int:
        """The bytes that one process sends in a step, with ring collectives."""
        w, everything = self.bytes_each, sum(self.sizes)
        gradients = w * sum(self.trained)
        if stage < 2:
            # gradients are reduced once, and gradients (or with ZeRO 1 weights) are gathered once
            volume = 2 * gradients
        elif stage == 2:
            volume = gradients * accumulation + gradients
        else:
            # parameters that stay from forward to backward are gathered once
            small = zero.stage3_param_persistence_threshold
            gatherings = 1 if self.gathered(world, zero) == sum(n for n in self.sizes if n > small) else 2
            volume = (gradients + gatherings * w * everything) * accumulation
        return volume * (world - 1) // world


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run to plan.

    Attributes:
        config: the model, at the image size of the run.
        freeze: a freeze mode.
        precision: "bf16" or "fp32".
        texts: texts of an image, see `fake_step.Texts`.
        world: number of GPUs.
        accumulation: micro-batches in a step.
        zero: engine settings.
    """

    config: PrismerConfig
    freeze: str
    precision: str
    texts: Texts
    world: int = 1
    accumulation: int = 1
    zero: ZeroSettings = ZeroSettings()


class Plan:
    """The costs of one job: memory of a micro-batch, the largest micro-batch that fits, FLOPs and bytes sent."""

    def __init__(self, job: Job):
        self.job = job
        self.trainer = FakeTrainer(job.config, job.freeze, job.precision, job.world)
        self.weights = Weights(self.trainer.model, job.precision)
        self.step, self._flops = cache(self._step), cache(self.trainer.flops)

    def _step(self, batch: int, checkpointing: bool) -> FakeStep:
        return self.trainer.step(batch, self.job.texts, checkpointing)

    def memory(self, setup: Setup, batch: int) -> Memory:
        """The bytes of one GPU at its fullest moment, for a micro-batch of `batch` images."""
        fake = self.step(batch, setup.checkpointing)
        held = self.weights.held(setup.stage, self.job.world, self.job.zero)
        if setup.offload:
            held = replace(held, optimizer=0, gradients=0)
        moments = [*self._backward(setup, held, fake), self._update(setup, held)]
        return max((replace(m, batch=fake.batch) for m in moments), key=lambda m: m.total)

    def _backward(self, setup: Setup, held: Memory, fake: FakeStep) -> list[Memory]:
        """The fullest moments up to the end of the backward pass."""
        w, zero, stage = self.weights.bytes_each, self.job.zero, setup.stage
        everything = w * sum(self.weights.trained)
        shard = w * self.weights.shard(stage, self.job.world)
        if stage == 3:
            # `held` includes the bucket
            gathered = w * self.weights.gathered(self.job.world, zero)
            return [_add(held, fake.peak_sharded, communication=gathered)]
        # with overlap a second bucket fills while the first is sent
        buckets = w * zero.reduce_bucket_size * (1 + zero.overlap_comm) if stage else 0
        together = _add(held, fake.peak, communication=buckets)
        if stage == 2:
            kept = 0 if setup.offload else shard
            apart = _add(held, fake.peak_sharded, gradients=kept, communication=buckets)
            # two upper bounds: all gradients stay to the end, or all shards exist from the start
            lower = min(apart, together, key=lambda m: m.total)
            return [apart if self.job.accumulation > 1 else lower]
        if self.job.accumulation > 1:
            # all gradients of earlier micro-batches exist already
            together = _add(held, fake.peak_sharded, gradients=everything, communication=buckets)
        # at the end all gradients exist, and flat copies of all of them or of the shard
        copies = buckets + min(shard, w * _ALLREDUCE_BUCKET)
        return [together, _add(held, Moment(), gradients=everything, communication=copies)]

    def _update(self, setup: Setup, held: Memory) -> Memory:
        """The fullest moment of the optimizer's step."""
        w, stage = self.weights.bytes_each, setup.stage
        shard = self.weights.shard(stage, self.job.world)
        if stage == 0:
            return _add(held, Moment(), gradients=w * shard, working=(4 if w < 4 else 0) * shard)
        if setup.offload:
            return held
        if stage == 3:
            group = min(shard, self.job.zero.sub_group_size)
            return _add(held, Moment(), working=(4 + (w if w < 4 else 0)) * group)
        # a flat copy of the gradients, and an fp32 copy of it in bf16 training
        return _add(held, Moment(), gradients=w * shard, working=(w + (4 if w < 4 else 0)) * shard)

    def host(self, setup: Setup) -> int:
        """The bytes that offload keeps on the host for one GPU: the optimizer, and the fp32 gradients it reads."""
        shard = self.weights.shard(setup.stage, self.job.world)
        return (_MASTER_AND_MOMENTS + 4) * shard if setup.offload else 0

    def largest_batch(self, setup: Setup, budget: int, hint: int = 1) -> int:
        """The largest micro-batch whose memory is at most `budget` bytes, or up to 10 % smaller; 0 if none fits.

        Memory is a convex function of the batch (a maximum of linear ones), so a straight line between two of its
        points overestimates it, except for a part of the loss's one chunk of logits.

        Args:
            setup: how the run shards.
            budget: bytes of one GPU.
            hint: a batch whose memory the caller needs anyway.
        """

        def total(batch: int) -> int:
            return self.memory(setup, batch).total

        low = high = hint
        if total(hint) > budget:
            low = 1
            if total(low) > budget:
                return 0
        else:
            # at this batch the kept activations alone should fill the budget
            high = 1 + max(hint, budget * hint // self.step(hint, setup.checkpointing).kept)
            while total(high) <= budget:
                low, high = high, 2 * high
        while True:
            reach = low + int((budget - total(low)) * (high - low) / (total(high) - total(low)))
            # `high` does not fit, `low` does: near either there is little to gain
            if high - reach <= high // 10 or reach - low <= low // 20:
                return reach
            low = reach

    def flops(self, batch: int, checkpointing: bool) -> tuple[int, int]:
        """FLOPs of one GPU's step, forward and backward; recomputation counts as backward."""
        forward, backward = self._flops(self.job.texts, checkpointing)
        images = batch * self.job.accumulation
        return forward * images, backward * images

    def sent(self, stage: int) -> int:
        """The bytes that one GPU sends in a step."""
        job = self.job
        return self.weights.sent(stage, job.world, job.zero, job.accumulation)


def _add(held: Memory, moment: Moment, **more: int) -> Memory:
    """The components of `held`, plus those of `moment`, plus `more`."""
    extra = dict(kept=moment.kept, working=moment.working, logits=moment.logits, gradients=moment.gradients)
    for name, value in more.items():
        extra[name] = extra.get(name, 0) + value
    return replace(held, **{name: getattr(held, name) + value for name, value in extra.items()})


def texts_of(train: TrainConfig, config: PrismerConfig) -> Texts:
    """The texts of each image in a run, at their greatest length."""
    # RoBERTa counts positions from padding_idx + 1
    room = config.max_positions - config.pad_id - 1
    tokens = {
        CAPTIONS: MAX_CAPTION_TOKENS,
        QUESTIONS: MAX_QUESTION_TOKENS + 1 + _ANSWER_TOKENS,
        CLASSES: MAX_CAPTION_TOKENS,
    }
    return tuple((count, min(tokens[kind], room)) for kind, count in train.texts_per_image.items() if count)
