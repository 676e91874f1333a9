"""Data: shards on disk, imports, rendered scenes, experts, semantics, and the loader that feeds the model."""
