"""Answer ranking: every answer of a closed list scored exactly, as a path in a token trie.

The score of an answer is minus its label-smoothed loss per token, end token included. Answers share the nodes of their
common prefixes. The decoder reads an image's questions once and then the trie, whose nodes attend to their question
and to their ancestors. The head is applied at internal nodes alone, and the loss of a child y needs three numbers of
its logits z (Prismer, arXiv:2303.02506, section 4.1):

    loss = lse(z) - (1 - e) * z_y - e * mean(z),    mean(z) = x . mean_v W + mean b

Legend: P questions, R rows that hold them (prismer/generation.py), A answers, L tokens of the longest, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prismer.batch import Detections
from prismer.capture import recorded, size_class
from prismer.errors import InputError, check_integer
from prismer.generation import Groups, Prompts, read_prompts
from prismer.kernels.decode_attention import decode_attention
from prismer.kernels.linear import linears
from prismer.text import KeysValues, TextDecoder

# logits at a time, 128 MB in fp32
_MAX_LOGITS = 2**25


class AnswerTrie:
    """The tokens of a list of answers as a tree; build it once for a list and use it for any number of questions.

    Node 0 is the question's read-out, any other node is the state after its token. Nodes are numbered depth first.

    Attributes:
        paths: (A, L) int64, the node after each token of an answer, -1 after its end.
        lengths: (A,) int64 tokens of each answer, the end token included.
        first_tokens: (A,) int64.
        order: (A,) int64 answers in depth-first order, in which neighbours share the longest prefixes.
        tokens, parents: (nodes,) int64.
        ancestors: (nodes, L) int64: the nodes from depth 1 to the node itself, -1 after it.
    """

    def __init__(self, answers: list[list[int]], eos_id: int):
        """
        Args:
            answers: tokens of each answer, the end token last (`prismer.texts.encode_answer`).
            eos_id: the end token.

        Raises:
            ValueError: if there is no answer, or one does not end with its only end token.
        """
        if not answers:
            raise InputError("the list of answers is empty; give at least one answer")
        for i, tokens in enumerate(answers):
            if not tokens or tokens[-1] != eos_id or eos_id in tokens[:-1]:
                raise InputError(f"answer {i} has tokens {tokens}; expected the end token {eos_id} once, as the last")
        A, L = len(answers), max(map(len, answers))
        self.order = np.array(sorted(range(A), key=lambda i: answers[i]))
        self.lengths = np.array([len(tokens) for tokens in answers])
        self.first_tokens = np.array([tokens[0] for tokens in answers])
        self.paths = np.full((A, L), -1)
        children: dict[tuple[int, int], int] = {}
        tokens_of, parents = [eos_id], [-1]
        for i in self.order:
            node = 0
            for t, token in enumerate(answers[i]):
                parent, node = node, children.setdefault((node, token), len(tokens_of))
                if node == len(tokens_of):
                    tokens_of.append(token)
                    parents.append(parent)
                self.paths[i, t] = node
        self.tokens, self.parents = np.array(tokens_of), np.array(parents)
        self.ancestors = np.full((len(parents), L), -1)
        for path, length in zip(self.paths, self.lengths, strict=True):
            self.ancestors[path[:length]] = np.where(np.tri(length, L, dtype=bool), path, -1)

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class Ranking:
    """Scores of the answers to P questions, image by image.

    Attributes:
        best: (P,) int64 index of the best answer; of equal scores the first in the list.
        candidates: (P, k) int64 indices of the answers that were scored, in list order.
        scores: (P, k) fp32 or float64, minus the smoothed loss per token.
    """

    best: Tensor
    candidates: Tensor
    scores: Tensor


@torch.inference_mode()
def rank_answers(
    decoder: TextDecoder,
    context: Tensor,
    groups: Groups,
    trie: AnswerTrie,
    *,
    detections: Detections | None = None,
    top_k: int | None = None,
    read_out: str = "pad",
    max_tokens: int = 8192,
) -> Ranking:
    """Score the answers of a list to any number of questions about each image.

    Args:
        context: (B, N, vision width) image tokens.
        groups: for each image its questions, tokens that start with `<s>`; numbers and lengths may differ.
        trie: the answers.
        detections: see `TextDecoder.project_context`.
        top_k: score only the k answers with the likeliest first tokens (of equal ones the first in the list), as the
            released code does; None scores every answer. Choosing them costs one host synchronisation.
        read_out: what predicts the first token of an answer, see `read_prompts`.
        max_tokens: trie nodes times rows in one pass of the decoder; it bounds memory and changes no result.

    Raises:
        ValueError: if `top_k` is below 1, or for the reasons of `read_prompts`.
    """
    if top_k is not None:
        check_integer("top_k", top_k)
        if top_k < 1:
            raise InputError(f"top_k is {top_k}; expected at least 1, or None to score every answer")
    cross = decoder.project_context(context, detections)
    prompts = read_prompts(decoder, cross, groups, read_out, trie.paths.shape[1])
    scorer = _Scorer(decoder, cross, prompts, trie)
    R, device = prompts.state.shape[0], prompts.state.device
    if top_k is None or top_k >= len(trie):
        # one plan serves all rows
        chosen = trie.order[None]
    else:
        chosen = _likeliest(decoder, prompts, trie, top_k)
    parts = _cut(trie, chosen, max(1, max_tokens // R))
    scores = torch.cat([scorer.scores(chosen[:, part]) for part in parts], 1)

    # back from depth-first to list order
    by_list = np.argsort(chosen, axis=1)
    candidates = torch.from_numpy(np.take_along_axis(chosen, by_list, 1)).to(device).expand(R, -1)
    scores = scores.gather(1, torch.from_numpy(by_list).to(device).expand(R, -1))
    candidates, scores = candidates[prompts.rows], scores[prompts.rows]
    # argmax takes the first of equal ones
    best = candidates.gather(1, scores.argmax(1, keepdim=True))[:, 0]
    return Ranking(best, candidates, scores)


def _likeliest(decoder: TextDecoder, prompts: Prompts, trie: AnswerTrie, k: int) -> np.ndarray:
    """(R, k) answers with the likeliest first tokens, in depth-first order."""
    # first tokens are few: only their columns of the head are computed
    distinct, which = (
        torch.from_numpy(array).to(prompts.state.device) for array in np.unique(trie.first_tokens, return_inverse=True)
    )
    (logits,) = linears(prompts.state, [(decoder.head_weight[distinct], decoder.head_bias[distinct])])
    ranked = logits[:, which].sort(dim=1, descending=True, stable=True).indices[:, :k].cpu().numpy()
    rank = np.empty(len(trie), dtype=np.int64)
    rank[trie.order] = np.arange(len(trie))
    return np.take_along_axis(ranked, np.argsort(rank[ranked], axis=1), 1)


def _cut(trie: AnswerTrie, chosen: np.ndarray, budget: int) -> list[slice]:
    """Columns of `chosen` (rows, k) in parts of about `budget` new nodes each, in the row that needs most."""
    paths = trie.paths[chosen]
    alike = (paths[:, 1:] == paths[:, :-1]) & (paths[:, 1:] >= 0)
    shared = np.cumprod(alike, axis=2).sum(2)
    # an answer's last token is predicted but never run
    nodes = trie.lengths[chosen] - 1
    nodes[:, 1:] -= np.minimum(shared, nodes[:, 1:])
    total = nodes.cumsum(1).max(0)
    parts, start, spent = [], 0, 0
    while start < len(total):
        end = max(start + 1, int(np.searchsorted(total, spent + budget, side="right")))
        parts.append(slice(start, end))
        start, spent = end, total[end - 1]
    return parts


class _Scorer:
    """Scores answers to R prompts; on a GPU the passes of repeated shapes are replays of one CUDA graph."""

    def __init__(self, decoder: TextDecoder, cross: list[KeysValues], prompts: Prompts, trie: AnswerTrie):
        self.decoder, self.cross, self.prompts, self.trie = decoder, cross, prompts, trie
        self.dtype = torch.promote_types(prompts.state.dtype, torch.float32)
        self.means = decoder.head_weight.mean(0, dtype=self.dtype), decoder.head_bias.mean(dtype=self.dtype)

    def scores(self, chosen: np.ndarray) -> Tensor:
        """(R, c) scores of answers `chosen` (R, c), or (1, c) for the same ones in every row."""
        plan = _plan(self.trie, chosen, self.prompts.state.device)
        given = self.cross, self.prompts, self.means, plan
        with recorded(self.decoder, ("ranking", self.decoder.config), self._scores, given) as recording:
            scores = self._scores(*given) if recording is None else recording.replay().clone()
        return scores[:, : chosen.shape[1]]

    def _scores(self, cross: list[KeysValues], prompts: Prompts, means: tuple[Tensor, Tensor], plan: "_Plan") -> Tensor:
        state = prompts.state[:, None]
        if plan.tokens.shape[1]:
            state = torch.cat((state, self._run(cross, prompts, plan)), 1)  # (R, 1 + nodes, D)
        losses = self._edge_losses(state, means, plan)
        paths = plan.paths.expand(len(losses), -1, -1)
        picked = losses.gather(1, paths.flatten(1).clamp_min(0)).view_as(paths)
        return -picked.masked_fill(paths < 0, 0.0).sum(2) / plan.lengths

    def _run(self, cross: list[KeysValues], prompts: Prompts, plan: "_Plan") -> Tensor:
        """Transformed hidden states (R, nodes, D)."""
        R = len(prompts.lengths)
        ancestors = plan.ancestors.expand(R, -1, -1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return decode_attention(q, prompts.keys[layer], prompts.values[layer], prompts.keep, k, v, ancestors)

        # a node at depth 1 follows its question: RoBERTa counts positions from pad_id + 1
        positions = prompts.lengths[:, None] + plan.depths + self.decoder.config.pad_id
        tokens = plan.tokens.expand(R, -1)
        return self.decoder.transform(self.decoder.run(tokens, positions, attend, cross))

    def _edge_losses(self, state: Tensor, means: tuple[Tensor, Tensor], plan: "_Plan") -> Tensor:
        """(R, edges): smoothed loss of each edge's token, predicted by the node that the edge leaves."""
        smoothing = self.decoder.config.label_smoothing
        weight, bias = self.decoder.head_weight, self.decoder.head_bias
        R, _, D = state.shape
        rows = state.reshape(-1, D).split(max(1, _MAX_LOGITS // len(bias)))
        lse = torch.cat([linears(part, [(weight, bias)])[0].to(self.dtype).logsumexp(-1) for part in rows])
        mean_weight, mean_bias = means
        mean = state.to(self.dtype) @ mean_weight + mean_bias
        sources = plan.sources.expand(R, -1)
        leaving = state.gather(1, sources[..., None].expand(-1, -1, D)).to(self.dtype)
        target = (leaving * weight[plan.targets].to(self.dtype)).sum(-1) + bias[plan.targets]
        known = lse.view(R, -1) - smoothing * mean
        return known.gather(1, sources) - (1 - smoothing) * target


class _Plan(NamedTuple):
    """What to run for c answers, in rows: one for each prompt, or one for all; short rows are padded.

    On a GPU nodes, edges, answers and depth are padded to classes of sizes.

    Attributes:
        tokens, depths: (rows, nodes) of the nodes to run: the internal ones without the root.
        ancestors: (rows, nodes, depth) positions among `tokens`, the node itself included, -1 for none.
        sources: (rows, edges) node that an edge leaves: 0 for the root, else 1 + its position among `tokens`.
        targets: (rows, edges) token of an edge.
        paths: (rows, c, L) edges of each answer, -1 after its end.
        lengths: (rows, c) tokens of each answer.
    """

    tokens: Tensor
    depths: Tensor
    ancestors: Tensor
    sources: Tensor
    targets: Tensor
    paths: Tensor
    lengths: Tensor


def _plan(trie: AnswerTrie, chosen: np.ndarray, device: torch.device) -> _Plan:
    rows = []
    for answers in chosen:
        paths = trie.paths[answers]
        # an edge has the number of the node that it enters
        edges = np.unique(paths[paths >= 0])
        parents = trie.parents[edges]
        nodes = np.unique(parents[parents > 0])
        past = trie.ancestors[nodes]
        rows.append(
            dict(
                tokens=trie.tokens[nodes],
                depths=(past >= 0).sum(1),
                ancestors=np.where(past >= 0, np.searchsorted(nodes, past), -1),
                sources=np.where(parents > 0, 1 + np.searchsorted(nodes, parents), 0),
                targets=trie.tokens[edges],
                paths=np.where(paths >= 0, np.searchsorted(edges, paths), -1),
                lengths=trie.lengths[answers],
            )
        )
    arrays = {name: _stack([row[name] for row in rows], _FILLS.get(name, 0), device) for name in rows[0]}
    # the nodes to run are less deep than the longest answer is long
    deepest = min(size_class(int(arrays["depths"].max(initial=0)), device), trie.paths.shape[1] - 1)
    arrays["ancestors"] = arrays["ancestors"][:, :, :deepest]
    return _Plan(**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()})


# what stands in a plan where there is no node, edge or answer; 0 in all other fields
_FILLS = {"ancestors": -1, "paths": -1, "lengths": 1}


def _stack(arrays: list[np.ndarray], fill: int, device: torch.device) -> np.ndarray:
    """Arrays that differ in their first dimension as one, padded with `fill` to the size class of the longest."""
    longest = size_class(max(map(len, arrays)), device)
    out = np.full((len(arrays), longest, *arrays[0].shape[1:]), fill, dtype=np.int64)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return out
