"""Pre-train the towers of the preset tiny on rendered scenes: vision on the labels, text as a language model.

    python scripts/train_towers.py render --images 24000     # scenes into runs/towers/, once
    python scripts/train_towers.py outline --names --images 3000     # or their texts alone, which is much faster
    python scripts/train_towers.py vision --minutes 25
    python scripts/train_towers.py text --names --steps 1100 # without --names: for scenes that are not renamed
    python scripts/train_towers.py pack                      # -> prismer/assets/tiny-towers/ with recipe and hashes

The scenes belong to a split called "towers", so that `prismer data render` never renders one of them for training,
validation or test. Without `vision`, `pack` keeps the shipped vision tower. The towers have no adaptors and no
cross-attention; `deepspeed train.py` adds and trains those.
"""

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from prismer.config import prismer_tiny
from prismer.dataloading.scenes.captions_and_questions import ATTRIBUTES, write_captions, write_questions
from prismer.dataloading.scenes.dataset import SEG_CLASSES, render_scene, scene_seed
from prismer.dataloading.scenes.exact_labels import outline
from prismer.dataloading.scenes.layout import WORDS, sample_layout
from prismer.dataloading.scenes.names import kind_names, sign_words
from prismer.dataloading.scenes.rename import rename_shapes
from prismer.experts import BACKGROUND
from prismer.files import replacing, write_checksums, write_json
from prismer.shipped import shipped_folder
from prismer.stems import normalise_rgb
from prismer.text import TextDecoder, causal_attend, position_ids
from prismer.texts import clean_caption, encode_caption, encode_qa
from prismer.tokenizer import Tokenizer
from prismer.vision import VisionEncoder

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "towers"
ASSETS = ROOT / "prismer" / "assets" / "tiny-towers"
SPLIT = "towers"
SHAPES, COLOURS = ATTRIBUTES["shape"], ATTRIBUTES["colour"]
MATERIALS, SIZES = ATTRIBUTES["material"], ATTRIBUTES["size"]
# side in pixels of the cells for which the vision tower predicts labels
CELL = 4


# -- scenes --------------------------------------------------------------------------------------------------------


def scene_targets(rgb: np.ndarray, planes: dict, meta: dict) -> dict[str, np.ndarray]:
    """The targets of the vision tower for one scene: labels of 4 px cells, words of patches, counts of objects."""
    middle = slice(CELL // 2, None, CELL)
    seg, boxes = planes["seg"][middle, middle], planes["obj_detection"][middle, middle]
    objects = meta["scene"]["objects"]
    colour = np.zeros(seg.shape, np.uint8)
    material = np.zeros(seg.shape, np.uint8)
    size = np.zeros(seg.shape, np.uint8)
    for own in (False, True):
        # first by shape alone, then by box and shape, because a box may cover pixels of a neighbour
        for index, thing in enumerate(objects):
            here = seg == SHAPES.index(thing["shape"])
            x0, y0, x1, y1 = (v // CELL for v in thing["box"])
            box = np.zeros_like(here)
            box[max(y0, 0) : y1 + 1, max(x0, 0) : x1 + 1] = True
            here &= box & (boxes == index) if own else box
            colour[here] = 1 + COLOURS.index(thing["colour"])
            material[here] = 1 + MATERIALS.index(thing["material"])
            size[here] = 1 + SIZES.index(thing["size"])
    words = planes["ocr_detection"]
    patch = 16
    grid = words.shape[0] // patch
    word = np.zeros((grid, grid), np.uint8)
    for y in range(grid):
        for x in range(grid):
            ids = words[y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
            seen = ids[ids != BACKGROUND]
            if seen.size:
                word[y, x] = 1 + WORDS.index(meta["words"][str(np.bincount(seen).argmax())])
    counts = np.zeros(1 + len(SHAPES) + len(COLOURS) + len(SHAPES) * len(COLOURS), np.uint8)
    for thing in objects:
        s, c = SHAPES.index(thing["shape"]), COLOURS.index(thing["colour"])
        for slot in (0, 1 + s, 1 + len(SHAPES) + c, 1 + len(SHAPES) + len(COLOURS) + s * len(COLOURS) + c):
            counts[slot] += 1
    depth = planes["depth"][middle, middle]
    normal = planes["normal"][middle, middle]
    return dict(
        rgb=rgb.transpose(2, 0, 1),
        seg=seg,
        colour=colour,
        material=material,
        size=size,
        word=word,
        counts=counts,
        depth=depth,
        normal=normal.transpose(2, 0, 1),
    )


def _render(index: int) -> tuple[dict[str, np.ndarray], dict]:
    scene = render_scene(scene_seed(0, SPLIT, index))
    meta = {key: scene.meta[key] for key in ("captions", "questions", "scene")}
    return scene_targets(scene.rgb, scene.planes, scene.meta), meta


def render(images: int, workers: int) -> None:
    """Render `images` scenes into one .npy file for each target and one JSON-lines file of texts."""
    WORK.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    with ProcessPoolExecutor(workers) as pool, open(WORK / "texts.jsonl.tmp", "w") as texts:
        results = pool.map(_render, range(images), chunksize=16)
        for i, (targets, meta) in enumerate(tqdm(results, total=images, mininterval=5)):
            for name, value in targets.items():
                if name not in arrays:
                    shape = (images, *value.shape)
                    arrays[name] = np.lib.format.open_memmap(WORK / f"{name}.npy", "w+", dtype=np.uint8, shape=shape)
                arrays[name][i] = value
            texts.write(json.dumps(meta) + "\n")
    for array in arrays.values():
        array.flush()
    os.replace(WORK / "texts.jsonl.tmp", WORK / "texts.jsonl")


def _outline(index: int, words: Sequence[str]) -> dict:
    rng = np.random.default_rng(scene_seed(0, SPLIT, index))
    scene = outline(sample_layout(rng, words))
    return {"captions": write_captions(scene, rng), "questions": write_questions(scene, rng), "scene": scene}


def write_outlines(images: int, workers: int, names: bool) -> None:
    """Write the texts of `images` scenes without rendering these; with `names`, many words stand on their signs."""
    WORK.mkdir(parents=True, exist_ok=True)
    outline_one = partial(_outline, words=sign_words()[0] if names else WORDS)
    with ProcessPoolExecutor(workers) as pool, replacing(WORK / "texts.jsonl") as new, open(new, "w") as texts:
        for meta in tqdm(pool.map(outline_one, range(images), chunksize=16), total=images, mininterval=5):
            texts.write(json.dumps(meta) + "\n")


# -- vision --------------------------------------------------------------------------------------------------------


class VisionTower(nn.Module):
    """The encoder without adaptors and experts, and linear heads that only training uses."""

    def __init__(self):
        super().__init__()
        config = prismer_tiny(experts=())
        self.trunk = VisionEncoder(config)
        for block in self.trunk.blocks:
            block.adaptor = nn.Identity()
        width, cells = config.vision_width, (config.patch_size // CELL) ** 2
        self.cells = config.patch_size // CELL
        self.dense = nn.ModuleDict(
            {
                name: nn.Linear(width, cells * classes)
                for name, classes in (
                    ("seg", len(SEG_CLASSES)),
                    ("colour", 1 + len(COLOURS)),
                    ("material", 1 + len(MATERIALS)),
                    ("size", 1 + len(SIZES)),
                    ("depth", 1),
                    ("normal", 3),
                )
            }
        )
        self.word = nn.Linear(width, 1 + len(WORDS))
        self.slots = 1 + len(SHAPES) + len(COLOURS) + len(SHAPES) * len(COLOURS)
        self.counts = nn.Linear(2 * width, self.slots * 6)

    def forward(self, rgb: Tensor) -> dict[str, Tensor]:
        trunk = self.trunk
        x = trunk.stems["rgb"](normalise_rgb(rgb, torch.float32)).flatten(2).mT + trunk.positional_embedding
        x = trunk.ln_pre(x)
        for block in trunk.blocks:
            x = block(x)
        x = trunk.ln_post(x)
        grid = trunk.config.grid
        out = {}
        for name, head in self.dense.items():
            y = head(x).unflatten(1, (grid, grid)).unflatten(-1, (self.cells, self.cells, -1))
            out[name] = y.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, classes, 32, 32)
        out["word"] = self.word(x).unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        pooled = torch.cat([x.mean(1), x.amax(1)], dim=-1)
        out["counts"] = self.counts(pooled).unflatten(-1, (6, self.slots))  # (B, 6, slots)
        return out


def vision_losses(out: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
    """The cross entropies of classes, counts and words, and the mean absolute errors of depth and normals."""
    losses = {name: F.cross_entropy(out[name], target[name].long()) for name in ("seg", "colour", "material", "size")}
    losses["word"] = F.cross_entropy(out["word"], target["word"].long()) * 2
    losses["counts"] = F.cross_entropy(out["counts"], target["counts"].long()) * 3
    losses["depth"] = F.l1_loss(out["depth"][:, 0], target["depth"].float() / 255)
    losses["normal"] = F.l1_loss(out["normal"], target["normal"].float() / 127.5 - 1)
    return losses


def vision_scores(model: VisionTower, data: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, float]:
    """Held-out accuracies of cells with an object, of patches with a word, and of counts."""
    right: dict[str, list] = {}
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            target = {k: torch.from_numpy(v[rows[start : start + 64]]) for k, v in data.items()}
            out = model(target["rgb"])
            for name in ("seg", "colour", "material", "size", "word", "counts"):
                guess, truth = out[name].argmax(1), target[name]
                ask = truth > 0 if name != "seg" else truth < len(SHAPES)
                right.setdefault(name, []).append((guess == truth)[ask].float())
    model.train()
    return {name: torch.cat(values).mean().item() for name, values in right.items()}


def cosine(step_share: float, peak: float, warmup: float = 0.03) -> float:
    """Learning rate at a share of the run: linear warm-up, then cosine to zero."""
    if step_share < warmup:
        return peak * step_share / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step_share - warmup) / (1 - warmup)))


def optimise(
    model: nn.Module,
    length: tuple[float, int],
    peak: float,
    loss_of: Callable[[int], dict[str, Tensor]],
    report: Callable[[], dict[str, float]],
    log: Path,
) -> None:
    """Train with AdamW for a fixed time or number of steps, with a cosine schedule over it.

    Args:
        model: trained in place.
        length: minutes, and steps, which count unless they are 0: a busy machine does fewer steps in a minute.
        peak: the highest learning rate.
        loss_of: the named losses of a step.
        report: scores for the log; called twenty times.
        log: the file of the log.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05)
    began, step, shown = time.time(), 0, -1
    lines = []
    minutes, steps = length
    while (share := step / steps if steps else (time.time() - began) / (60 * minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = cosine(share, peak)
        losses = loss_of(step)
        loss = sum(losses.values())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        if int(share * 20) > shown:
            shown = int(share * 20)
            row = {"step": step, "seconds": round(time.time() - began), "loss": round(loss.item(), 4)}
            row |= {k: round(v, 4) for k, v in report().items()}
            lines.append(json.dumps(row))
            print(lines[-1], flush=True)
    lines.append(json.dumps({"steps": step, "final": {k: round(v, 4) for k, v in report().items()}}))
    print(lines[-1], flush=True)
    log.write_text("\n".join(lines) + "\n")


def train_vision(length: tuple[float, int], batch: int, peak: float) -> None:
    """Train the vision tower; the last 500 scenes are held out for the scores."""
    torch.manual_seed(0)
    names = ("rgb", "seg", "colour", "material", "size", "word", "counts", "depth", "normal")
    data = {name: np.load(WORK / f"{name}.npy", mmap_mode="r") for name in names}
    total = len(data["rgb"])
    held_out = np.arange(total - 500, total)
    rng = np.random.default_rng(0)
    model = VisionTower()
    order: list[int] = []

    def loss_of(step: int) -> dict[str, Tensor]:
        while len(order) < batch:
            order.extend(rng.permutation(total - 500).tolist())
        rows = np.sort(np.array([order.pop() for _ in range(batch)]))
        target = {k: torch.from_numpy(v[rows]) for k, v in data.items()}
        return vision_losses(model(target["rgb"]), target)

    optimise(model, length, peak, loss_of, lambda: vision_scores(model, data, held_out), WORK / "vision.jsonl")
    save_file({k: v.contiguous() for k, v in model.trunk.state_dict().items()}, WORK / "vision.safetensors")


# -- text ----------------------------------------------------------------------------------------------------------


def plain_text_logits(decoder: TextDecoder, ids: Tensor) -> Tensor:
    """The decoder without cross-attention, adaptors and the extra layer: (R, T) ids -> (R, T, V) logits."""
    pad = decoder.config.pad_id
    attend = causal_attend(ids.ne(pad))
    x = decoder.embeddings(decoder.embeddings.word(ids), position_ids(ids, pad))
    for i, layer in enumerate(decoder.layers):
        x = layer.mlp(layer.attention(x, i, attend))
    return decoder.logits(decoder.transform(x))


def text_ids(tokenizer: Tokenizer, renamed: int = 0) -> list[list[int]]:
    """The token ids of every caption, and of every question with its read-out pad and answer.

    Args:
        tokenizer: spells the texts.
        renamed: how often each scene comes again with other names.
    """
    rows = []
    for index, line in enumerate((WORK / "texts.jsonl").read_text().splitlines()):
        metas, rng = [json.loads(line)], np.random.default_rng(index)
        metas += [rename_shapes(kind_names()[0], metas[0], {}, rng)[0] for _ in range(renamed)]
        for meta in metas:
            rows += [encode_caption(tokenizer, caption, "")[0] for caption in meta["captions"]]
            pairs = [(q["question"], a["answer"]) for q in meta["questions"] for a in q["answers"]]
            rows += [encode_qa(tokenizer, question, answer)[0] for question, answer in pairs]
    return rows


def train_tokenizer() -> Tokenizer:
    """Train a byte-level BPE on the cleaned texts of the scenes, with answers in the forms in which they occur."""
    texts = []
    for line in (WORK / "texts.jsonl").read_text().splitlines()[:6000]:
        meta = json.loads(line)
        texts += [clean_caption(caption) for caption in meta["captions"]]
        texts += [q["question"].capitalize() for q in meta["questions"]]
        texts += [" " + a["answer"].capitalize() for q in meta["questions"] for a in q["answers"]]
    return Tokenizer.train(texts, prismer_tiny().vocab_size)


def train_text(length: tuple[float, int], batch: int, peak: float, names: bool) -> None:
    """Train the text tower; the last 2,000 texts are held out.

    Args:
        length, peak: as for `optimise`.
        batch: texts of a step.
        names: for renamed scenes, with the tokenizer that spells any name; else a tokenizer is trained on the texts.
    """
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_folder(shipped_folder("names")) if names else train_tokenizer()
    tokenizer.save(WORK / "tokenizer")
    rows = text_ids(tokenizer, renamed=2 if names else 0)
    print(f"{len(rows)} texts, longest {max(map(len, rows))} tokens, mean {np.mean([len(r) for r in rows]):.1f}")
    pad = tokenizer.pad_id
    rng = np.random.default_rng(0)
    decoder = TextDecoder(prismer_tiny(vocab_size=tokenizer.vocab_size))
    held_out, rows = rows[-2000:], rows[:-2000]

    def loss(texts: list[list[int]]) -> Tensor:
        width = max(map(len, texts))
        ids = torch.tensor([t + [pad] * (width - len(t)) for t in texts])
        logits = plain_text_logits(decoder, ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad)

    def report() -> dict[str, float]:
        decoder.eval()
        with torch.inference_mode():
            value = float(np.mean([loss(held_out[i : i + 100]).item() for i in range(0, 2000, 100)]))
        decoder.train()
        return {"held_out_loss": value}

    # texts of similar length share a batch, so that few tokens are padding
    rows.sort(key=len)

    def loss_of(step: int) -> dict[str, Tensor]:
        start = rng.integers(0, len(rows) - 8 * batch)
        picked = rng.choice(8 * batch, batch, replace=False) + start
        return {"lm": loss([rows[i] for i in picked])}

    optimise(decoder, length, peak, loss_of, report, WORK / "text.jsonl")
    keep = ("embeddings.", "head.", "layers.")
    drop = (".cross.", ".adaptor.")
    tensors = {
        k: v.contiguous()
        for k, v in decoder.state_dict().items()
        if k.startswith(keep) and not any(d in k for d in drop)
    }
    save_file(tensors, WORK / "text.safetensors")


# -- packing -------------------------------------------------------------------------------------------------------


def pack() -> None:
    """Write both towers as one safetensors file, with the tokenizer and the recipe, into the package's assets."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    before = json.loads((ASSETS / "recipe.json").read_text()) if (ASSETS / "recipe.json").exists() else {}
    scenes, logs = before.get("scenes"), before.get("logs", {})
    for name, prefix in (("vision", "encoder."), ("text", "decoder.")):
        if (WORK / f"{name}.safetensors").exists():
            tensors |= {prefix + key: value for key, value in load_file(WORK / f"{name}.safetensors").items()}
            logs[name] = json.loads((WORK / f"{name}.jsonl").read_text().splitlines()[-1])
        else:
            shipped = load_file(ASSETS / "towers.safetensors")
            tensors |= {key: value for key, value in shipped.items() if key.startswith(prefix)}
    if (WORK / "rgb.npy").exists():
        scenes = {"split": SPLIT, "count": len(np.load(WORK / "rgb.npy", mmap_mode="r"))}
    ASSETS.mkdir(parents=True, exist_ok=True)
    with replacing(ASSETS / "towers.safetensors") as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    Tokenizer.from_folder(WORK / "tokenizer").save(ASSETS)
    recipe = {
        "script": "scripts/train_towers.py",
        "seed": 0,
        "scenes": scenes,
        "sha256": hashlib.sha256((ASSETS / "towers.safetensors").read_bytes()).hexdigest(),
        "parameters": sum(t.numel() for t in tensors.values()),
        "logs": logs,
    }
    write_json(ASSETS / "recipe.json", recipe)
    write_checksums(ASSETS)
    print(json.dumps(recipe, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("render", "outline", "vision", "text", "pack"))
    parser.add_argument("--images", type=int, default=24000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--steps", type=int, default=0, help="instead of minutes, on a busy machine")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--names", action="store_true", help="outline, text: for renamed scenes, with their tokenizer")
    args = parser.parse_args()
    if args.stage == "render":
        render(args.images, args.workers)
    elif args.stage == "outline":
        write_outlines(args.images, args.workers, args.names)
    elif args.stage == "vision":
        train_vision((args.minutes, args.steps), args.batch, args.lr)
    elif args.stage == "text":
        train_text((args.minutes, args.steps), args.batch, args.lr, args.names)
    else:
        pack()


if __name__ == "__main__":
    main()
