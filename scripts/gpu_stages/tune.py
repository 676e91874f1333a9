"""The measured choices for this device: what `kernels/tuned/<device>.json` is made from.

`prismer tune` does the same for one model, where the whole package is installed.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from prismer.freezing import freeze
from prismer.generation import beam_search
from prismer.kernels import tuning
from prismer.kernels.tuning.measure import Measurement
from prismer.kernels.tuning.tables import Entry, Table, machine, slug
from prismer.ranking import AnswerTrie, rank_answers
from scripts.gpu_stages.calls import NEW_TOKENS, PROMPT
from scripts.gpu_stages.models import Network, build, draw_batch

if TYPE_CHECKING:
    from scripts.gpu_check import Context

_MODELS = (("base", 480, 8), ("base", 224, 32), ("large", 480, 4))
_ANSWERS, _ANSWER_TOKENS = 128, 4


def _record(model: Network, images: int, device: str) -> dict[tuning.Key, tuple[int, ...]]:
    """The distinct calls of a training step, of captions and of rankings, and the shape to measure for each."""
    config = model.config
    word = config.eos_id + 1
    with tuning.recording() as taken:
        freeze(model, "freeze_lang_vision")
        model(draw_batch(config, images, device)).backward()
        model.zero_grad()
        model.eval()
        with torch.inference_mode():
            context = model.encoder(draw_batch(config, 1, device).images)
            prompt = [[[config.bos_id] + [word] * (PROMPT - 1)]]
            beam_search(model.decoder, context, prompt, max_new_tokens=NEW_TOKENS)
            words = (5 + torch.arange(_ANSWERS * (_ANSWER_TOKENS - 1)) % (config.vocab_size - 5)).view(_ANSWERS, -1)
            trie = AnswerTrie([[*answer, config.eos_id] for answer in words.tolist()], config.eos_id)
            rank_answers(model.decoder, context, prompt, trie)
    return taken.to_measure(device)


def measure_choices(context: "Context") -> Iterator[dict]:
    """Measure the calls of each model, and write the table after each model."""
    device = torch.device(context.device)
    entries: dict[tuple, Entry] = {}
    share = context.seconds / len(_MODELS)
    for name, side, images in _MODELS[:1] if context.quick else _MODELS:
        calls = {}
        for dtype in (torch.float32,) if context.quick else (torch.bfloat16, torch.float32):
            calls |= _record(build(name, side, context, dtype), 2 if context.quick else images, context.device)
        calls = {key: shape for key, shape in calls.items() if key not in entries}
        seconds = 0.0 if context.quick else 0.5 * share / max(1, len(calls))
        for key, entry in Measurement(device=device, seconds=seconds).run(calls):
            if entry is not None:
                entries[key] = entry
                yield dict(kind="choice", model=f"{name}-{side}", **asdict(entry))
        table = Table(machine=machine(context.device), entries=tuple(entries.values()))
        (context.folder / f"{slug(table.machine)}.json").write_text(table.to_json())
