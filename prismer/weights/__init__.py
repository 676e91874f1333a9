"""Weights on disk: model folders, the hub, published checkpoints and pre-trained backbones."""
