"""Proves that Trainer takes the steps that Prismer takes, and that every layer that LoRA adapts counts.

Run: pytest tests/transformers/test_training.py
"""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from prismer.freezing import freeze
from prismer.training.config import TrainConfig
from prismer.training.zero import build_optimizer
from prismer.transformers import PrismerForConditionalGeneration
from tests.transformers.small import draw_batch, inputs_of, small_config, small_pair

# the packed projections of the encoder, which are no layers
PACKED = ["attn.in_proj_weight"]


def of_step(samples):
    """A collator: each sample is a whole batch here."""
    (batch,) = samples
    return batch


def test_three_steps_of_trainer_are_three_of_prismer(tmp_path):
    ours = small_pair()[0]
    theirs = PrismerForConditionalGeneration.from_prismer(copy.deepcopy(ours))
    batches = [draw_batch(ours.config, seed) for seed in range(6)]
    settings = TrainConfig(batch_size=4, accumulation=2, learning_rate=3e-3, gradient_clipping=1.0)
    freeze(ours, "freeze_lang_vision")
    optimizer, expected = build_optimizer(ours, settings), []
    for step in range(3):
        losses = [ours(batch) / 2 for batch in batches[2 * step : 2 * step + 2]]
        for loss in losses:
            loss.backward()
        nn.utils.clip_grad_norm_([p for p in ours.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(sum(losses).detach()))

    freeze(theirs, "freeze_lang_vision")
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    own = build_optimizer(theirs, settings)
    trainer = Trainer(
        model=theirs,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            max_steps=3,
            max_grad_norm=1.0,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
        ),
        train_dataset=[inputs_of(batch) for batch in batches],
        data_collator=of_step,
        optimizers=(own, torch.optim.lr_scheduler.ConstantLR(own, factor=1.0)),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    # Trainer logs four digits
    assert losses == pytest.approx(expected, abs=2e-3)
    state = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        if name.endswith("key.bias"):
            # attention does not depend on it: what it gets is the rounding of a gradient of zero
            continue
        change = (state[name] - before[name]).double().norm()
        assert (tensor - state[name]).double().norm() <= 1e-3 * change + 1e-7, name
    evaluated = trainer.evaluate(eval_dataset=[inputs_of(batches[0])])
    assert evaluated["eval_loss"] == pytest.approx(float(ours.eval()(batches[0]).detach()), rel=1e-4)


def adapted(expert_text=("obj_detection",), **changes):
    """A model with LoRA on all that it can adapt, and the inputs of a batch."""
    ours, base = small_pair(expert_text=expert_text)
    settings = dict(r=2, target_modules="all-linear", target_parameters=PACKED)
    model = get_peft_model(base, LoraConfig(**{**settings, **changes}))
    return model, inputs_of(draw_batch(ours.config))


@pytest.mark.parametrize("expert_text", [(), ("obj_detection",)], ids=["image tokens", "with detections"])
def test_every_layer_that_lora_adapts_counts_and_nothing_else_trains(expert_text):
    model, inputs = adapted(expert_text)
    plain = model.get_base_model()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "lora" not in name]
    assert all(name.endswith("base_layer") for name in linear)
    packed = [name for name, _ in plain.named_parameters() if name.endswith("in_proj_weight")]
    assert len(packed) == 2 and len(trained) == 2 * (len(linear) + len(packed))

    # new adapters add nothing
    model.eval()
    loss, logits = model(**inputs).loss, model(**inputs).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(**inputs).loss, loss)
    before = {name: p.clone() for name, p in plain.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    model.train()
    model(**inputs).loss.backward()
    idle = [name for name, p in trained.items() if "lora_B" in name and not p.grad.abs().max() > 0]
    assert idle == []
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in plain.named_parameters() if name in before)
    model.eval()
    assert not torch.allclose(model(**inputs).logits, logits)
    # each adapter alone changes what the model computes
    with torch.no_grad():
        first = model(**inputs).loss
    for name, p in trained.items():
        if "lora_B" not in name:
            continue
        kept = p.detach().clone()
        with torch.no_grad():
            # not the same for all channels, which a norm would remove
            p.normal_()
            second = model(**inputs, skip_logits=True).loss
            p.copy_(kept)
        assert not torch.allclose(first, second, rtol=1e-6, atol=0), name


def test_lora_is_saved_loaded_and_merged(tmp_path):
    model, inputs = adapted()
    base = copy.deepcopy(model)
    base.unload()
    base = base.unload()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    model.eval()
    del inputs["labels"]
    expected = model(**inputs).logits
    search = {name: value for name, value in inputs.items() if name not in ("text_weights", "instance_rows")}
    search |= dict(input_ids=search["input_ids"][:, :3], attention_mask=None, max_new_tokens=5, min_length=0)
    tokens = model.generate(**search)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, expected)
    # PEFT unloads the adapters of out_proj, which lie inside those of in_proj_weight, in a second pass
    again.merge_and_unload()
    merged = again.merge_and_unload()
    assert type(merged) is PrismerForConditionalGeneration
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.generate(**search), tokens)
    merged.save_pretrained(tmp_path / "merged")
    loaded = PrismerForConditionalGeneration.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, merged(**inputs).logits)


def test_the_word_table_may_train_beside_lora():
    model, inputs = adapted(target_parameters=None, modules_to_save=["word"])
    output = model(**inputs)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "word" in name}
    trained = {name for name, gradient in gradients.items() if gradient is not None}
    assert trained == {"base_model.model.decoder.embeddings.word.modules_to_save.default.weight"}
    gradient = gradients[trained.pop()]
    assert gradient.shape == (small_config().vocab_size, small_config().text_width)
    # the head's gradient reaches tokens that no text holds
    absent = torch.ones(len(gradient), dtype=torch.bool)
    absent[inputs["input_ids"].flatten()] = False
    assert gradient[absent].abs().max() > 0
