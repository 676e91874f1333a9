"""Scores of captions in Python and numpy: BLEU, ROUGE-L and CIDEr-D.

Captions are compared as lists of tokens, see `tokenize_caption`. Scores are fractions: papers print BLEU 0.40 as 40 and
CIDEr 1.35 as 135. METEOR and SPICE are left to the COCO caption toolkit (toolkit.py).
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from prismer.errors import InputError
from prismer.evaluation.caption_tokens import tokenize_caption

MAX_NGRAM = 4
CIDER_SIGMA = 6.0
# the COCO toolkit adds these to numerators and denominators of BLEU: a corpus without a match of four tokens has a
# BLEU-4 of about 1e-5, not 0
_TINY, _SMALL = 1e-15, 1e-9
# weighs recall against precision in ROUGE-L
ROUGE_BETA = 1.2

Tokens = Sequence[str]


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """BLEU-1 to BLEU-4 of a corpus (Papineni et al. 2002).

        BLEU-n = min(1, exp(1 - r / c)) * (p_1 ... p_n)^(1/n)

    p_k is the share of the candidates' k-grams that occur in a reference of the same image; a k-gram counts at most as
    often as in the reference that contains it most often. c is the number of tokens of all candidates, and r that of
    the references closest in length, of the shorter one on a tie. As in the COCO toolkit, c and the numerators of p_k
    get 1e-15 more, r and the denominators 1e-9.

    Args:
        candidates: for each image the tokens of one caption.
        references: for each image the tokens of its references.

    Returns:
        (4,) fp64; below 1e-4 where no n-gram occurs in a reference.

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
    precision = (matched + _TINY) / (total + _SMALL)
    brevity = math.exp(min(0.0, 1 - (reference_length + _SMALL) / (candidate_length + _TINY)))
    return brevity * np.cumprod(precision) ** (1 / np.arange(1, MAX_NGRAM + 1))


def rouge_l(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """ROUGE-L of each caption (Lin 2004), with the constants of the COCO toolkit.

        (1 + b^2) P R / (R + b^2 P), b = 1.2

    P is the longest common subsequence with a reference over the length of the candidate, R the same over the length of
    the reference; each is the largest over the references, so that they may come from different ones.

    Returns:
        (images,) fp64; their mean is the score of the corpus. A caption without tokens scores 0.

    Raises:
        ValueError: as `bleu`.
    """
    _check(candidates, references)
    scores = np.zeros(len(candidates))
    for i, (candidate, refs) in enumerate(zip(candidates, references, strict=True)):
        common = [_longest_common_subsequence(candidate, ref) for ref in refs]
        if any(common):
            precision = max(common) / len(candidate)
            recall = max(length / len(ref) for length, ref in zip(common, refs, strict=True) if length)
            scores[i] = (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)
    return scores


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


def caption_scores(
    candidates: Sequence[str], references: Sequence[Sequence[str]], domains: Sequence[str | None] | None = None
) -> dict[str, float]:
    """All caption scores of a set of images.

    Args:
        candidates: for each image one caption, plain text.
        references: for each image its references, plain text.
        domains: for each image its domain, or None if it has none; None if no image has one.

    Returns:
        BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D by name; then "CIDEr-D/DOMAIN" for the domains in alphabetical order. The
        score of a domain is that of its images as a set of its own, with its own n-gram weights, as in the NoCaps
        evaluation. The score of all images is therefore not a mean of those of the domains.

    Raises:
        ValueError: as `bleu`.
    """
    tokens = [tokenize_caption(caption) for caption in candidates]
    reference_tokens = [[tokenize_caption(caption) for caption in refs] for refs in references]
    scores = {f"BLEU-{n + 1}": float(s) for n, s in enumerate(bleu(tokens, reference_tokens))}
    scores["ROUGE-L"] = float(rouge_l(tokens, reference_tokens).mean())
    scores["CIDEr-D"] = float(cider_d(tokens, reference_tokens).mean())
    for domain in sorted({domain for domain in domains or () if domain is not None}):
        inside = [i for i, name in enumerate(domains or ()) if name == domain]
        of_domain = cider_d([tokens[i] for i in inside], [reference_tokens[i] for i in inside])
        scores[f"CIDEr-D/{domain}"] = float(of_domain.mean())
    return scores


def _ngrams(tokens: Tokens) -> Counter:
    """Every n-gram of 1 to 4 tokens with its count."""
    tokens = tuple(tokens)
    return Counter(tokens[i : i + n] for n in range(1, MAX_NGRAM + 1) for i in range(len(tokens) - n + 1))


def _longest_common_subsequence(a: Tokens, b: Tokens) -> int:
    """The number of tokens of the longest sequence that is left of both after some of their tokens are removed."""
    # lengths[j]: the result for the tokens of `a` so far and the first j tokens of `b`
    lengths = [0] * (len(b) + 1)
    for token in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if token == other else max(above, lengths[j - 1])
            diagonal = above
    return lengths[-1]


def _check(candidates: Sequence, references: Sequence[Sequence]) -> None:
    if len(candidates) != len(references) or not len(candidates):
        raise InputError(
            f"got {len(candidates)} captions and references of {len(references)} images; "
            f"give one caption for each image, at least one"
        )
    empty = next((i for i, refs in enumerate(references) if not len(refs)), None)
    if empty is not None:
        raise InputError(f"image {empty} has no reference caption; leave the image out")
