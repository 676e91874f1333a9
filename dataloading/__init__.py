"""Data at rest and in flight: label maps, shards, rendered scenes, the DALI pipeline and the loader."""
