"""Ask a model in words: captions, answers to questions, classes (spec 5.5, 5.6).

Images are encoded once however many questions are asked about them. Text rules are those of training
(prismer/texts.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from prismer.batch import ImageBatch
from prismer.generation import beam_search, check_count
from prismer.network import PrismerNetwork
from prismer.ranking import AnswerTrie, Ranking, rank_answers
from prismer.texts import encode_answer, encode_class_name, encode_prompt, encode_question
from prismer.tokenizer import Tokenizer

_MAX_TOKENS = 4096
# of a text to choose from: far more than a text tower has positions (checked with the question), and few enough for a
# trie, which takes memory by the square


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: the answer or class as it stands in the list, or the generated answer in lower case.
        score: mean log-probability of its tokens, smoothed as in training where a list was ranked; of a generated
            answer the score of the beam search.
        ranked: all answers of the list that were scored with their scores, best first; empty if generated.
    """

    text: str
    score: float
    ranked: list[tuple[str, float]] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Candidates:
    """A closed list of texts with its token trie, to be built once when many batches are asked."""

    texts: list[str]
    trie: AnswerTrie

    @classmethod
    def answers(cls, tokenizer: Tokenizer, answers: list[str]) -> "Candidates":
        """Answers to questions, as `answer` ranks them."""
        return cls._build(tokenizer, answers, encode_answer, "answers")

    @classmethod
    def classes(cls, tokenizer: Tokenizer, names: list[str]) -> "Candidates":
        """Class names, as `classify` ranks them."""
        return cls._build(tokenizer, names, encode_class_name, "class_names")

    @classmethod
    def _build(
        cls, tokenizer: Tokenizer, texts: list[str], encode: Callable[[Tokenizer, str], list[int]], name: str
    ) -> "Candidates":
        texts = _texts(texts, name)
        encoded = [encode(tokenizer, text) for text in texts]
        longest = max(range(len(texts)), key=lambda i: len(encoded[i]))
        if len(encoded[longest]) > _MAX_TOKENS:
            raise ValueError(
                f"entry {longest} of {name} has {len(encoded[longest])} tokens, at most {_MAX_TOKENS} can be ranked; "
                f"shorten it"
            )
        trie = AnswerTrie(encoded, tokenizer.eos_id)
        return cls(texts, trie)


@torch.inference_mode()
def caption(
    model: PrismerNetwork,
    images: ImageBatch,
    *,
    beams: int = 3,
    max_length: int | None = None,
    min_length: int = 8,
    length_penalty: float = 1.0,
    scoring: str = "classic",
    prefix: str | None = None,
) -> list[str]:
    """Describe each image in a sentence, capitalised and with a full stop, without the prefix.

    Args:
        beams: open beams; 1 is greedy.
        max_length, min_length: tokens, `<s>` and the prefix included; max_length None takes the model's own
            (`config.caption_max_length`).
        length_penalty, scoring: see `beam_search`.
        prefix: how the sentence starts; None takes the model's own (`config.caption_prefix`).

    Raises:
        ValueError: if the model has no tokenizer or is in training mode, or an option is out of range.
    """
    tokenizer = _tokenizer(model)
    prefix = model.config.caption_prefix if prefix is None else _text(prefix, "prefix")
    prompt = encode_prompt(tokenizer, prefix)
    if max_length is None:
        max_length = model.config.caption_max_length
    for name, value in (("max_length", max_length), ("min_length", min_length)):
        check_count(name, value)
    if max_length <= len(prompt):
        raise ValueError(f"max_length is {max_length}, but the prefix alone has {len(prompt)} tokens; raise max_length")
    generated = beam_search(
        model.decoder,
        _encode(model, images),
        [[prompt]] * len(images),
        beams=beams,
        max_new_tokens=max_length - len(prompt),
        min_new_tokens=max(0, min_length - len(prompt)),
        length_penalty=length_penalty,
        scoring=scoring,
    )
    _check_finite(generated.scores)
    return [tokenizer.decode(tokens).strip().capitalize() + "." for tokens in generated.tokens]


@torch.inference_mode()
def answer(
    model: PrismerNetwork,
    images: ImageBatch,
    questions: list[str] | list[list[str]],
    answers: list[str] | Candidates | None = None,
    *,
    top_k: int | None = None,
    read_out: str = "pad",
    beams: int = 3,
    max_new_tokens: int = 10,
    min_new_tokens: int = 1,
    length_penalty: float = -1.0,
) -> list[Answer] | list[list[Answer]]:
    """Answer questions about images, from a list of answers or in the model's own words.

    Args:
        questions: one question for each image, or a list of questions (or none) for each image.
        answers: the list to choose from (`Candidates.answers` to build it once); None generates freely.
        top_k: of the list, score only the k with the likeliest first tokens; None scores all.
        read_out: what predicts the first token of an answer: "pad" as this library trains, "last" or "batch" as the
            released weights were used (`prismer.generation.read_prompts`).
        beams, max_new_tokens, min_new_tokens, length_penalty: of free generation; the released code asked for 2 new
            tokens at least, which no answer of one token can meet.

    Returns:
        Answers in the nesting of `questions`.

    Raises:
        ValueError: if questions do not fit the images, one is empty, or an option is out of range.
    """
    tokenizer = _tokenizer(model)
    grouped, nested = _group(questions, len(images))
    candidates = answers
    if answers is not None and not isinstance(answers, Candidates):
        candidates = Candidates.answers(tokenizer, answers)
    groups = [[encode_question(tokenizer, question) for question in group] for group in grouped]
    if not any(groups):
        return groups
    context = _encode(model, images)
    if candidates is None:
        generated = beam_search(
            model.decoder,
            context,
            groups,
            beams=beams,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            length_penalty=length_penalty,
            read_out=read_out,
        )
        _check_finite(generated.scores)
        texts = [tokenizer.decode(tokens).strip().lower() for tokens in generated.tokens]
        results = [Answer(text, score) for text, score in zip(texts, generated.scores.tolist(), strict=True)]
    else:
        ranking = rank_answers(model.decoder, context, groups, candidates.trie, top_k=top_k, read_out=read_out)
        results = _named(ranking, candidates)
    if not nested:
        return results
    remaining = iter(results)
    return [[next(remaining) for _ in group] for group in grouped]


@torch.inference_mode()
def classify(
    model: PrismerNetwork,
    images: ImageBatch,
    class_names: list[str] | Candidates,
    *,
    prefix: str = "A photo of a",
    top_k: int | None = None,
) -> list[Answer]:
    """The class of each image, by ranking `prefix` and each name.

    Args:
        class_names: the names to choose from (`Candidates.classes` to build them once).
        prefix: what the names follow.
        top_k: score only the k names with the likeliest first tokens; None scores all.

    Raises:
        ValueError: if the list is empty, the model has no tokenizer, or an option is out of range.
    """
    tokenizer = _tokenizer(model)
    if not isinstance(class_names, Candidates):
        class_names = Candidates.classes(tokenizer, class_names)
    prompt = encode_prompt(tokenizer, _text(prefix, "prefix"))
    # all prompts are alike: no <pad> comes between prefix and name, in training nor here
    ranking = rank_answers(
        model.decoder, _encode(model, images), [[prompt]] * len(images), class_names.trie, top_k=top_k, read_out="last"
    )
    return _named(ranking, class_names)


def _tokenizer(model: PrismerNetwork) -> Tokenizer:
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer; build it with one or load a folder that holds one")
    if model.training:
        raise ValueError("the model is in training mode, where dropout is random; call model.eval() first")
    _check_weights(model)
    return model.tokenizer


def _encode(model: PrismerNetwork, images: ImageBatch) -> torch.Tensor:
    if not len(images):
        raise ValueError("the batch holds no images; give at least one")
    return model.encode(images.to(model.device))


_COMPUTES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_weights(model: PrismerNetwork) -> None:
    """Refuse weights that nothing can be computed with."""
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise ValueError(
                f"the model's weights ({name}) are on the meta device, which holds no numbers; load them first"
            )
        if weight.is_floating_point() and weight.dtype not in _COMPUTES:
            raise ValueError(
                f"the model's weights ({name}) are {weight.dtype}, which no op here computes in; "
                f"call model.to(torch.bfloat16) first"
            )
    towers = model.encoder.positional_embedding.dtype, model.decoder.head_weight.dtype
    if towers[0] != towers[1]:
        raise ValueError(
            f"the encoder is {towers[0]} and the decoder {towers[1]}; give both one dtype, e.g. model.float()"
        )


def _check_finite(scores: torch.Tensor) -> None:
    # weights of another architecture or a diverged run would otherwise speak as confidently as good ones
    if not bool(scores.isfinite().all()):
        raise RuntimeError("the model's scores are not finite; check its weights and its inputs")


def _group(questions: list[str] | list[list[str]], num_images: int) -> tuple[list[list[str]], bool]:
    """One list of questions per image, and whether they were given so."""
    entries = None if isinstance(questions, str) else _listed(questions)
    if entries is None or len(entries) != num_images:
        if isinstance(questions, str):
            given = "one string"
        else:
            given = repr(questions)[:60] if entries is None else f"a list of {len(entries)}"
        raise ValueError(
            f"questions is {given} for {num_images} images; give a list with one question, or one list of "
            f"questions, for each image"
        )
    if not any(_listed(entry) is not None for entry in entries):
        return [[_text(entry, "a question")] for entry in entries], False
    if any(isinstance(entry, str) for entry in entries):
        raise ValueError("questions mixes strings and lists; give either for all images")
    return [[_text(question, "a question") for question in _needed(_listed(entry), entry)] for entry in entries], True


def _needed(listed: list | None, given) -> list:
    if listed is None:
        raise ValueError(f"the questions of an image are {given!r:.60}; give a list of strings")
    return listed


def _listed(given) -> list | None:
    """The entries of something that has an order and can be read twice; None for anything else."""
    if isinstance(given, np.ndarray):
        return given.tolist() if given.ndim else None
    return list(given) if isinstance(given, list | tuple) else None


def _texts(given, name: str) -> list[str]:
    """A list of at least one text, as it stands.

    Raises:
        ValueError: if it is empty, not a list, or holds something else; a set has no order, and so no first of equals.
    """
    entries = _listed(given)
    if not entries:
        raise ValueError(f"{name} is {repr(given)[:60]}; give a list of at least one text")
    return [_text(entry, f"entry {i} of {name}") for i, entry in enumerate(entries)]


def _text(given, name: str) -> str:
    """`given`, if it is a text that can be written down.

    Raises:
        ValueError: if it is something else, or holds lone surrogates (bytes of a command line that are not UTF-8).
    """
    if not isinstance(given, str):
        raise ValueError(f"{name} is {repr(given)[:60]}, {_a(given)}; give a string")
    try:
        given.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is {given[:60]!a}, which is not UTF-8; write it in UTF-8") from None
    return str(given)


def _a(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _named(ranking: Ranking, candidates: Candidates) -> list[Answer]:
    """Indices as texts."""
    _check_finite(ranking.scores)
    order = ranking.scores.sort(dim=1, descending=True, stable=True)
    indices = ranking.candidates.gather(1, order.indices).tolist()
    results = []
    for row, scores in zip(indices, order.values.tolist(), strict=True):
        ranked = [(candidates.texts[i], score) for i, score in zip(row, scores, strict=True)]
        results.append(Answer(*ranked[0], ranked))
    return results
