"""Images, expert maps and texts as tensors whose first dimension is the batch, which any collator can stack.

| input | shape | |
|---|---|---|
| `pixel_values` | (B, 3, R, R) uint8 | normalised on the device |
| `depth`, `normal`, `edge`, `seg`, `obj_detection`, `ocr_detection` | (B, planes, s, s) uint8 | left out: background |
| `seg_features`, `obj_detection_features`, `ocr_detection_features` | (B, 256, 64) floats | of each id of the map |
| `detection_ids`, `detection_facts` | (B, S) int64, (B, S, 6) uint8 | detections as text |
| `input_ids`, `attention_mask`, `labels` | (B, T) int64 | |
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from prismer.batch import IGNORE_INDEX, Detections, ImageBatch, TextBatch
from prismer.config import PrismerConfig as Architecture
from prismer.errors import InputError, listed
from prismer.experts import EXPERTS, FEATURE_WIDTH

_FEATURES = {name: f"{name}_features" for name, expert in EXPERTS.items() if expert.is_ids}
# what a model takes beside the pixels of an image
IMAGE_INPUTS = (*EXPERTS, *_FEATURES.values(), "detection_ids", "detection_facts")


def tensors_of(images: ImageBatch) -> dict[str, Tensor]:
    """The inputs of a model that stand for `images`."""
    found = {"pixel_values": images.rgb, **images.labels}
    found |= {_FEATURES[name]: images.features[rows] for name, rows in images.rows.items()}
    if images.detections is not None:
        found |= {"detection_ids": images.detections.ids, "detection_facts": images.detections.facts}
    return found


def image_batch_of(
    architecture: Architecture,
    pixel_values: Tensor | None,
    given: Mapping[str, Tensor | None],
    instance_rows: Tensor | None,
) -> ImageBatch:
    """The images that the inputs stand for; missing maps are filled with background.

    Args:
        pixel_values: (B, 3, R, R) uint8.
        given: the other inputs by name, see IMAGE_INPUTS; None counts as missing.
        instance_rows: (256,) int64, or None for the fixed default.

    Raises:
        ValueError: if pixels are missing or no uint8, or a map and its features do not come together.
    """
    if pixel_values is None or pixel_values.dtype != torch.uint8:
        kind = "missing" if pixel_values is None else str(pixel_values.dtype)
        raise InputError(f"pixel_values are {kind}; give uint8 (B, 3, R, R), as PrismerImageProcessor makes them")
    inputs = {name: tensor for name, tensor in given.items() if tensor is not None}
    batch = ImageBatch.without_labels(pixel_values, architecture.experts, architecture.label_size)
    tables = [batch.features]
    for name in architecture.experts:
        features = _FEATURES.get(name)
        if features is not None and (name in inputs) != (features in inputs):
            raise InputError(f"{name} and {features} are one input; give both or neither")
        if name in inputs:
            batch.labels[name] = inputs[name]
        if features in inputs:
            table = inputs[features].float().reshape(-1, FEATURE_WIDTH)
            # each image has 256 rows of its own, after the rows of the tables before
            first = sum(map(len, tables))
            batch.rows[name] = torch.arange(first, first + len(table), device=table.device).view(-1, 256)
            tables.append(table)
    batch.features = torch.cat(tables)
    batch.instance_rows = instance_rows
    if architecture.expert_text:
        ids, facts = inputs.get("detection_ids"), inputs.get("detection_facts")
        if ids is None or facts is None:
            size = architecture.num_detection_tokens, architecture.pad_id
            batch.detections = Detections.none(len(batch), *size, device=pixel_values.device)
        else:
            batch.detections = Detections(ids=ids, facts=facts)
    return batch


def text_batch_of(
    architecture: Architecture,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    text_weights: Tensor | None = None,
) -> TextBatch:
    """One text for each image; on a CPU without computing its padding.

    Args:
        input_ids: (B, T) right-padded.
        attention_mask: (B, T), 0 at padding; a `<pad>` with 1 is the query that predicts an answer. None: no padding.
        labels: (B, T), the tokens that are targets and IGNORE_INDEX elsewhere; None for no target.
        text_weights: (B,) weight of each text in the loss; None for 1.

    Raises:
        ValueError: if the first token of a text is padding.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    ids = torch.where(real, input_ids, architecture.pad_id)
    started = ids[:, 0].ne(architecture.pad_id).all()
    if not ids.is_cpu:
        # the host must not wait for the device
        torch._assert_async(started)
    elif not started:
        raise InputError("a text starts with padding; pad on the right, as PrismerProcessor does")
    if labels is None:
        labels = torch.full_like(ids, IGNORE_INDEX)
    if text_weights is None:
        text_weights = torch.ones(len(ids), device=ids.device)
    texts = TextBatch(ids=ids[:, None], labels=labels[:, None], weights=text_weights[:, None])
    if ids.is_cpu and not torch.compiler.is_compiling():
        # up to the last real token
        places = torch.arange(1, ids.shape[1] + 1)
        texts.packing = texts.pack((real * places).amax(1, keepdim=True))
    return texts


def prompts_of(
    architecture: Architecture, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[list[list[int]], bool]:
    """The prompts of a batch as lists of ids, padding removed on either side, and whether they are questions.

    A question ends with the `<pad>` that predicts its answer, whose mask is 1; that `<pad>` is left out of the lists.

    Raises:
        ValueError: if the batch mixes questions with other prompts, or a mask is needed to tell padding from queries.
    """
    pad = architecture.pad_id
    rows = input_ids.tolist()
    if attention_mask is not None:
        masks = attention_mask.tolist()
        rows = [[i for i, real in zip(row, mask, strict=True) if real] for row, mask in zip(rows, masks, strict=True)]
    elif any(row[-2:] == [pad, pad] for row in rows):
        raise InputError("input_ids hold padding without an attention_mask; give the mask that the processor makes")
    kinds = {row[-1:] == [pad] for row in rows}
    if len(kinds) > 1:
        raise InputError("the batch holds questions and other prompts; generate from each kind in a batch of its own")
    asked = kinds.pop()
    return [row[:-1] if asked else row for row in rows], asked


def check_known(options: Iterable[str], known: tuple[str, ...], taker: str) -> None:
    """Refuse options that would not be followed; `taker` names the function in errors."""
    unknown = set(options) - set(known)
    if unknown:
        raise InputError(f"{taker} does not take {listed(unknown)}; it takes {', '.join(sorted(known))}")
