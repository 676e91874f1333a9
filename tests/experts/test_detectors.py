"""Proves that the detectors of transformers are read from folders and give the boxes that transformers gives.

The models are tiny, with random weights in the format of the real ones.

python -m pytest tests/experts/test_detectors.py
"""

import numpy as np
import pytest
import torch

from prismer.dataloading.experts.network import Images
from prismer.dataloading.experts.objects import COCO, NETWORKS, DFine, NanoDet, Owlv2, RtDetr
from prismer.dataloading.experts.weights import MissingWeights
from tests.experts.stand_ins import assert_same_detections, predict_alone, random_images


def tiny_rt_detr():
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=16,
        encoder_in_channels=[8, 16, 16],
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        num_queries=12,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        num_denoising=0,
        id2label={i: f"thing {i}" for i in range(5)},
    )
    return RTDetrForObjectDetection(config)


@pytest.fixture(scope="module")
def rt_detr_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rt-detr")
    torch.manual_seed(0)
    tiny_rt_detr().save_pretrained(folder)
    return folder


def test_rt_detr_gives_an_image_the_same_boxes_alone_and_in_a_batch(rt_detr_folder):
    network = RtDetr.load(rt_detr_folder)
    assert network.classes == [f"thing {i}" for i in range(5)] and len(network.version) == 12
    network.threshold = 0.0
    images = random_images(640)
    together = network.predict(images, {})
    assert all(output.boxes for output in together)
    for i, output in enumerate(together):
        assert_same_detections(output, predict_alone(network, images, i))


def test_rt_detr_boxes_are_those_of_transformers(rt_detr_folder):
    from transformers import RTDetrImageProcessor
    from transformers.models.rt_detr.modeling_rt_detr import RTDetrObjectDetectionOutput

    network = RtDetr.load(rt_detr_folder)
    # boxes far apart, so that all are kept
    middle = torch.cartesian_prod(torch.arange(4) / 4 + 0.125, torch.arange(3) / 3 + 1 / 6)
    boxes = torch.cat([middle, torch.rand(12, 2) * 0.2 + 0.05], dim=1)[None]
    logits = torch.full((1, 12, 5), -5.0)
    logits[0, torch.arange(12), torch.arange(12) % 5] = torch.randn(12)
    # one box has two classes
    logits[0, 3, 4] = 3.0
    output = network.read(logits, boxes, random_images(640, 1), {})[0]
    outputs = RTDetrObjectDetectionOutput(logits=logits, pred_boxes=boxes)
    expected = RTDetrImageProcessor().post_process_object_detection(outputs, threshold=0.5)[0]
    pairs = zip(expected["scores"], expected["labels"], expected["boxes"].clamp(0, 1), strict=True)
    rows = [(label.item(), *box.tolist(), score.item()) for score, label, box in pairs]
    same = [row for row in rows if row[0] == 3 and row[1:5] == rows[0][1:5]]
    got = [(output.table[i], *output.boxes[i]) for i in output.boxes]
    np.testing.assert_allclose(got, [row for row in rows if row not in same], atol=1e-6)


def test_a_folder_with_another_detector_is_refused(rt_detr_folder, tmp_path):
    with pytest.raises(ValueError, match="type rt_detr, d-fine is d_fine"):
        DFine.load(rt_detr_folder)
    with pytest.raises(MissingWeights, match=r"obj_detection=rt-detr@PekingU/rtdetr"):
        RtDetr.load(tmp_path)
    with pytest.raises(MissingWeights, match="not at .*/nowhere"):
        RtDetr.load(tmp_path / "nowhere")
    model = tiny_rt_detr()
    state = {k: v for k, v in model.state_dict().items() if "enc_score_head" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks \d+ weights of rt-detr.*enc_score_head"):
        RtDetr.load(tmp_path)


@pytest.fixture(scope="module")
def owlv2_folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import Owlv2Config, Owlv2ForObjectDetection, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("owlv2")
    torch.manual_seed(0)
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision = dict(text, image_size=960, patch_size=160)
    words = ["!", "a", "photo", "of", *sorted({w for name in COCO for w in name.split()}), "red", "ball"]
    text |= dict(
        vocab_size=len(words) + 2,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=len(words),
        eos_token_id=len(words) + 1,
    )
    Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(
        folder
    )
    vocabulary = {word: i for i, word in enumerate([*words, "<start>", "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, vocabulary[word]) for word in ("<start>", "<end>")]
    tokenizer.post_processor = processors.TemplateProcessing("<start> $A <end>", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="!").save_pretrained(folder)
    return folder


def test_owlv2_gives_an_image_the_same_boxes_alone_and_in_a_batch(owlv2_folder):
    network = Owlv2.load(owlv2_folder)
    assert network.classes == list(COCO)
    images = random_images(960, sizes=[(960, 480), (700, 960)])
    network.threshold = 0.0
    together = network.predict(images, {})
    assert all(output.boxes for output in together)
    for i, output in enumerate(together):
        assert_same_detections(output, predict_alone(network, images, i))


def test_owlv2_with_stored_queries_equals_the_model_of_transformers(owlv2_folder, monkeypatch):
    """Class names embedded once give the result of a model that reads them with every batch."""
    from transformers import AutoTokenizer

    (owlv2_folder / "classes.txt").write_text("red ball\n\n cat \ndining table\n")
    try:
        network = Owlv2.load(owlv2_folder)
        assert network.version != Owlv2.load(owlv2_folder).version.split("-")[0]
    finally:
        (owlv2_folder / "classes.txt").unlink()
    assert network.classes == ["red ball", "cat", "dining table"]
    seen = {}
    monkeypatch.setattr(network, "read", lambda logits, boxes, *_: seen.update(logits=logits, boxes=boxes))
    images = random_images(960)
    network.predict(images, {})
    tokens = AutoTokenizer.from_pretrained(owlv2_folder)(
        [f"a photo of a {name}" for name in network.classes] * 2,
        padding="max_length",
        max_length=16,
        return_tensors="pt",
    )
    mean, std = (torch.tensor(v)[:, None, None] for v in (Owlv2.mean, Owlv2.std))
    outputs = network.model(
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        pixel_values=(images.pixels / 255 - mean) / std,
    )
    torch.testing.assert_close(seen["logits"], outputs.logits)
    torch.testing.assert_close(seen["boxes"], outputs.pred_boxes)


def test_owlv2_drops_boxes_in_the_padding(owlv2_folder):
    network = Owlv2.load(owlv2_folder)
    boxes = torch.tensor([[[0.25, 0.5, 0.25, 0.5], [0.8, 0.5, 0.2, 0.2], [0.3, 0.5, 0.25, 0.5]]])
    logits = torch.full((1, 3, 80), -9.0)
    logits[0, [0, 1, 2], [5, 5, 5]] = torch.tensor([2.0, 3.0, 1.0])
    # the image is the left half; the third box is suppressed by the first
    images = Images(torch.zeros(1, 3, 960, 960, dtype=torch.uint8), [(960, 480)], 16)
    output = network.read(logits, boxes, images, {})[0]
    assert output.table == {0: 5}
    np.testing.assert_allclose(output.boxes[0][:4], (0.25, 0.25, 0.75, 0.75), atol=1e-6)
    assert output.plane[8, 4] == 0 and output.plane[8, 3] == 255


@pytest.mark.parametrize("text", ["", "cat\ndog\ncat\n"])
def test_a_class_list_without_names_or_with_duplicates_is_refused(owlv2_folder, text):
    (owlv2_folder / "classes.txt").write_text(text)
    try:
        with pytest.raises(ValueError, match="write each name once"):
            Owlv2.load(owlv2_folder)
    finally:
        (owlv2_folder / "classes.txt").unlink()


def test_nanodet_is_the_default_and_all_detectors_read_depth():
    assert NETWORKS[0] is NanoDet
    for network in NETWORKS:
        assert network.info.expert == "obj_detection"
        assert network.info.inputs == ("depth",) and not network.info.inputs_required
