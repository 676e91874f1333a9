"""Logits and losses of given texts: what the decoder computes for a training batch, seen text by text."""

import dataclasses

import torch
import torch.nn.functional as F

from prismer.batch import IGNORE_INDEX
from prismer.text import causal_attend, position_ids


def logits_of(decoder, ids, context):
    """(R, T) ids of R texts about B images -> (R, T, V) logits; every text is a row of its own."""
    pad_id = decoder.config.pad_id
    hidden = decoder.run(ids, position_ids(ids, pad_id), causal_attend(ids.ne(pad_id)), context)
    return decoder.logits(decoder.transform(hidden))


def text_losses(decoder, texts, context):
    """(B, G): the summed loss of each text, by the training pass: all weights are 0 but those of one text."""
    picks = torch.eye(texts.weights.numel()).view(-1, *texts.weights.shape) * texts.weights.numel()
    losses = [decoder(dataclasses.replace(texts, weights=pick), context) for pick in picks]
    return torch.stack(losses).view(texts.weights.shape)


def plain_text_losses(decoder, texts, context):
    """(B, G): the same by the definition: torch's own cross entropy of the logits of every text alone."""
    rows = logits_of(decoder, texts.ids.flatten(0, 1), context)
    targets = F.pad(texts.labels.flatten(0, 1)[:, 1:], (0, 1), value=IGNORE_INDEX)
    losses = F.cross_entropy(
        rows.mT, targets, label_smoothing=decoder.config.label_smoothing, ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses.sum(1).view(texts.weights.shape)
