"""A stand-in for a CLIP model: open_clip's own architecture, tiny, with random weights, saved like a real one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import load_file, save_file

from prismer.dataloading.store.shards import Sample, ShardWriter

CONTEXT, WIDTH = 12, 80


MODEL = {
    "embed_dim": WIDTH,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": CONTEXT, "width": 96, "heads": 3, "layers": 2, "vocab_size": 49408},
}


# enough texts for 64 components, of several lengths
TEXTS = [
    f"{colour} {thing}"
    for colour in "red green blue dark".split()
    for thing in (
        "car bus person tree sky dog cat road sign house window door table chair lamp bottle bicycle traffic light"
    ).split()
]


def save_tower(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write the folder of a CLIP model with random weights; `changes` go to its configuration."""
    torch.manual_seed(seed)
    folder.mkdir()
    config = {"model_cfg": MODEL | changes, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.CLIP(**(MODEL | changes))
    for parameter in (model.positional_embedding, model.text_projection):
        torch.nn.init.normal_(parameter, std=0.3)
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return folder


def embed(clip: Path, texts: list[str]) -> np.ndarray:
    """open_clip's own embeddings, with all positions, in one batch."""
    model = open_clip.create_model(f"local-dir:{clip}").eval()
    with torch.inference_mode():
        return model.encode_text(open_clip.get_tokenizer(f"local-dir:{clip}")(texts)).numpy()


def project(folder: Path, embeddings: np.ndarray) -> np.ndarray:
    """Embeddings through the PCA of a semantics folder."""
    pca = {name: tensor.numpy() for name, tensor in load_file(folder / "pca.safetensors").items()}
    return (embeddings - pca["mean"]) @ pca["components"].T


def write_dataset(folder: Path, classes: dict[str, list[str]], words_of: list[dict[str, str] | None]) -> Path:
    """A dataset of words without label maps, one sample per entry."""
    with ShardWriter(folder, classes=classes, source="test") as writer:
        for i, words in enumerate(words_of):
            meta = {} if words is None else {"words": words}
            writer.write(Sample(f"{i:04d}", b"\xff\xd8image", {}, meta))
    return folder
