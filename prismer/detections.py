"""DetectionTokens: the names that experts found in an image, as context tokens of the decoder.

Prismer (arXiv:2303.02506) leaves this to future work, in its last section: detections as sequences of text tokens
instead of painted maps. A token is a row of the decoder's word table, so that a name that was never seen in training is
spelt in known tokens, and what the decoder reads it may write.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from prismer.batch import FACT_VALUES
from prismer.config import PrismerConfig
from prismer.kernels.modules import LayerNorm


class DetectionTokens(nn.Module):
    """Word rows and facts of detections -> context tokens: project(norm(word + the embedding of each fact)).

    The projection leads from the width of the text to that of the image tokens, because the keys and values of
    cross-attention are made of both kinds of token by one matrix.
    """

    # ZeRO-3 gathers all parameters of the module at once, instead of layer by layer
    _z3_leaf = True

    def __init__(self, config: PrismerConfig):
        super().__init__()
        # the tables of all facts, one below the other
        self.facts = nn.Embedding(sum(FACT_VALUES), config.text_width)
        self.norm = LayerNorm(config.text_width)
        self.project = nn.Linear(config.text_width, config.vision_width)
        for layer in (self.facts, self.project):
            nn.init.normal_(layer.weight, std=config.init_std)
        nn.init.zeros_(self.project.bias)

    def forward(self, words: Tensor, facts: Tensor) -> Tensor:
        """words: (B, S, D) rows of the word table; facts: (B, S, 6), see `Detections`. Returns (B, S, vision width)."""
        x = words
        for table, column in zip(self.facts.weight.split(FACT_VALUES), facts.int().unbind(-1), strict=True):
            x = x + F.embedding(column, table)
        return self.project(self.norm(x))
