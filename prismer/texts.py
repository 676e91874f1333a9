"""Captions, questions, answers and class names as token ids and labels, and their collation into a TextBatch.

The rules are those of Prismer (arXiv:2303.02506) as its released code applies them, with one change: the query that
predicts the first answer token is always one `<pad>`. There, it was a `<pad>` for every question but the longest of
its batch, so that an answer depended on its neighbours; here no text depends on another.

A text is `(ids, labels, weight)`. `labels[t]` is the token `ids[t]` where it is a target and IGNORE_INDEX elsewhere;
the loss shifts. A `<pad>` is never a key, has the position of all pads, and may be a query.
"""

import re
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from prismer.batch import IGNORE_INDEX, TextBatch
from prismer.tokenizer import Tokenizer

MAX_WORDS = 30
MAX_CAPTION_TOKENS = 30
# `<s>` and `</s>` included
MAX_QUESTION_TOKENS = 35
# `<s>` included

Text = tuple[list[int], list[int], float]
ChooseTexts = Callable[[dict, np.random.Generator], list[Text]]

_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")


def clean_caption(caption: str) -> str:
    """A caption as it is trained on: capitalised, `.!"()*#:;~` as blanks, single blanks, at most 30 words.

    Capitals come before blanks, as in the released data: `"Stop" sign` starts with its quotation mark and so in
    lower case.
    """
    words = _PUNCTUATION.sub(" ", caption.capitalize()).split()
    return " ".join(words[:MAX_WORDS])


def clean_question(question: str) -> str:
    """A question as it is asked: `.!"()*#:;~` as blanks, capitalised, at most 30 words, `?` at the end.

    Runs of blanks stay, each blank ending a (possibly empty) word.

    Raises:
        ValueError: if nothing is left of the question.
    """
    text = _PUNCTUATION.sub(" ", question).capitalize().strip()
    if not text.strip("? "):
        raise ValueError(f"the question {question!r} is empty; ask it in words")
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
    """`<s>` and the prefix: where captions and class names start, in training and in generation."""
    return [tokenizer.bos_id, *tokenizer.encode(prefix.strip())]


def encode_caption(
    tokenizer: Tokenizer, caption: str, prefix: str = "", max_positions: int | None = None
) -> tuple[list[int], list[int]]:
    """`<s> prefix caption </s>` and labels on what follows the prefix.

    The sentence is capitalised once: without a prefix the caption starts with a capital, after a prefix it goes on
    in lower case.

    Args:
        caption: cleaned here (`clean_caption`).
        prefix: "A picture of"; "" for pre-training.
        max_positions: size of the decoder's position table (`PrismerConfig.max_positions`), if it may be the
            shorter limit.

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
    """`<s> prefix name </s>`, the name in lower case and otherwise as it is, labels on the name and `</s>`.

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
    """Whether `max_positions` hold the answer after the longest question, as training and ranking ask it."""
    if max_positions is None:
        return True
    # the read-out `<pad>` takes no position; the end token is predicted and never read
    room = _max_tokens(tokenizer, max_positions) + 1 - MAX_QUESTION_TOKENS
    # a token is one byte at least; with the blank in front and the end token, this many at most
    if len(answer.encode()) + 2 <= room:
        return True
    return len(encode_answer(tokenizer, answer)) <= room


def encode_class_name(tokenizer: Tokenizer, name: str) -> list[int]:
    """The tokens of a class name after a prefix, `</s>` last: the candidates of classification by ranking."""
    return [*tokenizer.encode(format_class(name)), tokenizer.eos_id]


def encode_question(tokenizer: Tokenizer, question: str, max_tokens: int = MAX_QUESTION_TOKENS) -> list[int]:
    """`<s>` and the cleaned question, cut to `max_tokens`; neither `</s>` nor the read-out `<pad>` follows.

    Raises:
        ValueError: if the question is empty.
    """
    return [tokenizer.bos_id, *tokenizer.encode(clean_question(question))][:max_tokens]


def encode_qa(
    tokenizer: Tokenizer, question: str, answer: str, max_positions: int | None = None
) -> tuple[list[int], list[int]]:
    """`<s> question <pad> answer </s>` and labels on the answer and `</s>` alone.

    The `<pad>` is the query that predicts the first token of the answer, whatever the batch.

    Args:
        question, answer: cleaned and formatted here.
        max_positions: size of the decoder's position table, if it may be the shorter limit; the question gives way.

    Raises:
        ValueError: if the question or the answer is empty, or the answer alone exceeds the positions.
    """
    target = encode_answer(tokenizer, answer)
    room = _max_tokens(tokenizer, max_positions) - len(target)
    if room < 2:
        raise ValueError(
            f"the answer {answer!r} has {len(target)} tokens, which leaves no question within "
            f"{max_positions} positions; shorten it"
        )
    source = encode_question(tokenizer, question, min(MAX_QUESTION_TOKENS, room))
    source.append(tokenizer.pad_id)
    return source + target, [IGNORE_INDEX] * len(source) + target


def collate(groups: list[list[Text]], *, pad_id: int = 1, bos_id: int = 0, split: int = 0) -> TextBatch:
    """The texts of B images as rectangular tensors.

    Args:
        groups: for each image its texts; lists may differ in length and be empty.
        pad_id: fills texts to the longest of the batch.
        bos_id: the one token of a text that only fills its group: a row of pads alone would have no key to attend to.
        split: place in the group where texts of another length begin, see TextBatch.

    Returns:
        ids (B, G, T), labels (B, G, T), weights (B, G), with G and T at least 1; filling texts have weight 0.

    Raises:
        ValueError: if there is no image, or a text's ids and labels differ in length or are empty.
    """
    if not groups:
        raise ValueError("there are no texts to collate; give one list of texts for each image")
    for ids, labels, _ in (text for group in groups for text in group):
        if len(ids) != len(labels) or not ids:
            raise ValueError(f"a text has {len(ids)} ids and {len(labels)} labels; give as many of each, at least one")
    num_images, num_texts = len(groups), max(1, *map(len, groups))
    length = max((len(ids) for group in groups for ids, _, _ in group), default=1)
    ids = np.full((num_images, num_texts, length), pad_id, dtype=np.int64)
    labels = np.full((num_images, num_texts, length), IGNORE_INDEX, dtype=np.int64)
    weights = np.zeros((num_images, num_texts), dtype=np.float32)
    ids[:, :, 0] = bos_id
    lengths = [1] * num_texts
    for b, group in enumerate(groups):
        for g, (text_ids, text_labels, weight) in enumerate(group):
            lengths[g] = max(lengths[g], len(text_ids))
            ids[b, g, : len(text_ids)] = text_ids
            labels[b, g, : len(text_labels)] = text_labels
            weights[b, g] = weight
    return TextBatch(
        ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        weights=torch.from_numpy(weights),
        lengths=tuple(lengths),
        split=split,
    )


# the choosers are partial applications of module functions, which loader processes can receive; closures cannot


def caption_texts(
    tokenizer: Tokenizer, prefix: str = "", num_texts: int = 1, max_positions: int | None = None
) -> ChooseTexts:
    """Choose up to `num_texts` captions of an image, drawn without replacement, each of weight 1.

    Pre-training is `prefix=""`.
    """
    return partial(_choose_captions, tokenizer, prefix, num_texts, max_positions)


def vqa_texts(tokenizer: Tokenizer, num_texts: int = 1, max_positions: int | None = None) -> ChooseTexts:
    """Choose up to `num_texts` (question, distinct answer) pairs of an image, each with its answer's weight."""
    return partial(_choose_questions, tokenizer, num_texts, max_positions)


def joint_texts(
    tokenizer: Tokenizer,
    prefix: str = "",
    captions_per_image: int = 1,
    questions_per_image: int = 1,
    max_positions: int | None = None,
) -> ChooseTexts:
    """Captions, then (question, answer) pairs, of one image in one group: the image is encoded once for all."""
    captions = caption_texts(tokenizer, prefix, captions_per_image, max_positions)
    questions = vqa_texts(tokenizer, questions_per_image, max_positions)
    return partial(_choose_both, captions, questions)


def classification_texts(
    tokenizer: Tokenizer,
    prefix: str = "A photo of a",
    class_names: list[str] | None = None,
    max_positions: int | None = None,
) -> ChooseTexts:
    """The class of an image as one text.

    `class_names` is needed where the samples hold class indices; class names in the samples are taken as they are.
    """
    return partial(_choose_class, tokenizer, prefix, class_names, max_positions)


def _choose_captions(
    tokenizer: Tokenizer, prefix: str, num_texts: int, max_positions: int | None, meta: dict, rng: np.random.Generator
) -> list[Text]:
    captions = _draw(_field(meta, "captions"), num_texts, rng)
    return [(*encode_caption(tokenizer, caption, prefix, max_positions), 1.0) for caption in captions]


def _choose_questions(
    tokenizer: Tokenizer, num_texts: int, max_positions: int | None, meta: dict, rng: np.random.Generator
) -> list[Text]:
    pairs = [
        (entry["question"], answer["answer"], float(answer["weight"]))
        for entry in _field(meta, "questions")
        for answer in entry.get("answers", ())
    ]
    # all of them, drawn or not: whether a sample is used must not depend on the draw
    for _, answer, _ in pairs:
        if not answer_fits(tokenizer, answer, max_positions):
            raise ValueError(f"the answer {answer[:40]!r}... is too long for {max_positions} positions; shorten it")
    return [
        (*encode_qa(tokenizer, question, answer, max_positions), weight)
        for question, answer, weight in _draw(pairs, num_texts, rng)
    ]


def _choose_both(captions: ChooseTexts, questions: ChooseTexts, meta: dict, rng: np.random.Generator) -> list[Text]:
    # an image may come with captions or questions alone, as lists of either kind are imported
    if "captions" not in meta:
        return questions(meta, rng)
    return captions(meta, rng) + (questions(meta, rng) if "questions" in meta else [])


def _choose_class(
    tokenizer: Tokenizer,
    prefix: str,
    class_names: list[str] | None,
    max_positions: int | None,
    meta: dict,
    rng: np.random.Generator,
) -> list[Text]:
    name = _field(meta, "class")
    if not isinstance(name, str):
        if class_names is None or not 0 <= name < len(class_names):
            known = "no class names were given" if class_names is None else f"there are {len(class_names)}"
            raise ValueError(f"a sample is of class {name} but {known}; give the name of every class")
        name = class_names[name]
    return [(*encode_class(tokenizer, prefix, name, max_positions), 1.0)]


def _field(meta: dict, name: str):
    # an empty list is an image without texts; a missing one is a dataset for another task, which would train nothing
    if meta.get(name) is None:
        raise ValueError(
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
        raise ValueError(f"the prefix {prefix!r} has {len(prompt)} tokens of the {limit} of a caption; shorten it")
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
        raise ValueError(f"the {what} {text!r} is empty; leave it out of the list")
    return text.strip()
