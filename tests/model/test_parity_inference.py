"""Proves that beam search writes what transformers' generate writes, and that ranking gives the results of the released
procedure; both are compared on transformers' model with our weights (twins.py).

transformers' generate (seen in 5.23) numbers the positions of a RoBERTa from 0, its forward from pad_id + 1; a hook
shifts them if they start at 0. Run: pytest tests/model/test_parity_inference.py
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, EncoderDecoderCache

from prismer.generation import beam_search
from prismer.ranking import AnswerTrie, rank_answers
from tests.model.plain_inference import plain_beam_search
from tests.model.twins import assert_close, build_decoders, theirs_logits


class PositionsFromPad:
    """A hook before RoBERTa's embeddings: positions of generate that start at 0 are shifted to pad_id + 1."""

    def __init__(self, pad_id):
        self.first, self.shift = None, pad_id + 1

    def __call__(self, module, args, kwargs):
        positions = kwargs["position_ids"]
        if positions is not None:
            self.first = positions.min().item() if self.first is None else self.first
            kwargs["position_ids"] = positions + self.shift * (self.first == 0)
        return args, kwargs


def generate(model, prompts, context, *, cache, beams, max_new_tokens, min_new_tokens, length_penalty):
    """transformers' tokens without prompt and end, and its scores."""
    options = {"use_cache": False}
    hook = model.roberta.embeddings.register_forward_pre_hook(PositionsFromPad(1), with_kwargs=True)
    if cache:
        caches = (DynamicCache(config=model.config), DynamicCache(config=model.config))
        options = {"past_key_values": EncoderDecoderCache(*caches)}
    ids = torch.tensor(prompts)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        encoder_hidden_states=context,
        num_beams=beams,
        do_sample=False,
        early_stopping=False,
        return_dict_in_generate=True,
        output_scores=True,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        length_penalty=length_penalty,
        pad_token_id=1,
        eos_token_id=2,
        **options,
    )
    hook.remove()
    written = [row[len(prompts[0]) :].tolist() for row in out.sequences]
    return [row[: row.index(2)] if 2 in row else row for row in written], out.sequences_scores


SEARCHES = [
    dict(beams=3, length_penalty=1.0, min_new_tokens=2, max_new_tokens=8),
    dict(beams=4, length_penalty=-1.0, min_new_tokens=0, max_new_tokens=6),
    dict(beams=2, length_penalty=0.0, min_new_tokens=1, max_new_tokens=7),
]


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: f"beams{s['beams']}-penalty{s['length_penalty']}")
@pytest.mark.parametrize("cache", [False, True], ids=["recomputed", "cached"])
def test_beam_search_writes_what_generate_writes(search, cache):
    """Modern scoring: a batch of images gets the tokens and scores of transformers' generate."""
    lengths, seen = set(), set()
    for seed in range(4):
        ours, theirs = build_decoders("odd", torch.float64, seed=seed)
        context = torch.randn(3, 5, 40, dtype=torch.float64)
        prompts = [[0, *torch.randint(3, 29, (3,)).tolist()] for _ in range(3)]
        found = beam_search(ours, context, [[p] for p in prompts], scoring="modern", **search)
        tokens, scores = generate(theirs, prompts, context, cache=cache, **search)
        assert found.tokens == tokens
        torch.testing.assert_close(found.scores, scores.double(), rtol=1e-6, atol=1e-9)
        lengths |= {len(row) for row in tokens}
        seen |= {tuple(row) for row in tokens}
    assert len(lengths) > 1 and len(seen) > 4


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: f"beams{s['beams']}-penalty{s['length_penalty']}")
def test_classic_scoring_on_transformers_model(search):
    """The plainly written classic rule on logits of transformers' model; its scores differ from the modern ones."""
    differs = False
    for seed in range(4):
        ours, theirs = build_decoders("odd", torch.float64, seed=seed)
        context = torch.randn(2, 5, 40, dtype=torch.float64)
        prompts = [[0, *torch.randint(3, 29, (3,)).tolist()] for _ in range(2)]
        groups = [[p] for p in prompts]
        found = beam_search(ours, context, groups, scoring="classic", **search)
        for b, prompt in enumerate(prompts):

            def next_log_probs(tokens, prompt=prompt, image=context[b : b + 1], model=theirs):
                return theirs_logits(model, torch.tensor([prompt + tokens]), image)[0, -1].log_softmax(-1).tolist()

            tokens, score = plain_beam_search(next_log_probs, len(prompt), 2, scoring="classic", **search)
            assert found.tokens[b] == tokens
            assert found.scores[b].item() == pytest.approx(score, rel=1e-6)
        modern = beam_search(ours, context, groups, scoring="modern", **search)
        differs |= not torch.allclose(modern.scores, found.scores)
    assert differs or search["length_penalty"] == 0


ANSWERS = [[7, 2], [7, 8, 2], [5, 9, 11, 2], [5, 9, 12, 2], [22, 2], [7, 8, 8, 8, 2], [9, 5, 2], [14, 2], [14, 3, 2]]


def published_ranking(model, context, questions, k, extra_pads):
    """Ranking step by step as in the released code, on transformers' model.

    `extra_pads` = 0 is the released procedure: only the shorter questions of a batch end in pads. 1 appends a pad to
    each question, so that a result does not depend on the batch.
    """
    columns = max(map(len, questions)) + extra_pads
    padded = torch.tensor([q + [1] * (columns - len(q)) for q in questions])
    first = theirs_logits(model, padded, context)[:, -1].softmax(-1)[:, [answer[0] for answer in ANSWERS]]
    results = []
    for b in range(len(questions)):
        kept = sorted(first[b].sort(descending=True, stable=True).indices[:k].tolist())
        scores = []
        for i in kept:
            whole = torch.cat([padded[b], torch.tensor(ANSWERS[i])])[None]
            logits = theirs_logits(model, whole, context[b : b + 1])[0, columns - 1 : -1]
            target = torch.tensor(ANSWERS[i])
            loss = F.cross_entropy(logits, target, label_smoothing=0.1, reduction="sum")
            scores.append(-loss.item() / len(target))
        results.append((kept[scores.index(max(scores))], kept, scores))
    return results


@pytest.mark.parametrize("k", [3, len(ANSWERS)], ids=["top3", "all"])
@pytest.mark.parametrize("read_out", ["batch", "pad"])
def test_ranking_gives_the_published_results(read_out, k):
    """Read-out "batch" depends on the batch as the released code does; "pad" gives each question its own result."""
    trie = AnswerTrie(ANSWERS, 2)
    best = set()
    for seed in range(3):
        ours, theirs = build_decoders("odd", torch.float64, seed=seed)
        context = torch.randn(3, 5, 40, dtype=torch.float64)
        questions = [[0, *torch.randint(3, 29, (n,)).tolist()] for n in (3, 6, 2)]
        groups = [[q] for q in questions]
        found = rank_answers(ours, context, groups, trie, top_k=k, read_out=read_out)
        expected = published_ranking(theirs, context, questions, k, extra_pads=int(read_out == "pad"))
        assert found.best.tolist() == [chosen for chosen, _, _ in expected]
        assert found.candidates.tolist() == [kept for _, kept, _ in expected]
        scores = torch.tensor([scores for *_, scores in expected], dtype=torch.float64)
        torch.testing.assert_close(found.scores, scores, rtol=1e-6, atol=1e-9)
        best |= set(found.best.tolist())
        alone = torch.cat(
            [
                rank_answers(ours, context[b : b + 1], [[q]], trie, top_k=k, read_out=read_out).scores
                for b, q in enumerate(questions)
            ]
        )
        assert torch.allclose(alone, found.scores) == (read_out == "pad")
    assert len(best) > 1


def test_fp32_scores_agree():
    """At BASE's width, the scores of both libraries agree to 1e-5."""
    ours, theirs = build_decoders("base")
    context = torch.randn(2, 30, 768)
    questions = [[0, 5, 9, 20], [0, 7]]
    found = rank_answers(ours, context, [[q] for q in questions], AnswerTrie(ANSWERS, 2), top_k=4, read_out="batch")
    expected = published_ranking(theirs, context, questions, 4, extra_pads=0)
    assert found.candidates.tolist() == [kept for _, kept, _ in expected]
    assert_close("scores", found.scores, torch.tensor([scores for *_, scores in expected]))
