"""Proves that each variant of the ablations changes what it says and nothing else, trains under ZeRO-3, is saved and
rebuilt, that finished runs are never repeated, and that the intervals and verdicts of the report are right.

    python -m pytest tests/train/test_ablations.py
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prismer.ablations.__main__ import main
from prismer.ablations.catalogue import BASELINE, FINDINGS, INFERENCE, MARGIN, VARIANTS, Claim, find_variant, select
from prismer.ablations.experiment import FINETUNE, JOINT, PRETRAIN, Experiment, Job, all_jobs, same_as_baseline
from prismer.ablations.feeds import ChangedSamples
from prismer.ablations.networks import RandomSampling, noise_maps, variant_class
from prismer.ablations.report import BEGIN, END, write_report
from prismer.ablations.results import Result, compare, image_scores, mean_and_interval, quantile_of_t
from prismer.batch import ImageBatch
from prismer.config import prismer_tiny
from prismer.dataloading.store.shards import Sample
from prismer.errors import InputError
from prismer.files import write_json
from prismer.freezing import freeze
from prismer.model import Prismer
from prismer.training.config import TrainConfig
from tests.train.conftest import small_config
from tests.train.forks import run_ranks

# one variant for each way to change a model
BUILT = (
    "no-adaptor adaptor-1_8 two-adaptors gated-adaptor random-sampling no-resampler rgb-resampled latents-16 experts-0 "
    "noise-experts-3 text-for-maps"
).split()


def build(name, **changes):
    torch.manual_seed(0)
    return variant_class(find_variant(name))(small_config(**changes)).eval()


def images(count=2, seed=0):
    """Images with noise for all maps."""
    config, draw = small_config(), torch.Generator().manual_seed(seed)
    rgb = torch.randint(256, (count, 3, 64, 64), dtype=torch.uint8, generator=draw)
    batch = ImageBatch.without_labels(rgb, config.experts, config.label_size)
    for name, map_ in batch.labels.items():
        batch.labels[name] = torch.randint(256, map_.shape, dtype=torch.uint8, generator=draw)
    return batch


# the variants themselves


def test_a_variant_that_changes_no_module_is_prismer_itself():
    assert variant_class(find_variant(BASELINE)) is Prismer
    assert variant_class(find_variant("depth-noise-50")) is Prismer


@pytest.mark.parametrize("name", BUILT)
def test_a_variant_is_rebuilt_from_its_folder(name, tmp_path):
    model = build(name)
    # a gate of 0 and the like would hide what was not loaded
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert torch.equal(loaded.encode(images()), model.encode(images()))
    with torch.device("meta"):
        twin = type(model)(loaded.config)
    assert twin.state_dict().keys() == model.state_dict().keys()
    if find_variant(name).network and name != "random-sampling" and not name.startswith(("rgb", "no-resampler")):
        with pytest.raises(ValueError, match="does not fit"):
            Prismer.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", [name for name in BUILT if VARIANTS[name].network])
def test_what_a_variant_shares_with_the_baseline_starts_alike(name):
    own, base = build(name).state_dict(), build(BASELINE).state_dict()
    changed = {key for key in own if key not in base or not torch.equal(own[key], base[key])}
    part = {"two-adaptors": "second_adaptor", "gated-adaptor": "gate"}.get(name, "adaptor")
    part = "noise_stems" if name.startswith("noise") else part
    assert all(part in key for key in changed), sorted(changed)
    assert changed or name in ("no-adaptor", "random-sampling", "no-resampler", "rgb-resampled")


@pytest.mark.parametrize("name", BUILT)
def test_only_the_inherited_towers_freeze(name):
    model = build(name)
    freeze(model, "freeze_lang_vision")
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen and not any("adaptor" in key or "noise" in key or "resampler" in key for key in frozen)


def adaptor(x, block, late, gate=1.0):
    """The definition of an adaptor."""
    u = x if late else block.norm(x)
    y = x + gate * block.up(torch.relu(block.down(u)).square())
    return block.norm(y) if late else y


def test_adaptors_are_removed_narrowed_doubled_and_gated():
    x = torch.randn(2, 5, 32)
    bare, narrow, two, gated = map(build, ("no-adaptor", "adaptor-1_8", "two-adaptors", "gated-adaptor"))
    one = build(BASELINE)

    def vision(model, branch):
        block = model.encoder.blocks[0]
        y = x + block.attn(block.ln_1(x))
        y = branch(y, block)
        return y + block.mlp(block.ln_2(y))

    def expected(model, late_branch, early_branch):
        """A decoder layer and a vision block with their adaptors written out."""
        layer = model.decoder.layers[0]
        h = layer.cross(layer.attention(x, 0, attend), x)
        return layer.mlp(late_branch(h, layer)), vision(model, early_branch)

    def attend(_, q, k, v):
        return v

    def outputs(model):
        return model.decoder.layers[0](x, 0, attend, x), model.encoder.blocks[0](x)

    for model in (one, narrow):
        want = expected(model, lambda h, o: adaptor(h, o.adaptor, True), lambda h, o: adaptor(h, o.adaptor, False))
        for got, wanted in zip(outputs(model), want, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert narrow.encoder.blocks[0].adaptor.down.out_features == 4
    assert build("adaptor-2").decoder.layers[1].adaptor.up.in_features == 64
    want = expected(bare, lambda h, o: h, lambda h, o: h)
    for got, wanted in zip(outputs(bare), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)

    # the second adaptor follows the MLP
    first = expected(two, lambda h, o: adaptor(h, o.adaptor, True), lambda h, o: adaptor(h, o.adaptor, False))
    blocks = (two.decoder.layers[0], two.encoder.blocks[0])
    for got, before, block, late in zip(outputs(two), first, blocks, (True, False), strict=True):
        torch.testing.assert_close(got, adaptor(before, block.second_adaptor, late), rtol=1e-4, atol=1e-4)

    # closed at first
    for gate in (0.0, 0.7):
        for layer in (gated.decoder.layers[0], gated.encoder.blocks[0]):
            assert gate or not layer.adaptor.gate.any()
            torch.nn.init.constant_(layer.adaptor.gate, gate)
        factor = np.tanh(gate)
        want = expected(
            gated,
            lambda h, o, f=factor: adaptor(h, o.adaptor, True, f),
            lambda h, o, f=factor: adaptor(h, o.adaptor, False, f),
        )
        for got, wanted in zip(outputs(gated), want, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_new_matrices_of_the_decoder_are_drawn_as_the_decoder_draws_its_own():
    for name, part in (("adaptor-2", "adaptor"), ("two-adaptors", "second_adaptor")):
        layer = build(name, text_width=64, init_std=0.5).decoder.layers[0]
        for linear in (getattr(layer, part).down, getattr(layer, part).up):
            assert 0.4 < linear.weight.std() < 0.6 and not linear.bias.any()


def test_the_blocks_read_the_tokens_that_a_variant_says():
    rgb, expert, latents = 16, 6 * 16, 4
    wanted = {
        "no-resampler": rgb + expert,
        "random-sampling": rgb + latents,
        "rgb-resampled": latents,
        "latents-16": rgb + 16,
        "experts-0": rgb,
        "noise-experts-3": rgb + latents,
    }
    assert {name: build(name).encode(images()).shape[1] for name in wanted} == wanted
    # RGB reaches the blocks through the resampler alone
    model, batch = build("rgb-resampled"), images()
    before = model.encode(batch)
    batch.rgb = 255 - batch.rgb
    assert not torch.equal(model.encode(batch), before)


def test_random_sampling_draws_anew_in_training_alone():
    x, sampling = torch.arange(50.0).view(1, 50, 1), RandomSampling(8)
    torch.manual_seed(0)
    draws = [sampling.train()(x) for _ in range(2)]
    assert not torch.equal(*draws)
    assert all(len(draw.unique()) == 8 and torch.isin(draw, x).all() for draw in draws)
    assert torch.equal(sampling.eval()(x), sampling(x)) and sampling(x).shape == (1, 8, 1)


def test_noise_is_uniform_and_depends_on_the_image_and_the_expert_alone():
    rgb = images(3).rgb
    maps = noise_maps(rgb, 0, 64)
    assert torch.equal(noise_maps(rgb[1:2], 0, 64), maps[1:2])
    counts = torch.bincount(maps.flatten().long(), minlength=256).double()
    # a chi-squared of 255 degrees of freedom: 255 +- 23
    assert 150 < ((counts - counts.mean()).square() / counts.mean()).sum() < 370
    nudged = rgb.clone()
    nudged[0, 0, 0, 0] ^= 1
    others = (maps[1], noise_maps(rgb, 1, 64)[0], noise_maps(nudged, 0, 64)[0])
    for other in others:
        assert abs(float((other == maps[0]).double().mean()) - 1 / 256) < 0.01
    model, batch = build("noise-experts-2"), images()
    assert torch.equal(model.encode(batch)[:1], model.encode(images())[:1])
    stems = model.encoder.noise_stems
    before = model.encode(batch)
    torch.nn.init.zeros_(stems[1].project.weight)
    assert not torch.equal(model.encode(batch), before)


# the samples


class Samples(list):
    classes = {"seg": ["cube", "sky"], "obj_detection": ["cube"]}
    place = "here"


def samples(count):
    def labels():
        return {name: np.zeros((8, 8), np.uint8) for name in ("depth", "seg", "edge")}

    class Fresh(Samples):
        def __getitem__(self, i):
            return Sample(f"s{i}", b"", labels(), {})

    return Fresh(range(count))


def test_a_larger_share_of_noise_holds_the_smaller_ones():
    noisy = {}
    for share in (0, 25, 50, 75, 100):
        dataset = ChangedSamples(samples(400), ("depth_noise", share))
        assert len(dataset) == 400 and dataset.place == "here"
        found = [dataset[i].labels for i in range(400)]
        noisy[share] = {i for i, labels in enumerate(found) if labels["depth"].any()}
        assert abs(len(noisy[share]) - 4 * share) < 45 and not any(labels["edge"].any() for labels in found)
        assert all((dataset[i].labels["depth"] == found[i]["depth"]).all() for i in range(9))
    assert noisy[0] < noisy[25] < noisy[50] < noisy[75] < noisy[100]
    assert len(noisy[100]) == 400 and found[0]["depth"].tobytes() != found[1]["depth"].tobytes()


def test_maps_are_dropped_and_classes_renamed():
    dropped = ChangedSamples(samples(2), ("drop", "depth", "edge"))
    assert list(dropped[0].labels) == ["seg"] and dropped.classes == Samples.classes
    renamed = ChangedSamples(samples(2), ("other_segmentation",))
    assert renamed.classes == {"seg": ["box", "heaven"], "obj_detection": ["cube"]}
    other = samples(2)
    other.classes = {"seg": ["person"]}
    with pytest.raises(InputError, match="rendered scenes alone"):
        ChangedSamples(other, ("other_segmentation",))


# the runs of an experiment


def jobs_of(names, tmp_path, seeds=(0,), **experiment):
    experiment = Experiment(**experiment)
    return all_jobs(experiment, prismer_tiny(), select(names), seeds, tmp_path / "runs", tmp_path / "results")


def finish(job):
    """As if the job had run."""
    job.model.mkdir(parents=True)
    job.result.parent.mkdir(parents=True, exist_ok=True)
    job.result.write_text("{}")


def test_every_finding_has_runs_and_valid_settings(tmp_path):
    for recipe in ("embedded", "paper"):
        jobs = jobs_of(["all"], tmp_path, recipe=recipe, finetune_data="vqav2")
        assert {job.variant for job in jobs} >= VARIANTS.keys() - {"layers-2", "latents-16", "experts-6"}
        for job in jobs:
            while job.stage == INFERENCE:
                job = job.parent
            config = TrainConfig.for_task(**job.settings())
            assert config.drop_labels == 0 and config.data == ("vqav2" if job.stage == FINETUNE else "data/scenes")
            assert config.image_size == (224 if recipe == "paper" else 0)


def test_a_variant_that_equals_the_baseline_is_not_run_twice(tmp_path):
    assert same_as_baseline(find_variant("layers-2"), prismer_tiny())
    assert not same_as_baseline(find_variant("layers-4"), prismer_tiny())
    assert [job.variant for job in jobs_of(["layers-2", "experts-6"], tmp_path)] == [BASELINE]


def test_freezing_shares_its_pre_training(tmp_path):
    jobs = {job.variant: job for job in jobs_of(["freezing"], tmp_path)}
    late, early = jobs["finetune-frozen-nothing"], jobs["pretrain-frozen-nothing"]
    assert late.parent == jobs[BASELINE].parent and late.settings()["freeze"] == "none"
    assert TrainConfig.for_task(**late.parent.settings()).freeze == "freeze_lang_vision"
    assert early.parent.settings()["freeze"] == "none" and early.settings()["freeze"] == "freeze_vision"
    assert early.settings()["model"] == str(early.parent.model)
    assert [job.stage for job in late.needed()] == [PRETRAIN, FINETUNE]
    finish(late.parent)
    assert late.needed() == [late] and len(early.needed()) == 2


def test_a_finished_run_is_never_repeated(tmp_path):
    baseline, dropped = jobs_of([BASELINE, "drop-depth"], tmp_path)
    assert (baseline.stage, dropped.stage, dropped.parent) == (JOINT, INFERENCE, baseline)
    assert dropped.needed() == [baseline, dropped]
    finish(baseline)
    assert baseline.needed() == [] and dropped.needed() == [dropped]
    # the model of a finished run is trained again only for a result that is missing
    baseline.model.rmdir()
    assert baseline.needed() == [] and dropped.needed() == [baseline, dropped]
    finish(dropped)
    assert dropped.needed() == []


def test_a_job_travels_as_json(tmp_path):
    for job in jobs_of(["finetune-frozen-both"], tmp_path, steps={JOINT: 3}, settings={"batch_size": 8}):
        assert Job.from_json(job.to_json()) == job
        assert job.settings()["batch_size"] == 8


def test_results_of_other_settings_are_refused(tmp_path):
    Experiment(steps={JOINT: 5}).store(tmp_path)
    Experiment(steps={JOINT: 5}).store(tmp_path)
    assert Experiment.load(tmp_path) == Experiment(steps={JOINT: 5})
    with pytest.raises(InputError, match="only equal runs can be compared"):
        Experiment(steps={JOINT: 6}).store(tmp_path)
    with pytest.raises(InputError, match="there is no variant 'x'"):
        select(["x"])


SCRIPT = """
import sys
from pathlib import Path
from prismer.ablations import feeds
from prismer.ablations.catalogue import INFERENCE, VARIANTS, Variant
from prismer.ablations.experiment import Job
from prismer.ablations.networks import CHANGES
from prismer.ablations.stage import run_job

seen = []

def mark(sample, run):
    sample.labels.clear()
    seen.append((run, sample.key.partition("-")[0]))

def change(model):
    CHANGES["adaptor_gated"](model)
    CHANGES["adaptor_two"](model)
    CHANGES["noise"](model, 1)

CHANGES["several"] = change
feeds.CHANGES["mark"] = mark, dict
text = {"expert_text": ("obj_detection", "ocr_detection")}
VARIANTS["several"] = Variant(name="several", change="", config=text, network=("several",), feed=("mark", "trained"))
VARIANTS["marked"] = Variant(name="marked", change="", begins=INFERENCE, feed=("mark", "evaluated"))
for file in sys.argv[2:]:
    assert run_job(Job.from_json(Path(file).read_text()), sys.argv[1]) == 0
assert set(seen) == {("trained", "train"), ("trained", "val"), ("evaluated", "val")}, set(seen)
"""


@pytest.mark.timeout(600)
def test_variants_train_under_zero_and_are_scored(workshop, tmp_path):
    """Several changes at once, with every parameter sharded as those of large models are; then an evaluation alone."""
    experiment = Experiment(
        data=str(workshop.folder / "data"),
        steps={JOINT: 2},
        settings=dict(batch_size=2, questions_per_image=1, eval_batch_size=8, warmup_steps=1),
    )
    common = dict(experiment=experiment, seed=3, runs=tmp_path / "runs", results=tmp_path / "results")
    trained = Job(stage=JOINT, variant="several", **common)
    jobs = [trained, Job(stage=INFERENCE, variant="marked", parent=trained, **common)]
    zero = dict.fromkeys(("stage3_param_persistence_threshold", "stage3_max_reuse_distance"), 0)
    (tmp_path / "zero.json").write_text(json.dumps(dict(zero_optimization=dict(stage=3, **zero))))
    files = [tmp_path / f"{job.stage}.json" for job in jobs]
    for job, file in zip(jobs, files, strict=True):
        file.write_text(job.to_json())
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run_ranks(1, [script, tmp_path / "zero.json", *files], tmp_path / "log")
    results = [Result.load(job.result) for job in jobs]
    for job, result in zip(jobs, results, strict=True):
        assert job.needed() == [] and result.about["steps"] == 2
        for metric, (right, asked) in result.images.items():
            assert asked.sum() > 8 and right.sum() / asked.sum() == pytest.approx(result.scores[metric], abs=1e-3)
        assert {"accuracy", "accuracy/yes/no", "accuracy/read"} <= result.images.keys()
    # the same model without labels: what it answers does not depend on where it is evaluated
    assert np.array_equal(*(result.images["accuracy"] for result in results))
    # the trained model is kept, what only a resumed run needs is not
    assert not (trained.folder / "checkpoints").exists()
    tensors = load_file(trained.model / "model.safetensors")
    gates = [value for key, value in tensors.items() if key.endswith(".gate")]
    assert len(gates) == 10 and all(gate.any() for gate in gates), "a gate got no gradient"
    norms = [value for key, value in tensors.items() if "noise_stems" in key and key.endswith("running_mean")]
    assert len(norms) == 4 and all(norm.any() for norm in norms), "no noise reached its stem"


# the report


def result(accuracy, seed=0, images=50, asked=4.0):
    counts = np.array([[accuracy * asked] * images, [asked] * images])
    scores = {"accuracy": accuracy, "accuracy/read": accuracy, "CIDEr-D": 1.0}
    return Result(seed, scores, {"accuracy": counts, "accuracy/read": counts}, {})


def series(**accuracies):
    return {
        name: {seed: result(value, seed) for seed, value in enumerate(values)} for name, values in accuracies.items()
    }


def test_intervals_are_those_of_students_t():
    mean, (low, high) = mean_and_interval([0.1, 0.2, 0.6])
    # standard deviation 0.26458, quantile 4.303 of two degrees of freedom
    assert mean == pytest.approx(0.3) and high - mean == pytest.approx(4.303 * 0.26458 / 3**0.5, rel=1e-3)
    assert mean - low == pytest.approx(high - mean)
    assert mean_and_interval([0.5]) == (0.5, None)
    for degrees, exact in ((2, 4.3027), (10, 2.2281), (11, 2.2010), (20, 2.0860), (60, 2.0003)):
        assert quantile_of_t(degrees) == pytest.approx(exact, abs=4e-3)


def test_a_claim_is_shown_contradicted_or_undecided():
    better = Claim(text="a is better", weights={"a": 1.0, "b": -1.0})
    harmless = Claim(text="a is not worse", weights={"a": 1.0, "b": -1.0}, margin=MARGIN)
    up = series(a=[0.52, 0.53, 0.54], b=[0.5, 0.51, 0.52])
    found = compare(better, up)
    assert found.verdict == "shown" and found.difference == pytest.approx(0.02) and found.seeds == [0, 1, 2]
    down = series(a=[0.495, 0.496, 0.497], b=[0.5, 0.501, 0.502])
    assert compare(better, down).verdict == "contradicted" and compare(harmless, down).verdict == "shown"
    mixed = series(a=[0.5, 0.6, 0.5], b=[0.5, 0.5, 0.6])
    assert compare(better, mixed).verdict == "undecided"
    # one seed tells nothing of chance; seeds that one variant lacks do not count
    assert compare(better, series(a=[0.6], b=[0.5, 0.5])).verdict == "undecided"
    assert compare(better, series(a=[0.6])).verdict == "not run"
    unasked = Claim(text="a", weights={"a": 1.0, "b": -1.0}, metric="accuracy/count")
    assert compare(unasked, up).verdict == "not run"


def test_images_count_as_chance_beside_seeds():
    """Three equal seeds leave no doubt, but a gain that rests on few images does."""
    claim = Claim(text="a is better", weights={"a": 1.0, "b": -1.0})
    found = series(a=[0.52] * 3, b=[0.5] * 3)
    for seed in range(3):
        right = np.full(50, 2.0)
        # one image gains a point, others lose little
        right[0] = 4.0
        right[1:] += (4.0 - 2.0) / 49
        found["a"][seed].images["accuracy"][0] = right
        found["b"][seed].images["accuracy"][0] = 2.0
    found["a"][0].images["accuracy"][0, 1:26] -= 1
    wide = compare(claim, found)
    assert wide.over_images[1] - wide.over_images[0] > 0.01 and wide.verdict == "undecided"
    narrow = compare(claim, series(a=[0.52] * 3, b=[0.5] * 3))
    assert narrow.over_images == pytest.approx((0.02, 0.02)) and narrow.verdict == "shown"
    with pytest.raises(InputError, match="other validation images"):
        compare(claim, {"a": {0: result(0.5)}, "b": {0: result(0.5, images=49)}})


def test_the_claims_add_up_and_the_slope_is_that_of_a_line():
    for finding in FINDINGS:
        names = {BASELINE, *(variant.name for variant in finding.variants)}
        for claim in finding.claims:
            assert sum(claim.weights.values()) == pytest.approx(0, abs=1e-12) and claim.weights.keys() <= names
    (slope,) = (claim for finding in FINDINGS for claim in finding.claims if "slope" in claim.text)
    found = series(**{name: [0.6 - 0.1 * i / 4] for i, name in enumerate(slope.weights)})
    assert compare(slope, found).difference == pytest.approx(0.1)


def test_the_accuracy_of_an_image_is_the_sum_over_its_questions():
    def question(kind, prediction, *answers):
        return dict(kind=kind, prediction=prediction, answers={answer: 1.0 for answer in answers})

    first = [
        question("read", "a", "a"),
        question("read", "b", "a"),
        question("read", "c"),
        question("yes/no", "a", "a"),
    ]
    # three of ten people said b, and the accuracy leaves each of them out in turn
    second = [dict(kind="read", prediction="b", answers={"a": 0.7, "b": 0.3})]
    found = image_scores([dict(questions=first), dict(caption="x"), dict(questions=second)])
    assert found == {
        "read": dict(right=[1, 0, 0.9], asked=[2, 0, 1]),
        "yes/no": dict(right=[1, 0, 0], asked=[1, 0, 0]),
    }


def test_the_report_states_verdicts_and_draws_plots(tmp_path):
    results, page = tmp_path / "results", tmp_path / "page.md"
    Experiment().store(results)
    for stage, name, accuracies in (
        (JOINT, BASELINE, (0.5, 0.52)),
        (JOINT, "no-adaptor", (0.4, 0.42)),
        (INFERENCE, "drop-all", (0.3, 0.31)),
        (FINETUNE, BASELINE, (0.6,)),
    ):
        for seed, accuracy in enumerate(accuracies):
            own = result(accuracy, seed)
            file = results / stage / name / f"seed-{seed}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            right, asked = own.images["accuracy"].tolist()
            images = {"yes/no": dict(right=right, asked=asked), "read": dict(right=right, asked=asked)}
            write_json(file, dict(seed=seed, scores={**own.scores, "accuracy/yes/no": 0.25}, images=images))
            loaded = Result.load(file)
            assert loaded.images["accuracy"].sum() == 2 * loaded.images["accuracy/yes/no"].sum()
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    text = write_report(Experiment(), prismer_tiny(), results, tmp_path / "plots", page)
    assert page.read_text() == f"before\n{BEGIN}\n\n{text}\n{END}\nafter\n"
    lines = text.splitlines()
    (row,) = (line for line in lines if line.startswith("| one adaptor per layer is better than none"))
    assert "| +10.0 |" in row and row.endswith("| 2 | **shown** |")
    assert any(line.startswith("| dropping all experts") and "**shown**" in line for line in lines)
    assert any(line.startswith("| one adaptor per layer is better than two") and "not run" in line for line in lines)
    (row,) = (line for line in lines if line.startswith("| no-adaptor"))
    assert "| 41.0 ±" in row and "| -10.0 (-10.0 to -10.0) |" in row and row.endswith("| 1.00 | 41 | 25 |")
    # layers-2 is the baseline of tiny, and fine-tuning has a baseline of its own
    assert any(line.startswith("| layers-2") and "| 51.0 ±" in line for line in lines)
    assert any(line.startswith("| baseline |  | 1 | 60.0 |") for line in lines)
    # a plot of the baseline alone would compare nothing
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"adaptors.png", "inference.png"}
    page.write_text("no marks")
    with pytest.raises(InputError, match="lost its marks"):
        write_report(Experiment(), prismer_tiny(), results, tmp_path / "plots", page)


def test_a_reader_that_has_seen_enough_ends_the_list_in_silence():
    command = f"{sys.executable} -m prismer.ablations list | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_the_command_lists_and_refuses(tmp_path, capsys):
    assert main(["list", "resampler", "freezing"]) == 0
    printed = capsys.readouterr().out
    assert "random-sampling" in printed and "finetune-frozen-both" in printed and "adaptors:" not in printed
    runs = ["--runs", str(tmp_path / "runs")]
    assert main(["run", "inference", "--seeds", "0,1", "--dry-run", *runs]) == 0
    assert capsys.readouterr().out.startswith("18 runs are missing for 18 results")
    assert not (tmp_path / "runs").exists()
    for words, message in (
        (["run", "adaptor"], "there is no variant 'adaptor'"),
        (["run", "adaptors", "--seeds", "a"], "whole numbers with commas"),
        (["run", "adaptors", "--set", "seed"], "give NAME=VALUE"),
        (["run", "adaptors", "--set", "sede=1"], "there is no setting sede"),
        (["run", "adaptors", "--set", "batch_size=0"], "batch_size is 0"),
        (["run", "adaptors", "--set", "rename_kinds=true"], "three validation splits"),
        (["run", "adaptors", "--config", "nowhere.json"], "nowhere.json"),
        (["run", "adaptors", "--recipe", "x"], "choose from embedded, paper"),
        (["run", "adaptors", "--model", "runs/tiny/model"], "choose from tiny, base"),
        (["report", "--results", str(tmp_path)], "experiment.json"),
    ):
        assert main([*words, *(runs if words[0] == "run" else [])]) == 2
        assert message in capsys.readouterr().err


def test_help_imports_nothing_heavy_and_a_model_no_compiler():
    program = (
        "import sys, prismer.ablations.__main__; assert 'torch' not in sys.modules\n"
        "import prismer.model; assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
