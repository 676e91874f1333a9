"""Rebuild the tokenizer in prismer/assets/names: a byte-level BPE for renamed scenes that spells names it never saw.

    apt-get download wamerican-small
    python scripts/build_names_tokenizer.py --words wamerican-small_2020.12.07-2_all.deb

A model that copies a name from its experts reads ` giraffe` and writes ` giraffe` in a caption, but ` Giraffe` in an
answer, and ` giraffes` where there are two. The merges are made for that. The first letter of a word is a token of its
own, so that only this token differs between ` giraffe` and ` Giraffe`. Parts of common words spell the rest; none of
them ends in s, so that a plural has one token more. Held-out names have no influence. The other words of the scenes'
texts are one token each, without the s of a plural.
"""

import argparse
import json
import re
import string
from collections import Counter
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from prismer.dataloading.scenes.captions_and_questions import write_captions, write_questions
from prismer.dataloading.scenes.exact_labels import OBJECT_CLASSES, outline
from prismer.dataloading.scenes.layout import WORDS, sample_layout
from prismer.dataloading.scenes.names import kind_names, plural_of, sign_words
from prismer.dataloading.scenes.rename import rename_shapes
from prismer.files import write_checksums
from prismer.shipped import shipped_folder
from prismer.texts import clean_caption, clean_question, format_answer
from prismer.tokenizer import FIRST_SPECIALS, MASK, Tokenizer
from scripts.build_names import checked, read_words

# a blank as byte-level BPE writes it
BLANK = "\u0120"
NUM_PARTS = 1400
NUM_SCENES = 200
# a word of the scenes' texts is one token if so many texts have it
LEAST_TEXTS = 8


def learn_parts(words: set[str]) -> list[tuple[str, str]]:
    """Merges of the parts of common words, without their first letter."""
    held_out = {word for name in (*kind_names()[1], *sign_words()[1]) for word in name.split()}
    plain = sorted(word for word in words if re.fullmatch("[a-z]{3,14}", word) and word not in held_out)
    # an s only begins a part, so that the s of a plural is a token of its own
    rests = [word[1:].replace("s", " s") for word in plain]
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = list(string.ascii_lowercase)
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + NUM_PARTS, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(rests, trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    # "a b" or, since tokenizers 0.20, ["a", "b"]
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]


def scene_texts() -> list[str]:
    """Captions, questions and answers of scenes as they are tokenized, half of them of renamed scenes."""
    seen = kind_names()[0]
    texts = []
    for i in range(NUM_SCENES):
        rng = np.random.default_rng(i)
        scene = outline(sample_layout(rng))
        metas = [{"captions": write_captions(scene, rng), "questions": write_questions(scene, rng)}]
        metas.append(rename_shapes(seen, {"scene": scene}, {"obj_detection": OBJECT_CLASSES}, rng)[0])
        for meta in metas:
            texts += map(clean_caption, meta["captions"])
            for entry in meta["questions"]:
                texts += [clean_question(entry["question"]), *(format_answer(a["answer"]) for a in entry["answers"])]
    return texts


def common_words(texts: list[str]) -> list[str]:
    """The words of the texts that are one token, as byte-level BPE writes them; the short ones first."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update({word for word, _ in split.pre_tokenize_str(text)})
    spelled = {*WORDS, *(word for name in kind_names()[0] for form in (name, plural_of(name)) for word in form.split())}
    common = {word for word, number in counts.items() if number >= LEAST_TEXTS}
    whole = (w for w in common if w.strip(BLANK).lower() not in spelled and not (w[-1] == "s" and w[:-1] in common))
    return sorted(whole, key=lambda word: (len(word), word))


def join(word: str, merges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The merges that make one token of a word.

    They begin at its end, so that other words which begin alike stay as they are; but no part may end in s.
    """
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    parts = list(word)
    while pairs := [(ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:], strict=False)) if pair in ranks]:
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    new = []
    while len(parts) > 1:
        at = 0 if word.endswith("s") else len(parts) - 2
        new.append((parts[at], parts[at + 1]))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return new


def build(words: set[str]) -> Tokenizer:
    """The tokenizer, from the words of the word list."""
    merges = [(BLANK, letter) for letter in string.ascii_letters + string.digits]
    merges += learn_parts(words)
    for word in common_words(scene_texts()):
        merges += join(word, merges)
    tokens = [*FIRST_SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges), MASK]
    return Tokenizer({token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges)


def report(tokenizer: Tokenizer) -> None:
    """Print how long names are, and how often the forms of a name share their tokens."""
    print(f"{tokenizer.vocab_size} tokens")
    for label, names in zip(("seen", "held-out"), kind_names(), strict=True):
        ids = [tokenizer.encode(f" {name}") for name in names]
        capitals = [tokenizer.encode(format_answer(name)) for name in names]
        plurals = [tokenizer.encode(f" {name}s") for name in names]
        alike = np.mean([a[1:] == b[1:] for a, b in zip(ids, capitals, strict=True)])
        added = np.mean([a == b[:-1] for a, b in zip(ids, plurals, strict=True)])
        lengths = list(map(len, ids))
        print(f"{len(names)} {label} names: {np.mean(lengths):.2f} tokens, at most {max(lengths)}")
        print(f"a capital changes only the first token of {alike:.1%}; {added:.1%} have one token more with an s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--words", type=Path, required=True, help="wamerican-small 2020.12.07-2 of Debian")
    args = parser.parse_args()
    folder = shipped_folder("names")
    tokenizer = build(read_words(checked("words", args.words)))
    tokenizer.save(folder)
    write_checksums(folder)
    report(tokenizer)


if __name__ == "__main__":
    main()
