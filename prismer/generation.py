"""Beam search that computes nothing twice: prompts read once, image keys and values projected once, static caches.

The beams of a prompt are the queries of one row. They share the prompt's keys and values and the image's; what each
has generated is a list of cache slots, so that reordering beams moves integers and never the cache (spec 5.5;
Prismer, arXiv:2303.02506, section 4.1). `read_prompts` is where ranking (prismer/ranking.py) starts too.

Legend: B images, G prompts of an image, R = B * G rows, S prompt tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.kernels.decode_attention import decode_attention
from prismer.text import TextDecoder, causal_attend, position_ids

READ_OUTS = ("pad", "last", "batch")
SCORINGS = ("classic", "modern")

Groups = list[list[list[int]]]
"""For each image its prompts, each a list of token ids that starts with `<s>`."""


@dataclass(frozen=True)
class Prompts:
    """What the decoder keeps of R prompts that it has read.

    Attributes:
        keys, values: for each self-attention layer (R, H, S, K).
        keep: (R, S) bool, False at padding.
        lengths: (R,) int64 tokens of each prompt, `<s>` included and pads not.
        state: (R, D) transformed hidden state that predicts the token after the prompt.
        rows: (P,) int64 rows that hold a prompt, image by image; the others only fill a group.
    """

    keys: list[Tensor]
    values: list[Tensor]
    keep: Tensor
    lengths: Tensor
    state: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Generated:
    """The best continuation of each of P prompts, image by image.

    Attributes:
        tokens: for each prompt the generated ids, without prompt and end token.
        scores: (P,) length-normalised sums of log-probabilities, fp32 or float64.
    """

    tokens: list[list[int]]
    scores: Tensor


@torch.inference_mode()
def read_prompts(
    decoder: TextDecoder, cross: list, groups: Groups, read_out: str, room: int
) -> Prompts:
    """Run the decoder once over all prompts and keep what their continuations need.

    Args:
        cross: `decoder.project_context` of B images.
        groups: for each image its prompts; their number and lengths may differ.
        read_out: the query that predicts the next token. "last": the prompt's last token. "pad": one `<pad>` after
            it, which is never a key, as in training on questions and answers (`prismer.tasks.encode_qa`). "batch":
            the last column of the padded batch, so that the longest prompt predicts from its last token and shorter
            ones from a `<pad>` (the released code, where a result depends on the batch).
        room: number of tokens that will follow, for the check of positions.

    Raises:
        ValueError: if the decoder is training, groups do not fit the images, a prompt is empty, or prompt and
            continuation exceed the position table.
    """
    config = decoder.config
    _check_prompts(decoder, cross, groups, read_out, room)
    B, G = len(groups), max(map(len, groups))
    S = max(len(prompt) for group in groups for prompt in group)
    columns = S + (read_out == "pad")
    rows = [g + b * G for b, group in enumerate(groups) for g in range(len(group))]
    flat = [[config.bos_id]] * (B * G)
    for row, prompt in zip(rows, (prompt for group in groups for prompt in group), strict=True):
        flat[row] = prompt
    device = decoder.head_weight.device
    ids = torch.tensor([prompt + [config.pad_id] * (columns - len(prompt)) for prompt in flat]).to(
        device
    )
    lengths = torch.tensor([len(prompt) for prompt in flat]).to(device)
    rows = torch.tensor(rows).to(device)

    keep = torch.arange(columns, device=device) < lengths[:, None]
    attend_causal = causal_attend(keep)
    keys, values = [], []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # copies, because every later step reads them and the layout of a step's matrix product is (R, H, S, K)
        keys.append(k[:, :, :S].contiguous())
        values.append(v[:, :, :S].contiguous())
        return attend_causal(layer, q, k, v)

    hidden = decoder.run(ids, position_ids(ids, config.pad_id), attend, cross)
    if read_out == "last":
        hidden = hidden[torch.arange(B * G, device=device), lengths - 1]
    else:
        hidden = hidden[:, -1]
    return Prompts(keys, values, keep[:, :S], lengths, decoder.transform(hidden), rows)


@torch.inference_mode()
def beam_search(
    decoder: TextDecoder,
    context: Tensor,
    groups: Groups,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    beams: int = 3,
    length_penalty: float = 1.0,
    scoring: str = "classic",
    read_out: str = "last",
) -> Generated:
    """The best continuation of each prompt; `beams=1` is greedy search.

    Each step takes the 2 * beams best one-token extensions of the open beams. An end token among the first `beams`
    of them closes a hypothesis, one below is discarded. A prompt is done when `beams` hypotheses exist and the worst
    scores at least what the best extension would; at the length limit its open beams become hypotheses. Everything
    stays on the device; the one host synchronisation of a step asks whether all prompts are done.

    Args:
        context: (B, N, vision width) image tokens.
        groups: for each image its prompts, e.g. `[[prompt]] * B`.
        max_new_tokens, min_new_tokens: bounds on generated tokens, the end token not counted by the lower one.
        length_penalty: exponent p of the length that a sum of log-probabilities is divided by.
        scoring: the length. "classic": prompt and generated tokens without the end token, as when Prismer was
            published; "modern": generated tokens with the end token, as recent libraries count.
        read_out: see `read_prompts`; a `<pad>` that predicts does not count as length.

    Raises:
        ValueError: if an option is out of range, or the prompts do not fit (`read_prompts`).
    """
    if scoring not in SCORINGS:
        raise ValueError(f"scoring is {scoring!r}; choose {' or '.join(SCORINGS)}")
    V = decoder.config.vocab_size
    if not 1 <= beams < V / 2:
        raise ValueError(
            f"beams is {beams}; expected 1 to {(V - 1) // 2}, under half of the {V} tokens"
        )
    if not 0 <= min_new_tokens <= max_new_tokens or max_new_tokens < 1:
        raise ValueError(
            f"min_new_tokens {min_new_tokens} and max_new_tokens {max_new_tokens} leave nothing to generate; "
            f"expected 0 <= min <= max and max >= 1"
        )
    cross = decoder.project_context(context)
    prompts = read_prompts(decoder, cross, groups, read_out, max_new_tokens)
    cache = _BeamCache(decoder, cross, prompts, beams, max_new_tokens)
    search = _Search(decoder, prompts, beams, max_new_tokens, length_penalty, scoring == "classic")

    logits = _logits(decoder, prompts.state)[:, None]  # (R, 1, V): one open beam so far
    for step in range(max_new_tokens):
        parents, tokens = search.advance(logits, step, end_allowed=step >= min_new_tokens)
        if step + 1 == max_new_tokens or bool(search.done.all()):
            break
        logits = _logits(decoder, decoder.transform(cache.run(parents, tokens, step)))
    return search.best(step + 1)


def _logits(decoder: TextDecoder, state: Tensor) -> Tensor:
    logits = F.linear(state, decoder.head_weight, decoder.head_bias)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _BeamCache:
    """Static self-attention cache: `beams` new slots a step, and for each beam the slots of its own past."""

    def __init__(
        self, decoder: TextDecoder, cross: list, prompts: Prompts, beams: int, max_new_tokens: int
    ):
        R, H, _, K = prompts.keys[0].shape
        self.decoder, self.cross, self.prompts, self.beams = decoder, cross, prompts, beams
        # what the last step generates is never read again
        slots = (max_new_tokens - 1) * beams
        self.keys = [k.new_empty(R, H, slots, K) for k in prompts.keys]
        self.values = [v.new_empty(R, H, slots, K) for v in prompts.values]
        self.ancestors = prompts.lengths.new_full((R, beams, max_new_tokens), -1)

    def run(self, parents: Tensor, tokens: Tensor, step: int) -> Tensor:
        """Extend beam `parents[r, i]` by `tokens[r, i]`, both (R, beams); returns hidden states (R, beams, D)."""
        start, end = step * self.beams, (step + 1) * self.beams
        self.ancestors = _pick(self.ancestors, parents)
        self.ancestors[:, :, step] = torch.arange(start, end, device=tokens.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[:, :, start:end], values[:, :, start:end] = k, v
            return decode_attention(
                q,
                self.prompts.keys[layer],
                self.prompts.values[layer],
                self.prompts.keep,
                keys[:, :, :end],
                values[:, :, :end],
                self.ancestors[:, :, : step + 1],
            )

        # RoBERTa counts positions from pad_id + 1
        positions = (self.prompts.lengths + step + self.decoder.config.pad_id + 1)[:, None]
        return self.decoder.run(tokens, positions.expand_as(tokens), attend, self.cross)


class _Search:
    """Open beams and finished hypotheses of R prompts, as tables of fixed size."""

    def __init__(
        self,
        decoder: TextDecoder,
        prompts: Prompts,
        beams: int,
        max_new_tokens: int,
        length_penalty: float,
        classic: bool,
    ):
        R = prompts.lengths.shape[0]
        self.prompts, self.beams, self.eos_id = prompts, beams, decoder.config.eos_id
        self.length_penalty, self.classic = length_penalty, classic
        dtype = torch.promote_types(prompts.state.dtype, torch.float32)
        self.sums = torch.zeros(R, 1, dtype=dtype, device=prompts.state.device)
        self.tokens = prompts.lengths.new_zeros(R, 1, max_new_tokens)
        # finished hypotheses, best first; -inf where there is none yet
        self.scores = self.sums.new_full((R, beams), float("-inf"))
        self.finished = self.tokens.expand(R, beams, -1)
        self.lengths = prompts.lengths.new_zeros(R, beams)
        # rows that only fill a group keep nobody waiting
        self.done = torch.ones(R, dtype=torch.bool, device=self.sums.device)
        self.done[prompts.rows] = False

    def advance(self, logits: Tensor, step: int, end_allowed: bool) -> tuple[Tensor, Tensor]:
        """One token further: logits (R, open beams, V) -> parents and tokens (R, beams) of the new open beams."""
        V = logits.shape[-1]
        log_probs = logits.log_softmax(-1)
        if not end_allowed:
            log_probs[..., self.eos_id] = float("-inf")
        best, index = (self.sums[..., None] + log_probs).flatten(1).topk(2 * self.beams)
        parents, tokens = index // V, index % V
        ended = tokens == self.eos_id

        # the length that a hypothesis has which ends here, and that an extension is judged by
        scores = best / self._normaliser(step if self.classic else step + 1)
        closes = ended[:, : self.beams] & ~self.done[:, None]
        closing = scores[:, : self.beams].masked_fill(~closes, float("-inf"))
        self._add(closing, _pick(self.tokens, parents[:, : self.beams]), step)
        self.done |= self.scores[:, -1] >= scores[:, 0]

        # each open beam ends at most once, so at least `beams` candidates go on; a stable sort keeps their order
        onward = ended.int().sort(dim=1, stable=True).indices[:, : self.beams]
        self.sums, parents, tokens = (t.gather(1, onward) for t in (best, parents, tokens))
        self.tokens = _pick(self.tokens, parents)
        self.tokens[:, :, step] = tokens
        return parents, tokens

    def best(self, steps: int) -> Generated:
        """The best hypothesis of each prompt after `steps` tokens; open beams of prompts not done count as finished."""
        open_scores = self.sums / self._normaliser(steps)
        self._add(open_scores.masked_fill(self.done[:, None], float("-inf")), self.tokens, steps)
        rows = self.prompts.rows
        tokens, lengths = self.finished[rows, 0].tolist(), self.lengths[rows, 0].tolist()
        generated = [ids[:length] for ids, length in zip(tokens, lengths, strict=True)]
        return Generated(generated, self.scores[rows, 0])

    def _add(self, scores: Tensor, tokens: Tensor, length: int) -> None:
        """Merge (R, beams) new hypotheses, -inf for none; of equal scores the earlier one stays ahead."""
        merged = torch.cat((self.scores, scores), 1).sort(dim=1, descending=True, stable=True)
        order = merged.indices[:, : self.beams]
        self.scores = merged.values[:, : self.beams]
        self.finished = _pick(torch.cat((self.finished, tokens), 1), order)
        lengths = self.lengths.new_full(scores.shape, length)
        self.lengths = torch.cat((self.lengths, lengths), 1).gather(1, order)

    def _normaliser(self, generated: int) -> Tensor:
        """(R, 1): length ** penalty."""
        length = self.prompts.lengths * int(self.classic) + generated
        return (length.to(self.sums.dtype) ** self.length_penalty)[:, None]


def _pick(table: Tensor, beams: Tensor) -> Tensor:
    """table (R, n, T), beams (R, m) -> (R, m, T)."""
    return table.gather(1, beams[..., None].expand(-1, -1, table.shape[2]))


def _check_prompts(
    decoder: TextDecoder, cross: list, groups: Groups, read_out: str, room: int
) -> None:
    config, B = decoder.config, cross[0][0].shape[0]
    if decoder.training:
        raise ValueError(
            "the model is in training mode, where dropout is random; call model.eval() first"
        )
    if read_out not in READ_OUTS:
        raise ValueError(f"read_out is {read_out!r}; choose {', '.join(READ_OUTS)}")
    if len(groups) != B:
        raise ValueError(
            f"prompts are given for {len(groups)} images, but there are {B}; give one list for each"
        )
    lengths = [len(prompt) for group in groups for prompt in group]
    if not lengths or not all(lengths):
        raise ValueError("a prompt is empty or there is none at all; each needs at least its <s>")
    # the last token that follows is predicted but never read
    limit = config.max_positions - config.pad_id - max(lengths)
    if room > limit:
        raise ValueError(
            f"a prompt of {max(lengths)} tokens can be followed by {limit} tokens, not {room}; "
            f"shorten the prompt or ask for fewer"
        )
