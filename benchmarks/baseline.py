"""The baseline of whole jobs: Prismer computed the way its released code computes it, on the parameters of our model.

Written from a description of what that code does (Prismer, arXiv:2303.02506), with the library calls of its time:

* Labels reach the encoder as fp32 maps; ids are expanded to 64 channels per pixel.
* The encoder runs in (L, B, D) order, normalises its streams in fp32, resizes the positional table for each expert and
  adds instance rows id by id.
* The decoder has no cache: each step of a caption runs the whole prefix of every beam, and each candidate answer runs
  its whole question, each against its own copy of the image tokens.
* The head computes logits of every position.

All of this slowness is deliberate. Everything else is as fast as plain PyTorch makes it.

Legend: L tokens of a stream, N image tokens, R rows of text, T tokens of a row, V vocabulary.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.published_loader import BACKGROUND, LOW_LEVEL, MEAN, STD, expand
from prismer.batch import IGNORE_INDEX, Batch, ImageBatch
from prismer.model import Prismer
from prismer.texts import encode_answer, encode_class_name, encode_prompt, encode_question


@dataclass(frozen=True)
class HostImages:
    """Images and labels as the released loader hands them to the encoder.

    Attributes:
        rgb: (B, 3, h, w) fp32, normalised.
        labels: expert -> (B, C, s, s) fp32; C = 1 or 3 intensities in -1..1, or the 64 features of the pixel's id.
        instances: (B, 1, s, s) int64 ids of objects; None without the object expert.
        instance_rows: (256,) row of the instance table for each id; None for the id modulo the table's size.
    """

    rgb: Tensor
    labels: dict[str, Tensor]
    instances: Tensor | None
    instance_rows: Tensor | None

    def __len__(self) -> int:
        return self.rgb.shape[0]


def expand_images(images: ImageBatch) -> HostImages:
    """Normalise and expand on the host, image by image and map by map, with a boolean mask for each id."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    labels = {}
    for name, maps in images.labels.items():
        if name in LOW_LEVEL:
            labels[name] = torch.stack([_stretch(map_) for map_ in maps])
            continue
        tables = images.features[images.rows[name]]  # (B, 256, 64)
        pairs = zip(maps, tables, strict=True)
        labels[name] = torch.stack([expand(map_[0], table, table[BACKGROUND]) for map_, table in pairs])
    objects = images.labels.get("obj_detection")
    return HostImages(
        rgb=(images.rgb.float() / 255 - mean) / std,
        labels=labels,
        instances=None if objects is None else objects.long(),
        instance_rows=images.instance_rows,
    )


def _stretch(map_: Tensor) -> Tensor:
    x = map_.float() / 255
    low, high = x.min(), x.max()
    return 2 * (x - low) / (high - low + 1e-6) - 1


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _cast_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Normalise in fp32 and cast back, as CLIP does."""
    return _norm(x.float(), norm).to(x.dtype)


def _squared_relu(x: Tensor) -> Tensor:
    return torch.square(F.relu(x))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _multihead(attn: nn.Module, q: Tensor, kv: Tensor) -> Tensor:
    """What `nn.MultiheadAttention` computes: (L, B, D) queries over keys and values from (M, B, D)."""
    return F.multi_head_attention_forward(
        q,
        kv,
        kv,
        q.shape[-1],
        attn.num_heads,
        attn.in_proj_weight,
        attn.in_proj_bias,
        None,
        None,
        False,
        0.0,
        attn.out_proj.weight,
        attn.out_proj.bias,
        need_weights=False,
    )[0]


def _tile(x: Tensor, times: int) -> Tensor:
    """Each row `times` times in a row; repeated, then put in order: two copies."""
    B = x.shape[0]
    order = torch.arange(B * times, device=x.device).view(times, B).T.flatten()
    return x.repeat(times, *[1] * (x.dim() - 1)).index_select(0, order)


def _pad(rows: list[list[int]], pad_id: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])


class Baseline:
    """The released way of computing, on the parameters of a Prismer; it does not copy them.

    Args:
        model: must have fp32 weights; its training mode decides about dropout and batch norm.
        autocast: torch.bfloat16 or torch.float16 to run products in that precision; None for fp32.

    Raises:
        ValueError: if the weights are not fp32.
    """

    def __init__(self, model: Prismer, autocast: torch.dtype | None = None):
        dtype = model.encoder.positional_embedding.dtype
        if dtype != torch.float32:
            raise ValueError(f"the model has {dtype} weights; pass fp32 weights, the baseline casts them itself")
        self.model, self.config, self.autocast = model, model.config, autocast

    def _casting(self) -> AbstractContextManager:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.model.device.type, self.autocast)

    # images

    def encode(self, images: ImageBatch | HostImages) -> Tensor:
        """(B, N, D) image tokens; an ImageBatch is expanded on the host first."""
        images = images if isinstance(images, HostImages) else expand_images(images)
        with self._casting():
            return self._encode(images)

    def _encode(self, images: HostImages) -> Tensor:
        encoder, config = self.model.encoder, self.config
        x = F.conv2d(images.rgb, encoder.stems["rgb"].weight, stride=config.patch_size)
        x = x.flatten(2).permute(2, 0, 1)  # (L, B, D)
        x = x + encoder.positional_embedding[:, None].to(x.dtype)
        if config.experts:
            tokens = [self._expert(name, images) for name in config.experts]
            x = torch.cat([x, self._resample(torch.cat(tokens))])
        x = _cast_norm(x, encoder.ln_pre)
        activation = _quick_gelu if config.vision_activation == "quick_gelu" else F.gelu
        for block in encoder.blocks:
            y = _cast_norm(x, block.ln_1)
            x = x + _multihead(block.attn, y, y)
            adaptor = block.adaptor
            y = _linear(_cast_norm(x, adaptor.norm), adaptor.down)
            x = x + _linear(_squared_relu(y), adaptor.up)
            y = _linear(_cast_norm(x, block.ln_2), block.mlp.c_fc)
            x = x + _linear(activation(y), block.mlp.c_proj)
        return _cast_norm(x, encoder.ln_post).permute(1, 0, 2)

    def stem(self, name: str, label: Tensor) -> Tensor:
        """(B, C, s, s) fp32 label of an expert -> (B, D, g, g)."""
        stem, config = self.model.encoder.stems[name], self.config
        side = config.label_size * (16 if name in LOW_LEVEL else 4) // config.patch_size
        x = F.interpolate(label, size=(side, side), mode="bilinear", align_corners=True)
        for conv, norm in zip(stem.convs, stem.norms, strict=True):
            x = F.conv2d(x, conv.weight, stride=conv.stride, padding=1)
            x = F.batch_norm(
                x,
                norm.running_mean,
                norm.running_var,
                norm.weight,
                norm.bias,
                self.model.training,
                norm.momentum,
                norm.eps,
            )
            x = F.relu(x)
        return F.conv2d(x, stem.project.weight)

    def _expert(self, name: str, images: HostImages) -> Tensor:
        """(g * g, B, D) tokens of one expert."""
        x = self.stem(name, images.labels[name])
        grid = x.shape[-1]
        if name == "obj_detection":
            self._add_instances(x, images)
        positions = self._positions(grid).to(x.dtype)
        return x.flatten(2).permute(2, 0, 1) + positions[:, None]

    def _positions(self, grid: int) -> Tensor:
        """(grid * grid, D) positions, resized again at each call."""
        table, side = self.model.encoder.positional_embedding, self.config.grid
        if side == grid:
            return table
        image = table.view(1, side, side, -1).permute(0, 3, 1, 2)
        return F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)[0].flatten(1).T

    def _add_instances(self, x: Tensor, images: HostImages) -> None:
        """Add the row of its object to each cell of x (B, D, g, g), in place, one id of the batch after another."""
        table, rows = self.model.encoder.instance_embedding, images.instance_rows
        cells = F.interpolate(images.instances.float(), size=x.shape[-2:], mode="nearest")[:, 0]
        view = x.permute(1, 0, 2, 3)
        for i in images.instances.unique().tolist():
            row = table[i % len(table) if rows is None else rows[i]].to(x.dtype)
            where = (slice(None), *(cells == i).nonzero(as_tuple=True))
            view[where] = view[where] + row[:, None]

    def _resample(self, x: Tensor) -> Tensor:
        """(L, B, D) expert tokens -> (latents, B, D)."""
        resampler = self.model.encoder.resampler
        z = resampler.latents[:, None].to(x.dtype).repeat(1, x.shape[1], 1)
        for block in resampler.blocks:
            # the released code normalises the latents twice, as queries and as keys
            kv = torch.cat([_cast_norm(z, block.ln_1), _cast_norm(x, block.ln_2)])
            z = z + _multihead(block.attn, _cast_norm(z, block.ln_1), kv)
            y = _linear(_cast_norm(z, block.ln_ff), block.mlp.c_fc)
            z = z + _linear(_squared_relu(y), block.mlp.c_proj)
        return z

    # text

    def logits(self, ids: Tensor, context: Tensor, keep: Tensor | None = None) -> Tensor:
        """Compute the logits of every position.

        Args:
            ids: (R, T) int64.
            context: (R, N, D) image tokens of each row.
            keep: (R, T) bool, True for tokens that are keys and get a position; None for all but `<pad>`.

        Returns:
            (R, T, V).
        """
        with self._casting():
            return self._logits(ids, context, ids.ne(self.config.pad_id) if keep is None else keep)

    def _logits(self, ids: Tensor, context: Tensor, keep: Tensor) -> Tensor:
        decoder, T = self.model.decoder, ids.shape[1]
        e, pad_id = decoder.embeddings, self.config.pad_id
        positions = keep.cumsum(1) * keep + pad_id
        x = F.embedding(ids, e.word.weight, pad_id) + e.token_type.weight[0]
        x = self._drop(_norm(x + F.embedding(positions, e.position.weight, pad_id), e.norm))
        causal = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril()
        mask = (1.0 - (causal & keep[:, None]).to(x.dtype)[:, None]) * torch.finfo(x.dtype).min
        for layer in decoder.layers:
            x = self._attention(layer.attention, x, x, mask)
            x = self._attention(layer.cross, x, context, None)
            adaptor = layer.adaptor
            x = _norm(x + _linear(_squared_relu(_linear(x, adaptor.down)), adaptor.up), adaptor.norm)
            x = self._feed_forward(layer.mlp, x)
        x = self._feed_forward(decoder.extra.mlp, self._attention(decoder.extra.attention, x, x, mask))
        x = _norm(F.gelu(_linear(x, decoder.head.dense)), decoder.head.norm)
        return F.linear(x, e.word.weight, decoder.head.bias)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.model.training)

    def _attention(self, sub: nn.Module, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """RoBERTa's attention sub-layer, self-attention or cross-attention; `mask` is added to the scores."""
        q, k, v = (
            _linear(source, layer).unflatten(-1, (sub.num_heads, -1)).transpose(1, 2)
            for source, layer in ((x, sub.query), (context, sub.key), (context, sub.value))
        )
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores + mask
        out = self._drop(scores.softmax(-1)) @ v
        return _norm(self._drop(_linear(out.transpose(1, 2).flatten(2), sub.output)) + x, sub.norm)

    def _feed_forward(self, sub: nn.Module, x: Tensor) -> Tensor:
        y = _linear(F.gelu(_linear(x, sub.intermediate)), sub.output)
        return _norm(self._drop(y) + x, sub.norm)

    def _losses(self, ids: Tensor, labels: Tensor, context: Tensor) -> Tensor:
        """(R,) label-smoothed loss of each row of text, summed over its targets."""
        logits = self.logits(ids, context)[:, :-1].contiguous()
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(),
            labels[:, 1:].flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="none",
            label_smoothing=self.config.label_smoothing,
        )
        return losses.view(len(ids), -1).sum(1)

    # jobs

    def loss(self, batch: Batch) -> Tensor:
        """The training loss, a scalar.

        Args:
            batch: must have one text for each image; its images may be expanded already.

        Raises:
            ValueError: if an image has several texts.
        """
        ids, labels = batch.texts.ids, batch.texts.labels
        if ids.shape[1] != 1:
            raise ValueError(f"each image has {ids.shape[1]} texts, the baseline takes one; repeat the image")
        losses = self._losses(ids[:, 0], labels[:, 0], self.encode(batch.images))
        return (batch.texts.weights[:, 0] * losses).mean()

    @torch.no_grad()
    def caption(
        self, images: ImageBatch | HostImages, beams: int = 3, max_length: int = 20, min_length: int = 8
    ) -> list[str]:
        """Write one caption per image with beam search; both lengths include `<s>` and the prefix."""
        tokenizer = self.model.tokenizer
        prompt = encode_prompt(tokenizer, self.config.caption_prefix)
        generated = self._beam_search(self.encode(images), prompt, beams, max_length, min_length)
        return [tokenizer.decode(ids[len(prompt) :]).strip().capitalize() + "." for ids in generated]

    def _beam_search(
        self, context: Tensor, prompt: list[int], beams: int, max_length: int, min_length: int
    ) -> list[list[int]]:
        """Best hypothesis of each image, prompt included; it works on Python lists, as the released library does."""
        B, V, eos_id = len(context), self.config.vocab_size, self.config.eos_id
        context = context.repeat_interleave(beams, dim=0)
        ids = torch.tensor([prompt] * (B * beams), device=context.device)
        # all beams of an image start the same: the first step may extend only the first beam
        sums = torch.tensor([[0.0, *[-1e9] * (beams - 1)]] * B, device=context.device)
        hypotheses: list[list[tuple[float, list[int]]]] = [[] for _ in range(B)]
        done = [False] * B
        while ids.shape[1] < max_length and not all(done):
            length = ids.shape[1]
            # a `<pad>` that the model generates counts as a token
            logits = self.logits(ids, context, torch.ones_like(ids, dtype=torch.bool))[:, -1]
            log_probs = logits.float().log_softmax(-1)
            if length < min_length:
                log_probs[:, eos_id] = float("-inf")
            best, index = (log_probs.view(B, beams, V) + sums[..., None]).flatten(1).topk(2 * beams)
            onward: list[tuple[int, int, float]] = []
            for b, candidates in enumerate(zip(best.tolist(), index.tolist(), strict=True)):
                if done[b]:
                    onward += [(b * beams, self.config.pad_id, 0.0)] * beams
                    continue
                before = len(onward)
                for rank, (total, i) in enumerate(zip(*candidates, strict=True)):
                    row, token = b * beams + i // V, i % V
                    if token != eos_id:
                        onward.append((row, token, total))
                    elif rank < beams:
                        _add_hypothesis(hypotheses[b], total / length, ids[row].tolist(), beams)
                    if len(onward) == before + beams:
                        break
                full = len(hypotheses[b]) == beams
                done[b] = full and hypotheses[b][-1][0] >= candidates[0][0] / length
            rows, tokens, totals = (torch.tensor(column, device=ids.device) for column in zip(*onward, strict=True))
            ids = torch.cat([ids[rows], tokens[:, None]], dim=1)
            sums = totals.view(B, beams)
        for b in range(B):
            for row in range(b * beams, (b + 1) * beams) if not done[b] else ():
                score = sums.flatten()[row].item() / ids.shape[1]
                _add_hypothesis(hypotheses[b], score, ids[row].tolist(), beams)
        return [found[0][1] for found in hypotheses]

    def rank(
        self, images: ImageBatch | HostImages, questions: list[str], answers: list[str], top_k: int
    ) -> tuple[Tensor, Tensor]:
        """Answer one question per image: score the `top_k` answers with the likeliest first tokens.

        Returns:
            (B, k) int64 indices of these answers in list order, and (B, k) scores.
        """
        tokenizer = self.model.tokenizer
        prompts = [encode_question(tokenizer, question) for question in questions]
        return self._rank(images, prompts, [encode_answer(tokenizer, answer) for answer in answers], top_k)

    def classify(
        self, images: ImageBatch | HostImages, class_names: list[str], top_k: int = 32, prefix: str = "A photo of a"
    ) -> tuple[Tensor, Tensor]:
        """Rank class names after a prefix, as `rank` does answers after a question."""
        tokenizer = self.model.tokenizer
        prompts = [encode_prompt(tokenizer, prefix)] * len(images)
        names = [encode_class_name(tokenizer, name) for name in class_names]
        return self._rank(images, prompts, names, top_k)

    @torch.no_grad()
    def _rank(
        self, images: ImageBatch | HostImages, prompts: list[list[int]], answers: list[list[int]], top_k: int
    ) -> tuple[Tensor, Tensor]:
        pad_id, device = self.config.pad_id, self.model.device
        context = self.encode(images)
        # every answer is padded to the longest of the whole list
        prompt_ids, answer_ids = (_pad(rows, pad_id).to(device) for rows in (prompts, answers))
        probabilities = self.logits(prompt_ids, context)[:, -1].float().softmax(-1)
        # a stable sort, to be deterministic: the released code leaves the order of ties open
        order = probabilities.index_select(1, answer_ids[:, 0]).sort(dim=1, descending=True, stable=True)
        chosen = order.indices[:, :top_k].sort(dim=1).values
        B, k = chosen.shape
        targets = answer_ids[chosen.flatten()]
        ids = torch.cat([_tile(prompt_ids, k), targets], dim=1)
        targets = targets.masked_fill(targets == pad_id, IGNORE_INDEX)
        unasked = ids.new_full((B * k, prompt_ids.shape[1]), IGNORE_INDEX)
        losses = self._losses(ids, torch.cat([unasked, targets], dim=1), _tile(context, k))
        return chosen, (-losses / targets.ne(IGNORE_INDEX).sum(1)).view(B, k)


def _add_hypothesis(found: list[tuple[float, list[int]]], score: float, ids: list[int], beams: int) -> None:
    """Add a hypothesis and keep the `beams` best, best first."""
    found.append((score, ids))
    found.sort(key=lambda hypothesis: -hypothesis[0])
    del found[beams:]
