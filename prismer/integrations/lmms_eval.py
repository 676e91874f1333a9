"""Prismer as a model of lmms-eval, found through its entry point `lmms_eval.models`.

    python -m lmms_eval --model prismer --model_args pretrained=vqa_prismer_base,experts=all --tasks vqav2_val_lite

The prompt of a task is written for models that follow instructions, which Prismer does not. It is asked the first line
that ends with a question mark; a prompt without one is a wish for a caption.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from prismer.batch import ImageBatch
from prismer.dataloading.experts.labeller import Labeller
from prismer.dataloading.feed.image_batch import image_batch
from prismer.errors import InputError
from prismer.model import Prismer
from prismer.weights.folder import stored_semantics


class PrismerForLmmsEval(lmms):
    """A model of lmms-eval; arguments come from `--model_args`, `--batch_size` and `--device`.

    Args:
        pretrained: model folder, name of `prismer models list`, or hub id.
        experts: expert networks that label each image: all, or names with + between them; "" feeds no labels.
        batch_size: images that the model reads at a time.
        device: "cpu", "cuda" or "cuda:N"; None takes a GPU if there is one.
        max_batch_size: not used; lmms-eval gives it to every model.

    Raises:
        ValueError: if there is no such model or network, or the batch size is not a number.
    """

    def __init__(
        self,
        pretrained: str = "tiny",
        experts: str = "",
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device in (None, "cuda"):
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise InputError(f"batch_size is {batch_size}; give the number of images that the model reads at a time")
        self.batch_size = int(batch_size)
        self.model = Prismer.from_pretrained(pretrained, device=device, dtype="auto")
        self.labeller = Labeller.load(experts.split("+"), device) if experts else None
        self.semantics = stored_semantics(self.model.config, self.model.folder)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """An answer to the question of each request's prompt, or a caption if the prompt asks nothing."""
        asked = [question_of(request.args[0]) for request in requests]
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="prismer", disable=self.rank != 0) as bar:
            for wants_answer in (True, False):
                places = [i for i, question in enumerate(asked) if bool(question) == wants_answer]
                for start in range(0, len(places), self.batch_size):
                    part = places[start : start + self.batch_size]
                    batch = self._images([_image(self.task_dict, *requests[i].args[2:6]) for i in part])
                    if wants_answer:
                        found = [answer.text for answer in self.model.answer(batch, [asked[i] for i in part])]
                    else:
                        found = self.model.caption(batch)
                    for i, text in zip(part, found, strict=True):
                        texts[i] = text
                    bar.update(len(part))
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not served: no task of lmms-eval compares likelihoods.

        Raises:
            ValueError: always.
        """
        raise InputError("Prismer generates for lmms-eval and compares no likelihoods; choose another task")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not possible: Prismer reads one prompt.

        Raises:
            ValueError: always.
        """
        raise InputError("Prismer reads one prompt and no conversation; choose another task")

    def _images(self, images: list) -> ImageBatch:
        labels = self.labeller(images) if self.labeller else None
        return image_batch(images, self.model.config, labels, self.semantics, self.model.tokenizer)


def question_of(prompt: str) -> str:
    """The first line of a prompt that ends with a question mark, without a "Question:" before it; "" if none does."""
    for line in prompt.splitlines():
        line = line.replace("<image>", "").strip()
        if line.endswith("?"):
            return line.removeprefix("Question:").strip()
    return ""


def _image(tasks: dict, visuals: Callable[[Any], Sequence], document: int, task: str, split: str) -> Any:
    """The image of a document.

    Raises:
        ValueError: if there is none, or more than one.
    """
    found = visuals(tasks[task][split][document])
    if len(found) != 1:
        raise InputError(
            f"document {document} of {task} has {len(found)} images; Prismer reads one, choose another task"
        )
    return found[0]
