"""Proves that every answer of a trie has the score that it has alone, in every mode, and that ranking does no more work
than documented. Run: pytest tests/model/test_ranking.py"""

import numpy as np
import pytest
import torch

import prismer.ranking as ranking
from prismer.ranking import AnswerTrie, rank_answers
from tests.model.plain_inference import plain_rank
from tests.model.test_generation import CONFIG, build_decoder, count, draw_context, draw_prompts

# a fixture
__all__ = ["count"]

END = CONFIG.eos_id
# prefixes of one another, a shared prefix, an end token alone, one answer twice
ANSWERS = [
    [7, END],
    [7, 8, END],
    [5, 9, 11, END],
    [5, 9, 12, END],
    [5, 9, END],
    [22, END],
    [7, 8, 8, 8, 8, END],
    [END],
    [5, 10, 11, END],
    [22, END],
    [9, 5, END],
]
GROUPS = {"one": [[6]], "B3": [[4], [4], [4]], "ragged": [[5, 2, 8], [], [3], [7, 7]]}


def compare(decoder, context, groups, answers, atol=1e-9, max_tokens=8192, **options):
    trie = AnswerTrie(answers, END)
    ours = rank_answers(decoder, context, groups, trie, max_tokens=max_tokens, **options)
    plain = plain_rank(decoder, context, groups, answers, **options)
    assert ours.candidates.tolist() == [candidates for _, candidates, _ in plain]
    expected = torch.tensor([scores for _, _, scores in plain], dtype=torch.float64)
    torch.testing.assert_close(ours.scores.double(), expected, rtol=0, atol=atol)
    assert ours.best.tolist() == [best for best, _, _ in plain]
    return ours


@pytest.mark.parametrize("read_out", ("pad", "last", "batch"))
@pytest.mark.parametrize("top_k", (1, 4, None))
@pytest.mark.parametrize("lengths", GROUPS.values(), ids=GROUPS)
def test_answers_have_the_scores_that_they_have_alone(lengths, top_k, read_out):
    for seed in range(2):
        context, groups = draw_context(len(lengths), seed), draw_prompts(lengths, seed)
        compare(build_decoder(seed), context, groups, ANSWERS, top_k=top_k, read_out=read_out)


@pytest.mark.parametrize("top_k", (3, None))
@pytest.mark.parametrize("max_tokens", (1, 7, 40))
def test_memory_bounds_change_no_result(monkeypatch, max_tokens, top_k):
    """The bounds hold, except for the prefix that a part begins inside of."""
    sizes, run = [], ranking._Scorer._run

    def recording(self, cross, prompts, plan):
        sizes.append(plan.tokens.shape[1])
        return run(self, cross, prompts, plan)

    monkeypatch.setattr(ranking._Scorer, "_run", recording)
    monkeypatch.setattr(ranking, "_MAX_LOGITS", 3 * CONFIG.vocab_size)
    groups = draw_prompts(GROUPS["ragged"])
    options = {"top_k": top_k, "max_tokens": max_tokens}
    compare(build_decoder(1), draw_context(4), groups, ANSWERS, **options)
    rows, deepest = 4 * 3, max(map(len, ANSWERS)) - 1
    assert max(sizes) <= max(1, max_tokens // rows) + deepest
    assert len(sizes) > 1


def test_answers_that_share_every_prefix():
    """A hundred answers of three different tokens."""
    rng = np.random.default_rng(0)
    answers = [rng.integers(3, 6, rng.integers(1, 6)).tolist() + [END] for _ in range(100)]
    groups = draw_prompts([[3, 5], [4]])
    ours = compare(build_decoder(2), draw_context(2), groups, answers)
    kept = rank_answers(build_decoder(2), draw_context(2), groups, AnswerTrie(answers, END), top_k=60, max_tokens=64)
    torch.testing.assert_close(kept.scores, ours.scores.gather(1, kept.candidates), rtol=0, atol=1e-10)


def test_label_smoothing_comes_from_the_config():
    decoder = build_decoder(3)
    plain = compare(decoder, draw_context(1), [[[0, 9]]], ANSWERS).scores
    for smoothing in (0.0, 0.4):
        decoder.config = CONFIG.replace(label_smoothing=smoothing)
        scores = compare(decoder, draw_context(1), [[[0, 9]]], ANSWERS).scores
        assert (scores - plain).abs().min() > 1e-3


def test_ranking_in_fp32():
    decoder, context = build_decoder(2, torch.float32), draw_context(2, dtype=torch.float32)
    compare(decoder, context, draw_prompts([[4, 6], [5]]), ANSWERS, atol=1e-5)


def test_ranking_in_bf16():
    """Scores are fp32 numbers; their error against float64 is at most twice that of the plain scores."""
    decoder = build_decoder(0, torch.bfloat16)
    exact = build_decoder(0, torch.bfloat16).double()
    context, groups = draw_context(1, dtype=torch.bfloat16), draw_prompts([[4, 6]])
    trie = AnswerTrie(ANSWERS, END)
    ours = rank_answers(decoder, context, groups, trie).scores
    plain = torch.tensor([scores for *_, scores in plain_rank(decoder, context, groups, ANSWERS)])
    truth = rank_answers(exact, context.double(), groups, trie).scores
    assert ours.dtype == torch.float32
    assert (ours - truth).square().mean() <= 4 * (plain - truth).square().mean()


def test_ties_go_to_the_first_in_the_list():
    """Equal first tokens at the cut, and equal scores at the top."""
    answers = [[9, 4, END], [7, 5, END], [7, 4, END], [7, 4, END], [7, 3, END]]
    decoder = build_decoder(0)
    decoder.head.bias[7] += 20.0
    for top_k in (1, 2, 3):
        ranked = compare(decoder, draw_context(1), [[[0, 9]]], answers, top_k=top_k)
        assert ranked.candidates.tolist() == [list(range(1, 1 + top_k))]
    decoder.head.bias[4] += 20.0
    assert rank_answers(decoder, draw_context(1), [[[0, 9]]], AnswerTrie(answers, END)).best.tolist() == [2]


def test_scores_do_not_depend_on_the_batch():
    decoder, context, groups = build_decoder(4), draw_context(4), draw_prompts(GROUPS["ragged"])
    trie = AnswerTrie(ANSWERS, END)
    for top_k in (4, None):
        together = rank_answers(decoder, context, groups, trie, top_k=top_k)
        p = 0
        for b, group in enumerate(groups):
            for prompt in group:
                alone = rank_answers(decoder, context[b : b + 1], [[prompt]], trie, top_k=top_k)
                assert alone.candidates.tolist() == together.candidates[p : p + 1].tolist()
                torch.testing.assert_close(alone.scores, together.scores[p : p + 1], rtol=0, atol=1e-10)
                p += 1


def test_read_outs_differ():
    """With "batch", as in the released code, the longest question predicts from its last token, others from a pad."""
    decoder, context, groups = build_decoder(4), draw_context(2), draw_prompts([[3], [6]])
    trie = AnswerTrie(ANSWERS, END)
    pad, last, batch = (
        rank_answers(decoder, context, groups, trie, read_out=read_out).scores for read_out in ("pad", "last", "batch")
    )
    assert (pad - last).abs().amax(1).min() > 1e-3
    torch.testing.assert_close(batch[0], pad[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(batch[1], last[1], rtol=0, atol=1e-10)


def test_no_node_is_computed_twice(count):
    """One projection per image; each question once, with its pad; each internal node once per question."""
    decoder, groups = build_decoder(0), draw_prompts([[4, 4], [4, 4]])
    rank_answers(decoder, draw_context(2), groups, AnswerTrie(ANSWERS, END))
    # 7, 7 8, 7 8 8, 7 8 8 8, 7 8 8 8 8, 5, 5 9, 5 9 11, 5 9 12, 5 10, 5 10 11, 22, 9, 9 5
    assert count == {"images": 2, "tokens": 4 * (5 + 14)}
    count.update(images=0, tokens=0)
    plain_rank(decoder, draw_context(2), groups, ANSWERS)
    recomputed = 5 + sum(5 + len(answer) - 1 for answer in ANSWERS)
    assert count == {"images": 4 * (1 + len(ANSWERS)), "tokens": 4 * recomputed}


def test_top_k_runs_only_the_answers_that_it_keeps(count):
    decoder = build_decoder(0)
    decoder.head.bias[[22, 7]] += 20.0
    ranked = rank_answers(decoder, draw_context(1), [[[0, 9]]], AnswerTrie(ANSWERS, END), top_k=4)
    assert set(ranked.candidates[0].tolist()) <= {0, 1, 5, 6, 9}
    at_most = len({7, (7, 8), (7, 8, 8), (7, 8, 8, 8), (7, 8, 8, 8, 8), 22})
    assert count["tokens"] <= 3 + at_most


def test_the_trie_holds_every_prefix_once():
    trie = AnswerTrie(ANSWERS, END)
    assert len(trie) == len(ANSWERS)
    for i, answer in enumerate(ANSWERS):
        path = trie.paths[i, : len(answer)]
        assert trie.tokens[path].tolist() == answer and trie.lengths[i] == len(answer)
        assert trie.parents[path].tolist() == [0, *path[:-1]]
        assert (trie.paths[i, len(answer) :] == -1).all()
        for t, node in enumerate(path):
            ancestors = trie.ancestors[node]
            assert ancestors[ancestors >= 0].tolist() == path[: t + 1].tolist()
    prefixes = {tuple(answer[:t]) for answer in ANSWERS for t in range(len(answer) + 1)}
    assert len(trie.tokens) == len(prefixes)
    assert [ANSWERS[i] for i in trie.order] == sorted(ANSWERS)


def test_answers_of_the_end_token_alone():
    """There is nothing to run after the question."""
    compare(build_decoder(0), draw_context(1), [[[0, 9]]], [[END], [END]])


@pytest.mark.parametrize(
    "answers, message",
    [
        ([], "the list of answers is empty"),
        ([[4, END], []], "answer 1 has tokens"),
        ([[4]], "answer 0 has tokens"),
        ([[END, 4, END]], "answer 0 has tokens"),
    ],
)
def test_answers_without_one_end_token_are_refused(answers, message):
    with pytest.raises(ValueError, match=message):
        AnswerTrie(answers, END)


def test_wrong_options_are_refused():
    trie = AnswerTrie(ANSWERS, END)
    with pytest.raises(ValueError, match="top_k is 0"):
        rank_answers(build_decoder(), draw_context(1), [[[0]]], trie, top_k=0)
    with pytest.raises(ValueError, match="training mode"):
        rank_answers(build_decoder().train(), draw_context(1), [[[0]]], trie)
    with pytest.raises(ValueError, match="prompts are given for 1 images"):
        rank_answers(build_decoder(), draw_context(2), [[[0]]], trie)
    just_fits = CONFIG.max_positions - CONFIG.pad_id - 1 - (trie.paths.shape[1] - 1)
    compare(build_decoder(), draw_context(1), draw_prompts([[just_fits]]), ANSWERS)
    with pytest.raises(ValueError, match="can be followed by 5 tokens, not 6"):
        rank_answers(build_decoder(), draw_context(1), draw_prompts([[just_fits + 1]]), trie)
