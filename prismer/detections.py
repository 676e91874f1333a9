"""DetectionTokens: the names that experts found in an image, as context tokens of the decoder.

Prismer (arXiv:2303.02506) leaves this to future work, in its last section: detections as sequences of text tokens
instead of painted maps. A token is a row of the decoder's word table, so that a name that was never seen in training is
spelt in known tokens, and what the decoder reads it may write.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prismer.batch import COLUMN, FACT_VALUES, PART, ROW
from prismer.config import PrismerConfig
from prismer.kernels.modules import LayerNorm, MultiheadAttention


class DetectionTokens(nn.Module):
    """Detections -> context tokens: project(norm(word + before(word before it) + facts)) + look(image token).

    The word before it in the same name tells the decoder, which has just written a part of a name, where the next part
    is. The image token is the one at the centre of the detection: what the image shows there, such as a colour, stands
    beside the name. The projection leads from the width of the text to that of the image tokens, because the keys and
    values of cross-attention are made of both kinds of token by one matrix.
    """

    # ZeRO-3 gathers all parameters of the module at once, instead of layer by layer
    _z3_leaf = True

    def __init__(self, config: PrismerConfig):
        super().__init__()
        self.grid = config.grid
        # the tables of all facts, one below the other
        self.facts = nn.Embedding(sum(FACT_VALUES), config.text_width)
        self.before = nn.Linear(config.text_width, config.text_width, bias=False)
        self.norm = LayerNorm(config.text_width)
        self.project = nn.Linear(config.text_width, config.vision_width)
        self.look = nn.Linear(config.vision_width, config.vision_width, bias=False)
        # small beside the rows of words, so that the words are heard from the start
        nn.init.normal_(self.facts.weight, std=config.init_std / 5)
        nn.init.normal_(self.look.weight, std=config.init_std)
        nn.init.orthogonal_(self.before.weight)
        nn.init.eye_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, words: Tensor, facts: Tensor, image: Tensor) -> Tensor:
        """Context tokens (B, S, vision width).

        Args:
            words: (B, S, D) rows of the word table.
            facts: (B, S, 6), see `Detections`.
            image: (B, N, vision width) context tokens, of which those of the RGB image come first.
        """
        facts = facts.int()
        first = facts[..., PART].eq(0)
        x = words + self.before(F.pad(words, (0, 0, 1, -1)).masked_fill(first[..., None], 0))
        for table, column in zip(self.facts.weight.split(FACT_VALUES), facts.unbind(-1), strict=True):
            x = x + F.embedding(column, table)
        # the middle of a cell lies in one patch
        row, column = ((2 * facts[..., i] + 1) * self.grid // (2 * FACT_VALUES[i]) for i in (ROW, COLUMN))
        B, N, D = image.shape
        starts = torch.arange(0, B * N, N, device=facts.device, dtype=facts.dtype)
        places = (row * self.grid + column + starts[:, None]).flatten()
        seen = image.reshape(B * N, D).index_select(0, places).view(B, -1, D)
        return self.project(self.norm(x)) + self.look(seen)


def start_copying(cross: MultiheadAttention, detections: DetectionTokens) -> None:
    """Initialise cross-attention so that it hands on words as they are, and finds the token behind the one it is at.

    A word passes four matrices from its row of the table to the residual stream of the decoder. As products of random
    matrices they say nothing at first, and a decoder learns to copy only after thousands of steps.
    """
    with torch.no_grad():
        nn.init.orthogonal_(cross.output.weight)
        cross.value.weight.copy_(cross.output.weight.T @ detections.project.weight.T)
        # a key has the word before it, turned by `before`: a query turned alike finds it
        nn.init.orthogonal_(cross.query.weight)
        cross.key.weight.copy_(cross.query.weight @ detections.project.weight.T)
        cross.query.weight.copy_(cross.query.weight @ detections.before.weight)
