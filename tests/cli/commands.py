"""What the tests of this folder share: a command line's result, and a small model."""

import dataclasses
from collections.abc import Callable

ANSWERS = ["Yes", "No", "Red", "Two"]
SMALL_MODEL = dict(
    image_size=32,
    label_size=32,
    vision_width=32,
    vision_depth=1,
    vision_heads=2,
    resampler_depth=1,
    resampler_heads=2,
    num_latents=4,
    text_width=32,
    text_depth=1,
    text_heads=2,
    text_mlp_width=64,
)


@dataclasses.dataclass
class Run:
    """The exit code and the output of one command line."""

    code: int
    out: str
    err: str


def raiser(body: str) -> Callable:
    """A function with this body, as if a module of this library defined it."""
    namespace = {"__name__": "prismer.something"}
    exec(f"def info_text(model):\n    {body}", namespace)
    return namespace["info_text"]


def assert_refused(run: Run, words: str) -> None:
    """Exit code 2, and one sentence with these words."""
    last = run.err.splitlines()[-1]
    assert run.code == 2 and last.startswith("prismer: ") and words in last, run.err
    # an import first names the images that it skipped
    assert all(line.startswith(("prismer: ", "skipped ")) for line in run.err.splitlines()), run.err
