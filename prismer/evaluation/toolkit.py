"""METEOR and SPICE, computed by the Java programs that the COCO caption toolkit (pycocoevalcap) ships.

The programs are started here, not by the toolkit's Python code: that code writes into the folder of its package,
downloads 400 MB unasked, and waits for ever for a program that hangs.
"""

import importlib.util
import json
import math
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prismer.errors import MachineError, shown

_NAMES = ("METEOR", "SPICE")
# the marks that the toolkit drops after its tokenizer; brackets stay, since "-lrb-" is not "-LRB-"
_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
# a program is ended after this time to start, plus this time for each image, s
_START_TIME, _IMAGE_TIME = 300.0, 2.0


def toolkit_scores(rows: Sequence[dict]) -> tuple[dict[str, float], list[str]]:
    """METEOR and SPICE of predicted captions, if the toolkit and Java are installed.

    Args:
        rows: as for `scores.scores`; rows with "skipped", and images without a true caption, are left out.

    Returns:
        "METEOR", "SPICE" and "SPICE/DOMAIN", the mean over the images of a domain, by name; and for each of METEOR and
        SPICE that is missing one sentence that says why and what to do. Both are empty if there are no captions.
    """
    rows = [row for row in rows if "skipped" not in row and row.get("captions")]
    if not rows:
        return {}, []
    limit = _START_TIME + _IMAGE_TIME * len(rows)
    try:
        folder = _toolkit_folder()
        candidates, references = _tokenized(folder, rows, limit)
    except MachineError as error:
        return {}, [f"{name} was not computed: {error}" for name in _NAMES]
    scores: dict[str, float] = {}
    notes: list[str] = []
    try:
        scores["METEOR"] = _meteor(folder, candidates, references, limit)
    except MachineError as error:
        notes.append(f"METEOR was not computed: {error}")
    try:
        by_image = _spice(folder, candidates, references, limit)
        scores["SPICE"] = float(np.mean(by_image))
        by_domain = defaultdict(list)
        for row, score in zip(rows, by_image, strict=True):
            if row.get("domain") is not None:
                by_domain[row["domain"]].append(score)
        scores |= {f"SPICE/{domain}": float(np.mean(by_domain[domain])) for domain in sorted(by_domain)}
    except MachineError as error:
        notes.append(f"SPICE was not computed: {error}")
    return scores, notes


def _toolkit_folder() -> Path:
    """The folder of the package pycocoevalcap.

    Raises:
        MachineError: if the package or Java is not installed.
    """
    spec = importlib.util.find_spec("pycocoevalcap")
    # the package has no __init__.py
    places = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    folder = next((place for place in places if (place / "meteor").is_dir()), None)
    if folder is None:
        raise MachineError("pycocoevalcap is not installed; pip install 'prismer-vlm[eval]'")
    if shutil.which("java") is None:
        raise MachineError("there is no program java; install a Java runtime, version 8 or newer")
    return folder


def _tokenized(folder: Path, rows: Sequence[dict], limit: float) -> tuple[list[str], list[list[str]]]:
    """The candidate and the references of each image after the toolkit's tokenizer, tokens joined by blanks."""
    # the tokenizer takes a text a line, and knows more line ends than Python does
    texts = [" ".join(text.split()) for row in rows for text in (row["caption"], *row["captions"])]
    options = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    lines = _java(["-cp", "stanford-corenlp-3.4.1.jar", *options], folder / "tokenizer", texts, limit)
    if len(lines) != len(texts):
        raise MachineError(f"the tokenizer of pycocoevalcap made {len(lines)} lines of {len(texts)} captions")
    tokenized = iter([" ".join(token for token in line.split(" ") if token not in _DROPPED) for line in lines])
    candidates, references = [], []
    for row in rows:
        candidates.append(next(tokenized))
        references.append([next(tokenized) for _ in row["captions"]])
    return candidates, references


def _meteor(folder: Path, candidates: Sequence[str], references: Sequence[Sequence[str]], limit: float) -> float:
    """METEOR 1.5 of a corpus, for English, normalised as by the toolkit."""
    options = ["-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    separator = " ||| "
    pairs = [
        separator.join(" ".join(text.replace("|||", "").split()) for text in (*refs, candidate))
        for candidate, refs in zip(candidates, references, strict=True)
    ]
    # first the statistics of each image, then the scores of the images and last that of the corpus
    statistics = _java(options, folder / "meteor", [f"SCORE{separator}{pair}" for pair in pairs], limit)
    if len(statistics) == len(pairs):
        numbers = _java(options, folder / "meteor", [separator.join(["EVAL", *statistics])], limit)
        if len(numbers) == len(pairs) + 1:
            return _number(numbers[-1], "METEOR")
    raise MachineError(f"the METEOR program did not answer for each of {len(pairs)} images")


def _spice(folder: Path, candidates: Sequence[str], references: Sequence[Sequence[str]], limit: float) -> list[float]:
    """SPICE of each image."""
    models = folder / "spice" / "lib" / "stanford-corenlp-3.6.0-models.jar"
    if not models.is_file():
        raise MachineError(
            f"{models} is missing; python -m pycocoevalcap.spice.get_stanford_models downloads it (400 MB)"
        )
    entries = [
        {"image_id": i, "test": candidate, "refs": list(refs)}
        for i, (candidate, refs) in enumerate(zip(candidates, references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch, "captions.json"), Path(scratch, "scores.json")
        given.write_text(json.dumps(entries))
        # without the toolkit's cache of parsed captions, which lies in the folder of its package
        options = ["-Xmx8G", "-jar", "spice-1.0.jar", str(given), "-out", str(made), "-subset", "-silent"]
        _java(options, folder / "spice", [], limit)
        try:
            found = {entry["image_id"]: entry["scores"]["All"]["f"] for entry in json.loads(made.read_bytes())}
            return [_number(found[i], "SPICE") for i in range(len(entries))]
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise MachineError(f"the SPICE program wrote no score for each image ({shown(error)})") from None


def _java(options: Sequence[str], folder: Path, lines: Sequence[str], limit: float) -> list[str]:
    """The lines that a Java program writes for the lines that it reads.

    Raises:
        MachineError: if it cannot be started, ends with an error, or runs for more than `limit` seconds.
    """
    text = "".join(f"{line}\n" for line in lines).encode()
    try:
        done = subprocess.run(["java", *options], cwd=folder, input=text, capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise MachineError(f"java did not end within {limit:.0f} s and was stopped") from None
    except OSError as error:
        raise MachineError(f"java cannot be started ({error.strerror})") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").split("\n")
        why = next((line.strip() for line in said if "Exception" in line or "Error" in line), said[0].strip())
        raise MachineError(f"java ended with status {done.returncode} ({why})")
    # the tokens may hold line ends that are none to Java
    return done.stdout.decode(errors="replace").removesuffix("\n").split("\n")


def _number(text: str | float, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise MachineError(f"the {name} program gave {shown(text)} for a score")
    return value
