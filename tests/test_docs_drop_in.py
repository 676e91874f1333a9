"""Proves that every example of docs/drop-in.md runs as written, and trains to the same losses without `apply_to`.

Run: pytest tests/test_docs_drop_in.py -s   (-s shows the reports)
"""

import re
from pathlib import Path

import pytest
import torch

import prismer.kernels.patch as patch

PAGE = Path(__file__).parents[1] / "docs" / "drop-in.md"
PACKAGES = {
    "flamingo_pytorch": "pip install --no-deps flamingo-pytorch einops-exts",
    "open_flamingo": "pip install --no-deps open-flamingo einops-exts",
}


def examples() -> dict[str, str]:
    """The code blocks of the page, by their headings."""
    found = {}
    heading = "the beginning"
    for title, block in re.findall(r"^#+ ([^\n]+)$|^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S):
        heading = title or heading
        if block:
            found[f"{heading} {sum(name.startswith(heading) for name in found) or ''}".strip()] = block
    return found


EXAMPLES = examples()


def move_vectors(model: torch.nn.Module) -> None:
    """Move norms from 1 and biases from 0, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def run_example(code: str, monkeypatch: pytest.MonkeyPatch, patched: bool) -> tuple[dict, list]:
    """Run an example, patched or not, and return its names and its reports."""
    reports = []
    original = patch.apply_to

    def apply_to(model, *args, **kwargs):
        move_vectors(model)
        report = original(model, *args, **kwargs)
        reports.append(report)
        if not patched:
            report.undo()
        return report

    with monkeypatch.context() as context:
        context.setattr(patch, "apply_to", apply_to)
        names = {"__name__": "example"}
        exec(compile(code, str(PAGE), "exec"), names)
    return names, reports


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_trains_like_the_unpatched_model(name, monkeypatch):
    code = EXAMPLES[name]
    for package, command in PACKAGES.items():
        if f"from {package}" in code:
            pytest.importorskip(package, reason=command)
    names, reports = run_example(code, monkeypatch, patched=True)
    assert reports and all(report.replaced for report in reports)
    print("", *reports, sep="\n")
    if "losses" not in names:
        return
    losses = names["losses"]
    assert len(losses) >= 3 and losses[-1] < losses[-3], f"it does not learn: {losses}"
    plain, _ = run_example(code, monkeypatch, patched=False)
    assert losses == pytest.approx(plain["losses"], rel=2e-5)


def test_every_family_has_an_example():
    text = " ".join(EXAMPLES)
    for family in ("open_clip", "CLIP and SigLIP", "RoBERTa and BERT", "BLIP", "Q-Former", "IDEFICS", "Idefics2"):
        assert family in text
    for family in ("flamingo-pytorch", "open_flamingo", "causal language model"):
        assert family in text
