"""Scores of captions, answers and classes in Python and numpy: BLEU, CIDEr-D, VQA accuracy, top-1.

Captions are compared as lists of tokens. `tokenize_caption` follows the Penn Treebank tokenizer of the COCO caption
toolkit (lower case, contractions split, punctuation dropped), so that scores are comparable with published ones;
ROUGE-L, METEOR and SPICE are left to that toolkit. Scores are fractions: papers print BLEU 0.40 as 40 and CIDEr 1.35 as
135.
"""

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from prismer.errors import InputError

MAX_NGRAM = 4
CIDER_SIGMA = 6.0

Tokens = Sequence[str]

# abbreviations, which keep their full stop: the first list in any case, the second only with a capital letter, since
# "he had to wash." ends a sentence
_ABBREVIATIONS = """mr mrs ms dr drs prof profs sen sens rep reps atty lt col gen messrs gov govs adm rev maj sgt cpl
pvt mt capt st ste ave pres lieut hon brig comdr cmdr pfc spc supt det jr sr bros blvd rd esq inc co cos corp ltd plc
etc vs jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri ala ariz calif colo conn fla ga
ind kan ky md mich minn mo mont neb nev okla penn tenn va vt wis wyo al est dept univ bldg ft sq tel ext cf assn intl
natl""".split()
_CAPITAL_ABBREVIATIONS = "Miss Ark Del Ill La Mass Ore Pa Tex Wash".split()

_TOKEN = re.compile(
    r"(?:https?://|www\.)[^\s<>\"]*[^\s<>\".,;:!?)]"
    r"|[\w.+-]+@[\w-]+(?:\.[\w-]+)+"
    # U.S., a.m., Ph.D., initials and known abbreviations keep their last full stop
    rf"|(?:(?i:ph\.d|[^\W\d_](?:\.[^\W\d_])*|{'|'.join(_ABBREVIATIONS)})"
    rf"|{'|'.join(_CAPITAL_ABBREVIATIONS)})\.(?![^\W_])"
    r"|(?i:no)\.(?=\s*\d)"
    # 3.5, 1,000.00, 10:30, 3/4, +5, but 10-year-old and 4x4 are words
    r"|(?:(?<!\S)[-+.])?\d+(?:[.,:/]\d+)*(?![^\W_]|[-./][^\W_])"
    r"|(?i:'n'|y'(?=all\b)|'t(?=(?:is|was)\b))"
    r"|(?i:n't|'(?:s|m|d|re|ve|ll|n|cause)|ma'am)(?![^\W_])"
    r"|'\d\ds?\b"
    r"|[A-Z]+&[A-Z]+"
    # words with hyphens, slashes and dots inside; o'clock, d'oeuvres, l'avion
    r"|(?:[#@](?=[^\W\d_]))?(?:(?i:[dol]'(?=[^\W\d_])))?[^\W_]+(?:(?:[-./]|_+)[^\W_]+)*"
    r"|[!?]+|\.{3,}|-+|\S"
)
_NEGATION = re.compile(r"(?<=[^\W\d_])(?=n't(?![^\W_]))", re.IGNORECASE)
_TYPOGRAPHIC = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "«": '"', "»": '"', "–": "--", "—": "--", "…": "..."}
)
_WORDS = "cannot can not;gonna gon na;gotta got ta;wanna wan na;gimme gim me;lemme lem me"
_BRACKETS = "( -lrb-;) -rrb-;[ -lsb-;] -rsb-;{ -lcb-;} -rcb-"
_REPLACED = {token: parts for token, *parts in map(str.split, f"{_WORDS};{_BRACKETS}".split(";"))}
# the toolkit drops a fixed list of marks, which contains neither brackets nor "!!"
_DROPPED = re.compile(r"['\"`,.:;!?]|-{1,}|\.{3,}")


def tokenize_caption(caption: str) -> list[str]:
    """The lower-case tokens of a caption, without punctuation.

    `"A dog's close-up, isn't it?"` gives a, dog, 's, close-up, is, n't, it.
    """
    text = _NEGATION.sub(" ", caption.translate(_TYPOGRAPHIC))
    tokens = []
    for token in _TOKEN.findall(text):
        if not _DROPPED.fullmatch(token):
            token = token.lower()
            tokens.extend(_REPLACED.get(token, [token]))
    return tokens


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """BLEU-1 to BLEU-4 of a corpus (Papineni et al. 2002).

        BLEU-n = min(1, exp(1 - r / c)) * (p_1 ... p_n)^(1/n)

    p_k is the share of the candidates' k-grams that occur in a reference of the same image; a k-gram counts at most as
    often as in the reference that contains it most often. c is the number of tokens of all candidates, and r that of
    the references closest in length, of the shorter one on a tie.

    Args:
        candidates: for each image the tokens of one caption.
        references: for each image the tokens of its references.

    Returns:
        (4,) fp64; 0 where no n-gram occurs in a reference.

    Raises:
        ValueError: if the two differ in length, or an image has no reference.
    """
    _check(candidates, references)
    matched, total = np.zeros(MAX_NGRAM), np.zeros(MAX_NGRAM)
    candidate_length = reference_length = 0
    for candidate, refs in zip(candidates, references, strict=True):
        candidate_length += len(candidate)
        reference_length += min((abs(len(r) - len(candidate)), len(r)) for r in refs)[1]
        allowed: Counter = Counter()
        for ref in refs:
            # the larger of the counts
            allowed |= _ngrams(ref)
        for ngram, count in (_ngrams(candidate) & allowed).items():
            matched[len(ngram) - 1] += count
        total += [max(0, len(candidate) - n) for n in range(MAX_NGRAM)]
    precision = matched / np.maximum(total, 1)
    brevity = math.exp(min(0.0, 1 - reference_length / candidate_length)) if candidate_length else 0.0
    return brevity * np.cumprod(precision) ** (1 / np.arange(1, MAX_NGRAM + 1))


def cider_d(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """CIDEr-D of each caption (Vedantam et al. 2015), which the COCO toolkit calls CIDEr.

        10 / 4 * sum over n = 1..4 of mean over references r of
            exp(-(|c| - |r|)^2 / (2 * 6^2)) * min(g_n(c), g_n(r)) . g_n(r) / (|g_n(c)| |g_n(r)|)

    g_n holds for each n-gram its count times log(images / images with a reference that contains it). These weights come
    from `references`, so that a score is only valid within its set of images; the score of a single image is 0.

    Returns:
        (images,) fp64; their mean is the score of the corpus.

    Raises:
        ValueError: as `bleu`.
    """
    _check(candidates, references)
    counted = [[_ngrams(ref) for ref in refs] for refs in references]
    document_frequency = Counter(itertools.chain.from_iterable(set().union(*refs) for refs in counted))
    log_images = math.log(max(1, len(references)))

    def weigh(counts: Counter) -> tuple[list[dict], np.ndarray]:
        vectors: list[dict] = [{} for _ in range(MAX_NGRAM)]
        for ngram, count in counts.items():
            idf = log_images - math.log(max(1, document_frequency[ngram]))
            vectors[len(ngram) - 1][ngram] = count * idf
        return vectors, np.array([math.sqrt(sum(w * w for w in v.values())) for v in vectors])

    scores = np.zeros(len(candidates))
    for i, (candidate, refs) in enumerate(zip(candidates, references, strict=True)):
        vectors, norms = weigh(_ngrams(candidate))
        for ref, ref_counts in zip(refs, counted[i], strict=True):
            ref_vectors, ref_norms = weigh(ref_counts)
            dots = np.array(
                [
                    sum(min(w, theirs[ngram]) * theirs[ngram] for ngram, w in ours.items() if ngram in theirs)
                    for ours, theirs in zip(vectors, ref_vectors, strict=True)
                ]
            )
            cosines = np.divide(dots, norms * ref_norms, out=np.zeros(MAX_NGRAM), where=norms * ref_norms > 0)
            penalty = math.exp(-((len(candidate) - len(ref)) ** 2) / (2 * CIDER_SIGMA**2))
            scores[i] += 10 * penalty * cosines.mean() / len(refs)
    return scores


def caption_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """All caption scores of a set of images.

    Args:
        candidates: for each image one caption, plain text.
        references: for each image its references, plain text.

    Returns:
        BLEU-1 to BLEU-4 and CIDEr-D by name.

    Raises:
        ValueError: as `bleu`.
    """
    tokens = [tokenize_caption(caption) for caption in candidates]
    reference_tokens = [[tokenize_caption(caption) for caption in refs] for refs in references]
    scores = {f"BLEU-{n + 1}": float(s) for n, s in enumerate(bleu(tokens, reference_tokens))}
    scores["CIDEr-D"] = float(cider_d(tokens, reference_tokens).mean())
    return scores


def _ngrams(tokens: Tokens) -> Counter:
    """Every n-gram of 1 to 4 tokens with its count."""
    tokens = tuple(tokens)
    return Counter(tokens[i : i + n] for n in range(1, MAX_NGRAM + 1) for i in range(len(tokens) - n + 1))


def _check(candidates: Sequence, references: Sequence[Sequence]) -> None:
    if len(candidates) != len(references) or not len(candidates):
        raise InputError(
            f"got {len(candidates)} captions and references of {len(references)} images; "
            f"give one caption for each image, at least one"
        )
    empty = next((i for i, refs in enumerate(references) if not len(refs)), None)
    if empty is not None:
        raise InputError(f"image {empty} has no reference caption; leave the image out")


# the contractions that the VQA evaluation restores when an apostrophe is missing; "its", "hell", "were" and others that
# are also words without an apostrophe are not among them
_CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()


def _without_apostrophes(word: str) -> list[str]:
    """Every spelling of `word` without some of its apostrophes; of several, at least one stays."""
    at = [i for i, c in enumerate(word) if c == "'"]
    drops = itertools.chain.from_iterable(itertools.combinations(at, n) for n in range(1, max(2, len(at))))
    return ["".join(c for i, c in enumerate(word) if i not in drop) for drop in drops]


_RESTORED = {short: word for word in _CONTRACTIONS for short in _without_apostrophes(word)}
_NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_ANSWER_MARKS = ';/[]"{}()=+\\_-><@`,?!'


def normalize_answer(answer: str) -> str:
    """The form in which the VQA evaluation compares answers.

    The text becomes lower case. A punctuation mark is removed if it touches a blank somewhere in the answer, or if the
    answer has a comma between digits; otherwise a blank replaces it. Full stops are removed unless a digit follows.
    Zero to ten and none become digits, articles are removed, and contractions get their apostrophes back.
    """
    answer = " ".join(answer.split())
    text = answer
    remove = re.search(r"\d,\d", answer) is not None
    for mark in _ANSWER_MARKS:
        touches = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if remove or touches else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


# people who answered each question of VQA; the weight of an answer is the share of them that gave it
PEOPLE = 10


def vqa_accuracy(prediction: str, answers: Sequence[str] | Mapping[str, float]) -> float:
    """The accuracy of one answer, between 0 and 1, after `normalize_answer` on both sides.

        mean over the answers a of min(1, #(others than a that agree) / 3)

    This metric is made for the answers of ten people. With fewer than four answers it could not reach 1, so any
    agreement counts as 1 there: with a single true answer it is exact match. The official script compares the raw texts
    where all ten people wrote the same; here texts are always normalised.

    Args:
        answers: each person's answer, or distinct answers with their weights. Weights are shares of ten people,
            whatever their sum: 0.6, 0.2, 0.1, 0.1 are six, two, one and one.

    Raises:
        ValueError: if there is no answer to compare with.
    """
    if not answers:
        raise InputError("a question has no true answer; leave it out of the evaluation")
    prediction = normalize_answer(prediction)
    if isinstance(answers, Mapping):
        people = PEOPLE
        same = [weight for text, weight in answers.items() if normalize_answer(text) == prediction]
        # weights are stored rounded; 2.9999 people are three
        agree = round(PEOPLE * sum(same) / sum(answers.values()), 3)
    else:
        people = len(answers)
        agree = sum(normalize_answer(text) == prediction for text in answers)
        if people < 4:
            return float(agree > 0)
    # leaving out a person who agrees leaves one fewer who agrees
    own, others = max(0.0, agree - 1), agree
    return (agree * min(1.0, own / 3) + (people - agree) * min(1.0, others / 3)) / people


def answer_scores(
    predictions: Sequence[str], answers: Sequence[Sequence[str] | Mapping[str, float]], kinds: Sequence[str]
) -> dict[str, float]:
    """Mean VQA accuracy, over all questions and for each kind of question.

    Args:
        predictions: the predicted answer of each question.
        answers: the true answers of each question, as for `vqa_accuracy`.
        kinds: the kind of each question ("colour", "count").

    Returns:
        "accuracy", then "accuracy/KIND" for the kinds in alphabetical order.

    Raises:
        ValueError: if the lengths differ or are 0, or a question has no true answer.
    """
    if not len(predictions) == len(answers) == len(kinds) != 0:
        raise InputError(
            f"got {len(predictions)} predictions for {len(answers)} questions of {len(kinds)} kinds; "
            f"give one of each, at least one"
        )
    scores = [vqa_accuracy(p, a) for p, a in zip(predictions, answers, strict=True)]
    by_kind = defaultdict(list)
    for kind, score in zip(kinds, scores, strict=True):
        by_kind[kind].append(score)
    means = {f"accuracy/{kind}": float(np.mean(by_kind[kind])) for kind in sorted(by_kind)}
    return {"accuracy": float(np.mean(scores)), **means}


def top1(predictions: Sequence, targets: Sequence) -> float:
    """The share of predictions (class indices or names) that equal their targets.

    Raises:
        ValueError: if the lengths differ or are 0.
    """
    if len(predictions) != len(targets) or not len(targets):
        raise InputError(
            f"got {len(predictions)} predictions for {len(targets)} targets; give one for each, at least one"
        )
    return sum(p == t for p, t in zip(predictions, targets, strict=True)) / len(targets)
