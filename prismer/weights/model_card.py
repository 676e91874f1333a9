"""The card of a model folder, README.md: licence, training data, scores, how to load it. The hub shows it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prismer.network import PrismerNetwork
from prismer.weights.catalogue import PUBLISHED_LICENCE, PUBLISHED_MODELS
from prismer.weights.locate import CONFIG, MODEL_CARD, PUBLISHED_WEIGHTS, find_folder

_LICENCE = re.compile(r"^license:\s*(\S+)\s*$", re.MULTILINE)
_UNKNOWN = (
    "Not stated. A model inherits the terms of what it was made from: CLIP of OpenAI and RoBERTa are under the MIT "
    f"licence, the released Prismer checkpoints under {PUBLISHED_LICENCE.upper()}."
)


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a card says besides the architecture.

    Attributes:
        licence: of the weights, as the hub spells it ("mit", "cc-by-nc-sa-4.0"); "" if it is not known.
        training: sentences on the data and the training.
        scores: name -> score.
        scored_on: what was scored.
    """

    licence: str = ""
    training: Sequence[str] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    scored_on: str = ""

    def text(self, model: PrismerNetwork, name: str) -> str:
        """The whole card, as Markdown.

        Args:
            name: of the model's folder.
        """
        config = model.config
        parameters = sum(parameter.numel() for parameter in model.parameters())
        experts = f"the expert maps {', '.join(config.experts)}" if config.experts else "images alone, no expert maps"
        text = f", and detections of {' and '.join(config.expert_text)} as text" if config.expert_text else ""
        lines = [
            "---",
            f"license: {self.licence or 'other'}",
            "library_name: prismer",
            "pipeline_tag: image-to-text",
            "tags: [image-captioning, visual-question-answering]",
            "---",
            f"# {name}",
            "",
            f"A Prismer (arXiv:2303.02506), preset {config.name}: {parameters:,} parameters, images of "
            f"{config.image_size} px. It reads {experts}{text}.",
            "",
            "## Licence",
            "",
            self.licence.upper() if self.licence else _UNKNOWN,
            "",
            "## Training",
            "",
            *(self.training or ["Not recorded."]),
            "",
            "## Scores",
            "",
        ]
        if self.scores:
            lines += [f"On {self.scored_on}:", "", "| score | value |", "|---|---|"]
            lines += [f"| {score} | {value:.4f} |" for score, value in self.scores.items()]
        else:
            lines.append("None recorded.")
        lines += [
            "",
            "## Use",
            "",
            "```bash",
            f"prismer caption image.jpg --model {name}",
            f'prismer answer image.jpg "What is this?" --model {name}',
            "```",
            "",
            "```python",
            "from prismer import Prismer",
            "",
            f'model = Prismer.from_pretrained("{name}")',
            'model.caption("image.jpg")',
            "```",
        ]
        return "\n".join(lines) + "\n"


def licence_of(source: str | Path) -> str:
    """The licence of a model on this machine, which a model that is made from it inherits; "" if it is not known.

    Args:
        source: what `from_pretrained` takes.
    """
    if str(source) in PUBLISHED_MODELS:
        return PUBLISHED_LICENCE
    folder = find_folder(source)
    if folder is None:
        return ""
    if (folder / MODEL_CARD).is_file():
        found = _LICENCE.search((folder / MODEL_CARD).read_text(encoding="utf-8", errors="replace"))
        return found[1] if found and found[1] != "other" else ""
    # a folder with no more than the published file is taken for a released checkpoint
    released = (folder / PUBLISHED_WEIGHTS).is_file() and not (folder / CONFIG).is_file()
    return PUBLISHED_LICENCE if released else ""
