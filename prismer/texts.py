"""Captions, questions, answers and class names as token ids and labels, and their collation into a TextBatch.

The rules are those of Prismer (arXiv:2303.02506) as its released code applies them, with one change: the query that
predicts the first answer token is always one `<pad>`. In the released code it is a `<pad>` for every question but the
longest of its batch, so that an answer depends on the other questions; here no text depends on another.

A text is `(ids, labels, weight)`. `labels[t]` is `ids[t]` where that token is a target, and IGNORE_INDEX elsewhere; the
loss shifts the labels. A `<pad>` is never a key, always has the same position, and may be a query.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from prismer.batch import IGNORE_INDEX, TextBatch
from prismer.errors import InputError
from prismer.tokenizer import Tokenizer

MAX_WORDS = 30
# `<s>` and `</s>` included
MAX_CAPTION_TOKENS = 30
# `<s>` included
MAX_QUESTION_TOKENS = 35
CLASS_PREFIX = "A photo of a"

Text = tuple[list[int], list[int], float]
ChooseTexts = Callable[[dict, np.random.Generator], list[Text]]

_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")


def clean_caption(caption: str) -> str:
    """A caption as training uses it: capitalised, blanks for `.!"()*#:;~`, single blanks, at most 30 words.

    As in the released data, capitals come before blanks: `"Stop" sign` starts with a quotation mark, and so becomes
    `stop sign`.
    """
    words = _PUNCTUATION.sub(" ", caption.capitalize()).split()
    return " ".join(words[:MAX_WORDS])


def clean_question(question: str) -> str:
    """A question as the model reads it: blanks for `.!"()*#:;~`, capitalised, at most 30 words, `?` at the end.

    Several blanks in a row stay; each one ends a word, which may be empty.

    Raises:
        ValueError: if nothing is left of the question.
    """
    text = _PUNCTUATION.sub(" ", question).capitalize().strip()
    if not text.strip("? "):
        raise InputError(f"the question {question!r} is empty; ask it in words")
    text = " ".join(text.split(" ")[:MAX_WORDS])
    return text if text.endswith("?") else text + "?"


def format_answer(answer: str) -> str:
    """An answer as the decoder writes it after a question: one blank, then capitalised.

    Raises:
        ValueError: if the answer is empty.
    """
    return " " + _not_empty(answer, "answer").capitalize()


def format_class(name: str) -> str:
    """A class name as the decoder writes it after a prefix: one blank, then lower case.

    Raises:
        ValueError: if the name is empty.
    """
    return " " + _not_empty(name, "class name").lower()


def encode_prompt(tokenizer: Tokenizer, prefix: str) -> list[int]:
    """`<s>` and the prefix: the start of captions and class names, in training and in generation."""
    return [tokenizer.bos_id, *tokenizer.encode(prefix.strip())]


def encode_caption(
    tokenizer: Tokenizer, caption: str, prefix: str = "", max_positions: int | None = None
) -> tuple[list[int], list[int]]:
    """`<s> prefix caption </s>` and labels on everything after the prefix.

    Only the start of the sentence is capitalised: a caption starts with a capital without a prefix, and in lower case
    after a prefix.

    Args:
        caption: not yet cleaned (`clean_caption`).
        prefix: "A picture of"; "" for pre-training.
        max_positions: size of the decoder's position table (`PrismerConfig.max_positions`), which may shorten the
            text; None for no such limit.

    Returns:
        ids and labels, at most 30 of each, `</s>` always last.
    """
    caption = clean_caption(caption)
    if prefix.strip():
        caption = " " + caption.lower() if caption else ""
    return _sentence(tokenizer, prefix, caption, max_positions)


def encode_class(
    tokenizer: Tokenizer, prefix: str, name: str, max_positions: int | None = None
) -> tuple[list[int], list[int]]:
    """`<s> prefix name </s>` and labels on the name and `</s>`; the name is in lower case, otherwise unchanged.

    Returns:
        ids and labels, at most 30 of each.

    Raises:
        ValueError: if the name is empty.
    """
    return _sentence(tokenizer, prefix, format_class(name), max_positions)


def encode_answer(tokenizer: Tokenizer, answer: str) -> list[int]:
    """The tokens of an answer after a question, `</s>` last: the targets of VQA, the candidates of its ranking."""
    return [*tokenizer.encode(format_answer(answer)), tokenizer.eos_id]


def answer_fits(tokenizer: Tokenizer, answer: str, max_positions: int | None) -> bool:
    """Whether the answer and the longest question together fit into `max_positions`, in training and in ranking."""
    if max_positions is None:
        return True
    # the `<pad>` before the answer takes no position; the end token is predicted and never read
    room = _max_tokens(tokenizer, max_positions) + 1 - MAX_QUESTION_TOKENS
    # a token has at least one byte, so that this is the most tokens, with the blank in front and the end token
    if len(answer.encode()) + 2 <= room:
        return True
    return len(encode_answer(tokenizer, answer)) <= room


def encode_class_name(tokenizer: Tokenizer, name: str) -> list[int]:
    """The tokens of a class name after a prefix, `</s>` last: the candidates of classification by ranking."""
    return [*tokenizer.encode(format_class(name)), tokenizer.eos_id]


def encode_question(tokenizer: Tokenizer, question: str, max_tokens: int = MAX_QUESTION_TOKENS) -> list[int]:
    """`<s>` and the cleaned question, cut to `max_tokens`, without `</s>` or the `<pad>` that predicts the answer.

    Raises:
        ValueError: if the question is empty.
    """
    return [tokenizer.bos_id, *tokenizer.encode(clean_question(question))][:max_tokens]


def encode_qa(
    tokenizer: Tokenizer, question: str, answer: str, max_positions: int | None = None
) -> tuple[list[int], list[int]]:
    """`<s> question <pad> answer </s>` and labels on the answer and `</s>`.

    The `<pad>` is the query that predicts the first token of the answer, in every batch.

    Args:
        question, answer: not yet cleaned and formatted.
        max_positions: size of the decoder's position table, which may shorten the question; None for no such limit.

    Raises:
        ValueError: if the question or the answer is empty, or the answer alone exceeds the positions.
    """
    target = encode_answer(tokenizer, answer)
    room = _max_tokens(tokenizer, max_positions) - len(target)
    if room < 2:
        raise InputError(
            f"the answer {answer!r} has {len(target)} tokens, which leaves no question within "
            f"{max_positions} positions; shorten it"
        )
    source = encode_question(tokenizer, question, min(MAX_QUESTION_TOKENS, room))
    source.append(tokenizer.pad_id)
    return source + target, [IGNORE_INDEX] * len(source) + target


def collate(groups: list[list[Text]], *, pad_id: int = 1, bos_id: int = 0, split: int = 0) -> TextBatch:
    """The texts of B images as rectangular tensors.

    Args:
        groups: for each image its texts; the lists may differ in length and may be empty.
        pad_id: pads texts to the length of the longest of the batch.
        bos_id: the only token of a text that fills up a group; a row of pads would have no key to attend to.
        split: number of leading texts in a group before those of another length, see TextBatch.

    Returns:
        ids (B, G, T), labels (B, G, T), weights (B, G), with G and T at least 1; texts that fill up have weight 0.

    Raises:
        ValueError: if there is no image, or a text's ids and labels differ in length or are empty.
    """
    if not groups:
        raise InputError("there are no texts to collate; give one list of texts for each image")
    for ids, labels, _ in (text for group in groups for text in group):
        if len(ids) != len(labels) or not ids:
            raise InputError(f"a text has {len(ids)} ids and {len(labels)} labels; give as many of each, at least one")
    num_images, num_texts = len(groups), max(1, *map(len, groups))
    length = max((len(ids) for group in groups for ids, _, _ in group), default=1)
    ids = np.full((num_images, num_texts, length), pad_id, dtype=np.int64)
    labels = np.full((num_images, num_texts, length), IGNORE_INDEX, dtype=np.int64)
    weights = np.zeros((num_images, num_texts), dtype=np.float32)
    ids[:, :, 0] = bos_id
    lengths = np.ones((num_images, num_texts), dtype=np.int64)
    for b, group in enumerate(groups):
        for g, (text_ids, text_labels, weight) in enumerate(group):
            lengths[b, g] = len(text_ids)
            ids[b, g, : len(text_ids)] = text_ids
            labels[b, g, : len(text_labels)] = text_labels
            weights[b, g] = weight
    texts = TextBatch(
        ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        weights=torch.from_numpy(weights),
        lengths=tuple(lengths.max(0).tolist()),
        split=split,
    )
    texts.packing = texts.pack(torch.from_numpy(lengths))
    return texts


# a chooser is a partial application of a function below, which can be sent to loader processes; a closure cannot


def choose_captions(
    tokenizer: Tokenizer, prefix: str, num_texts: int, max_positions: int | None, meta: dict, rng: np.random.Generator
) -> list[Text]:
    """Up to `num_texts` captions of an image, drawn without replacement, each of weight 1."""
    captions = _draw(_field(meta, "captions"), num_texts, rng)
    return [(*encode_caption(tokenizer, caption, prefix, max_positions), 1.0) for caption in captions]


def choose_questions(
    tokenizer: Tokenizer, num_texts: int, max_positions: int | None, meta: dict, rng: np.random.Generator
) -> list[Text]:
    """Up to `num_texts` (question, distinct answer) pairs of an image, each with its answer's weight."""
    pairs = [
        (entry["question"], answer["answer"], float(answer["weight"]))
        for entry in _field(meta, "questions")
        for answer in entry.get("answers", ())
    ]
    # check answers that are not drawn too: the draw must not decide whether a sample is used
    for _, answer, _ in pairs:
        if not answer_fits(tokenizer, answer, max_positions):
            raise InputError(f"the answer {answer[:40]!r}... is too long for {max_positions} positions; shorten it")
    return [
        (*encode_qa(tokenizer, question, answer, max_positions), weight)
        for question, answer, weight in _draw(pairs, num_texts, rng)
    ]


def choose_class(
    tokenizer: Tokenizer, class_names: list[str], max_positions: int | None, meta: dict, rng: np.random.Generator
) -> list[Text]:
    """The class of an image as one text; `class_names` names the classes of samples that hold an index."""
    name = _field(meta, "class")
    if not isinstance(name, str):
        if not 0 <= name < len(class_names):
            raise InputError(
                f"a sample is of class {name} but {len(class_names)} names were given; give the name of every class"
            )
        name = class_names[name]
    return [(*encode_class(tokenizer, CLASS_PREFIX, name, max_positions), 1.0)]


def choose_joint(choosers: dict[str, ChooseTexts], meta: dict, rng: np.random.Generator) -> list[Text]:
    """Texts of several kinds in one group, so that the image is encoded once for all of them.

    Args:
        choosers: field of a sample's JSON -> chooser of its texts, in the order of the group. Kinds that a sample
            lacks are left out, since lists of captions and of questions are imported apart; a sample that lacks all
            kinds is refused.
    """
    present = [choose for name, choose in choosers.items() if name in meta]
    # without any, a chooser says what is missing
    present = present or list(choosers.values())[-1:]
    return [text for choose in present for text in choose(meta, rng)]


def _field(meta: dict, name: str) -> Any:
    # an empty list is an image without texts; a missing field is a dataset for another task
    if meta.get(name) is None:
        raise InputError(
            f"a sample has no {name!r}, only {', '.join(sorted(meta)) or 'nothing'}; "
            f"choose a task that fits the dataset"
        )
    return meta[name]


def _draw(items: list, count: int, rng: np.random.Generator) -> list:
    if len(items) <= count:
        return list(items)
    return [items[i] for i in rng.choice(len(items), size=count, replace=False)]


def _sentence(tokenizer: Tokenizer, prefix: str, body: str, max_positions: int | None) -> tuple[list[int], list[int]]:
    limit = min(MAX_CAPTION_TOKENS, _max_tokens(tokenizer, max_positions))
    prompt = encode_prompt(tokenizer, prefix)
    if len(prompt) >= limit:
        raise InputError(f"the prefix {prefix!r} has {len(prompt)} tokens of the {limit} of a caption; shorten it")
    if not prefix.strip():
        body = body.lstrip()
    ids = prompt + tokenizer.encode(body)
    ids = [*ids[: limit - 1], tokenizer.eos_id]
    return ids, [IGNORE_INDEX] * len(prompt) + ids[len(prompt) :]


def _max_tokens(tokenizer: Tokenizer, max_positions: int | None) -> int:
    # RoBERTa counts positions from padding_idx + 1: the table's first rows are never used
    return 10**9 if max_positions is None else max_positions - tokenizer.pad_id - 1


def _not_empty(text: str, what: str) -> str:
    if not text.strip():
        raise InputError(f"the {what} {text!r} is empty; leave it out of the list")
    return text.strip()
