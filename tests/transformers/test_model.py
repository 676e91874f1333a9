"""Proves that the model of transformers computes what Prismer computes, and that one folder serves both.

Run: pytest tests/transformers/test_model.py
"""

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

from prismer.dataloading.feed.image_batch import ExpertLabels
from prismer.errors import InputError
from prismer.files import find_damage
from prismer.model import Prismer
from prismer.shipped import shipped_folder
from prismer.tokenizer import Tokenizer
from prismer.transformers import PrismerConfig, PrismerForConditionalGeneration, PrismerProcessor
from prismer.weights.folder import folder_config
from tests.model.teacher_forcing import logits_of
from tests.transformers.small import draw_batch, inputs_of, small_config, small_pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The shipped model, as Prismer saves it."""
    path = tmp_path_factory.mktemp("models") / "ours"
    Prismer.from_pretrained("tiny").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return Prismer.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return AutoModelForImageTextToText.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def draw_image(seed):
    pixels = torch.randint(0, 256, (5, 4, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((150, 120))


IMAGES = [draw_image(0), draw_image(1)]
QUESTIONS = ["How many objects are there?", "What color is the small shiny cube ?"]


def test_loss_and_gradients_are_those_of_prismer():
    ours, theirs = small_pair()
    batch = draw_batch(ours.config)
    loss = ours(batch)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    output = theirs(**inputs_of(batch))
    output.loss.backward()
    assert output.logits is None
    torch.testing.assert_close(output.loss, loss)
    found = {name: p.grad for name, p in theirs.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("expert_text", [(), ("obj_detection",)])
def test_logits_are_those_of_each_text_alone(expert_text):
    ours, theirs = (model.eval() for model in small_pair(expert_text=expert_text))
    batch = draw_batch(ours.config)
    inputs = inputs_of(batch)
    output = theirs(**inputs)
    torch.testing.assert_close(output.loss, ours(batch))
    context = ours.encode(batch.images)
    for b, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        found = batch.images.detections
        if found is not None:
            found = type(found)(found.ids[b : b + 1], found.facts[b : b + 1])
        cross = ours.decoder.project_context(context[b : b + 1], found)
        alone = logits_of(ours.decoder, inputs["input_ids"][b : b + 1, :length], cross)
        torch.testing.assert_close(output.logits[b, :length], alone[0], rtol=1e-4, atol=1e-5)


def test_masked_tokens_are_padding():
    _, theirs = small_pair()
    inputs = inputs_of(draw_batch(theirs.config.architecture))
    loss = theirs(**inputs).loss
    padding = inputs["attention_mask"] == 0
    torch.testing.assert_close(theirs(**inputs | {"input_ids": inputs["input_ids"].masked_fill(padding, 7)}).loss, loss)
    with pytest.raises(InputError, match="a text starts with padding"):
        theirs(**inputs | {"attention_mask": inputs["attention_mask"].flip(1)})


def test_training_draws_the_rows_of_objects_and_evaluation_does_not():
    _, theirs = small_pair()
    inputs = inputs_of(draw_batch(theirs.config.architecture)) | {"instance_rows": None}
    losses = {theirs(**inputs).loss.item() for _ in range(3)}
    assert len(losses) == 3
    torch.manual_seed(5)
    first = theirs(**inputs).loss
    torch.manual_seed(5)
    torch.testing.assert_close(theirs(**inputs).loss, first)
    theirs.eval()
    torch.testing.assert_close(theirs(**inputs).loss, theirs(**inputs).loss)


def test_logits_are_formed_when_they_are_asked_for():
    _, theirs = small_pair()
    inputs = inputs_of(draw_batch(theirs.config.architecture))
    assert theirs(**inputs, skip_logits=False).logits is not None
    assert theirs.eval()(**inputs, skip_logits=True).logits is None
    assert theirs(**inputs, return_dict=False)[1].shape == (3, 11, 300)
    del inputs["labels"]
    assert theirs.train()(**inputs).loss is None
    checkpointed = inputs_of(draw_batch(theirs.config.architecture))
    loss = theirs(**checkpointed).loss
    theirs.activation_checkpointing_enable()
    assert theirs.encoder.gradient_checkpointing and theirs.decoder.gradient_checkpointing
    torch.testing.assert_close(theirs(**checkpointed).loss, loss)


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_are_those_of_prismer(ours, theirs, processor, beams):
    inputs = processor(images=IMAGES)
    tokens = theirs.generate(**inputs, num_beams=beams)
    start = inputs["input_ids"].shape[1]
    assert torch.equal(tokens[:, :start], inputs["input_ids"])
    texts = processor.batch_decode(tokens[:, start:], skip_special_tokens=True)
    assert [text.strip().capitalize() + "." for text in texts] == ours.caption(IMAGES, beams=beams)
    prefixed = theirs.generate(**processor(images=IMAGES, text=["Two objects"] * 2), num_beams=beams, max_length=12)
    texts = processor.batch_decode(prefixed[:, 3:], skip_special_tokens=True)
    expected = ours.caption(IMAGES, beams=beams, prefix="Two objects", max_length=12)
    assert len(ours.tokenizer.encode("Two objects")) == 2
    assert [text.strip().capitalize() + "." for text in texts] == expected


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_those_of_prismer(ours, theirs, processor, beams):
    inputs = processor(images=IMAGES, text=QUESTIONS)
    assert (inputs["input_ids"][:, -1] == 1).sum() == 2, "the shorter question is padded, the longer ends in its query"
    found = theirs.generate(**inputs, num_beams=beams, return_dict_in_generate=True)
    texts = processor.batch_decode(found.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    expected = ours.answer(IMAGES, QUESTIONS, beams=beams)
    assert [text.strip().lower() for text in texts] == [answer.text for answer in expected]
    torch.testing.assert_close(found.sequences_scores, torch.tensor([answer.score for answer in expected]))


def test_prompts_may_be_padded_on_the_left(theirs, processor):
    inputs = processor(images=IMAGES, text=QUESTIONS)
    left = dict(inputs)
    length = int(inputs["attention_mask"][0].sum())
    shift = inputs["input_ids"].shape[1] - length
    assert shift > 0
    for name in ("input_ids", "attention_mask"):
        left[name] = inputs[name].clone()
        left[name][0] = inputs[name][0].roll(shift)
    start = inputs["input_ids"].shape[1]
    assert torch.equal(theirs.generate(**left)[:, start:], theirs.generate(**inputs)[:, start:])


def test_generate_refuses_what_it_would_not_follow(theirs, processor):
    inputs = processor(images=IMAGES, text=QUESTIONS)
    with pytest.raises(InputError, match="do_sample"):
        theirs.generate(**inputs, do_sample=True)
    with pytest.raises(InputError, match="generate does not take top_p"):
        theirs.generate(**inputs, top_p=0.5)
    with pytest.raises(InputError, match="mixes|questions and other prompts"):
        theirs.generate(**processor(images=IMAGES, text=[QUESTIONS[0], "Two"]))
    with pytest.raises(InputError, match="the processor does not take sufix"):
        processor(images=IMAGES, sufix="a")


def test_labels_of_experts_reach_the_model(ours, theirs, processor):
    plane = torch.full((40, 40), 255, dtype=torch.uint8)
    plane[10:30, 5:25] = 0
    labels = ExpertLabels(
        {"obj_detection": plane.numpy(), "depth": torch.arange(1600).view(40, 40).div(8).byte().numpy()},
        {"instances": {"0": 1}},
        {"obj_detection": ["cube", "cone"]},
    )
    batch = ours._as_batch(IMAGES, [labels, None], None)
    inputs = processor(images=IMAGES, expert_labels=[labels, None])
    with torch.inference_mode():
        expected = ours.encode(batch)
        maps = {name: inputs[name] for name in inputs if name not in ("pixel_values", "input_ids", "attention_mask")}
        torch.testing.assert_close(theirs.encode(inputs["pixel_values"], **maps), expected)
        blank = theirs.encode(**{name: processor(images=IMAGES)[name] for name in ("pixel_values", *maps)})
    assert not torch.allclose(blank[0], expected[0])
    torch.testing.assert_close(blank[1], expected[1])
    with pytest.raises(InputError, match="seg and seg_features are one input"):
        theirs.encode(inputs["pixel_values"], seg=inputs["seg"])
    with pytest.raises(InputError, match="pixel_values are torch.float32"):
        theirs.encode(inputs["pixel_values"].float())


def test_targets_become_labels_as_in_training(ours, processor):
    answered = processor(images=IMAGES, text=QUESTIONS, targets=["Five", "red"])
    assert answered["labels"].shape == answered["input_ids"].shape
    for ids, labels, mask in zip(answered["input_ids"], answered["labels"], answered["attention_mask"], strict=True):
        targets = labels[labels != -100]
        assert targets[-1] == ours.config.eos_id and mask[labels != -100].all()
        query = int((labels != -100).nonzero()[0]) - 1
        assert ids[query] == ours.config.pad_id and mask[query] == 1
    named = processor(images=IMAGES, kind="class", targets=["cone", "cube"])
    text = processor.tokenizer.decode(named["input_ids"][0], skip_special_tokens=True)
    assert text == "A photo of a cone"
    # special tokens that a user types are text
    typed = processor(images=IMAGES[:1], targets=["<s>"])
    assert typed["input_ids"][0].tolist() == [0, *Tokenizer.from_folder(shipped_folder("tiny")).encode("<s>"), 2]


def test_one_folder_serves_both(tmp_path, folder, ours, theirs, processor):
    assert isinstance(AutoConfig.from_pretrained(folder), PrismerConfig)
    assert type(AutoModel.from_pretrained(folder)) is PrismerForConditionalGeneration
    assert type(processor) is PrismerProcessor
    theirs.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    assert find_damage(tmp_path / "m") is None
    assert folder_config(tmp_path / "m") == ours.config
    assert json.loads((tmp_path / "m/answers.json").read_text()) == json.loads((folder / "answers.json").read_text())
    back = Prismer.from_pretrained(tmp_path / "m")
    expected = ours.state_dict()
    assert back.state_dict().keys() == expected.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.state_dict().items())
    assert back.caption(IMAGES[:1]) == ours.caption(IMAGES[:1])
    # also with the tokenizer file of transformers alone
    for name in ("vocab.json", "merges.txt", "checksums.json"):
        (tmp_path / "m" / name).unlink()
    assert Prismer.from_pretrained(tmp_path / "m").caption(IMAGES[:1]) == ours.caption(IMAGES[:1])
    again = AutoModel.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16 and again.generation_config.num_beams == 3
    assert again.to_prismer().caption(IMAGES[:1])[0].endswith(".")
    reread = AutoProcessor.from_pretrained(tmp_path / "m")
    first, second = (given(images=IMAGES, text=QUESTIONS) for given in (processor, reread))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_folder_without_the_type_of_model_is_read_by_its_classes(tmp_path, folder, ours, theirs):
    shutil.copytree(folder, tmp_path / "m")
    settings = json.loads((folder / "config.json").read_text())
    del settings["model_type"]
    (tmp_path / "m/config.json").write_text(json.dumps(settings))
    model = PrismerForConditionalGeneration.from_pretrained(tmp_path / "m")
    inputs = PrismerProcessor.from_pretrained(tmp_path / "m")(images=IMAGES[:1], text=QUESTIONS[:1])
    assert torch.equal(model.generate(**inputs), theirs.generate(**inputs))


def test_a_folder_with_too_few_weights_is_refused(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "m")
    settings = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(settings | {"text_depth": 5}))
    with pytest.raises(InputError, match="lacks .* tensors of this architecture, such as decoder.layers.4"):
        AutoModel.from_pretrained(tmp_path / "m")
    (tmp_path / "m/config.json").write_text(json.dumps(settings | {"model_type": "blip"}))
    with pytest.raises(InputError, match="another type of model"):
        folder_config(tmp_path / "m")


def test_settings_are_checked_and_written_whole(tmp_path):
    with pytest.raises(InputError, match="text_heads"):
        PrismerConfig(text_width=30, text_heads=4)
    config = PrismerConfig.from_architecture(small_config())
    assert config.hidden_size == config.text_width and config.pad_token_id == 1
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dropout"] == config.dropout
    assert PrismerConfig.from_pretrained(tmp_path).architecture == small_config()


def test_the_pipeline_answers_and_captions(folder, ours):
    pipe = pipeline("image-text-to-text", model=str(folder))
    content = [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": QUESTIONS[0]}]
    chat = [{"role": "user", "content": content}]
    expected = ours.answer(IMAGES[:1], QUESTIONS[:1])[0].text
    for given in (dict(text=chat), dict(images=IMAGES[0], text=QUESTIONS[0])):
        (found,) = pipe(**given, return_full_text=False)
        assert found["generated_text"].strip().lower() == expected
    content[1]["text"] = "Describe the image."
    (found,) = pipe(text=chat, return_full_text=False)
    assert found["generated_text"] + "." == ours.caption(IMAGES[0])[0]
    chat.append({"role": "assistant", "content": [{"type": "text", "text": "Two objects"}]})
    (found,) = pipe(text=chat, return_full_text=False)
    assert found["generated_text"].strip().capitalize() + "." == ours.caption(IMAGES[0], prefix="Two objects")[0]
