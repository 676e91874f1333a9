"""RoBERTa's byte-level BPE: text to token ids and back.

Every text is representable, and no text turns into a special token: `<s>` typed by a user is three ordinary tokens.
The functions that build sequences (`prismer.texts`) add special tokens by id.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from prismer.errors import InputError
from prismer.files import CHECKSUMS, find_damage, write_atomically
from prismer.reading import is_text, read_json
from prismer.shipped import shipped_folder

# ids 0..3, as in RoBERTa; `<mask>` comes last
FIRST_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"

ROBERTA_VOCAB_SIZE = 50265
_ROBERTA = shipped_folder("roberta")


class Tokenizer:
    """A byte-level BPE with RoBERTa's special tokens.

    Attributes:
        bos_id, pad_id, eos_id, unk_id, mask_id: ids of `<s>`, `<pad>`, `</s>`, `<unk>`, `<mask>`.
        vocab_size: number of ids.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], source: str = "vocabulary"):
        """
        Args:
            vocab: token (bytes written as GPT-2's printable characters) -> id; ids are 0..len-1.
            merges: pairs in order of priority.
            source: names the vocabulary in errors.

        Raises:
            ValueError: if ids are not consecutive, or a special token is missing.
        """
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise InputError(f"the ids of {source} are not 0 to {len(vocab) - 1}; restore the file")
        missing = [token for token in (*FIRST_SPECIALS, MASK) if token not in vocab]
        if missing:
            raise InputError(
                f"{source} lacks {', '.join(missing)}; use a vocabulary of the RoBERTa family, which has them"
            )
        unknown = next(((a, b) for a, b in merges if not (a in vocab and b in vocab and a + b in vocab)), None)
        if unknown is not None:
            raise InputError(
                f"the merge {' '.join(unknown)!r} is not of tokens of {source}; use merges that belong to it"
            )
        self.bos_id, self.pad_id, self.eos_id, self.unk_id = (vocab[s] for s in FIRST_SPECIALS)
        self.mask_id = vocab[MASK]
        self.vocab_size = len(vocab)
        self._vocab, self._merges = vocab, merges
        self._specials = {self.bos_id, self.pad_id, self.eos_id, self.unk_id, self.mask_id}
        self._bpe = _byte_level(models.BPE(vocab=vocab, merges=merges))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens; no blank is added in front."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: if an id is not in the vocabulary.
        """
        ids = [int(i) for i in ids]
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise InputError(
                f"token id {wrong} is not of this vocabulary of {self.vocab_size}; "
                f"decode with the tokenizer that the model was trained with"
            )
        kept = [i for i in ids if i not in self._specials]
        return self._bpe.decode(kept, skip_special_tokens=False)

    @classmethod
    def roberta(cls) -> "Tokenizer":
        """The vocabulary of RoBERTa, 50265 ids, from the package."""
        return cls.from_folder(_ROBERTA)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read `vocab.json` and `merges.txt`, or else `tokenizer.json`, in the layout of transformers.

        Raises:
            ValueError: if the files are absent, damaged, or not a byte-level BPE.
        """
        folder = Path(folder)
        vocab_path, merges_path = folder / "vocab.json", folder / "merges.txt"
        if vocab_path.is_file() and merges_path.is_file():
            vocab = read_json(vocab_path, remedy="restore the file")
            try:
                lines = merges_path.read_text(encoding="utf-8-sig").split("\n")
            except UnicodeDecodeError:
                raise InputError(f"{merges_path} is not text; restore the file") from None
            pairs = [line for line in lines if line and not line.startswith("#version")]
            found = cls(_checked_vocab(vocab, vocab_path), _pairs(pairs, merges_path), str(vocab_path))
            if damaged := find_damage(folder, ("vocab.json", "merges.txt")):
                raise InputError(
                    f"{folder / damaged} is damaged: its checksum is not the one in {CHECKSUMS}; copy it again, "
                    f"or delete {CHECKSUMS} if you changed it yourself"
                )
            return found
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(
                f"{folder} holds neither vocab.json with merges.txt nor tokenizer.json; copy the tokenizer files there"
            )
        return cls._from_tokenizer_json(path)

    @classmethod
    def _from_tokenizer_json(cls, path: Path) -> "Tokenizer":
        data = read_json(path, remedy="restore the file")
        model, pre = (data.get(key) if isinstance(data, dict) else None for key in ("model", "pre_tokenizer"))
        kinds = [part.get("type") if isinstance(part, dict) else None for part in (model, pre)]
        if kinds != ["BPE", "ByteLevel"]:
            raise InputError(f"{path} is not a byte-level BPE; use a tokenizer of the RoBERTa family")
        if pre.get("add_prefix_space") or not pre.get("use_regex", True) or data.get("normalizer"):
            raise InputError(
                f"{path} changes texts before its BPE (prefix space, normalizer or no word split); "
                f"RoBERTa's does not, use that"
            )
        vocab = dict(_checked_vocab(model.get("vocab"), path))
        # special tokens may be listed beside the vocabulary alone
        added = data.get("added_tokens", [])
        try:
            vocab |= _checked_vocab({entry["content"]: entry["id"] for entry in added}, path)
        except (TypeError, KeyError):
            raise InputError(f"the added_tokens of {path} are damaged; restore the file") from None
        return cls(vocab, _pairs(model.get("merges", []), path), str(path))

    def save(self, folder: str | Path) -> None:
        """Write `vocab.json` and `merges.txt` into `folder`, which is created if needed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        vocab = dict(sorted(self._vocab.items(), key=lambda item: item[1]))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self._merges)]
        write_atomically(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False).encode())
        write_atomically(folder / "merges.txt", ("\n".join(lines) + "\n").encode())

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a small vocabulary; the same texts give the same vocabulary.

        Args:
            texts: texts as it will encode them (an answer starts with a blank).
            vocab_size: 5 special tokens, 256 bytes and the merges; fewer merges if no more pairs occur twice.

        Raises:
            ValueError: if `vocab_size` has no room for every byte.
        """
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        smallest = len(FIRST_SPECIALS) + 1 + len(alphabet)
        if vocab_size < smallest:
            raise InputError(f"vocab_size {vocab_size} does not hold every byte; ask for {smallest} or more")
        bpe = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            special_tokens=list(FIRST_SPECIALS),
            initial_alphabet=alphabet,
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        model = json.loads(bpe.to_str())["model"]
        vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
        vocab[MASK] = len(vocab)
        return cls(vocab, _pairs(model["merges"], "the trained vocabulary"))


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(model)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def _checked_vocab(vocab: object, path: Path) -> dict[str, int]:
    if not isinstance(vocab, dict) or not all(
        isinstance(token, str) and is_text(token) and type(i) is int for token, i in vocab.items()
    ):
        raise InputError(f"{path} does not map tokens to ids; restore the file")
    return vocab


def _pairs(merges: list, source: Path | str) -> list[tuple[str, str]]:
    if not isinstance(merges, list):
        raise InputError(f"the merges of {source} are no list; restore the file")
    # tokenizer.json holds "a b" or, since tokenizers 0.20, ["a", "b"]
    pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
    for i, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or [type(token) for token in pair] != [str, str]:
            raise InputError(f"merge {i + 1} of {source} is {merges[i]!r}, not two tokens; restore the file")
    return [tuple(pair) for pair in pairs]
