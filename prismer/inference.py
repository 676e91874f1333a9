"""Ask a model in words: captions, answers to questions, classes.

Images are encoded once, however many questions are asked about them. The text rules are those of training
(prismer/texts.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from prismer.batch import Detections, ImageBatch
from prismer.errors import InputError, MachineError, check_integer, shown
from prismer.generation import beam_search
from prismer.network import PrismerNetwork
from prismer.ranking import AnswerTrie, Ranking, rank_answers
from prismer.reading import is_text
from prismer.texts import CLASS_PREFIX, encode_answer, encode_class_name, encode_prompt, encode_question
from prismer.tokenizer import Tokenizer

# of a text to choose from: far more than a text tower has positions, which is checked with the question; and few enough
# for a trie, whose memory grows with the square
_MAX_TOKENS = 4096
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: the answer or class as it stands in the list, or the generated answer in lower case.
        score: from a list, the mean log-probability of its tokens, smoothed as in training; generated, the score of
            the beam search.
        ranked: all answers of the list that were scored, with their scores, best first; empty for a generated answer.
    """

    text: str
    score: float
    ranked: list[tuple[str, float]] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Candidates:
    """A closed list of texts with its token trie, to be built once for many batches.

    Attributes:
        texts: the list.
        trie: their tokens, as `rank_answers` takes them.
    """

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
            raise InputError(
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
        beams: open beams; 1 is greedy search.
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
        check_integer(name, value)
    if max_length <= len(prompt):
        raise InputError(f"max_length is {max_length}, but the prefix alone has {len(prompt)} tokens; raise max_length")
    context, detections = _encode(model, images)
    generated = beam_search(
        model.decoder,
        context,
        [[prompt]] * len(images),
        detections=detections,
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
        answers: the list to choose from (`Candidates.answers` builds it once); None generates freely.
        top_k: of the list, score only the k answers with the likeliest first tokens; None scores all.
        read_out: what predicts the first token of an answer: "pad" as this library trains, "last" or "batch" as the
            released weights were used (`prismer.generation.read_prompts`).
        beams, max_new_tokens, min_new_tokens, length_penalty: of free generation; the released code demanded at least
            2 new tokens, which excludes answers of one token.

    Returns:
        Answers, nested as `questions` are.

    Raises:
        ValueError: if the questions do not fit the images, one is empty, or an option is out of range.
    """
    tokenizer = _tokenizer(model)
    grouped, nested = _group(questions, len(images))
    candidates = answers
    if answers is not None and not isinstance(answers, Candidates):
        candidates = Candidates.answers(tokenizer, answers)
    groups = [[encode_question(tokenizer, question) for question in group] for group in grouped]
    if not any(groups):
        return groups
    context, detections = _encode(model, images)
    if candidates is None:
        generated = beam_search(
            model.decoder,
            context,
            groups,
            detections=detections,
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
        options = dict(detections=detections, top_k=top_k, read_out=read_out)
        ranking = rank_answers(model.decoder, context, groups, candidates.trie, **options)
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
    prefix: str = CLASS_PREFIX,
    top_k: int | None = None,
) -> list[Answer]:
    """The class of each image, by ranking the names as continuations of `prefix`.

    Args:
        class_names: the names to choose from (`Candidates.classes` builds them once).
        prefix: the prompt before the names.
        top_k: score only the k names with the likeliest first tokens; None scores all.

    Raises:
        ValueError: if the list is empty, the model has no tokenizer, or an option is out of range.
    """
    tokenizer = _tokenizer(model)
    if not isinstance(class_names, Candidates):
        class_names = Candidates.classes(tokenizer, class_names)
    prompt = encode_prompt(tokenizer, _text(prefix, "prefix"))
    context, detections = _encode(model, images)
    # neither here nor in training does a <pad> come between prefix and name
    options = dict(detections=detections, top_k=top_k, read_out="last")
    ranking = rank_answers(model.decoder, context, [[prompt]] * len(images), class_names.trie, **options)
    return _named(ranking, class_names)


def _tokenizer(model: PrismerNetwork) -> Tokenizer:
    """The tokenizer of a model that can be asked; a ValueError for any other model."""
    if model.tokenizer is None:
        raise InputError("the model has no tokenizer; build it with one or load a folder that holds one")
    if model.training:
        raise InputError("the model is in training mode, where dropout is random; call model.eval() first")
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise InputError(
                f"the model's weights ({name}) are on the meta device, which holds no numbers; load them first"
            )
        if weight.is_floating_point() and weight.dtype not in _DTYPES:
            raise InputError(
                f"the model's weights ({name}) are {weight.dtype}, which no op here computes in; "
                f"call model.to(torch.bfloat16) first"
            )
    encoder, decoder = model.encoder.positional_embedding.dtype, model.decoder.head_weight.dtype
    if encoder != decoder:
        raise InputError(f"the encoder is {encoder} and the decoder {decoder}; give both one dtype, e.g. model.float()")
    return model.tokenizer


def _encode(model: PrismerNetwork, images: ImageBatch) -> tuple[torch.Tensor, Detections | None]:
    """Image tokens and detections, as the decoder reads them."""
    if not len(images):
        raise InputError("the batch holds no images; give at least one")
    images = images.to(model.device)
    return model.encode(images), images.detections


def _check_finite(scores: torch.Tensor) -> None:
    # otherwise weights of another architecture or of a diverged run give texts that look like any others
    if not bool(scores.isfinite().all()):
        raise MachineError("the model's scores are not finite; check its weights and its inputs")


def _group(questions: Any, num_images: int) -> tuple[list[list[str]], bool]:
    """One list of questions per image, and whether they were given as such lists."""
    entries = _as_list(questions)
    if entries is None or len(entries) != num_images:
        given = shown(questions) if entries is None else f"a list of {len(entries)}"
        raise InputError(
            f"questions is {'one string' if isinstance(questions, str) else given} for {num_images} images; give a "
            f"list with one question, or one list of questions, for each image"
        )
    groups = [_as_list(entry) for entry in entries]
    if not any(group is not None for group in groups):
        return [[_text(entry, "a question")] for entry in entries], False
    if any(isinstance(entry, str) for entry in entries):
        raise InputError("questions mixes strings and lists; give either for all images")
    for entry, group in zip(entries, groups, strict=True):
        if group is None:
            raise InputError(f"the questions of an image are {shown(entry)}; give a list of strings")
    return [[_text(question, "a question") for question in group] for group in groups], True


def _as_list(given: Any) -> list | None:
    """The entries of a list, tuple or array; None for anything else, such as a set, which has no order."""
    if isinstance(given, np.ndarray):
        return given.tolist() if given.ndim else None
    return list(given) if isinstance(given, list | tuple) else None


def _texts(given: Any, name: str) -> list[str]:
    """A list of at least one text, as it stands; a ValueError for anything else."""
    entries = _as_list(given)
    if not entries:
        raise InputError(f"{name} is {shown(given)}; give a list of at least one text")
    return [_text(entry, f"entry {i} of {name}") for i, entry in enumerate(entries)]


def _text(given: Any, name: str) -> str:
    """`given` as a string; a ValueError for another type, and for text that UTF-8 cannot hold (lone surrogates)."""
    if not isinstance(given, str):
        kind = type(given).__name__
        article = "an" if kind[0].lower() in "aeiou" else "a"
        raise InputError(f"{name} is {shown(given)}, {article} {kind}; give a string")
    if not is_text(given):
        raise InputError(f"{name} is {given[:60]!a}, which is not UTF-8; write it in UTF-8")
    return str(given)


def _named(ranking: Ranking, candidates: Candidates) -> list[Answer]:
    """A ranking as answers, one for each row."""
    _check_finite(ranking.scores)
    order = ranking.scores.sort(dim=1, descending=True, stable=True)
    indices = ranking.candidates.gather(1, order.indices).tolist()
    results = []
    for row, scores in zip(indices, order.values.tolist(), strict=True):
        ranked = [(candidates.texts[i], score) for i, score in zip(row, scores, strict=True)]
        results.append(Answer(*ranked[0], ranked))
    return results
