"""Proves that every relative link of the Markdown pages leads to a file, and that pages, docstrings and comments name
files that exist.

    pytest tests/test_docs_links.py
"""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")
_FOLDERS = "prismer|kernels|dataloading|csrc|benchmarks|tests|scripts"
NAMED = re.compile(rf"(?<![\w/.])((?:{_FOLDERS})/[\w/]+\.(?:py|cpp|cu|h))")

SOURCES = subprocess.run(
    ["git", "ls-files", "*.py", "*.cpp", "*.h", "*.cu", "*.cuh"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.split()
# `name.py` in a docstring or comment, without its folder
BARE = re.compile(r"`(\w+\.(?:py|cpp|cu))`")


def missing(page: Path, text: str) -> list[str]:
    links = [target for target in LINK.findall(text) if not (page.parent / target).exists()]
    return links + [name for name in NAMED.findall(text) if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_exist(page):
    assert missing(ROOT / page, (ROOT / page).read_text()) == []


def test_sources_name_files_that_exist():
    names = {Path(path).name for path in SOURCES}
    stale = {}
    for path in SOURCES:
        text = (ROOT / path).read_text()
        found = [name for name in NAMED.findall(text) if not (ROOT / name).exists()]
        found += [name for name in BARE.findall(text) if name not in names]
        if found and Path(path).name != Path(__file__).name:
            stale[path] = found
    assert stale == {}


@pytest.mark.parametrize("text", ["[a](docs/no-such-page.md)", "see kernels/no_such_op.py"])
def test_a_dead_link_is_found(text):
    assert missing(ROOT / "README.md", text)
