"""What a training run needs of each GPU: bytes by component, FLOPs, bytes sent, for every way to shard it.

Two moments can be the fullest: the worst of forward and backward (fake_step.py follows the real model there), and the
optimizer's step, which has no activations but copies gradients to fp32. DeepSpeed holds, for P parameters of w bytes,
T of them trained, on N processes (measured on version 0.19.8; tests/test_plan.py holds its running engines against it):

    ZeRO    parameters             optimizer (fp32 master, two moments)    gradients                  sent each step
    0       w P                    12 T, in fp32 training 8 T              w T                        2 w T
    1       w P                    12 T / N                                w T, then w T / N          2 w T
    2       w P                    12 T / N                                w T / N                    2 w T
    3       w P / N, small whole   12 T / N                                w T / N                    w T + w P or 2 w P

and buckets to reduce gradients in; ZeRO 3 also the parameters that it has gathered: all of them where
stage3_max_live_parameters and stage3_max_reuse_distance allow it, which then saves the second gathering of a step.
Left out: what CUDA, cuDNN and NCCL take for themselves, and holes between blocks. `reserve` is for those.
"""

from dataclasses import dataclass, fields, replace
from functools import cache

from torch import nn

from prismer.config import PrismerConfig
from prismer.costs.fake_step import DTYPES, FakeStep, FakeTrainer, Moment, Texts
from prismer.texts import MAX_CAPTION_TOKENS, MAX_QUESTION_TOKENS
from prismer.training.config import TrainConfig
from prismer.training.tasks import CAPTIONS, CLASSES, QUESTIONS

ANSWER_TOKENS = 6
"""Tokens that a question's answer is taken to have, `</s>` included; few have more."""

MASTER_AND_MOMENTS = 12
"""Bytes of fp32 weight and AdamW's two moments for each trained parameter."""

ALLREDUCE_BUCKET = 500_000_000
"""Elements of the flat copies that DeepSpeed reduces gradients by without ZeRO."""


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """The engine settings that decide about memory, in elements; the defaults are DeepSpeed's."""

    reduce_bucket_size: int = 500_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_param_persistence_threshold: int = 100_000
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    contiguous_gradients: bool = True
    overlap_comm: bool = False
    # the default of stages below 3; stage 3 has one bucket in any case

    @classmethod
    def from_engine(cls, engine: dict) -> "ZeroSettings":
        """Those of engine settings as `engine_settings.read_config` returns them; "auto" is the default.

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
                raise ValueError(f"{name} is {value!r}; give a number of elements, 0 or more")
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One way to run: ZeRO stage 0 to 3, optimizer on the host or not, blocks recomputed in backward or not."""

    stage: int
    offload: bool = False
    checkpointing: bool = False


SETUPS = tuple(
    Setup(stage=stage, offload=offload, checkpointing=checkpointing)
    for stage in range(4)
    # DeepSpeed offloads what it shards
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
        kept: activations that wait for the backward pass.
        logits: the loss's chunk of logits, with their gradients.
        working: temporaries, gradients of activations, fp32 copies of gradients at the step.
        communication: parameters gathered by ZeRO 3, buckets of gradients.
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
        """All components."""
        return sum(getattr(self, field.name) for field in fields(self))


class Weights:
    """The parameters of a model as ZeRO sees them.

    Args:
        model: frozen as it will train; tensors without data do.
        precision: "bf16" or "fp32".
    """

    def __init__(self, model: nn.Module, precision: str):
        parameters = list(model.parameters())
        self.bytes_each = DTYPES[precision].itemsize
        self.sizes = [p.numel() for p in parameters]
        self.trained = [p.numel() for p in parameters if p.requires_grad]
        self.buffers = sum(b.nbytes for b in model.buffers())
        # gathered together: the parameters of a leaf module of ZeRO 3, else a module's own
        self.largest_module = max(
            sum(p.numel() for p in module.parameters(recurse=hasattr(module, "_z3_leaf"))) for module in model.modules()
        )

    def held(self, stage: int, world: int, zero: ZeroSettings) -> Memory:
        """What DeepSpeed holds on one process between two steps, without offload."""
        w, trained = self.bytes_each, sum(self.trained)
        memory = Memory(parameters=w * sum(self.sizes) + self.buffers)
        if stage == 0:
            # in fp32 the weights are their own masters
            return replace(memory, optimizer=(MASTER_AND_MOMENTS if w < 4 else 8) * trained)
        if stage < 3:
            return replace(memory, optimizer=MASTER_AND_MOMENTS * self.shard(stage, world))
        small = [n for n in self.sizes if n <= zero.stage3_param_persistence_threshold]
        whole = w * sum(small) if world > 1 else 0
        return Memory(
            parameters=w * sum(-(-n // world) for n in self.sizes) + whole + self.buffers,
            gradients=w * self.shard(stage, world),
            optimizer=MASTER_AND_MOMENTS * self.shard(stage, world),
            communication=w * zero.reduce_bucket_size * zero.contiguous_gradients,
        )

    def shard(self, stage: int, world: int) -> int:
        """Trained parameters that one process updates."""
        if stage == 0:
            return sum(self.trained)
        if stage == 3:
            return sum(-(-n // world) for n in self.trained)
        # one flat tensor, padded so that every shard starts at an even element
        return 2 * -(-sum(self.trained) // (2 * world))

    def gathered(self, world: int, zero: ZeroSettings) -> int:
        """Most parameters beyond its own that a process of ZeRO 3 holds at once.

        Where the limits forbid to keep them all, DeepSpeed may release later than it promises: with both at 0 a model
        of 44 MB was seen to hold 20 MB at its worst, where this says 5 (DeepSpeed 0.19.8, two processes on a CPU).
        """
        if world == 1:
            return 0
        large = sum(n for n in self.sizes if n > zero.stage3_param_persistence_threshold)
        stay = min(zero.stage3_max_live_parameters, zero.stage3_max_reuse_distance)
        return min(large, max(stay, self.largest_module + zero.stage3_prefetch_bucket_size))

    def sent(self, stage: int, world: int, zero: ZeroSettings, accumulation: int = 1) -> int:
        """Bytes that one process sends in a step, by ring collectives."""
        w, everything = self.bytes_each, sum(self.sizes)
        gradients = w * sum(self.trained)
        if stage < 2:
            # reduced, and (as weights from ZeRO 1 on) gathered, once a step
            volume = 2 * gradients
        elif stage == 2:
            volume = gradients * accumulation + gradients
        else:
            # what stays from forward to backward is gathered once
            small = zero.stage3_param_persistence_threshold
            gatherings = 1 if self.gathered(world, zero) == sum(n for n in self.sizes if n > small) else 2
            volume = (gradients + gatherings * w * everything) * accumulation
        return volume * (world - 1) // world


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run to be planned.

    Attributes:
        config: the model, at the image size of the run.
        freeze: a freeze mode.
        precision: "bf16" or "fp32".
        texts: texts of an image, see `fake_step.Texts`.
        world: GPUs.
        accumulation: micro-batches of a step.
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
    """Answers about one job: memory of a micro-batch, the largest that fits, FLOPs and bytes sent."""

    def __init__(self, job: Job):
        self.job = job
        self.trainer = FakeTrainer(job.config, job.freeze, job.precision, job.world)
        self.weights = Weights(self.trainer.model, job.precision)
        self.step, self._flops = cache(self._step), cache(self.trainer.flops)

    def _step(self, batch: int, checkpointing: bool) -> FakeStep:
        return self.trainer.step(batch, self.job.texts, checkpointing)

    def memory(self, setup: Setup, batch: int) -> Memory:
        """Bytes of one GPU at its fullest moment, for a micro-batch of `batch` images."""
        fake = self.step(batch, setup.checkpointing)
        held = self.weights.held(setup.stage, self.job.world, self.job.zero)
        if setup.offload:
            held = replace(held, optimizer=0, gradients=0)
        moments = [*self._backward(setup, held, fake), self._update(setup, held)]
        return max((replace(m, batch=fake.batch) for m in moments), key=lambda m: m.total)

    def _backward(self, setup: Setup, held: Memory, fake: FakeStep) -> list[Memory]:
        """The worst moments up to the end of the backward pass."""
        w, zero, stage = self.weights.bytes_each, self.job.zero, setup.stage
        every = w * sum(self.weights.trained)
        shard = w * self.weights.shard(stage, self.job.world)
        if stage == 3:
            # the bucket is held
            gathered = w * self.weights.gathered(self.job.world, zero)
            return [_add(held, fake.peak_sharded, communication=gathered)]
        # a second bucket fills while the first is on its way
        buckets = w * zero.reduce_bucket_size * (1 + zero.overlap_comm) if stage else 0
        together = _add(held, fake.peak, communication=buckets)
        if stage == 2:
            kept = 0 if setup.offload else shard
            apart = _add(held, fake.peak_sharded, gradients=kept, communication=buckets)
            # both are upper bounds: gradients that all stay, and shards that are all there from the start
            early = min(apart, together, key=lambda m: m.total)
            return [apart if self.job.accumulation > 1 else early]
        if self.job.accumulation > 1:
            # those of the micro-batches before are all there
            together = _add(held, fake.peak_sharded, gradients=every, communication=buckets)
        # in the end all gradients, and flat copies: of all of them, or of the shard
        flat = buckets + min(shard, w * ALLREDUCE_BUCKET)
        flat = _add(held, Moment(), gradients=every, communication=flat)
        return [together, flat]

    def _update(self, setup: Setup, held: Memory) -> Memory:
        """The optimizer's step."""
        w, stage = self.weights.bytes_each, setup.stage
        shard = self.weights.shard(stage, self.job.world)
        if stage == 0:
            return _add(held, Moment(), gradients=w * shard, working=(4 if w < 4 else 0) * shard)
        if setup.offload:
            return held
        if stage == 3:
            group = min(shard, self.job.zero.sub_group_size)
            return _add(held, Moment(), working=(4 + (w if w < 4 else 0)) * group)
        # a flat copy, and fp32 of it where it is not
        return _add(held, Moment(), gradients=w * shard, working=(w + (4 if w < 4 else 0)) * shard)

    def host(self, setup: Setup) -> int:
        """Bytes that offload keeps on the host for one GPU: optimizer, and the fp32 gradients that it reads."""
        shard = self.weights.shard(setup.stage, self.job.world)
        return (MASTER_AND_MOMENTS + 4) * shard if setup.offload else 0

    def largest_batch(self, setup: Setup, room: int, hint: int = 1) -> int:
        """The most images of a micro-batch whose memory stays within `room` bytes, or up to 10 % fewer; 0 if not one.

        Memory is a convex function of the batch (the larger of sums that grow evenly), so a straight line between two
        of its points does not promise too much, but for a part of the loss's one chunk of logits.

        Args:
            hint: a batch that is asked about anyway.
        """

        def total(batch: int) -> int:
            return self.memory(setup, batch).total

        low = high = hint
        if total(hint) > room:
            low = 1
            if total(low) > room:
                return 0
        else:
            # here what is kept alone should fill the room
            high = 1 + max(hint, room * hint // self.step(hint, setup.checkpointing).kept)
            while total(high) <= room:
                low, high = high, 2 * high
        while True:
            reach = low + int((room - total(low)) * (high - low) / (total(high) - total(low)))
            # `high` does not fit: near it, or near a point that fits, there is little to gain
            if high - reach <= high // 10 or reach - low <= low // 20:
                return reach
            low = reach

    def flops(self, batch: int, checkpointing: bool) -> tuple[int, int]:
        """FLOPs of one GPU's step, forward and backward, with recomputation in the latter."""
        forward, backward = self._flops(self.job.texts, checkpointing)
        images = batch * self.job.accumulation
        return forward * images, backward * images

    def sent(self, stage: int) -> int:
        """Bytes that one GPU sends in a step."""
        job = self.job
        return self.weights.sent(stage, job.world, job.zero, job.accumulation)


def _add(held: Memory, moment: Moment, **more: int) -> Memory:
    """Components of `held`, plus activations and gradients of a moment, plus `more`."""
    extra = dict(kept=moment.kept, working=moment.working, logits=moment.logits, gradients=moment.gradients)
    for name, value in more.items():
        extra[name] = extra.get(name, 0) + value
    return replace(held, **{name: getattr(held, name) + value for name, value in extra.items()})


def texts_of(train: TrainConfig, config: PrismerConfig) -> Texts:
    """The texts that a run puts beside an image, as long as they can be."""
    # RoBERTa counts positions from padding_idx + 1
    room = config.max_positions - config.pad_id - 1
    tokens = {
        CAPTIONS: MAX_CAPTION_TOKENS,
        QUESTIONS: MAX_QUESTION_TOKENS + 1 + ANSWER_TOKENS,
        CLASSES: MAX_CAPTION_TOKENS,
    }
    return tuple((count, min(tokens[kind], room)) for kind, count in train.texts_per_image.items() if count)
