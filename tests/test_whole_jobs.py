"""Proves on small models that the benchmark of whole jobs measures correctly.

Every kind of job passes its comparison, and stops if results differ. Its measurements hold exact FLOPs, peak memory and
operators of each contender.

Run: pytest tests/test_whole_jobs.py
"""

import csv
import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing

import prismer
from benchmarks import harness
from benchmarks import test_jobs as bench
from benchmarks import whole_jobs as jobs
from benchmarks.job_runner import Job, measure
from benchmarks.word_lists import ANSWERS, CLASSES, QUESTIONS
from prismer.config import PrismerConfig, preset, prismer_base
from prismer.texts import encode_answer, encode_question
from prismer.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(Path(prismer.__file__).parent / "assets" / "tiny")
SMALL = PrismerConfig(
    image_size=80,
    label_size=64,
    vision_width=32,
    vision_depth=2,
    vision_heads=2,
    resampler_depth=1,
    resampler_heads=4,
    num_latents=8,
    text_width=24,
    text_depth=2,
    text_heads=2,
    text_mlp_width=48,
    init_std=0.2,
    vocab_size=TOKENIZER.vocab_size,
)
OURS, BASELINE = harness.OURS, jobs.BASELINE


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """The measurements of a test; those of the session stay empty."""
    found = []
    monkeypatch.setattr("benchmarks.job_runner.MEASUREMENTS", found)
    return found


@pytest.fixture
def model():
    return jobs.build(SMALL, TOKENIZER)


def conftest():
    """benchmarks/conftest.py, imported under a name other than `conftest`, which is that of the tests."""
    path = Path(harness.__file__).with_name("conftest.py")
    spec = importlib.util.spec_from_file_location("benchmarks_conftest", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


JOBS = {
    "caption": lambda m: jobs.caption_job(m, "S", batch=2, length=8),
    "answer": lambda m: jobs.rank_job(m, "S", 8, answers=ANSWERS[:60]),
    "five-questions": lambda m: jobs.rank_job(m, "S", 8, questions=5, answers=ANSWERS[:60]),
    "all-answers": lambda m: jobs.rank_job(m, "S", 8, whole_list=True, answers=ANSWERS[:60]),
    "classes": lambda m: jobs.classify_job(m, "S", 8, CLASSES[:60]),
    "encoder": lambda m: jobs.encoder_job(m, "S"),
    "labels": lambda m: jobs.labels_job(m.config, "S", batch=2),
    "step": lambda m: jobs.step_job(m, "S", "freeze_vision", 2),
    "five-captions": lambda m: jobs.step_job(m, "S", "none", 1, texts=5),
}


COMPILED_JOBS = {
    "caption": lambda m: jobs.caption_job(m, "S", length=8, compiled=True),
    "answer": lambda m: jobs.rank_job(m, "S", 8, answers=ANSWERS[:60], compiled=True),
    "classes": lambda m: jobs.classify_job(m, "S", 8, CLASSES[:60], compiled=True),
    "encoder": lambda m: jobs.encoder_job(m, "S", compiled=True),
    "step": lambda m: jobs.step_job(m, "S", "freeze_vision", 2, compiled=True),
}


@pytest.mark.parametrize("kind", JOBS)
def test_jobs(kind, model, rows, monkeypatch):
    monkeypatch.setattr(jobs, "MATRIX_SIDE", 256)
    job = JOBS[kind](model)
    found = measure(job, rounds=2)
    assert list(found.values()) == rows and found.keys() == job.calls.keys()
    ours, baseline = found[OURS], found[BASELINE]
    assert ours.ratio == ours.low == ours.high == 1 and baseline.rounds == 2
    assert baseline.ratio == pytest.approx((baseline.low + baseline.high) / 2), "not the median of two rounds"
    for row in found.values():
        assert row.milliseconds > 0 and row.peak_mb > 0 and row.ops > 0 and row.spread_ms > 0
        assert (row.flops > 0) == (0 < row.matrix_share < 1) == (kind != "labels")
    assert baseline.ops > ours.ops
    assert not [p for p in model.parameters() if p.grad is not None]
    if kind == "encoder":
        assert found["mm 256"].flops == 2 * 256**3
        # the resampler folds its norms into products, which changes the FLOPs a little
        assert 0.9 < ours.flops / baseline.flops < 1.1
    elif kind != "labels":
        assert ours.flops < baseline.flops
    if kind == "five-captions":
        # the encoder dominates, and ours encodes four images fewer
        assert found["ours ungrouped"].flops > 2 * ours.flops


@pytest.mark.parametrize("kind", [kind for kind in JOBS if kind != "labels"])
def test_jobs_in_bf16_as_on_a_gpu(kind, rows, monkeypatch):
    """The baseline computes on an fp32 copy under autocast; results are compared as bf16 allows."""
    monkeypatch.setattr(jobs, "MATRIX_SIDE", 256)
    monkeypatch.setattr(jobs, "DTYPE", torch.bfloat16)
    # past the cache of models
    model = jobs.build.__wrapped__(SMALL, TOKENIZER)
    job = JOBS[kind](model)
    found = measure(job)
    assert {row.dtype for row in found.values()} == {"bfloat16"}
    assert {p.dtype for p in model.decoder.parameters()} == {torch.bfloat16}
    assert found[BASELINE].ops > found[OURS].ops
    if kind in ("encoder", "step"):
        wrong = job.calls[BASELINE]
        job.calls[BASELINE] = lambda: 2 * wrong()
        with pytest.raises(AssertionError, match="not timed"):
            measure(job)


def flops_of_a_step(c: PrismerConfig, T: int) -> int:
    """FLOPs of one prefix of T tokens: layers project all keys and values of the image, all positions get logits."""
    D, H, N = c.vision_width, c.text_width, c.num_context_tokens
    attention = 2 * T * 4 * H * H + 4 * T * T * H
    cross = 2 * (2 * T * H * H + 2 * N * D * H) + 4 * T * N * H
    adaptor, feed_forward = 4 * T * H * H, 4 * T * H * c.text_mlp_width
    layers = c.text_depth * (attention + cross + adaptor + feed_forward) + attention + feed_forward
    return layers + 2 * T * H * H + 2 * T * H * c.vocab_size


def test_flops_of_the_baseline_for_a_caption(model):
    """They match the formula, which gives the published system's 1,506 GF for BASE at 480 px (16 steps, 3 beams)."""
    lengths = 6, 8
    flops = [measure(jobs.caption_job(model, "S", length=length))[BASELINE].flops for length in lengths]
    # the difference is the additional steps of the longer caption
    assert flops[1] - flops[0] == 3 * sum(flops_of_a_step(SMALL, T) for T in range(*lengths))
    base = prismer_base(image_size=480)
    assert 3 * sum(flops_of_a_step(base, T) for T in range(4, 20)) == pytest.approx(1506e9, rel=0.005)


def test_flops_of_the_baseline_for_a_ranking(model):
    """Each candidate runs question and padded answer: 606 and 4,618 GF for BASE at 480 px, 786 GF for classes."""
    counts = [measure(jobs.rank_job(model, "S", k, answers=ANSWERS[:60]))[BASELINE].flops for k in (2, 4)]
    question = len(encode_question(TOKENIZER, QUESTIONS[0]))
    tokens = question + max(len(encode_answer(TOKENIZER, answer)) for answer in ANSWERS[:60])
    assert counts[1] - counts[0] == 2 * flops_of_a_step(SMALL, tokens)
    for side, prompt, answer, k, published in ((480, 14, 10, 16, 606), (480, 14, 10, 128, 4618), (384, 5, 12, 32, 786)):
        base = prismer_base(image_size=side)
        total = flops_of_a_step(base, prompt) + k * flops_of_a_step(base, prompt + answer)
        assert total == pytest.approx(published * 1e9, rel=0.005)


@pytest.mark.parametrize("kind", JOBS)
def test_differing_results_are_not_timed(kind, model, rows):
    job = JOBS[kind](model)
    for name in [name for name in job.calls if name != OURS and not name.startswith("mm")]:
        right = job.calls[name]
        job.calls[name] = lambda right=right: _off(right())
        with pytest.raises(AssertionError, match="not timed"):
            measure(job)
        job.calls[name] = right
    assert not rows


def _off(result):
    """The result of any job, off by a thousandth, or another text."""
    if isinstance(result, list):
        return ["A wrong caption."] * len(result) if isinstance(result[0], str) else [result[0] * 1.001, *result[1:]]
    return (result[0], result[1] * 1.001) if isinstance(result, tuple) else result * 1.001


@pytest.mark.long
@pytest.mark.parametrize("kind", ("caption", "answer", "classes", "encoder", "step"))
def test_torch_compile_is_a_contender(kind, model, monkeypatch):
    """It does the same job, is compiled before anything is counted, and is refused if results differ."""
    monkeypatch.setattr(jobs, "MATRIX_SIDE", 256)
    compiler = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(jobs, "COMPILER", compiler)
    model.zero_grad()
    job = COMPILED_JOBS[kind](model)
    compiled = compiler.frame_count
    assert compiled and not [p for p in model.parameters() if p.grad is not None]
    found = measure(job, rounds=2)
    assert found[jobs.COMPILED].ratio > 0 and found[jobs.COMPILED].rounds == 2
    assert compiler.frame_count == compiled, "something is compiled while contenders are timed"
    right = job.calls[jobs.COMPILED]
    job.calls[jobs.COMPILED] = lambda: _off(right())
    with pytest.raises(AssertionError, match="not timed"):
        measure(job)
    torch.compiler.reset()


@pytest.mark.parametrize("case", bench.CASES, ids=lambda case: case.name)
def test_cases_of_the_benchmark(case, model):
    """Every job of the benchmark builds at a small size, and its contenders agree."""
    job = case.make(model, "S")
    outcomes = {}
    for name, call in job.calls.items():
        job.reset()
        outcomes[name] = job.outcome(call())
    job.check(outcomes)
    preset(case.model, image_size=case.side)


def test_case_names_are_distinct_and_one_case_runs_by_default():
    names = [case.name for case in bench.CASES]
    assert len(set(names)) == len(names)
    assert [case.name for case in bench.CASES if case.default] == ["caption"]


def test_gradients_are_compared(model):
    job = JOBS["step"](model)
    outcomes = {name: (torch.tensor(1.0), {"w": torch.ones(3), "b": torch.ones(1)}) for name in job.calls}
    job.check(outcomes)
    outcomes[OURS][1]["b"] = torch.full((1,), 1.01)
    with pytest.raises(AssertionError, match="gradients of ours are off by"):
        job.check(outcomes)
    del outcomes[OURS][1]["b"]
    with pytest.raises(AssertionError, match="trains other parameters"):
        job.check(outcomes)


def test_the_peak_of_a_step_excludes_gradients():
    weight = torch.nn.Parameter(torch.ones(1000, 1000))

    def step():
        loss = weight.sum()
        loss.backward()
        return loss.detach()

    def reset():
        weight.grad = None

    job = Job(
        room="train",
        shape="S",
        part="step",
        calls={OURS: step, BASELINE: step},
        check=lambda outcomes: None,
        reset=reset,
    )
    assert all(row.peak_mb < 0.1 for row in measure(job).values()), "the gradient of 4 MB is counted"


def test_report(model, rows, tmp_path):
    """Measurements of whole jobs and of single ops share one table, one CSV and one plot."""
    report = conftest()
    found = measure(JOBS["answer"](model))
    assert found[BASELINE].ratio == pytest.approx(found[BASELINE].milliseconds / found[OURS].milliseconds)
    op = harness.Measurement(
        room="layer_norm",
        shape="BASE",
        dtype="float32",
        part="forward",
        contender=OURS,
        milliseconds=1.0,
        ratio=1.0,
        low=1.0,
        high=1.0,
        peak_mb=1.0,
        host_ms=1.0,
        gb_per_s=1.0,
        tflop_per_s=0.0,
        rounds=3,
    )
    rows += [op, dataclasses.replace(op, contender="eager", ratio=2.0)]
    lines = report.table(rows)
    assert len(lines) == 3 and "operators" in lines[1] and "eager 2.00" in lines[2]
    report.write_csv(rows, tmp_path / "cpu.csv")
    written = list(csv.DictReader((tmp_path / "cpu.csv").open()))
    assert [int(line["flops"]) for line in written] == [row.flops for row in rows]
    report.plot(rows, tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").stat().st_size > 1000
