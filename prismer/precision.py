"""The precision of training and inference: bf16 if the processor is at least as fast in it, else fp32.

Recent GPUs are at least as fast in bf16. A CPU without AVX512-BF16 or AMX emulates bf16, ten to a hundred times slower
than fp32, and one with these instructions may still be slower at small widths. So a CPU is measured: for training at
the start of a run, one layer of each kind forward and backward; for inference by `prismer tune`, the many rows of the
encoder and the few rows of the decoder. Loading a model measures nothing: the same machine gives the same answers.
"""

import copy
import itertools
import math
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from prismer.batch_norm import without_other_ranks
from prismer.config import PrismerConfig
from prismer.errors import InputError
from prismer.experts import EXPERTS, FEATURE_WIDTH
from prismer.kernels import matmul, tuning
from prismer.kernels.modules import ResamplerBlock
from prismer.kernels.tuning.tables import bf16_instructions, device_facts
from prismer.stems import ExpertStem
from prismer.text import DecoderLayer, causal_attend
from prismer.vision import VisionBlock

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# what the precision of inference is called in a table of measured choices
PRECISION = "inference"
# Narrower models answer in fp32 everywhere. Matrix products are not what takes their time: bf16 captions of the shipped
# tiny took 1.3 times as long on a CPU with AVX512-BF16. And so no measurement decides what they answer.
_MIN_WIDTH = 256

# the caption that stands for inference
_BEAMS, _STEPS = 3, 20
# weights that together exceed a processor's own caches
_COLD = 2**25
# from so many rows on, the time of a product is proportional to them
_ROWS = 128

# the training step that stands for all: at most so many images, tokens of a text, and pixels of a label map's side
_IMAGES, _TEXT, _PIXELS = 16, 32, 64
# bf16 is chosen for training if a step takes at most this share of its time in fp32: for less, fp32 is more exact
_GAIN = 0.95
# from this ratio of the times of one layer on, the other layers need not be measured
_CLEARLY = 4


def native_bf16_flags() -> set[str]:
    """The bf16 instructions that torch may use on this processor, as Linux names them; empty where it has none."""
    return bf16_instructions()


def step_seconds(config: PrismerConfig, seconds: float = 0.05) -> dict[torch.dtype, float]:
    """Seconds that one core takes in bf16 and fp32 for the layers of a training step, forward and backward, per image.

    One layer of each kind is measured as it trains by default, with its short operators: a block of the vision tower, a
    layer of the text tower, a block of the resampler and the stems. Images are many enough to keep a small model's
    layers busy; tokens and pixels are few enough to end within two seconds. The times are scaled to all layers, tokens
    and pixels.

    Args:
        seconds: processor time to spend on each kind of layer, beyond one run.
    """
    with torch.random.fork_rng(devices=[]):
        images, kinds = _layers_of_a_step(config)
    total = dict.fromkeys(NAMES, 0.0)
    for module, times, inputs in kinds:
        steps = {dtype: partial(_train_layer, *_in_dtype(module, inputs, dtype)) for dtype in NAMES}
        # in training rank 0 measures while the others wait
        with without_other_ranks():
            spent = _fastest(steps, seconds)
        for dtype in NAMES:
            total[dtype] += times * spent[dtype] / images
        if max(spent.values()) > _CLEARLY * min(spent.values()):
            # emulated bf16, with which the other layers would take seconds
            break
    return total


def _layers_of_a_step(config: PrismerConfig) -> tuple[int, list[tuple[nn.Module, float, tuple]]]:
    """The number of images; and a layer of each kind, how many of its runs a step consists of, and its inputs."""
    D, H = config.vision_width, config.text_width
    tokens, pixels = min(config.num_context_tokens, _ROWS), min(config.label_size, _PIXELS)
    # a large model is busy with one image
    images = max(1, min(_IMAGES, _ROWS * _MIN_WIDTH**2 // (tokens * D * D)))
    maps = torch.arange(images * pixels * pixels).remainder(256).to(torch.uint8).view(images, 1, pixels, pixels)
    rows, keep = torch.zeros(images, 256, dtype=torch.int64), torch.ones(images, _TEXT, dtype=torch.bool)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.linspace(-1, 1, math.prod(shape)).view(shape)

    block = VisionBlock(D, config.vision_heads, config.vision_activation)
    text = numbers(images, _TEXT, H), 0, causal_attend(keep), numbers(images, tokens, D)
    kinds: list[tuple[nn.Module, float, tuple]] = [
        (block, config.vision_depth * config.num_context_tokens / tokens, (numbers(images, tokens, D),)),
        (DecoderLayer(config), config.text_depth + 1, text),
    ]
    if config.experts:
        found = config.label_grid**2 * len(config.experts)
        given = min(found, _ROWS)
        pair = numbers(images, config.num_latents, D), numbers(images, given, D)
        kinds.append((ResamplerBlock(D, config.resampler_heads), config.resampler_depth * found / given, pair))
    for is_ids in (False, True):
        alike = [expert for expert in config.experts if EXPERTS[expert].is_ids == is_ids]
        if alike:
            label = maps.expand(-1, EXPERTS[alike[0]].planes, -1, -1)
            stem = ExpertStem(alike[0], D, config.patch_size, pixels)
            area = (config.label_size / pixels) ** 2
            kinds.append((stem, len(alike) * area, (label, rows, numbers(4, FEATURE_WIDTH))))
    return images, kinds


def _in_dtype(module: nn.Module, inputs: tuple, dtype: torch.dtype) -> tuple[nn.Module, list]:
    """A copy of `module` that trains in `dtype`, its inherited weights frozen, and the inputs in that dtype."""
    module = copy.deepcopy(module).to(dtype).train()
    for part in getattr(module, "pretrained", ()):
        part.requires_grad_(False)
    floats = [isinstance(x, torch.Tensor) and x.is_floating_point() for x in inputs]
    # the first input of a layer comes from a layer that trains
    return module, [x.to(dtype).requires_grad_() if is_float else x for x, is_float in zip(inputs, floats, strict=True)]


def _train_layer(module: nn.Module, inputs: list) -> None:
    module(*inputs).sum().backward()


def caption_seconds(config: PrismerConfig, seconds: float = 0.1) -> dict[torch.dtype, float]:
    """Seconds that one core takes in bf16 and fp32 for the matrix products of a caption.

    The MLP of one layer of each tower is measured, with as many rows as an image has tokens (at most 128) and as beam
    search has beams. The other products of a layer are estimated from it by their FLOPs. The decoder's weights are read
    from memory, as in a model of many layers, which is what its few rows wait for.

    Args:
        seconds: processor time to spend on each tower.
    """
    D, H, M = config.vision_width, config.text_width, config.text_mlp_width
    tokens = config.num_context_tokens
    rows = min(tokens, _ROWS)
    # FLOPs of a layer over those of its MLP: attention and adaptor; in text, cross-attention's queries and output, too
    encode = config.vision_depth * (tokens / rows) * (14 / 8)
    decode = _STEPS * (config.text_depth + 1) * (1 + 8 * H / (2 * M))
    total = dict.fromkeys(NAMES, 0.0)
    with torch.inference_mode():
        for count, width, hidden, times in ((rows, D, 4 * D, encode), (_BEAMS, H, M, decode)):
            layers = 1 if count == rows else max(1, _COLD // (2 * width * hidden))
            shapes = ((count, width), (layers, hidden, width), (layers, width, hidden))
            draws = [torch.full(shape, 0.1) for shape in shapes]
            calls = itertools.count()

            def step(
                x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, calls: Iterator[int] = calls
            ) -> torch.Tensor:
                layer = next(calls) % len(up)
                return matmul.linear(F.gelu(matmul.linear(x, up[layer])), down[layer])

            steps = {dtype: partial(step, *(draw.to(dtype) for draw in draws)) for dtype in NAMES}
            for dtype, spent in _fastest(steps, seconds).items():
                total[dtype] += times * spent
    return total


def _fastest(steps: dict[torch.dtype, Callable[[], object]], seconds: float) -> dict[torch.dtype, float]:
    """Processor seconds of the fastest run of each step on one core; the steps take turns for `seconds`."""

    def spent(step: Callable[[], object]) -> float:
        # this thread's own time: a wall clock would include what else the machine does
        start = time.thread_time()
        step()
        return time.thread_time() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = {dtype: spent(step) for dtype, step in steps.items()}
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            best = {dtype: min(best[dtype], spent(step)) for dtype, step in steps.items()}
    finally:
        torch.set_num_threads(threads)
    return best


def choose_precision(wanted: str, config: PrismerConfig, device: torch.device) -> tuple[str, str]:
    """Choose the precision of a training run.

    Args:
        wanted: "bf16" or "fp32" to force it, "auto" to measure.
        config: of the model; layers of its sizes are measured on a CPU that has bf16 instructions.
        device: where the run computes.

    Returns:
        "bf16" or "fp32", and one line that says why.

    Raises:
        ValueError: if bf16 is forced on a GPU without bf16 arithmetic.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        native = _gpu_multiplies_bf16()
        if wanted == "bf16" and not native:
            raise InputError(f"{name} has no bf16 arithmetic; set precision to auto or fp32")
        if wanted != "auto":
            return wanted, f"precision: {wanted}, as asked, on {name}"
        if native:
            return "bf16", f"precision: bf16 on {name}"
        return "fp32", f"precision: fp32, since {name} has no bf16 arithmetic"
    if wanted != "auto":
        return wanted, f"precision: {wanted}, as asked"
    cpu, flags = f"this {platform.machine()} CPU", ", ".join(sorted(native_bf16_flags()))
    if not flags:
        return "fp32", f"precision: fp32, since {cpu} has no bf16 instructions"
    spent = step_seconds(config)
    bf16, fp32 = spent[torch.bfloat16], spent[torch.float32]
    chosen = "bf16" if bf16 <= _GAIN * fp32 else "fp32"
    return chosen, (
        f"precision: {chosen}, since the layers of a training step take one core of {cpu} ({flags}) "
        f"{bf16:.2g} s an image in bf16 and {fp32:.2g} s in fp32"
    )


def slow_resumption(precision: str, config: PrismerConfig, device: torch.device) -> str | None:
    """One line about a run that was started in bf16 and is resumed where fp32 is faster; None for any other run.

    Args:
        precision: that of the run's start.
        config, device: as in `choose_precision`.
    """
    if precision != "bf16":
        return None
    chosen, why = choose_precision("auto", config, device)
    if chosen == "bf16":
        return None
    return (
        f"the run stays in bf16, as it was started, but here fp32 is faster ({why.partition('since ')[2]}); "
        f"to train on in fp32, export it and start another run from that model"
    )


def inference_dtype(
    wanted: torch.dtype | str | None, stored: torch.dtype, config: PrismerConfig, device: torch.device
) -> tuple[torch.dtype, str | None]:
    """Choose the dtype that a loaded model computes in.

    Args:
        wanted: a dtype forces it; "auto" takes the faster of bf16 and fp32; None takes the stored one, unless that is
            bf16 and the device is faster in fp32.
        stored: dtype of the weights on disk.
        config: of the model; products of its sizes are measured on a CPU that has bf16 instructions.
        device: where the model computes.

    Returns:
        The dtype; and one line that says why, if it was chosen here and is not the stored one.

    Raises:
        ValueError: if `wanted` is another string.
    """
    if isinstance(wanted, str) and wanted != "auto":
        raise InputError(f'unknown dtype {wanted!r}; give "auto" or a torch.dtype')
    if isinstance(wanted, torch.dtype):
        return wanted, None
    if wanted is None and stored != torch.bfloat16:
        return stored, None
    chosen, why = _faster_in(config, device)
    if chosen == stored:
        return chosen, None
    names = {**NAMES, torch.float16: "fp16", torch.float64: "fp64"}
    return chosen, f"precision: {names[chosen]} instead of the stored {names[stored]}, since {why}"


def _gpu_multiplies_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def bf16_is_prior() -> bool:
    """Does a processor of this kind usually answer faster in bf16?

    It does with AMX, on Arm, and on AMD with AVX512-BF16. Intel's processors issue AVX512-BF16 at half of the rate of
    fp32 products: on a Xeon without AMX, encoding BASE at 480 px took 1.67 s in bf16 and 0.96 in fp32.
    """
    flags = native_bf16_flags()
    on_amd = device_facts("cpu")["device"].startswith("AuthenticAMD")
    return bool(flags & {"amx_bf16", "bf16", "svebf16"}) or (on_amd and "avx512_bf16" in flags)


def _faster_in(config: PrismerConfig, device: torch.device) -> tuple[torch.dtype, str]:
    """The faster of bf16 and fp32, and why."""
    width = max(config.vision_width, config.text_width)
    if width < _MIN_WIDTH:
        return torch.float32, f"a model of width {width} gains nothing from bf16"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if _gpu_multiplies_bf16():
            return torch.bfloat16, f"{name} multiplies bf16 faster"
        return torch.float32, f"{name} has no bf16 arithmetic"
    flags = ", ".join(sorted(native_bf16_flags()))
    cpu = f"this {platform.machine()} CPU"
    if not flags:
        return torch.float32, f"{cpu} has no bf16 instructions"
    key = PRECISION, torch.bfloat16, False, (config.vision_width, config.text_width)
    measured = tuning.choice("cpu", key)
    if measured is None:
        chosen = torch.bfloat16 if bf16_is_prior() else torch.float32
        return chosen, f"{NAMES[chosen]} is the usual choice for {cpu} ({flags}); prismer tune measures it"
    return {name: dtype for dtype, name in NAMES.items()}[measured], f"it was measured as faster on {cpu}"
