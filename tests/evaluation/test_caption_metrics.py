"""Proves that the scores of captions equal hand-computed values and those of the COCO caption toolkit.

python -m pytest tests/evaluation/test_caption_metrics.py

The values of TOOLKIT and TREEBANK were made with pycocoevalcap 1.2 from the sentences below (its PTBTokenizer on Java
17, then Bleu(4), Rouge and Cider on its tokens).
"""

import math

import numpy as np
import pytest

from prismer.evaluation.caption_metrics import bleu, caption_scores, cider_d, rouge_l
from prismer.evaluation.caption_tokens import tokenize_caption

CANDIDATES = [
    "A brown dog runs through the grass with a ball.",
    "Two men aren't riding horses on the beach",
    "A close-up of Dr. Smith's 1,000 red apples!",
    "A kitchen with a stove and a sink.",
    "A man in a hat, at 10:30 a.m.",
    "Zebra.",
    "The the the the street sign says “stop”.",
    "A plate of food with broccoli, rice and chicken on a wooden table next to a glass of water.",
]
REFERENCES = [
    [
        "A dog runs in the grass with a ball in its mouth.",
        "The brown dog's running through tall grass.",
        "A dog plays.",
    ],
    ["Two men ride horses along a beach.", "Men riding horses on the sand", "People on horseback at the beach; sunny!"],
    ["Lots of red apples in a box", "A close-up of 1,000 apples.", "Apples of Dr. Smith (red)."],
    ["A kitchen with a stove, a sink and a window.", "A small kitchen containing a stove & a sink."],
    ["An old man wearing a hat in the morning...", "The man's hat is black.", "A man in a hat"],
    ["Some giraffes eat leaves", "Two giraffes standing in a field of tall grass"],
    ["A street sign that says stop", "A red stop sign on the street corner.", "Stop sign."],
    ["A plate of food on a table.", "Chicken, rice and broccoli on a plate.", "A meal with a glass of water."],
]
TOOLKIT = {
    "BLEU-1": 0.7916666666556712,
    "BLEU-2": 0.6765222033704131,
    "BLEU-3": 0.5148879463437217,
    "BLEU-4": 0.3959156507951536,
    "ROUGE-L": 0.6124067767534676,
    "CIDEr-D": 1.872023649073631,
}
TOOLKIT_ROUGE_L = [
    0.7155425219941348,
    0.6916099773242631,
    0.7530864197530864,
    0.7624999999999998,
    0.8026315789473684,
    0.0,
    0.5865384615384615,
    0.5873452544704264,
]
TOOLKIT_CIDER_D = [
    2.065215229180673,
    2.073888535693839,
    2.1135027423104757,
    3.9611167953476425,
    2.7421443701707577,
    0.0,
    1.6640670118293508,
    0.35625450805630954,
]
# of the first four tokens of each candidate, so that the brevity penalty applies
TOOLKIT_SHORT_BLEU = [0.5243506088373784, 0.4976142856512391, 0.4341927232704007, 0.390248007046464]
TOLERANCE = 1e-12

TREEBANK = {
    "10:30am train, 1,000km road, 3.5mm jack, 1.5x 4.0GB": "10:30 am train 1,000 km road 3.5 mm jack 1.5 x 4.0 gb",
    "3/4in pipe, 2.5-inch 3.0-liter 50cm x 1/2-inch": "3/4in pipe 2.5-inch 3.0-liter 50cm x 1/2-inch",
    "A man can't ride; it's John's dog's toy, and they're gonna (maybe) leave.": "a man ca n't ride it 's john 's "
    "dog 's toy and they 're gon na -lrb- maybe -rrb- leave",
    "Mr. Smith vs. the U.S. army, No. 5 at 10:30 a.m.": "mr. smith vs. the u.s. army no. 5 at 10:30 a.m.",
    "It costs $3.50 or 1,000 dollars, 50% off: 3/4 cup -- black-and-white t-shirt...": "it costs $ 3.50 or 1,000 "
    "dollars 50 % off 3/4 cup black-and-white t-shirt",
    "wow!! what?! \"quoted\" 'single' ‘fancy’ “quotes” don’t em—dash…": "wow !! what ?! quoted single fancy "
    "quotes do n't em dash",
    "AT&T R&B a & b rock'n'roll o'clock O'Brien, teddy bears' picnic 'cause": "at&t r&b a & b rock 'n' roll "
    "o'clock o'brien teddy bears picnic 'cause",
    "I cannot wash. The pa. of Pa. Wash. ended the 90's and '90s #1 #tag @user": "i can not wash the pa of pa. "
    "wash. ended the 90 's and '90s # 1 #tag @user",
    "see http://www.example.com/a.html, me@example.com and 5'6\" [tall] {one} 10-year-old, 1.5-inch y'all 'tis": "see "
    "http://www.example.com/a.html me@example.com and 5 6 -lsb- tall -rsb- -lcb- one -rcb- 10-year-old 1.5-inch "
    "y' all 't is",
    "naïve café 日本語 a_b x = y + 2 <3": "naïve café 日本語 a_b x = y + 2 < 3",
    "tell 'em to wait 'til 5, £3 or €4 or 50¢ &amp; &quot;more&quot; AT&amp;T, C++": "tell 'em to wait 'til 5 # 3 or "
    "$ 4 or 50 cents & more at&t c++",
    "smile :) :-( ;) (a smiley :) a sign:(red) ** a_b __ -- ---- ----- no. 5 no. five pp. 3": "smile :-rrb- :--lrb- "
    ";-rrb- -lrb- a smiley :-rrb- a sign -lrb- red -rrb- ** a_b __ ----- no. 5 no five pp. 3",
    " . ": "",
}


def tokenized() -> tuple[list[list[str]], list[list[list[str]]]]:
    return [tokenize_caption(c) for c in CANDIDATES], [[tokenize_caption(r) for r in refs] for refs in REFERENCES]


@pytest.mark.parametrize("caption", TREEBANK)
def test_captions_are_tokenized_as_by_the_treebank_tokenizer(caption):
    assert tokenize_caption(caption) == TREEBANK[caption].split()


def test_caption_scores_equal_the_toolkit():
    scores = caption_scores(CANDIDATES, REFERENCES)
    assert list(scores) == list(TOOLKIT)
    for name, value in TOOLKIT.items():
        assert scores[name] == pytest.approx(value, abs=TOLERANCE), name
    tokens, references = tokenized()
    np.testing.assert_allclose(cider_d(tokens, references), TOOLKIT_CIDER_D, atol=TOLERANCE)
    np.testing.assert_allclose(rouge_l(tokens, references), TOOLKIT_ROUGE_L, atol=TOLERANCE)
    short = [caption[:4] for caption in tokens]
    np.testing.assert_allclose(bleu(short, references), TOOLKIT_SHORT_BLEU, atol=TOLERANCE)


def test_bleu_without_a_match_is_as_small_as_that_of_the_toolkit():
    """pycocoevalcap 1.2 on the same tokens: Bleu(4) of two captions that share no pair of tokens with a reference."""
    found = bleu([["a", "b"], ["c", "d", "e"]], [[["a", "x", "b"]], [["c", "y", "e"], ["d"]]])
    np.testing.assert_allclose(
        found, [0.8187307527504899, 1.4947910059157744e-08, 5.6767619790052446e-11, 6.221008427661611e-10]
    )


def test_bleu_equals_hand_computed_values():
    # Papineni's example: "the" counts twice of seven times, as often as in one reference
    seven = ["the"] * 7
    references = [["the cat is on the mat".split(), "there is a cat on the mat".split()]]
    np.testing.assert_allclose(bleu([seven], references), [2 / 7, 0, 0, 0], atol=1e-8)
    # 3 of 3 words, 1 of 2 pairs; 3 tokens against 4: brevity exp(1 - 4/3)
    brevity = math.exp(-1 / 3)
    expected = [brevity, brevity * math.sqrt(1 / 2), 0, 0]
    np.testing.assert_allclose(bleu(["a b d".split()], [["a b c d".split()]]), expected, atol=1e-5)
    # lengths 3 and 5 are equally close to 4: the shorter one counts, so that there is no penalty
    tie = bleu(["a b c d".split()], [["a b c".split(), "a b c d e".split()]])
    np.testing.assert_allclose(tie, [1, 1, 1, 1])
    np.testing.assert_allclose(bleu([[]], [["a".split()]]), np.zeros(4), atol=1e-15)


def test_cider_d_equals_hand_computed_values():
    # each n-gram occurs in one of two images, so that every weight is log 2; equal captions of two tokens reach 1 only
    # for n = 1 and 2
    same = cider_d([["a", "b"], ["c", "d"]], [[["a", "b"]], [["c", "d"]]])
    np.testing.assert_allclose(same, [5, 5])
    # "a a b" against "a b": clipped dot 1 + 1, norms sqrt 5 and sqrt 2; pairs: "a b" of "a a", "a b"; length off by 1
    (score, _) = cider_d([["a", "a", "b"], ["c"]], [[["a", "b"]], [["c"]]])
    cosines = 2 / math.sqrt(10) + 1 / math.sqrt(2)
    assert score == pytest.approx(10 * math.exp(-1 / 72) * cosines / 4)
    # words that occur with every image have weight 0
    np.testing.assert_array_equal(cider_d([["a"], ["a"]], [[["a"]], [["a"]]]), [0, 0])


def test_rouge_l_equals_hand_computed_values():
    # subsequence "a b d" of three tokens: precision 3/3 and recall 3/4
    (score,) = rouge_l(["a b d".split()], [["a b c d".split()]])
    assert score == pytest.approx(2.44 * 0.75 / (0.75 + 1.44))
    # of "b a c" and "a b c" two tokens remain in order; precision counts more than in the harmonic mean's other order
    (score,) = rouge_l(["b a c e".split()], [["a b c".split()]])
    assert score == pytest.approx(2.44 * (2 / 4) * (2 / 3) / (2 / 3 + 1.44 * 2 / 4))
    # precision from the long reference, recall from the short one
    (score,) = rouge_l(["a b c d".split()], [["a x".split(), "a b c e f g".split()]])
    assert score == pytest.approx(2.44 * (3 / 4) * (1 / 2) / (1 / 2 + 1.44 * 3 / 4))
    np.testing.assert_array_equal(rouge_l([[], ["a"], []], [[["a"]], [["b"], []], [[]]]), [0, 0, 0])


def test_the_cider_d_of_a_domain_is_that_of_its_images_alone():
    domains = ["out", None, "in", "in", "out", "in", None, "out"]
    scores = caption_scores(CANDIDATES, REFERENCES, domains)
    assert list(scores) == [*TOOLKIT, "CIDEr-D/in", "CIDEr-D/out"]
    for domain in ("in", "out"):
        inside = [i for i, name in enumerate(domains) if name == domain]
        alone = caption_scores([CANDIDATES[i] for i in inside], [REFERENCES[i] for i in inside])
        assert scores[f"CIDEr-D/{domain}"] == alone["CIDEr-D"] != pytest.approx(scores["CIDEr-D"])


@pytest.mark.parametrize("score", [bleu, rouge_l, cider_d])
def test_captions_and_references_must_match(score):
    with pytest.raises(ValueError, match="got 1 captions and references of 2"):
        score([["a"]], [[["a"]], [["b"]]])
    with pytest.raises(ValueError, match="at least one"):
        score([], [])
    with pytest.raises(ValueError, match="image 1 has no reference"):
        score([["a"], ["b"]], [[["a"]], []])
