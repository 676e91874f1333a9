"""Proves that METEOR and SPICE come from the programs of pycocoevalcap, that a failing program costs one sentence, and
that our scores equal those of the toolkit.

python -m pytest tests/evaluation/test_toolkit.py

The last part needs pycocoevalcap and Java (pip install 'prismer-vlm[eval]'), and is skipped without them.
"""

import importlib.util
import os
import random
import shutil
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from prismer.evaluation import toolkit
from prismer.evaluation.caption_metrics import bleu, cider_d, rouge_l
from prismer.evaluation.caption_tokens import tokenize_caption
from prismer.evaluation.toolkit import toolkit_scores
from tests.evaluation.test_caption_metrics import TREEBANK

ROWS = [
    dict(key="a", caption="A dog.", captions=["a dog", "a cat"], domain="in-domain"),
    dict(key="b", skipped="it is damaged"),
    dict(
        key="c", caption="A red\n\u2028cube |||", captions=["a red cube", "A RED CUBE", "a cube"], domain="out-domain"
    ),
    dict(key="d", caption="a test image", captions=[]),
    dict(key="e", caption="a hen", captions=["a hen"]),
]
METEOR_SCORE, SPICE_SCORES = (1 / 2 + 2 / 3 + 1) / 3, {"SPICE/in-domain": 0.2, "SPICE/out-domain": 0.3, "SPICE": 0.2}


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder with a stand-in for Java, which comes first on PATH, and a toolkit of empty files."""
    java = tmp_path / "java"
    source = Path(__file__).with_name("stand_in_java.py").read_text()
    java.write_text(f"#!{sys.executable} -SE\n{source}")
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    for name in ("tokenizer", "meteor", "spice/lib"):
        (tmp_path / "pycocoevalcap" / name).mkdir(parents=True)
    (tmp_path / "pycocoevalcap" / "spice/lib/stanford-corenlp-3.6.0-models.jar").touch()
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path / "pycocoevalcap")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_scores_come_from_the_programs(programs):
    scores, notes = toolkit_scores(ROWS)
    assert notes == []
    assert scores == pytest.approx({"METEOR": METEOR_SCORE, **SPICE_SCORES})
    # nothing is written into the package
    assert [path.name for path in programs.rglob("*.json")] == []


def test_no_captions_need_no_program():
    assert toolkit_scores([]) == toolkit_scores(ROWS[1:2] + ROWS[3:4]) == ({}, [])


def test_a_missing_toolkit_or_java_is_named(programs, monkeypatch):
    monkeypatch.setenv("PATH", "")
    _, notes = toolkit_scores(ROWS)
    assert notes == [
        f"{name} was not computed: there is no program java; install a Java runtime, version 8 or newer"
        for name in ("METEOR", "SPICE")
    ]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    scores, notes = toolkit_scores(ROWS)
    assert scores == {} and notes == [
        f"{name} was not computed: pycocoevalcap is not installed; pip install 'prismer-vlm[eval]'"
        for name in ("METEOR", "SPICE")
    ]


def test_missing_models_cost_spice_alone(programs):
    (programs / "pycocoevalcap" / "spice/lib/stanford-corenlp-3.6.0-models.jar").unlink()
    scores, (note,) = toolkit_scores(ROWS)
    assert scores == pytest.approx({"METEOR": METEOR_SCORE})
    assert note.startswith("SPICE was not computed: ") and "get_stanford_models downloads it" in note


@pytest.mark.parametrize(
    ("mode", "lost", "why"),
    [
        ("die PTBTokenizer", ["METEOR", "SPICE"], "java ended with status 1 (Exception in thread"),
        ("silent PTBTokenizer", ["METEOR", "SPICE"], "the tokenizer of pycocoevalcap made 1 lines of 9 captions"),
        ("die meteor-1.5.jar", ["METEOR"], "OutOfMemoryError: Java heap space)"),
        ("silent meteor-1.5.jar", ["METEOR"], "the METEOR program did not answer for each of 3 images"),
        ("nan meteor-1.5.jar", ["METEOR"], "the METEOR program gave 'NaN' for a score"),
        ("die spice-1.0.jar", ["SPICE"], "java ended with status 1"),
        ("silent spice-1.0.jar", ["SPICE"], "the SPICE program wrote no score for each image (FileNotFoundError"),
        ("nan spice-1.0.jar", ["SPICE"], "the SPICE program gave nan for a score"),
    ],
)
def test_a_failing_program_costs_its_score_and_one_sentence(programs, mode, lost, why):
    (programs / "MODE").write_text(mode)
    scores, notes = toolkit_scores(ROWS)
    assert {"METEOR", "SPICE"} - scores.keys() == set(lost)
    assert [note.partition(" was not computed: ")[0] for note in notes] == lost
    assert all(why in note and "\n" not in note for note in notes)


@pytest.mark.parametrize("program", ["PTBTokenizer", "meteor-1.5.jar"])
def test_a_program_that_hangs_is_ended(programs, monkeypatch, program):
    monkeypatch.setattr(toolkit, "_START_TIME", 2.0)
    monkeypatch.setattr(toolkit, "_IMAGE_TIME", 0.0)
    (programs / "MODE").write_text(f"hang {program}")
    _, notes = toolkit_scores(ROWS)
    assert notes and all("java did not end within 2 s and was stopped" in note for note in notes)
    for process in map(int, (programs / "pids").read_text().split()):
        # gone, and waited for
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


needs_toolkit = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None,
    reason="needs pycocoevalcap (extra eval) and Java",
)
SUBJECTS = """a man;two women;Three dogs;the man's dog;a 10-year-old boy;someone;a close-up;An old-fashioned U.S. flag;
Dr. Smith;a black-and-white cat;several people;kids' toys;A bus (red);the "STOP" sign;John O'Brien""".split(";")
VERBS = """is riding;are standing;isn't eating;can't reach;sits;'s holding;cannot see;jumps over;has got;doesn't like;
is gonna throw;looks at;plays with;they're near;won't leave""".split(";")
OBJECTS = """a horse;1,000 apples;the beach;a stove & a sink;a ball, a bat, and a glove;3/4 of a pizza;water;it;
a sign that reads 'NO PARKING';a clock at 10:30 a.m.;the street;an umbrella - blue;a $5 bill;50% of a cake;
his t-shirt;rock 'n' roll;a laptop/desktop computer;the 1990's;one-way street""".split(";")
ENDS = ["", ".", ".", "!", " .", "...", "?", ";", " on a sunny day.", ", outdoors", " in St. Louis.", "!!", " -- maybe"]


def drawn_captions(seed: int, images: int) -> list[list[str]]:
    """For each image six captions that share words."""
    rng = random.Random(seed)
    captions = []
    for _ in range(images):
        words = [[rng.choice(part).strip() for _ in range(3)] for part in (SUBJECTS, VERBS, OBJECTS)]
        captions.append([f"{' '.join(map(rng.choice, words))}{rng.choice(ENDS)}" for _ in range(6)])
    return captions


@pytest.mark.slow
@needs_toolkit
def test_our_scores_equal_those_of_the_toolkit():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    captions = drawn_captions(0, 300)
    candidates, references, differ = toolkit_tokens(captions)
    assert differ == {}
    our_candidates = [tokenize_caption(texts[0]) for texts in captions]
    our_references = [[tokenize_caption(text) for text in texts[1:]] for texts in captions]
    bleus, _ = Bleu(4).compute_score(references, candidates, verbose=0)
    np.testing.assert_allclose(bleu(our_candidates, our_references), bleus, rtol=0, atol=1e-9)
    for ours, scorer in ((rouge_l, Rouge()), (cider_d, Cider())):
        score, by_image = scorer.compute_score(references, candidates)
        np.testing.assert_allclose(ours(our_candidates, our_references), by_image, rtol=0, atol=1e-9)
        assert ours(our_candidates, our_references).mean() == pytest.approx(score, abs=1e-9) and 0 < score < 10
    rows = [dict(key=str(i), caption=texts[0], captions=texts[1:]) for i, texts in enumerate(captions)]
    scores, notes = toolkit_scores(rows)
    meteor, _ = Meteor().compute_score(references, candidates)
    assert scores["METEOR"] == pytest.approx(meteor, abs=1e-9) and 0.1 < meteor < 0.9
    assert all(note.startswith("SPICE") for note in notes)


@needs_toolkit
def test_the_known_differences_to_the_tokenizer_of_the_toolkit_are_complete():
    """Captions whose tokens differ: those of the toolkit, and ours."""
    known = {
        "black/white/red/green": ("black/white/red / green", "black/white/red/green"),
        "a v2.0 sign": ("a v2 .0 sign", "a v2.0 sign"),
        "a <b> tag": ("a <b> tag", "a < b > tag"),
        "hello :D": ("hello :d", "hello d"),
        "row A. The end": ("row a the end", "row a. the end"),
        "row A. the end": None,
        "2 1/2 men": None,
        **dict.fromkeys(TREEBANK),
    }
    _, _, differ = toolkit_tokens([[text, "a"] for text in known])
    assert differ == {text: pair for text, pair in known.items() if pair}


@pytest.mark.slow
@needs_toolkit
def test_odd_captions_keep_their_places():
    """Line ends, the separator of the METEOR program, and captions without a token."""
    odd = ["a\ndog", "a\r\ndog", "a\u2028dog", "a\x85dog", "a\x0bdog", "a ||| dog", "...", "🐶 dog", "", "-"]
    rows = [dict(key=text, caption=text, captions=["a dog", text]) for text in odd]
    scores, _ = toolkit_scores(rows)
    assert 0 < scores["METEOR"] <= 1


def toolkit_tokens(captions: list[list[str]]) -> tuple[dict, dict, dict[str, tuple[str, str]]]:
    """The tokens of the toolkit: of the first caption of each image and of the others; and where ours differ."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    candidates = tokenizer.tokenize({i: [{"caption": texts[0]}] for i, texts in enumerate(captions)})
    references = tokenizer.tokenize({i: [{"caption": text} for text in texts[1:]] for i, texts in enumerate(captions)})
    pairs = [
        (text, tokens.split(), tokenize_caption(text))
        for i, texts in enumerate(captions)
        for text, tokens in zip(texts, [*candidates[i], *references[i]], strict=True)
    ]
    differ = {text: (" ".join(theirs), " ".join(ours)) for text, theirs, ours in pairs if theirs != ours}
    return candidates, references, differ
