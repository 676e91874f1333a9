"""A training step of the real model on tensors without data: its bytes and FLOPs, in a second and without memory.

The model runs forward and backward on torch's meta device while a dispatch mode sees tensors appear and disappear. The
bytes are of four kinds: kept (alive when the forward pass ends, because the backward pass reads them), gradients of
parameters, logits (inside the loss), and working memory (the rest: temporaries and gradients of activations). Fused ops
count as on any device: they keep what they save for the backward pass, and inside they take what their implementation
on torch's operators allocates. Attention and the short ops take nothing inside, because their kernels allocate nothing.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from prismer import batch_norm as layers
from prismer.batch import FACT_VALUES, Batch, Detections, ImageBatch, TextBatch
from prismer.config import PrismerConfig
from prismer.costs.counting import CostCounter
from prismer.freezing import freeze
from prismer.kernels import dispatch
from prismer.model import Prismer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# (texts per image, tokens of each): one pair, or two if texts of another length follow (questions)
Texts = tuple[tuple[int, int], ...]

# their kernels allocate only outputs, on every device; torch's operators would allocate more
_OUTPUTS_ONLY = frozenset(
    f"{op}{suffix}"
    for op in ("attention", "layer_norm", "bias_activation", "label_map", "instance_rows")
    for suffix in ("", "_backward")
)
_LOSS = ("linear_cross_entropy", "linear_cross_entropy_backward")


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Bytes alive at one time, beyond parameters, buffers and the batch."""

    kept: int = 0
    working: int = 0
    logits: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        """The sum of all four kinds."""
        return self.kept + self.working + self.logits + self.gradients


@dataclass(frozen=True, kw_only=True)
class FakeStep:
    """Memory of one forward and backward pass.

    Attributes:
        peak: the fullest moment if every gradient stays until the optimizer's step, as in plain training.
        peak_sharded: the fullest moment if each gradient leaves as soon as it is formed; its `gradients` are 0.
        kept: bytes alive when the forward pass ends.
        logits: the most bytes inside the loss.
        batch: bytes of images, expert labels and texts.
    """

    peak: Moment
    peak_sharded: Moment
    kept: int
    logits: int
    batch: int


class _MemoryWatch(TorchDispatchMode):
    """Follows each storage from the operator that allocates it until it is freed.

    Args:
        known: tensors that exist already, which do not count.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.logits = 0
        # kept alive, so that no new storage gets the id of an old one
        self.known = [t.untyped_storage() for t in known]
        self.kinds = {id(storage): "" for storage in self.known}
        self.sizes: dict[int, int] = {}
        self.finalizers: dict[int, weakref.ref] = {}
        self.live = dict.fromkeys(("kept", "working", "gradients"), 0)
        self.peak = self.peak_sharded = Moment()
        self.insides: dict[tuple, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func.namespace == "aten":
            # a composite operator such as linear is seen as the operators that it calls
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func.is_view:
            return func(*args, **kwargs)
        inside = self._inside(func, args, kwargs)
        out = func(*args, **kwargs)
        if func._opname in _LOSS:
            self._compare(logits=inside)
            self.logits = max(self.logits, inside)
        else:
            self._compare(working=inside)
        tree_map_only(Tensor, self._on_allocation, out)
        self._compare()
        return out

    def _inside(self, func, args: tuple, kwargs: dict) -> int:
        """The most bytes inside a registered op, outputs included; equal layers of a stack are measured once."""
        if func.namespace != "prismer" or func._schema.is_mutable or func._opname in _OUTPUTS_ONLY:
            return 0
        leaves = list(tree_iter((args, kwargs)))
        key = func, *((a.shape, a.dtype) if isinstance(a, Tensor) else str(a) for a in leaves)
        if key not in self.insides:
            watch = _MemoryWatch([a for a in leaves if isinstance(a, Tensor)])
            with watch:
                dispatch.implementation(func._opname)(*args, **kwargs)
            self.insides[key] = watch.peak.total
        return self.insides[key]

    def _on_allocation(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self.kinds:
            self.kinds[key], self.sizes[key] = "working", storage.nbytes()
            self.live["working"] += self.sizes[key]
            self.finalizers[key] = weakref.ref(storage, lambda _: self._on_free(key))

    def _on_free(self, key: int) -> None:
        del self.finalizers[key]
        self.live[self.kinds.pop(key)] -= self.sizes.pop(key)

    def become(self, key: int, kind: str) -> None:
        """Count the storage with this id as `kind` from now on."""
        if self.kinds.get(key):
            self.live[self.kinds[key]] -= self.sizes[key]
            self.live[kind] += self.sizes[key]
            self.kinds[key] = kind

    def end_forward(self) -> None:
        """Count all that is alive now as kept for the backward pass."""
        for key in list(self.sizes):
            self.become(key, "kept")
        # the fullest moment so far was in the forward pass, and most of its bytes are kept
        self.peak, self.peak_sharded = (
            replace(m, kept=kept, working=m.kept + m.working - kept)
            for m in (self.peak, self.peak_sharded)
            for kept in [min(self.live["kept"], m.kept + m.working)]
        )

    def _compare(self, working: int = 0, logits: int = 0) -> None:
        now = Moment(**{**self.live, "working": self.live["working"] + working, "logits": logits})
        if now.total > self.peak.total:
            self.peak = now
        if now.total - now.gradients > self.peak_sharded.total:
            self.peak_sharded = replace(now, gradients=0)


def blank_batch(config: PrismerConfig, size: int, texts: Texts) -> Batch:
    """`size` images with labels and detections of every expert, and texts of full length, all of whose tokens count."""
    side, count = config.image_size, sum(n for n, _ in texts)
    images = ImageBatch.without_labels(
        torch.zeros(size, 3, side, side, dtype=torch.uint8), config.experts, config.label_size
    )
    images.instance_rows = torch.zeros(256, dtype=torch.int64)
    if config.expert_text:
        found = torch.full((size, config.num_detection_tokens), config.eos_id)
        images.detections = Detections(found, torch.zeros(*found.shape, len(FACT_VALUES), dtype=torch.uint8))
    ids = torch.full((size, count, max(t for _, t in texts)), config.eos_id)
    lengths = tuple(t for n, t in texts for _ in range(n))
    split = texts[0][0] if len(texts) == 2 else 0
    text = TextBatch(ids, ids.clone(), torch.ones(size, count), lengths, split)
    return Batch(images, text, [], [])


def _tensors(batch: Batch) -> list[Tensor]:
    images, texts = batch.images, batch.texts
    found = [images.rgb, *images.labels.values(), *images.rows.values(), images.features]
    if images.detections is not None:
        found += [images.detections.ids, images.detections.facts]
    return [*found, images.instance_rows, texts.ids, texts.labels, texts.weights]


@contextmanager
def _pretend_world(world: int) -> Iterator[None]:
    """Make batch norm see `world` processes, because it keeps other tensors in several than in one."""
    before = layers.dist
    layers.dist = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_world_size=lambda: world,
        get_rank=lambda: 0,
        all_reduce=lambda x: None,
    )
    try:
        yield
    finally:
        layers.dist = before


class FakeTrainer:
    """A Prismer without data that measures its training steps.

    Args:
        config: architecture and image size.
        mode: a freeze mode.
        precision: of the weights, "bf16" or "fp32".
        world: number of processes that train together.
    """

    def __init__(self, config: PrismerConfig, mode: str, precision: str, world: int = 1):
        self.config, self.precision, self.world = config, precision, world
        with torch.device("meta"):
            model = Prismer(config).train()
        freeze(model, mode)
        self.model = model.to(DTYPES[precision])

    def step(self, batch_size: int, texts: Texts, checkpointing: bool = False) -> FakeStep:
        """The memory of one forward and backward pass.

        Args:
            batch_size: images in the micro-batch.
            texts: texts of each image, see `Texts`.
            checkpointing: whether the backward pass recomputes each block.
        """
        batch = self._batch(batch_size, texts, checkpointing)
        inputs = _tensors(batch)
        watch = _MemoryWatch([*self.model.parameters(), *self.model.buffers(), *inputs])

        def on_gradient(parameter: Tensor) -> None:
            watch.become(id(parameter.grad.untyped_storage()), "gradients")

        trained = [p for p in self.model.parameters() if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(on_gradient) for p in trained]
        with self._as_on_a_gpu(), watch:
            loss = self.model(batch)
            watch.end_forward()
            kept = watch.live["kept"]
            loss.backward()
        for hook in hooks:
            hook.remove()
        self.model.zero_grad()
        return FakeStep(
            peak=watch.peak,
            peak_sharded=watch.peak_sharded,
            kept=kept,
            logits=watch.logits,
            batch=sum(t.nbytes for t in inputs),
        )

    def flops(self, texts: Texts, checkpointing: bool = False) -> tuple[int, int]:
        """FLOPs of one image, forward and backward, 2 per multiply-add; recomputation counts as backward."""
        batch = self._batch(1, texts, checkpointing)
        with self._as_on_a_gpu(), CostCounter() as counter:
            loss = self.model(batch)
            forward = counter.flops
            loss.backward()
        self.model.zero_grad()
        return forward, counter.flops - forward

    def _batch(self, size: int, texts: Texts, checkpointing: bool) -> Batch:
        self.model.set_gradient_checkpointing(checkpointing)
        with torch.device("meta"):
            return blank_batch(self.config, size, texts)

    @contextmanager
    def _as_on_a_gpu(self) -> Iterator[None]:
        """Run registered ops, which keep what their kernels keep, as one of `world` processes."""
        with dispatch.use_backend("torch"), _pretend_world(self.world):
            yield
