"""The calls of a model that can run on several implementations, and their measurement: what `prismer tune` does.

The calls are recorded from one training step, one caption and one ranking, in each precision. Layers repeat, so a model
of two layers makes the same distinct calls as the whole one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from prismer.config import PrismerConfig
from prismer.costs.fake_step import blank_batch
from prismer.freezing import freeze
from prismer.generation import beam_search
from prismer.kernels import tuning
from prismer.kernels.tuning import Key
from prismer.kernels.tuning.measure import Measurement
from prismer.kernels.tuning.tables import Entry, Table, machine
from prismer.network import PrismerNetwork
from prismer.precision import NAMES, PRECISION, bf16_is_prior, caption_seconds, native_bf16_flags
from prismer.ranking import AnswerTrie, rank_answers

# tokens of a text in a step, of a question, and the size of the list of answers: those of the paper's tasks
_TEXT_TOKENS, _QUESTION_TOKENS, _ANSWERS, _ANSWER_TOKENS = 20, 12, 128, 4
_LAYERS = 2


def precisions(device: torch.device) -> tuple[torch.dtype, ...]:
    """The precisions that a model may run in on a device: fp32, and bf16 where it is not emulated."""
    native = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else bool(native_bf16_flags())
    return (torch.float32, torch.bfloat16) if native else (torch.float32,)


def record_calls(config: PrismerConfig, batch: int, device: torch.device) -> dict[Key, tuple[int, ...]]:
    """The distinct calls of a training step of `batch` images, and of one caption and one ranking of an image.

    Returns:
        The shape to measure, by key of the call (`prismer.kernels.tuning.Key`).
    """
    small = config.replace(
        vision_depth=min(config.vision_depth, _LAYERS),
        text_depth=min(config.text_depth, _LAYERS),
        resampler_depth=min(config.resampler_depth, _LAYERS),
    )
    found: dict[Key, tuple[int, ...]] = {}
    for dtype in precisions(device):
        torch.manual_seed(0)
        model = PrismerNetwork(small).to(device, dtype)
        with tuning.recording() as taken:
            _train_step(model, small, batch, device)
            _answer(model.eval(), small, device)
        found |= taken.to_measure(device.type)
    return found


def _train_step(model: PrismerNetwork, config: PrismerConfig, batch: int, device: torch.device) -> None:
    freeze(model, "freeze_lang_vision")
    model.train()
    model(blank_batch(config, batch, ((1, _TEXT_TOKENS),)).to(device)).backward()
    model.zero_grad()


@torch.inference_mode()
def _answer(model: PrismerNetwork, config: PrismerConfig, device: torch.device) -> None:
    images = blank_batch(config, 1, ((1, 2),)).images.to(device)
    context = model.encode(images)
    word = config.eos_id + 1
    found = images.detections
    prompt = [[[config.bos_id, word, word]]]
    beam_search(model.decoder, context, prompt, max_new_tokens=4, min_new_tokens=4, detections=found)
    answers = [[word + i, *[word] * (_ANSWER_TOKENS - 2), config.eos_id] for i in range(_ANSWERS)]
    trie = AnswerTrie([[min(t, config.vocab_size - 1) for t in answer] for answer in answers], config.eos_id)
    question = [[[config.bos_id] + [word] * _QUESTION_TOKENS]]
    rank_answers(model.decoder, context, question, trie, detections=found)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a measurement is.

    Attributes:
        done, total: calls that were looked at, and all of them.
        call: the last one, for people.
    """

    done: int
    total: int
    call: str


def measure_calls(
    config: PrismerConfig, *, batch: int, device: torch.device, seconds: float, before: Table | None = None
) -> Iterator[Progress | Table]:
    """Record a model's calls, measure them, and yield how far it is; the table comes last.

    Args:
        config: of the model.
        batch: images of a training step.
        device: where to measure.
        seconds: to spend on timing, about; slow calls may take longer.
        before: a table of this machine, whose other entries are kept.
    """
    calls = record_calls(config, batch, device)
    measurement = Measurement(device=device, seconds=seconds / max(1, len(calls)))
    for done, (key, _) in enumerate(measurement.run(calls), 1):
        yield Progress(done=done, total=len(calls), call=describe(key))
    entries = {entry.key: entry for entry in before.entries} if before else {}
    entries |= {entry.key: entry for entry in measurement.entries}
    if device.type == "cpu" and (precision := _precision(config)):
        entries[precision.key] = precision
    yield Table(machine=machine(device.type), entries=tuple(entries.values()))


def _precision(config: PrismerConfig) -> Entry | None:
    """The faster precision for inference; None without bf16 instructions."""
    if not native_bf16_flags():
        return None
    spent = {NAMES[dtype]: 1e6 * seconds for dtype, seconds in caption_seconds(config).items()}
    return Entry(
        op=PRECISION,
        dtype="bfloat16",
        gradient=False,
        shape=(config.vision_width, config.text_width),
        choice=min(spent, key=spent.__getitem__),
        prior="bf16" if bf16_is_prior() else "fp32",
        microseconds=spent,
    )


def describe(key: Key) -> str:
    """A call, for people: the op, what it computes in, and the class of its shape."""
    op, dtype, gradient, shape = key
    name = NAMES.get(dtype, str(dtype).removeprefix("torch."))
    return f"{op} {name} {'x'.join(map(str, shape))}{' with gradient' if gradient else ''}"
