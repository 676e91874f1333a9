"""Proves that the tokenizer is RoBERTa's, against shipped files, known ids, an independent BPE, and transformers.

python -m pytest -q tests/model/test_tokenizer.py
"""

import hashlib
import importlib.util
import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from prismer.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "prismer" / "assets" / "roberta"
SHA256 = {
    "vocab.json": "06b4d46c8e752d410213d9548eb27a54db70fda0319b6271fb8d59dead5e1cab",
    "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
SMALL_TEXTS = ["A red cube and a blue ball.", "What colour is the cube?", " Red", " Blue"] * 3


@pytest.fixture(scope="module")
def roberta() -> Tokenizer:
    return Tokenizer.roberta()


@pytest.fixture(scope="module")
def build_script():
    spec = importlib.util.spec_from_file_location("build_tokenizer", ROOT / "scripts" / "build_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hard_strings(count: int = 600) -> list[str]:
    """Blanks, newlines, numbers, contractions, scripts, emoji and control characters in any order."""
    pieces = (
        " |  |\n|\t|\r\n|\u00a0|\u3000|a|The|dog|don't|I'LL|it's|1|2023|é|e\u0301|ß|İ|Ω|Привет|日本語|한국"
        "|عربي|हिन्दी|👍|👍🏽|👨\u200d👩\u200d👧|🇫🇷|\ufeff|...|!?|</|s>|<|#|\u200b|\x00|\x7f|’s|ﬁ|½|unhyphenated"
    ).split("|")
    rng = random.Random(0)
    strings = ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(count - 3)]
    return [*strings, "", " leading", "trailing "]


def test_the_shipped_files_are_robertas():
    for name, digest in SHA256.items():
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest, name


def test_known_texts_have_their_ids(roberta):
    assert roberta.encode("Hello world!") == [31414, 232, 328]
    fox = "The quick brown fox jumps over the lazy dog"
    assert roberta.encode(fox) == [133, 2119, 6219, 23602, 13855, 81, 5, 22414, 2335]
    assert roberta.encode("") == []
    ids = (roberta.bos_id, roberta.pad_id, roberta.eos_id, roberta.unk_id, roberta.mask_id, roberta.vocab_size)
    assert ids == (0, 1, 2, 3, 50264, 50265)


def test_encode_agrees_with_a_plain_bpe(roberta, build_script):
    regex = pytest.importorskip("regex")
    vocab = json.loads((ASSETS / "vocab.json").read_text(encoding="utf-8"))
    lines = (ASSETS / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    ranks = {line.replace(" ", ""): rank for rank, line in enumerate(lines)}
    alphabet = build_script.byte_alphabet()
    # the word pattern of GPT-2
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for text in hard_strings():
        words = ["".join(alphabet[b] for b in word.encode()) for word in regex.findall(pattern, text)]
        expected = [vocab[part] for word in words for part in build_script.split_by_ranks(word, ranks)]
        assert roberta.encode(text) == expected, repr(text)


def test_encode_agrees_with_transformers(roberta):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.RobertaTokenizer.from_pretrained(str(ASSETS))
    # transformers makes a special token of "<s>" in a text; we never do (test_texts_hold_no_special_tokens)
    texts = [text for text in hard_strings() if "<s>" not in text and "</s>" not in text]
    assert len(texts) > 500
    for text in texts:
        assert roberta.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], repr(text)


@pytest.mark.parametrize("name", ["roberta", "small"])
def test_decode_inverts_encode(roberta, name):
    tokenizer = roberta if name == "roberta" else Tokenizer.train(SMALL_TEXTS, 280)
    for text in hard_strings(200):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_texts_hold_no_special_tokens(roberta):
    # typed by a user they are text; as ids they are special tokens
    ids = roberta.encode("<s> a<pad></s><mask>")
    assert not {0, 1, 2, 3, 50264} & set(ids)
    assert roberta.decode(ids) == "<s> a<pad></s><mask>"
    assert roberta.decode([0, 31414, 1, 232, 328, 50264, 2, 3]) == "Hello world!"
    with pytest.raises(ValueError, match="token id 50265 is not of this vocabulary of 50265"):
        roberta.decode([0, 50265])
    with pytest.raises(ValueError, match="token id -100"):
        roberta.decode([-100])


def test_a_trained_vocabulary_has_specials_bytes_and_merges():
    tokenizer = Tokenizer.train(SMALL_TEXTS, 280)
    special = (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.mask_id)
    assert tokenizer.vocab_size == 280 and special == (0, 1, 2, 3, 279)
    text = "What colour is the cube?"
    assert len(tokenizer.encode(text)) < len(text.encode())
    # no pair occurs twice: there are bytes and special tokens alone
    assert Tokenizer.train(["abcdefg"], 300).vocab_size == 261
    with pytest.raises(ValueError, match="vocab_size 260 does not hold every byte; ask for 261 or more"):
        Tokenizer.train(SMALL_TEXTS, 260)


def test_training_is_deterministic(tmp_path):
    # hash seeds differ between processes
    texts = [
        f"{a} {b} of {c}" for a in ("red", "blue", "green") for b in ("cube", "ball") for c in ("one", "two", "ten")
    ]
    Tokenizer.train(texts, 300).save(tmp_path / "here")
    code = (
        "import json, sys; from prismer.tokenizer import Tokenizer; "
        "Tokenizer.train(json.loads(sys.argv[1]), 300).save(sys.argv[2])"
    )
    command = [sys.executable, "-c", code, json.dumps(texts), str(tmp_path / "there")]
    subprocess.run(command, check=True, cwd=ROOT, timeout=60)
    for name in SHA256:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name


def test_a_saved_tokenizer_loads(roberta, tmp_path):
    roberta.save(tmp_path / "roberta")
    for name in SHA256:
        assert (tmp_path / "roberta" / name).read_bytes() == (ASSETS / name).read_bytes(), name
    small = Tokenizer.train(SMALL_TEXTS, 280)
    small.save(tmp_path / "small")
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == sorted(SHA256)
    again = Tokenizer.from_folder(tmp_path / "small")
    assert again.vocab_size == 280
    assert all(again.encode(text) == small.encode(text) for text in hard_strings(100))


def test_tokenizer_json_loads(roberta, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.RobertaTokenizer.from_pretrained(str(ASSETS)).save_pretrained(str(tmp_path))
    for name in SHA256:
        (tmp_path / name).unlink(missing_ok=True)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.mask_id) == (50265, 50264)
    assert all(tokenizer.encode(text) == roberta.encode(text) for text in hard_strings(100))
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="changes texts before its BPE"):
        Tokenizer.from_folder(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="neither vocab.json with merges.txt nor tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    cases = {
        '{"<s>": 0': "is not JSON",
        '["<s>"]': "does not map tokens to ids",
        '{"<s>": 0, "<pad>": 2}': "the ids of .* are not 0 to 1",
        '{"<s>": 0, "<pad>": 1, "</s>": 2}': "lacks <unk>, <mask>",
    }
    for text, message in cases.items():
        (tmp_path / "vocab.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_folder(tmp_path)
    specials = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "a", "b", "<mask>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(specials))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(ValueError, match="the merge 'a b' is not of tokens"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "merges.txt").write_text("a\n")
    with pytest.raises(ValueError, match="merge 1 of .* is 'a', not two tokens"):
        Tokenizer.from_folder(tmp_path)


def test_build_script_recovers_the_shipped_files(build_script):
    """The script gets tables that were reconstructed from its results."""
    character_to_byte = {character: byte for byte, character in build_script.byte_alphabet().items()}
    merges = (ASSETS / "merges.txt").read_text(encoding="utf-8")
    joined = [line.replace(" ", "") for line in merges.split("\n")[1:-1]]
    gpt2 = [bytes([b]) for b in range(256)]
    gpt2 += [bytes(character_to_byte[c] for c in token) for token in joined] + [b"<|endoftext|>"]
    assert build_script.build_merges(gpt2) == merges
    vocab_text = (ASSETS / "vocab.json").read_text(encoding="utf-8")
    roberta = [
        token.encode() if i in build_script.ROBERTA_LITERALS else bytes(character_to_byte[c] for c in token)
        for token, i in json.loads(vocab_text).items()
    ]
    roberta[50108:50112] = [b" "] * 4
    assert build_script.build_vocab(roberta) == vocab_text


def test_the_script_reads_a_table_of_strings(build_script):
    strings = [b"a", b"", b"bcd"]
    table = struct.pack("<II4I", 7, 3, 0, 1, 1, 4) + b"abcd\0"
    assert build_script.read_i2w(table, 3) == strings
    with pytest.raises(ValueError, match="found no table of 4 strings"):
        build_script.read_i2w(table, 4)
