"""The whole model: against its definitions, without host syncs, beam steps captured, jobs against plain PyTorch."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prismer import capture
from prismer.batch import IGNORE_INDEX, Batch, ImageBatch, TextBatch
from prismer.config import PrismerConfig, preset, prismer_tiny
from prismer.experts import BACKGROUND, EXPERTS, FEATURE_WIDTH
from prismer.freezing import freeze
from prismer.generation import BeamSearch, BeamState, Memory, beam_search, read_prompts
from prismer.kernels.dispatch import use_backend
from prismer.text import TextDecoder
from prismer.vision import VisionEncoder
from scripts.gpu_stages.calls import BEAMS, NEW_TOKENS, PROMPT, TEXT_TOKENS
from scripts.gpu_stages.device import captured, measure, no_syncs, wait_for

if TYPE_CHECKING:
    from scripts.gpu_check import Context


class Network(nn.Module):
    """Encoder and decoder alone: `prismer.network` also needs the package `tokenizers`."""

    def __init__(self, config: PrismerConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = VisionEncoder(config), TextDecoder(config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.positional_embedding.device

    def forward(self, batch: Batch) -> Tensor:
        """The training loss."""
        return self.decoder(batch.texts, self.encoder(batch.images))


def build(name: str, side: int, context: "Context", dtype: torch.dtype) -> Network:
    """A model with random weights and without dropout; quick runs get two layers of the tiny one."""
    torch.manual_seed(0)
    if context.quick:
        config = prismer_tiny(
            image_size=32, label_size=32, vision_depth=2, text_depth=2, resampler_depth=1, vocab_size=101, dropout=0.0
        )
    else:
        config = preset(name, image_size=side, dropout=0.0)
    with torch.device(context.device):
        return Network(config).to(dtype)


def draw_batch(config: PrismerConfig, count: int, device: str) -> Batch:
    """Noise for images, patches of ids, and captions of 20 tokens."""
    draw, labels, rows, side = torch.Generator().manual_seed(1), {}, {}, config.label_size
    for name in config.experts:
        shape = (count, EXPERTS[name].planes, side, side)
        labels[name] = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
        if EXPERTS[name].is_ids:
            patches = torch.randint(0, 7, (count, 1, side // 8, side // 8), generator=draw, dtype=torch.uint8)
            patches[patches == 6] = BACKGROUND
            labels[name] = patches.repeat_interleave(8, 2).repeat_interleave(8, 3)
            rows[name] = torch.randint(1, 300, (count, 256), generator=draw)
    images = ImageBatch(
        rgb=torch.randint(0, 256, (count, 3, config.image_size, config.image_size), generator=draw, dtype=torch.uint8),
        labels=labels,
        rows=rows,
        features=torch.randn(300, FEATURE_WIDTH, generator=draw),
        instance_rows=torch.randint(0, config.num_instances, (256,), generator=draw),
    )
    ids = torch.randint(5, config.vocab_size, (count, 1, TEXT_TOKENS), generator=draw)
    ids[..., 0], ids[..., -1] = config.bos_id, config.eos_id
    targets = ids.clone()
    targets[..., :PROMPT] = IGNORE_INDEX
    texts = TextBatch(ids=ids, labels=targets, weights=torch.ones(count, 1), lengths=(TEXT_TOKENS,))
    return Batch(images=images, texts=texts, keys=[], meta=[]).to(device)


def _step(model: Callable[[Batch], Tensor], weights: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    def run() -> Tensor:
        weights.zero_grad(set_to_none=True)
        loss = model(batch)
        loss.backward()
        return loss.detach()

    return run


def compare(context: "Context") -> Iterator[dict]:
    """Loss, tokens and gradients of the default choice against `reference`, whose own error float64 tells in small."""
    for dtype in (torch.float32,) if context.quick else (torch.float32, torch.bfloat16):
        model = build("base", 224, context, dtype)
        freeze(model, "freeze_vision")
        batch = draw_batch(model.config, 2, context.device)
        found = {}
        # None takes what would run; the definitions in the same dtype round at the same places or fewer
        for backend in (None, "torch", "reference"):
            with use_backend(backend):
                loss = _step(model, model, batch)()
                tokens = model.encoder(batch.images).detach()
            grads = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
            found[backend] = loss.double(), tokens.double(), grads
        allowed = 1e-3 if dtype == torch.float32 else 5e-2
        for backend in (None, "torch"):
            off = {
                "loss": _distance([found[backend][0]], [found["reference"][0]]),
                "tokens": _distance([found[backend][1]], [found["reference"][1]]),
                # together: the gradient of a key's bias is nothing but rounding
                "gradients": _distance(found[backend][2].values(), found["reference"][2].values()),
            }
            yield dict(
                kind="check",
                what=f"the model on {backend or 'the default choice'} against the definitions",
                dtype=str(dtype).removeprefix("torch."),
                ok=all(value <= allowed for value in off.values()),
                allowed=allowed,
                off={key: float(f"{value:.3g}") for key, value in off.items()},
            )


def _distance(ours, theirs) -> float:
    """The norm of the difference of lists of tensors, relative to the norm of the second."""
    pairs = list(zip(ours, theirs, strict=True))
    error, size = (
        sum(t.square().sum().item() for t in tensors) ** 0.5
        for tensors in ((a - b for a, b in pairs), (b for _, b in pairs))
    )
    return error / size if size else error


Search = tuple[BeamSearch, Memory, BeamState]


def _context(model: Network, batch: int, context: "Context") -> tuple[Tensor, list[list[list[int]]]]:
    """Random image tokens, and a prompt for each image."""
    tokens, width = 7 if context.quick else 964, model.encoder.positional_embedding.shape[1]
    image = torch.randn(batch, tokens, width, device=context.device).to(model.decoder.head_weight.dtype)
    return image, [[[model.config.bos_id, *range(5, 4 + PROMPT)]]] * batch


@torch.inference_mode()
def _search(model: Network, batch: int, context: "Context") -> Search:
    """A search of captions after its first token."""
    image, groups = _context(model, batch, context)
    cross = model.decoder.project_context(image)
    prompts = read_prompts(model.decoder, cross, groups, "last", NEW_TOKENS)
    counts = dict(beams=BEAMS, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    search = BeamSearch(model.decoder, **counts, length_penalty=1.0, classic=True)
    memory = search.remember(cross, prompts)
    return search, memory, search.start(memory)


def forbid_syncs(context: "Context") -> Iterator[dict]:
    """A forward pass, a training step and a beam step under `set_sync_debug_mode("error")`, each after a first call."""
    dtype = torch.float32 if context.quick else torch.bfloat16
    model = build("base", 224, context, dtype)
    batch = draw_batch(model.config, 2, context.device)

    def encode() -> None:
        with torch.inference_mode():
            model.encoder(batch.images)

    model.eval()
    yield _without_syncs("encoding images", encode, context)
    found = _search(model, 2, context)
    yield _without_syncs("a beam step", lambda: _beam_step(found), context)
    model.train()
    freeze(model, "freeze_vision")
    yield _without_syncs("a training step", _step(model, model, batch), context)


@torch.inference_mode()
def _beam_step(found: Search) -> BeamState:
    search, memory, state = found
    return search(memory, state)


def _without_syncs(what: str, call: Callable[[], object], context: "Context") -> dict:
    call()
    wait_for(context.device)
    try:
        with no_syncs(context.device):
            call()
        error = None
    except RuntimeError as found:
        error = str(found)[:500]
    return dict(kind="check", what=f"no host sync in {what}", ok=error is None, error=error)


def time_beam_step(context: "Context") -> Iterator[dict]:
    """A step of three beams as a graph against a call, and whole searches: operator by operator, and as they run."""
    model = build("base", 480, context, torch.float32 if context.quick else torch.bfloat16).eval()
    for batch in (1,) if context.quick else (1, 8):
        yield from _time_beams(model, batch, context)


def _time_beams(model: Network, batch: int, context: "Context") -> Iterator[dict]:
    found = _search(model, batch, context)

    def step() -> BeamState:
        return _beam_step(found)

    yield _job("beam step", batch, "a call", measure(step, context.device, context.quick))
    expected = step()
    replay, result = captured(step, context.device)
    replay()
    wait_for(context.device)
    same = all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))
    yield dict(kind="check", what="a captured beam step gives the result of a call", batch=batch, ok=same)

    image, groups = _context(model, batch, context)
    counts = dict(beams=BEAMS, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    texts = {}
    for contender, way in (("operator by operator", capture.eager), ("as it runs", nullcontext)):
        times = []
        # shapes are recorded when they come for the second time
        for _ in range(3 if context.quick else 8):
            wait_for(context.device)
            start = time.perf_counter()
            with way():
                texts[contender] = beam_search(model.decoder, image, groups, **counts).tokens
            times.append(time.perf_counter() - start)
        yield _job("search of 16 tokens", batch, contender, dict(host_us=1e6 * statistics.median(times[2:])))
    same = len({str(tokens) for tokens in texts.values()}) == 1
    yield dict(kind="check", what="a recorded search writes the words of an eager one", batch=batch, ok=same)


def _job(job: str, batch: int, contender: str, timed: dict) -> dict:
    return dict(kind="job", job=job, model="base", batch=batch, contender=contender) | timed


def time_jobs(context: "Context") -> Iterator[dict]:
    """Encoding and training steps of BASE and LARGE: the default choice, `torch` for every op, the published way."""
    end = time.monotonic() + 0.9 * context.seconds
    dtype = torch.float32 if context.quick else torch.bfloat16
    jobs = [("base", 480, "encode", 1)] if context.quick else _JOBS
    for name, side, job, count in [*jobs, *([("base", 224, "step", 2)] if context.quick else [])]:
        if time.monotonic() > end:
            yield dict(kind="note", note=f"{name} {side} {job} {count} was not timed: the budget was spent")
            continue
        model = build(name, side, context, dtype)
        batch = draw_batch(model.config, count, context.device)
        for contender, call in _contenders(model, batch, job, context).items():
            described = dict(kind="job", job=job, model=name, side=side, batch=count, contender=contender)
            try:
                yield described | measure(call, context.device, context.quick)
            except torch.OutOfMemoryError as error:
                yield described | dict(refused=str(error).splitlines()[0][:200])
            wait_for(context.device)
        del model, batch


_JOBS = [
    (name, side, job, count)
    for name in ("base", "large")
    for side, job, count in ((480, "encode", 1), (480, "encode", 8), (224, "step", 8), (480, "step", 4))
]


def _contenders(model: Network, batch: Batch, job: str, context: "Context") -> dict[str, Callable[[], object]]:
    def ours(backend: str | None) -> Callable[[], object]:
        step = _step(model, model, batch)

        def run() -> object:
            with use_backend(backend), nullcontext() if job == "step" else torch.inference_mode():
                return step() if job == "step" else model.encoder(batch.images)

        return run

    model.train(job == "step")
    freeze(model, "freeze_vision")
    found = dict(ours=ours(None), torch=ours("torch"))
    try:
        from benchmarks.baseline import Baseline, expand_images
    # it needs torchvision, Pillow and tokenizers
    except ImportError:
        return found
    plain = Network(model.config).to(context.device).train(job == "step")
    plain.load_state_dict(model.state_dict())
    freeze(plain, "freeze_vision")
    baseline = Baseline(plain, None if context.quick else torch.bfloat16)
    images = expand_images(batch.images.to("cpu"))
    moved = type(images)(
        rgb=images.rgb.to(context.device),
        labels={name: label.to(context.device) for name, label in images.labels.items()},
        instances=None if images.instances is None else images.instances.to(context.device),
        instance_rows=images.instance_rows,
    )
    expanded = Batch(images=moved, texts=batch.texts, keys=[], meta=[])
    step = _step(baseline.loss, plain, expanded)

    def published() -> object:
        with nullcontext() if job == "step" else torch.inference_mode():
            return step() if job == "step" else baseline.encode(moved)

    return found | dict(published=published)
