"""The tensors that travel from the loader to the model: named fields, shapes, device moves, blank experts."""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

from prismer.experts import BACKGROUND, EXPERTS, FEATURE_WIDTH

# a label that takes no part in the loss
IGNORE_INDEX = -100

_Self = TypeVar("_Self", bound="_Movable")


class _Movable:
    """`to` for a dataclass of tensors, dicts of tensors and plain values."""

    def to(self: _Self, device: torch.device | str, non_blocking: bool = True) -> _Self:
        """A copy with every tensor on `device`."""

        def move(value: Any) -> Any:
            if isinstance(value, (Tensor, _Movable)):
                return value.to(device, non_blocking=non_blocking)
            if isinstance(value, dict):
                return {key: move(item) for key, item in value.items()}
            return value

        return type(self)(**{f.name: move(getattr(self, f.name)) for f in dataclasses.fields(self)})


@dataclass
class ImageBatch(_Movable):
    """The input of the vision encoder; label maps stay uint8 until the device expands them.

    Attributes:
        rgb: (B, 3, h, w) uint8.
        labels: expert -> (B, planes, s, s) uint8, `s` the label size.
        rows: high-level expert -> (B, 256) int64: for each id of the map, its row of `features`.
        features: (F, 64) fp32 semantics; row 0 is the background.
        instance_rows: (256,) int64: for each object id, its row of the instance table; None picks the fixed default.
    """

    rgb: Tensor
    labels: dict[str, Tensor]
    rows: dict[str, Tensor]
    features: Tensor
    instance_rows: Tensor | None = None

    def __len__(self) -> int:
        return self.rgb.shape[0]

    @classmethod
    def without_labels(cls, rgb: Tensor, experts: tuple[str, ...], label_size: int) -> "ImageBatch":
        """Images without expert labels: their maps are constant (low-level) or background (ids)."""
        labels, rows = {}, {}
        for name in experts:
            expert = EXPERTS[name]
            shape = (rgb.shape[0], expert.planes, label_size, label_size)
            labels[name] = torch.full(shape, expert.fill, dtype=torch.uint8, device=rgb.device)
            if expert.is_ids:
                rows[name] = torch.zeros(rgb.shape[0], 256, dtype=torch.int64, device=rgb.device)
        features = torch.zeros(1, FEATURE_WIDTH, device=rgb.device)
        return cls(rgb=rgb, labels=labels, rows=rows, features=features)

    def blank(self) -> "ImageBatch":
        """Grey images without expert labels, in the same shapes (the "blank image" baseline)."""
        labels = {name: torch.full_like(map_, EXPERTS[name].fill) for name, map_ in self.labels.items()}
        return dataclasses.replace(self, rgb=torch.full_like(self.rgb, 118), labels=labels)


@dataclass
class Packing(_Movable):
    """Where the tokens of a batch of texts are, so that the decoder computes no padding (`TextBatch.pack`).

    A slot is a place of the padded texts: those of `TextBatch.parts`, one part after another. Self-attention sees
    slots, cross-attention a row of tokens for each image, and everything else the P tokens alone. Without `tokens`
    every slot is a token. Otherwise the last token is a pad that stands for every pad: what is computed for it is not
    used, and its gradients are zero.

    Attributes:
        tokens: (P,) int64 slot of each token; None if every slot is one.
        slots: (S,) int64 token of each slot; None likewise.
        rows: (B, N) int64 tokens of each image; None if they lie in such rows already.
        places: (P,) int64 place of each token in the flat rows; None likewise.
        targets: (n,) int64 tokens after which a target follows, at least one; None if the host does not know them.
    """

    tokens: Tensor | None = None
    slots: Tensor | None = None
    rows: Tensor | None = None
    places: Tensor | None = None
    targets: Tensor | None = None


# the share of slots that pads must have before look-ups cost less than to compute them
_MANY_PADS = 0.1


@dataclass
class TextBatch(_Movable):
    """G texts for each of B images, right-padded; a `<pad>` inside a text is the query that predicts an answer.

    Attributes:
        ids: (B, G, T) int64 tokens; `<pad>` is never a key.
        labels: (B, G, T) int64, the token itself if it is a target, else IGNORE_INDEX (the loss shifts them).
        weights: (B, G) fp32 weight of each text in the loss; 0 for a text that only fills the group.
        lengths: tokens of the longest text at each of the G places; () if the host does not know them.
        split: place at which texts of another length begin (questions after captions), 0 for none; the decoder then
            reads each part without the padding of the other.
        packing: of these `parts`; None if every slot is computed.
    """

    ids: Tensor
    labels: Tensor
    weights: Tensor
    lengths: tuple[int, ...] = ()
    split: int = 0
    packing: Packing | None = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "TextBatch":
        """A copy on `device`; on a GPU without the packing, whose look-ups are more launches in every layer."""
        moved = super().to(device, non_blocking=non_blocking)
        return moved if torch.device(device).type == "cpu" else dataclasses.replace(moved, packing=None)

    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """(ids, labels) of the texts before and after `split`, each as wide as its longest text."""
        G, T = self.ids.shape[1:]
        cuts = [0, self.split, G] if 0 < self.split < G else [0, G]
        parts = []
        for start, stop in itertools.pairwise(cuts):
            # the loss shifts by one: a part of fillers alone keeps two tokens
            length = min(T, max(2, *self.lengths[start:stop])) if self.lengths else T
            parts.append((self.ids[:, start:stop, :length], self.labels[:, start:stop, :length]))
        return parts

    def every_slot(self) -> Packing:
        """The packing that computes every slot."""
        parts, B = self.parts(), self.ids.shape[0]
        if len(parts) == 1:
            return Packing()
        sizes = [ids.numel() for ids, _ in parts]
        slots = torch.arange(sum(sizes), device=self.ids.device)
        rows = torch.cat([part.view(B, -1) for part in slots.split(sizes)], dim=1)
        return Packing(rows=rows, places=rows.flatten().argsort())

    def pack(self, lengths: Tensor) -> Packing:
        """The packing that leaves out the padding, unless there is little, and that knows the targets.

        Args:
            lengths: (B, G) int64 tokens of each text, at least 1; on the CPU, as all of this.
        """
        parts, B, start, own = self.parts(), self.ids.shape[0], 0, []
        for ids, _ in parts:
            own.append((torch.arange(ids.shape[2]) < lengths[:, start : start + ids.shape[1], None]).flatten())
            start += ids.shape[1]
        kept = torch.cat(own)
        aimed = torch.cat([shifted(labels).flatten() for _, labels in parts]) != IGNORE_INDEX
        found, S = kept.nonzero()[:, 0], len(kept)
        if len(found) + 1 > (1 - _MANY_PADS) * S:
            packing = self.every_slot()
            packing.targets = _at_least_one(aimed)
            return packing
        tokens = torch.cat([found, (~kept).nonzero()[0]])
        pad = len(found)
        slots = torch.full((S,), pad).index_copy_(0, found, torch.arange(pad))
        image = torch.cat([torch.arange(B).repeat_interleave(len(part) // B) for part in own])[found]
        counts = image.bincount(minlength=B)
        # every row ends with a pad
        N = int(counts.max()) + 1
        order = image.argsort(stable=True)
        column = torch.arange(pad) - (counts.cumsum(0) - counts)[image[order]]
        places = torch.full((pad + 1,), N - 1).index_copy_(0, order, image[order] * N + column)
        rows = torch.full((B * N,), pad).index_copy_(0, places[:-1], torch.arange(pad)).view(B, N)
        return Packing(tokens, slots, rows, places, _at_least_one(aimed[tokens]))


def shifted(labels: Tensor) -> Tensor:
    """(B, G, T) labels -> the target of each position: the token after it; the last position has none."""
    return F.pad(labels[:, :, 1:], (0, 1), value=IGNORE_INDEX)


def _at_least_one(aimed: Tensor) -> Tensor:
    """Where `aimed` is; without any, the first place, whose target is ignored."""
    found = aimed.nonzero()[:, 0]
    return found if len(found) else found.new_zeros(1)


@dataclass
class Batch(_Movable):
    """One training or evaluation batch.

    Attributes:
        images, texts: the model's input; no texts in evaluation.
        keys: names of the samples.
        meta: JSON of the samples.
    """

    images: ImageBatch
    texts: TextBatch | None
    keys: list[str]
    meta: list[dict]


# so that torch.export takes a batch as an input
for _batch in (ImageBatch, Packing, TextBatch, Batch):
    _pytree.register_dataclass(_batch, serialized_type_name=f"prismer.batch.{_batch.__name__}")

# tables are indexed by raw uint8 ids, so that rows[:, 255] is the background row
assert BACKGROUND == 255
