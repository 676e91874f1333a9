"""The text tower of a CLIP model, loaded with open_clip: texts -> raw embeddings."""

import hashlib
import warnings
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from prismer.errors import InputError

_BATCH = 256
_CONFIG = "open_clip_config.json"
# what open_clip and torch raise on weights that are damaged or do not fit
_LOAD_ERRORS = (OSError, RuntimeError, ValueError, TypeError, LookupError, EOFError, UnpicklingError, SafetensorError)
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth")


class TextTower:
    """A loaded text tower, fp32, in evaluation mode.

    Args:
        source: a folder with open_clip_config.json and weights; or NAME@FILE, an architecture of open_clip and a file
            of weights; or NAME@TAG or hf-hub:ORG/MODEL, which open_clip takes from the hub. Only the last two use the
            network, and only if the files are not in the hub's cache.
        device: where it runs.

    Attributes:
        name: `source`, with paths made absolute.
        width: numbers per embedding.
        sha256: of the tower's tensors in fp32, by name; it does not depend on the kind of weight file.
        library: version of open_clip.

    Raises:
        ValueError: if there are no weights, or they do not fit the architecture.
    """

    def __init__(self, source: str, device: str | torch.device = "cpu"):
        # not at the top: importing open_clip takes seconds
        import open_clip

        self.name, architecture, weights = _locate(str(source))
        try:
            model = open_clip.create_model(
                architecture,
                weights,
                device=device,
                # otherwise open_clip would load a hub tower's own weights first
                pretrained_text=False,
                require_pretrained=True,
            )
            self._tokenize = open_clip.get_tokenizer(architecture)
        except _LOAD_ERRORS as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise InputError(
                f"the CLIP model {source} cannot be loaded ({reason}); "
                f"give weights of its architecture, as safetensors or a state dict"
            ) from None
        # only the text half is used; the vision half is most of the memory
        del model.visual
        self.library = open_clip.__version__
        self.sha256 = _digest(model)
        self._device = device
        self._tower = _Encode(model.eval().requires_grad_(False))
        # in a causal tower, tokens after the end of a text cannot change its embedding: they are cut off to save time
        self._is_causal = (
            type(model) is open_clip.CLIP and model.attn_mask is not None and model.text_pool_type == "argmax"
        )
        self.width = self._run(self._tokenize([""])).shape[1]

    @torch.inference_mode()
    def embed(self, texts: list[str], progress: bool = False) -> Tensor:
        """The projections of `texts`, not normalised; longer texts than the tower reads are cut, with one warning.

        Returns:
            (len(texts), W) fp32 on the CPU.

        Raises:
            ValueError: if an embedding is not finite.
        """
        tokens = torch.cat([self._tokenize(texts[i : i + 4096]) for i in range(0, len(texts), 4096)])
        ends = tokens.argmax(1)
        if self._is_causal and (ends == tokens.shape[1] - 1).any():
            full = (ends == tokens.shape[1] - 1).nonzero().flatten().tolist()
            warnings.warn(
                f"{len(full)} texts fill the {tokens.shape[1]} tokens of the tower and may be cut, such as "
                f"{texts[full[0]][:60]!r}",
                stacklevel=2,
            )
        embeddings = torch.empty(len(texts), self.width)
        with tqdm(total=len(texts), desc="embed", unit="text", disable=not progress) as bar:
            # sorted, so that a batch holds texts of one length
            for rows in ends.argsort(stable=True).split(_BATCH):
                embeddings[rows] = self._run(tokens[rows]).cpu()
                bar.update(len(rows))
        if not embeddings.isfinite().all():
            raise InputError(f"the tower {self.name} gives numbers that are not finite; get it again")
        return embeddings

    @torch.inference_mode()
    def _run(self, tokens: Tensor) -> Tensor:
        shortened = {}
        if self._is_causal:
            T = int(tokens.argmax(1).max()) + 1
            tokens, model = tokens[:, :T], self._tower.model
            shortened["model.positional_embedding"] = model.positional_embedding[:T]
            shortened["model.attn_mask"] = model.attn_mask[:T, :T]
        return functional_call(self._tower, shortened, (tokens.to(self._device),)).float()


class _Encode(nn.Module):
    """`encode_text` as a forward, which `functional_call` needs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens, normalize=False)


def _locate(source: str) -> tuple[str, str, str | None]:
    """The source with absolute paths, and the architecture and weights that `open_clip.create_model` takes."""
    import open_clip

    if source.startswith("hf-hub:"):
        return source, source, None
    folder = Path(source)
    if folder.is_dir():
        found = [path for pattern in _WEIGHTS for path in folder.glob(pattern)]
        if not (folder / _CONFIG).is_file() or not found:
            lacking = "weights" if (folder / _CONFIG).is_file() else _CONFIG
            raise InputError(
                f"{folder} has no {lacking}; give a folder with both, or an architecture of open_clip and a file of "
                f"weights, as in ViT-L-14-quickgelu@FILE"
            )
        folder = str(folder.resolve())
        return folder, f"local-dir:{folder}", None
    name, _, weights = source.partition("@")
    if name.replace("/", "-") not in open_clip.list_models():
        raise InputError(
            f"{name} is neither a folder nor an architecture of open_clip; give a folder with {_CONFIG} and weights, "
            f"or e.g. ViT-L-14-quickgelu@FILE"
        )
    if Path(weights).is_file():
        weights = str(Path(weights).resolve())
    elif weights not in open_clip.list_pretrained_tags_by_model(name):
        raise InputError(
            f"no CLIP weights are at {weights or 'hand'} for {name}; name their file as {name}@FILE, or load them from "
            f"the hub by a tag of open_clip, as in ViT-L-14-quickgelu@openai"
        )
    return f"{name}@{weights}", name, weights


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        # the temperature is part of neither tower
        if not key.startswith("logit_"):
            digest.update(f"{key} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()
