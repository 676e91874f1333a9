"""Beam search that computes nothing twice: prompts read once, image keys and values projected once, static caches.

The beams of a prompt are the queries of one row. They share the keys and values of the prompt and of the image. What a
beam has generated is a list of cache slots, so that reordering beams moves integers and never the caches. Ranking
(prismer/ranking.py) starts with `read_prompts`, too. Source: Prismer, arXiv:2303.02506, section 4.1.

Legend: B images, G prompts of an image, R = B * G rows, S prompt tokens, V vocabulary.
"""

import numbers
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prismer.batch import Detections
from prismer.capture import LateFlag, copy_all, recorded, size_class
from prismer.errors import InputError, check_integer
from prismer.kernels.decode_attention import decode_attention
from prismer.text import KeysValues, TextDecoder, causal_attend, position_ids

READ_OUTS = ("pad", "last", "batch")
SCORINGS = ("classic", "modern")

# 80 tokens to a larger power soon exceed fp32
_MAX_PENALTY = 10

# for each image its prompts, each a list of token ids that starts with `<s>`
Groups = list[list[list[int]]]


class Prompts(NamedTuple):
    """R prompts that the decoder has read, as their continuations need them.

    Attributes:
        keys, values: for each self-attention layer (R, H, S, K).
        keep: (R, S) bool, False at padding.
        lengths: (R,) int64 tokens of each prompt, with `<s>` and without pads.
        state: (R, D) transformed hidden state that predicts the token after the prompt.
        rows: (P,) int64 rows that hold a prompt, image by image; other rows only fill a group.
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
def read_prompts(decoder: TextDecoder, cross: list[KeysValues], groups: Groups, read_out: str, room: int) -> Prompts:
    """Run the decoder once over all prompts and keep what their continuations need.

    Args:
        cross: `decoder.project_context` of B images.
        groups: for each image its prompts; their number and lengths may differ.
        read_out: the query that predicts the next token. "last": the prompt's last token. "pad": one `<pad>` after
            it, which is never a key, as in training on questions and answers (`prismer.texts.encode_qa`). "batch":
            the last column of the padded batch: the last token of the longest prompt, a `<pad>` of shorter ones (as
            in the released code, whose results depend on the batch).
        room: number of tokens that will follow, to check their positions.

    Raises:
        ValueError: if the decoder is in training mode, the groups do not fit the images, a prompt is empty, or prompt
            and continuation exceed the position table.
    """
    config = decoder.config
    _check_prompts(decoder, cross, groups, read_out, room)
    B, G = len(groups), max(map(len, groups))
    S = max(len(prompt) for group in groups for prompt in group)
    device = decoder.head_weight.device
    if read_out != "batch":
        S = size_class(S, device)
    columns = S + (read_out == "pad")
    rows = [g + b * G for b, group in enumerate(groups) for g in range(len(group))]
    flat = [[config.bos_id]] * (B * G)
    for row, prompt in zip(rows, (prompt for group in groups for prompt in group), strict=True):
        flat[row] = prompt
    ids = torch.tensor([prompt + [config.pad_id] * (columns - len(prompt)) for prompt in flat]).to(device)
    lengths = torch.tensor([len(prompt) for prompt in flat]).to(device)
    rows = torch.tensor(rows).to(device)

    keep = torch.arange(columns, device=device) < lengths[:, None]
    attend_causal = causal_attend(keep)
    keys, values = [], []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # contiguous copies: every later step multiplies with them in this layout
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
    detections: Detections | None = None,
    beams: int = 3,
    length_penalty: float = 1.0,
    scoring: str = "classic",
    read_out: str = "last",
) -> Generated:
    """The best continuation of each prompt; `beams=1` is greedy search.

    Each step takes the 2 * beams best one-token extensions of the open beams. An end token among the first `beams`
    of them closes a hypothesis; one below is discarded. A prompt is done when it has `beams` hypotheses and the best
    extension would score no more than the worst of them. At the length limit open beams become hypotheses. Everything
    stays on the device. On a CPU a step ends with the question whether all prompts are done; on a GPU the host hears
    the answer one step late and waits for nothing, and the steps of repeated shapes are replays of one CUDA graph.

    Args:
        context: (B, N, vision width) image tokens.
        groups: for each image its prompts, e.g. `[[prompt]] * B`.
        max_new_tokens, min_new_tokens: bounds on generated tokens, the end token not counted by the lower one.
        detections: see `TextDecoder.project_context`.
        length_penalty: exponent p of the length that a sum of log-probabilities is divided by.
        scoring: what counts as length. "classic": prompt and generated tokens without the end token, as in the
            libraries of the paper's time; "modern": generated tokens with the end token, as in recent libraries.
        read_out: see `read_prompts`; a `<pad>` that predicts does not count as length.

    Raises:
        ValueError: if an option is out of range, or for the reasons of `read_prompts`.
    """
    if scoring not in SCORINGS:
        raise InputError(f"scoring is {scoring!r}; choose {' or '.join(SCORINGS)}")
    V = decoder.config.vocab_size
    counts = dict(beams=beams, max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens)
    for name, value in counts.items():
        check_integer(name, value)
    number = isinstance(length_penalty, numbers.Real) and not isinstance(length_penalty, bool)
    # written so that NaN is refused, too
    if not (number and -_MAX_PENALTY <= length_penalty <= _MAX_PENALTY):
        raise InputError(f"length_penalty is {length_penalty!r}; give a number of at most {_MAX_PENALTY}, e.g. 1.0")
    if not 1 <= beams < V / 2:
        raise InputError(f"beams is {beams}; expected 1 to {(V - 1) // 2}, under half of the {V} tokens")
    if not 0 <= min_new_tokens <= max_new_tokens or max_new_tokens < 1:
        raise InputError(
            f"min_new_tokens {min_new_tokens} and max_new_tokens {max_new_tokens} leave nothing to generate; "
            f"expected 0 <= min <= max and max >= 1"
        )
    cross = decoder.project_context(context, detections)
    prompts = read_prompts(decoder, cross, groups, read_out, max_new_tokens)
    search = BeamSearch(decoder, **counts, length_penalty=length_penalty, classic=scoring == "classic")
    memory = search.remember(cross, prompts)
    state = search.start(memory)
    over = LateFlag(context.device)
    with recorded(decoder, search.options, search.step_in_place, (memory, state)) as recording:
        if recording is not None:
            memory, state = recording.arguments
        all_done = state.done.all()
        for _ in range(max_new_tokens - 1):
            # a step more than needed changes nothing: a prompt that is done keeps its hypotheses
            if over.read(all_done):
                break
            if recording is not None:
                all_done = recording.replay()
            else:
                state = search(memory, state)
                all_done = state.done.all()
        return search.best(memory.prompts, state)


class Memory(NamedTuple):
    """What the steps of R searches attend to and count with; every tensor keeps its place.

    Attributes:
        cross: for each layer the keys and values of the images.
        prompts: the prompts, as the decoder has read them.
        keys, values: caches of each self-attention layer, (R, H, slots, K). A step writes `beams` new slots in place.
        columns: (max_new_tokens,) int64 0, 1, 2, ...
        beam_numbers: (beams,) int64 0, 1, 2, ...
    """

    cross: list[KeysValues]
    prompts: Prompts
    keys: list[Tensor]
    values: list[Tensor]
    columns: Tensor
    beam_numbers: Tensor


class BeamState(NamedTuple):
    """R searches between two steps; every tensor keeps its shape from step to step.

    Attributes:
        generated: () int64, tokens that the open beams have generated, L.
        sums: (R, beams) their sums of log-probabilities, fp32 or float64.
        tokens: (R, beams, max_new_tokens) int64, the tokens themselves, zero from L on.
        ancestors: (R, beams, max_new_tokens) int64 cache slots of all tokens of a beam but the last, then -1.
        scores: (R, beams) of finished hypotheses, best first; -inf for those that do not exist yet.
        finished: (R, beams, max_new_tokens) int64 tokens of the finished hypotheses.
        lengths: (R, beams) int64 number of these tokens.
        done: (R,) bool, whether a prompt's search is over.
    """

    generated: Tensor
    sums: Tensor
    tokens: Tensor
    ancestors: Tensor
    scores: Tensor
    finished: Tensor
    lengths: Tensor
    done: Tensor


class BeamSearch(nn.Module):
    """The step of `beam_search`, a function of two tuples of tensors; arguments as there.

    All steps are one program: the host asks nothing, and no value of Python changes from step to step. So
    `torch.compile` compiles it once, `torch.export.export(search, (memory, state))` takes it whole, and a GPU records
    it once (prismer/capture.py).
    """

    def __init__(
        self,
        decoder: TextDecoder,
        *,
        beams: int,
        max_new_tokens: int,
        min_new_tokens: int,
        length_penalty: float,
        classic: bool,
    ):
        super().__init__()
        self.decoder = decoder
        self.beams, self.max_new_tokens, self.min_new_tokens = beams, max_new_tokens, min_new_tokens
        self.length_penalty, self.classic = length_penalty, classic

    @property
    def options(self) -> tuple:
        """All that a step depends on besides weights and tensors."""
        counts = self.beams, self.max_new_tokens, self.min_new_tokens
        return "beam search", *counts, self.length_penalty, self.classic, self.decoder.config

    def remember(self, cross: list[KeysValues], prompts: Prompts) -> Memory:
        """What the steps need, with empty caches."""
        R, H, _, K = prompts.keys[0].shape
        device = prompts.lengths.device
        # the tokens of the last step are never read again
        slots = (self.max_new_tokens - 1) * self.beams
        return Memory(
            cross=cross,
            prompts=prompts,
            # finite from the start: an attention may multiply masked slots by zero
            keys=[k.new_zeros(R, H, slots, K) for k in prompts.keys],
            values=[v.new_zeros(R, H, slots, K) for v in prompts.values],
            columns=torch.arange(self.max_new_tokens, device=device),
            beam_numbers=torch.arange(self.beams, device=device),
        )

    def start(self, memory: Memory) -> BeamState:
        """The state after the first token, which the prompts predict."""
        prompts, state, T = memory.prompts, memory.prompts.state, self.max_new_tokens
        R = len(state)
        scores = state.new_full((R, self.beams), float("-inf"), dtype=torch.promote_types(state.dtype, torch.float32))
        nothing = prompts.lengths.new_zeros(R, 1, T)
        # rows that only fill a group are done from the start
        done = torch.ones(R, dtype=torch.bool, device=state.device)
        done[prompts.rows] = False
        # one open beam so far
        empty = BeamState(
            generated=prompts.lengths.new_zeros(()),
            sums=scores.new_zeros(R, 1),
            tokens=nothing,
            ancestors=nothing - 1,
            scores=scores,
            finished=nothing.expand(-1, self.beams, -1),
            lengths=nothing.new_zeros(R, self.beams),
            done=done,
        )
        return self._advance(memory, empty, self._logits(state[:, None]))

    def forward(self, memory: Memory, state: BeamState) -> BeamState:
        """Run the decoder on the last token of every open beam, and extend the beams."""
        prompts, last = memory.prompts, state.generated - 1
        slots = last * self.beams + memory.beam_numbers
        ancestors = torch.where(memory.columns == last, slots[:, None], state.ancestors)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # the whole caches, although later slots are still empty: only the listed slots are read
            keys = memory.keys[layer].index_copy_(2, slots, k)
            values = memory.values[layer].index_copy_(2, slots, v)
            return decode_attention(
                q, prompts.keys[layer], prompts.values[layer], prompts.keep, keys, values, ancestors
            )

        tokens = state.tokens.index_select(2, last[None])[..., 0]
        # RoBERTa counts positions from pad_id + 1
        positions = (prompts.lengths + state.generated + self.decoder.config.pad_id)[:, None]
        hidden = self.decoder.run(tokens, positions.expand_as(tokens), attend, memory.cross)
        logits = self._logits(self.decoder.transform(hidden))
        return self._advance(memory, state._replace(ancestors=ancestors), logits)

    def step_in_place(self, memory: Memory, state: BeamState) -> Tensor:
        """Write the next state over `state`; whether all prompts are done, () bool."""
        copy_all(list(state), list(self(memory, state)))
        return state.done.all()

    def best(self, prompts: Prompts, state: BeamState) -> Generated:
        """The best hypothesis of each prompt; open beams of unfinished prompts count as hypotheses."""
        scores = state.sums / self._normaliser(prompts, state.generated)
        scores, finished, lengths = _merge(state, scores.masked_fill(state.done[:, None], float("-inf")), state.tokens)
        rows = prompts.rows
        tokens, lengths = finished[rows, 0].tolist(), lengths[rows, 0].tolist()
        generated = [ids[:length] for ids, length in zip(tokens, lengths, strict=True)]
        return Generated(generated, scores[rows, 0])

    def _logits(self, state: Tensor) -> Tensor:
        """(R, open beams, D) -> (R, open beams, V), fp32 at least."""
        logits = self.decoder.logits(state)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _advance(self, memory: Memory, state: BeamState, logits: Tensor) -> BeamState:
        """Extend the open beams by one token, given the logits (R, open beams, V) after each of them."""
        V, eos_id, length = logits.shape[-1], self.decoder.config.eos_id, state.generated
        log_probs = logits.log_softmax(-1)
        if self.min_new_tokens:
            log_probs[..., eos_id].masked_fill_(length < self.min_new_tokens, float("-inf"))
        best, index = (state.sums[..., None] + log_probs).flatten(1).topk(2 * self.beams)
        parents, tokens = index // V, index % V
        ended = tokens == eos_id

        # the length of a hypothesis that ends here; extensions are judged by the same length
        ratings = best / self._normaliser(memory.prompts, length if self.classic else length + 1)
        closes = ended[:, : self.beams] & ~state.done[:, None]
        closing = ratings[:, : self.beams].masked_fill(~closes, float("-inf"))
        closed = _pick(state.tokens, parents[:, : self.beams])
        scores, finished, lengths = _merge(state, closing, closed)

        # each open beam ends at most once, so at least `beams` candidates go on; a stable sort keeps their order
        onward = ended.int().sort(dim=1, stable=True).indices[:, : self.beams]
        sums, parents, tokens = (t.gather(1, onward) for t in (best, parents, tokens))
        return BeamState(
            generated=length + 1,
            sums=sums,
            tokens=torch.where(memory.columns == length, tokens[..., None], _pick(state.tokens, parents)),
            ancestors=_pick(state.ancestors, parents),
            scores=scores,
            finished=finished,
            lengths=lengths,
            done=state.done | (scores[:, -1] >= ratings[:, 0]),
        )

    def _normaliser(self, prompts: Prompts, generated: Tensor) -> Tensor:
        """(R, 1): length ** penalty."""
        length = prompts.lengths * int(self.classic) + generated
        dtype = torch.promote_types(prompts.state.dtype, torch.float32)
        return (length.to(dtype) ** self.length_penalty)[:, None]


def _merge(state: BeamState, scores: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`scores`, `finished` and `lengths` of a state and (R, beams) new hypotheses of its length, -inf for none.

    Of equal scores the earlier one stays ahead.
    """
    beams = scores.shape[1]
    merged = torch.cat((state.scores, scores), 1).sort(dim=1, descending=True, stable=True)
    order = merged.indices[:, :beams]
    finished = _pick(torch.cat((state.finished, tokens), 1), order)
    lengths = torch.cat((state.lengths, state.generated.expand_as(scores)), 1).gather(1, order)
    return merged.values[:, :beams], finished, lengths


def _pick(table: Tensor, beams: Tensor) -> Tensor:
    """table (R, n, T), beams (R, m) -> (R, m, T)."""
    return table.gather(1, beams[..., None].expand(-1, -1, table.shape[2]))


def _check_prompts(decoder: TextDecoder, cross: list[KeysValues], groups: Groups, read_out: str, room: int) -> None:
    config, B = decoder.config, cross[0][0].shape[0]
    if decoder.training:
        raise InputError("the model is in training mode, where dropout is random; call model.eval() first")
    if read_out not in READ_OUTS:
        raise InputError(f"read_out is {read_out!r}; choose {', '.join(READ_OUTS)}")
    if len(groups) != B:
        raise InputError(f"prompts are given for {len(groups)} images, but there are {B}; give one list for each")
    lengths = [len(prompt) for group in groups for prompt in group]
    if not lengths or not all(lengths):
        raise InputError("a prompt is empty or there is none at all; each needs at least its <s>")
    # the last token that follows is predicted but never read
    limit = config.max_positions - config.pad_id - max(lengths)
    if room > limit:
        raise InputError(
            f"a prompt of {max(lengths)} tokens can be followed by {limit} tokens, not {room}; "
            f"shorten the prompt or ask for fewer"
        )
