"""Rules for transformer towers: layer norms, feed-forwards and attention of torch, open_clip and transformers."""

from prismer.kernels.layer_norm import layer_norm
from prismer.kernels.patch import Rule


def _layer_norm_forward(self, x):
    return layer_norm(x, self.weight, self.bias, self.eps)


def _check_layer_norm(module):
    if len(module.normalized_shape) != 1:
        return f"it normalises {len(module.normalized_shape)} dimensions, the fused one the last alone"
    return None


RULES = (
    Rule(
        "layer_norm",
        "torch.nn.modules.normalization.LayerNorm",
        {"forward": _layer_norm_forward},
        _check_layer_norm,
    ),
)
