"""The whole jobs that test_jobs.py measures: ours against the released way of computing (baseline.py).

Everything is synthetic and deterministic: random weights, noise instead of images, patches of ids instead of label
maps, and answers made of word lists (word_lists.py).

The baseline gets labels that are expanded already, as if its loader were fast enough; their expansion is measured as a
job of its own. The dropout rate is so low that nothing is dropped: all operators of training run, and the results of
the contenders can be compared.

With `compiled=True` a job has one more contender: the same model through torch.compile. A step is compiled whole, of
captions and rankings the encoder.
"""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baseline import Baseline, HostImages, expand_images
from benchmarks.harness import DEVICE, OURS
from benchmarks.job_runner import Job
from benchmarks.word_lists import ANSWERS, CAPTIONS, CLASSES, QUESTIONS
from prismer.batch import Batch, ImageBatch, TextBatch
from prismer.config import PrismerConfig
from prismer.experts import BACKGROUND, EXPERTS, FEATURE_WIDTH
from prismer.freezing import freeze
from prismer.inference import Candidates
from prismer.kernels.label_map import label_map
from prismer.model import Prismer
from prismer.ranking import AnswerTrie, rank_answers
from prismer.stems import normalise_low_level
from prismer.texts import collate, encode_caption, encode_prompt, encode_question
from prismer.tokenizer import Tokenizer

BASELINE = "baseline"
COMPILED = "compile"
# torch.compile's default; the tests of this file take a faster one
COMPILER = "inductor"
# what a user would compute in: fp32 on a CPU, bf16 on a GPU; --dtype sets another. The baseline runs in fp32, or else
# under autocast
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
# errors that the results of a whole job may have, relative to the norm of the baseline's: of losses, tokens and scores,
# and of all gradients together
_ERRORS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (5e-2, 2e-1)}
NEVER_DROPS = 1e-12
MATRIX_SIDE = 2048
CLASS_PREFIX = "A photo of a"


# inputs


@functools.lru_cache(maxsize=1)
def build(config: PrismerConfig, tokenizer: Tokenizer | None = None) -> Prismer:
    """A model with random weights and the given tokenizer, by default RoBERTa's."""
    torch.manual_seed(0)
    # made where it runs: a GPU draws a billion weights in no time
    with DEVICE:
        return Prismer(config.replace(dropout=NEVER_DROPS), tokenizer or Tokenizer.roberta()).to(DTYPE)


def released(model: Prismer) -> Baseline:
    """The baseline on the weights of a model; if they are not fp32, on an fp32 copy, with products in their dtype."""
    dtype = model.encoder.positional_embedding.dtype
    if dtype == torch.float32:
        return Baseline(model)
    return Baseline(copy.deepcopy(model).float(), autocast=dtype)


def draw_images(config: PrismerConfig, count: int, seed: int = 1) -> ImageBatch:
    """Noise for images and intensity maps; patches of six ids and background for id maps, different in each image."""
    g = torch.Generator().manual_seed(seed)
    labels, rows, side = {}, {}, config.label_size
    for name in config.experts:
        expert = EXPERTS[name]
        if not expert.is_ids:
            shape = (count, expert.planes, side, side)
            labels[name] = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
            continue
        patches = torch.randint(0, 7, (count, 1, 8, 8), generator=g, dtype=torch.uint8)
        patches[patches == 6] = BACKGROUND
        labels[name] = F.interpolate(patches, size=(side, side), mode="nearest")
        rows[name] = torch.randint(1, 300, (count, 256), generator=g)
        rows[name][:, BACKGROUND] = 0
    size = config.image_size
    return ImageBatch(
        rgb=torch.randint(0, 256, (count, 3, size, size), generator=g, dtype=torch.uint8),
        labels=labels,
        rows=rows,
        features=torch.randn(300, FEATURE_WIDTH, generator=g),
        instance_rows=torch.randint(0, config.num_instances, (256,), generator=g),
    ).to(DEVICE)


def repeat_image(images: ImageBatch, times: int) -> ImageBatch:
    """Repeat a batch of one image `times` times."""
    return dataclasses.replace(
        images,
        rgb=images.rgb.repeat(times, 1, 1, 1),
        labels={name: map_.repeat(times, 1, 1, 1) for name, map_ in images.labels.items()},
        rows={name: table.repeat(times, 1) for name, table in images.rows.items()},
    )


def expanded(images: ImageBatch) -> HostImages:
    """The expanded images that the released loader would produce, on the device."""
    host = expand_images(images.to("cpu"))
    return HostImages(
        rgb=host.rgb.to(DEVICE),
        labels={name: label.to(DEVICE) for name, label in host.labels.items()},
        instances=None if host.instances is None else host.instances.to(DEVICE),
        instance_rows=host.instance_rows,
    )


def through_compile(model: Prismer) -> Prismer:
    """The same model, which encodes and computes its loss through torch.compile."""
    torch.compiler.reset()
    other = copy.copy(model)
    other.encode = torch.compile(model.encode, backend=COMPILER)
    other.loss = torch.compile(model.forward, backend=COMPILER)
    return other


def compiled_now(call: Callable[[], object]) -> Callable[[], object]:
    """`call`, which has run once: nothing is compiled under the dispatch mode of a counter."""
    call()
    return call


# what is compared


def assert_close(name: str, ours: Tensor, theirs: Tensor, relative: float | None = None) -> None:
    """Compare by the norm of the difference, relative to the norm of `theirs`."""
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} and {tuple(theirs.shape)}"
    relative = _ERRORS[DTYPE][0] if relative is None else relative
    error = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
    assert error <= relative, f"{name} is off by {error:.1e}, allowed are {relative:.1e}: not timed"


def _check_scores(outcomes: dict[str, object]) -> None:
    """Each contender must give the baseline's candidates and scores; some contenders rank more candidates."""
    candidates, scores = outcomes[BASELINE]
    if DTYPE != torch.float32:
        # random weights leave answers nearly tied, and bf16 ranks them in another order
        assert all(values.isfinite().all() for _, values in outcomes.values()), "scores are not finite: not timed"
        return
    for name, (own, values) in outcomes.items():
        if own.shape[1] > candidates.shape[1]:
            # this contender scored the whole list, in its order
            own, values = candidates, values.gather(1, candidates)
        assert torch.equal(own, candidates), f"{name} picks other candidates than the baseline: not timed"
        assert_close(f"scores of {name}", values, scores)


def _check_tokens(outcomes: dict[str, object]) -> None:
    for name in (OURS, COMPILED):
        if name in outcomes:
            assert_close(f"tokens of {name}", outcomes[name], outcomes[BASELINE])


def _check_steps(outcomes: dict[str, object]) -> None:
    loss, gradients = outcomes[BASELINE]
    for name, (own_loss, own) in outcomes.items():
        assert_close(f"loss of {name}", own_loss, loss)
        assert own.keys() == gradients.keys(), f"{name} trains other parameters than the baseline: not timed"
        # the norm over all parameters together: a key's bias alone has a gradient of nothing but rounding
        error, size = (
            sum(t.square().sum().item() for t in tensors) ** 0.5
            for tensors in ((own[k] - gradients[k] for k in own), gradients.values())
        )
        assert error <= _ERRORS[DTYPE][1] * size, f"gradients of {name} are off by {error / size:.1e}: not timed"


# inference


def caption_job(
    model: Prismer, shape: str, batch: int = 1, beams: int = 3, length: int = 20, compiled: bool = False
) -> Job:
    """Captions of exactly `length` tokens, so that the work does not depend on what a random model writes."""
    model.eval()
    images = draw_images(model.config, batch)
    options = dict(beams=beams, max_length=length, min_length=length)
    baseline, host = released(model), expanded(images)

    def check(outcomes: dict[str, object]) -> None:
        theirs = outcomes[BASELINE]
        for name, ours in outcomes.items():
            # of nearly tied words bf16 may write another one
            same = ours == theirs if DTYPE == torch.float32 else len(ours) == len(theirs)
            assert same, f"captions of {name} differ, {ours[0]!r} and {theirs[0]!r} are the first: not timed"

    calls: dict[str, Callable] = {OURS: lambda: model.caption(images, **options)}
    if compiled:
        other = through_compile(model)
        calls[COMPILED] = compiled_now(lambda: other.caption(images, **options))
    calls[BASELINE] = lambda: baseline.caption(host, **options)
    return Job(room="caption", shape=f"{shape} batch {batch}", dtype=DTYPE, calls=calls, check=check)


def rank_job(
    model: Prismer,
    shape: str,
    top_k: int,
    questions: int = 1,
    whole_list: bool = False,
    answers: list[str] = ANSWERS,
    compiled: bool = False,
) -> Job:
    """Answers to questions about one image, which ours encodes once; `whole_list` adds a ranking of every answer."""
    model.eval()
    tokenizer, images, asked = model.tokenizer, draw_images(model.config, 1), QUESTIONS[:questions]
    copies = repeat_image(images, questions)
    baseline, host = released(model), expanded(copies)
    trie = Candidates.answers(tokenizer, answers).trie
    group = [encode_question(tokenizer, question) for question in asked]

    def rank(images: ImageBatch, groups: list, k: int | None, by: Prismer = model) -> tuple[Tensor, Tensor]:
        return _rank(by, images, groups, trie, k, "batch")

    calls: dict[str, Callable] = {OURS: lambda: rank(images, [group], top_k)}
    if questions > 1:
        calls["ours ungrouped"] = lambda: rank(copies, [[prompt] for prompt in group], top_k)
    if whole_list:
        calls["ours, whole list"] = lambda: rank(images, [group], None)
    if compiled:
        other = through_compile(model)
        calls[COMPILED] = compiled_now(lambda: rank(images, [group], top_k, other))
    calls[BASELINE] = lambda: baseline.rank(host, asked, answers, top_k)
    return Job(
        room="answer",
        shape=f"{shape} k={top_k}" + (f", {questions} questions" if questions > 1 else ""),
        dtype=DTYPE,
        calls=calls,
        check=_check_scores,
    )


def classify_job(
    model: Prismer, shape: str, top_k: int = 32, classes: list[str] = CLASSES, compiled: bool = False
) -> Job:
    """The class of one image."""
    model.eval()
    tokenizer, images = model.tokenizer, draw_images(model.config, 1)
    baseline, host = released(model), expanded(images)
    trie = Candidates.classes(tokenizer, classes).trie
    groups = [[encode_prompt(tokenizer, CLASS_PREFIX)]]
    calls: dict[str, Callable] = {
        OURS: lambda: _rank(model, images, groups, trie, top_k, "last"),
        "ours, whole list": lambda: _rank(model, images, groups, trie, None, "last"),
    }
    if compiled:
        other = through_compile(model)
        calls[COMPILED] = compiled_now(lambda: _rank(other, images, groups, trie, top_k, "last"))
    calls[BASELINE] = lambda: baseline.classify(host, classes, top_k, CLASS_PREFIX)
    shape = f"{shape} k={top_k} of {len(classes)}"
    return Job(room="classify", shape=shape, dtype=DTYPE, calls=calls, check=_check_scores)


def _rank(
    model: Prismer, images: ImageBatch, groups: list, trie: AnswerTrie, top_k: int | None, read_out: str
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        ranking = rank_answers(model.decoder, model.encode(images), groups, trie, top_k=top_k, read_out=read_out)
    if top_k is None:
        # the scores must be in the order of the list
        assert torch.equal(ranking.candidates[0].cpu(), torch.arange(len(trie)))
    return ranking.candidates, ranking.scores


def encoder_job(model: Prismer, shape: str, compiled: bool = False) -> Job:
    """Encode one image, beside a plain matrix product that shows what the machine can do."""
    model.eval()
    images = draw_images(model.config, 1)
    baseline, host = released(model), expanded(images)
    a, b = (torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=DEVICE, dtype=DTYPE) for _ in range(2))

    @torch.inference_mode()
    def encode(by: Prismer = model) -> Tensor:
        return by.encode(images)

    @torch.inference_mode()
    def encode_baseline() -> Tensor:
        return baseline.encode(host)

    calls: dict[str, Callable] = {OURS: encode}
    if compiled:
        calls[COMPILED] = compiled_now(functools.partial(encode, through_compile(model)))
    calls |= {BASELINE: encode_baseline, f"mm {MATRIX_SIDE}": lambda: torch.mm(a, b)}
    return Job(room="encoder", shape=f"{shape} batch 1", dtype=DTYPE, calls=calls, check=_check_tokens)


def labels_job(config: PrismerConfig, shape: str, batch: int = 4) -> Job:
    """Turn stored label maps into the input of each stem's first convolution."""
    images = draw_images(config, batch)
    sides = {
        name: config.label_size * (4 if EXPERTS[name].is_ids else 16) // config.patch_size for name in config.experts
    }

    def resize(x: Tensor, side: int) -> Tensor:
        return x if x.shape[-1] == side else F.interpolate(x, size=(side, side), mode="bilinear", align_corners=True)

    def ours() -> list[Tensor]:
        return [
            label_map(images.labels[name][:, 0], images.rows[name], images.features, side)
            if EXPERTS[name].is_ids
            else resize(normalise_low_level(images.labels[name], torch.float32), side)
            for name, side in sides.items()
        ]

    on_host = images.to("cpu")

    def baseline() -> list[Tensor]:
        host = expand_images(on_host)
        return [resize(host.labels[name].to(DEVICE), side) for name, side in sides.items()]

    def check(outcomes: dict[str, object]) -> None:
        for name, own, theirs in zip(sides, outcomes[OURS], outcomes[BASELINE], strict=True):
            assert_close(name, own, theirs)

    return Job(
        room="labels",
        shape=f"{shape} batch {batch}",
        part="labels",
        calls={OURS: ours, BASELINE: baseline},
        check=check,
    )


# training


def caption_batch(model: Prismer, images: ImageBatch, texts: int, prefix: str) -> Batch:
    """`texts` different captions for each image."""
    captions = itertools.cycle(CAPTIONS)
    limit = model.config.max_positions
    groups = [
        [(*encode_caption(model.tokenizer, next(captions), prefix, limit), 1.0) for _ in range(texts)]
        for _ in range(len(images))
    ]
    return Batch(images=images, texts=collate(groups).to(DEVICE), keys=[], meta=[])


def step_job(
    model: Prismer,
    shape: str,
    mode: str,
    batch: int,
    texts: int = 1,
    prefix: str = "A picture of",
    compiled: bool = False,
) -> Job:
    """Forward and backward; with several texts of one image, also ours with a copy of the image for each text."""
    model.train()
    freeze(model, mode)
    grouped = caption_batch(model, draw_images(model.config, batch), texts, prefix)
    pairs = grouped
    if texts > 1:
        assert batch == 1, "several texts are measured on one image"
        t = grouped.texts
        one_each = TextBatch(ids=t.ids.transpose(0, 1), labels=t.labels.transpose(0, 1), weights=t.weights.mT)
        pairs = dataclasses.replace(grouped, images=repeat_image(grouped.images, texts), texts=one_each)
    baseline = released(model)
    host = dataclasses.replace(pairs, images=expanded(pairs.images))

    def step(loss_of: Callable[[Batch], Tensor], batch: Batch) -> Callable[[], Tensor]:
        def run() -> Tensor:
            loss = loss_of(batch)
            loss.backward()
            return loss.detach()

        return run

    calls = {OURS: step(model, grouped)}
    if texts > 1:
        calls["ours ungrouped"] = step(model, pairs)
    if compiled:
        calls[COMPILED] = compiled_now(step(through_compile(model).loss, grouped))
        model.zero_grad(set_to_none=True)
    calls[BASELINE] = step(baseline.loss, host)

    def outcome(loss: object) -> tuple[object, dict[str, Tensor]]:
        # those of the model or of the baseline's copy: whoever ran last
        named = (*model.named_parameters(), *baseline.model.named_parameters())
        return loss, {name: p.grad for name, p in named if p.grad is not None}

    def reset() -> None:
        for owner in (model, baseline.model):
            owner.zero_grad(set_to_none=True)

    return Job(
        room="train",
        shape=f"{shape} {mode} batch {batch}" + (f" x {texts}" if texts > 1 else ""),
        part="step",
        dtype=DTYPE,
        calls=calls,
        check=_check_steps,
        reset=reset,
        outcome=outcome,
    )
