"""Proves that lmms-eval gets from Prismer what `Prismer.answer` and `Prismer.caption` say; a stand-in takes its place,
since it brings a hundred packages. Run: pytest tests/integrations/test_lmms_eval.py
"""

import sys
import types

import numpy as np
import pytest
from PIL import Image

from prismer.errors import InputError
from prismer.model import Prismer

TASK, SPLIT = "toy", "test"
RNG = np.random.default_rng(0)
PHOTOS = [Image.fromarray(RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(3)]
WORD = "\nAnswer the question using a single word or phrase."


class Base:
    """What lmms-eval's own base class sets."""

    def __init__(self):
        self.task_dict = {TASK: {SPLIT: PHOTOS}}

    rank = property(lambda self: self._rank)


@pytest.fixture
def adapter(monkeypatch):
    """The module of the adapter, with the stand-in for lmms-eval."""
    for name, content in (
        ("lmms_eval", {}),
        ("lmms_eval.api", {}),
        ("lmms_eval.api.model", {"lmms": Base}),
        ("lmms_eval.api.instance", {"Instance": types.SimpleNamespace}),
    ):
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "prismer.integrations.lmms_eval", raising=False)
    import prismer.integrations.lmms_eval as module

    yield module
    # it was made with the stand-in
    sys.modules.pop("prismer.integrations.lmms_eval", None)


def request(prompt, document=0, visuals=lambda photo: [photo]):
    return types.SimpleNamespace(args=(prompt, {}, visuals, document, TASK, SPLIT))


def test_questions_are_answered_and_other_prompts_get_captions_in_order(adapter):
    model = Prismer.from_pretrained("tiny", dtype="auto")
    prompts = ["How many objects are there?", "", "What color is the cube?"]
    asked = [(0, prompts[0] + WORD), (1, "Provide a one-sentence caption."), (2, f"<image>\nQuestion: {prompts[2]}")]
    asked += [(1, prompts[0] + WORD), (0, "Describe the image.")]
    requests = [request(prompt, document) for document, prompt in asked]
    for batch_size in (1, "2"):
        texts = adapter.PrismerForLmmsEval("tiny", batch_size=batch_size, device="cpu").generate_until(requests)
        answers = [model.answer(PHOTOS[i], [question])[0].text for i, question in ((0, prompts[0]), (2, prompts[2]))]
        captions = [model.caption(PHOTOS[i])[0] for i in (1, 0)]
        assert texts == [
            answers[0],
            captions[0],
            answers[1],
            model.answer(PHOTOS[1], [prompts[0]])[0].text,
            captions[1],
        ]


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("Is it red?\nAnswer with yes or no.", "Is it red?"),
        ("Look.\n  Question: Is it red? \nA. yes\nB. no", "Is it red?"),
        ("<image>Is it red?", "Is it red?"),
        ("Describe it.", ""),
        ("", ""),
    ],
)
def test_the_question_of_a_prompt(adapter, prompt, question):
    assert adapter.question_of(prompt) == question


def test_what_prismer_cannot_do_is_refused_in_one_sentence(adapter):
    with pytest.raises(InputError, match=r"^batch_size is auto; give the number of images"):
        adapter.PrismerForLmmsEval("tiny", batch_size="auto", device="cpu")
    model = adapter.PrismerForLmmsEval("tiny", device="cpu")
    for visuals in (lambda photo: [], lambda photo: [photo, photo]):
        with pytest.raises(InputError, match=r"^document 0 of toy has [02] images; Prismer reads one"):
            model.generate_until([request("Is it red?", visuals=visuals)])
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(InputError, match="choose another task$"):
            method([])


def test_the_entry_point_names_the_class(adapter, monkeypatch):
    from prismer.integrations import lmms_eval_manifest

    registry = types.ModuleType("lmms_eval.models.registry_v2")
    registry.ModelManifest = types.SimpleNamespace
    monkeypatch.setitem(sys.modules, "lmms_eval.models", types.ModuleType("lmms_eval.models"))
    monkeypatch.setitem(sys.modules, "lmms_eval.models.registry_v2", registry)
    found = lmms_eval_manifest()
    module, name = found.simple_class_path.rsplit(".", 1)
    assert found.model_id == "prismer" and getattr(sys.modules[module], name) is adapter.PrismerForLmmsEval
