"""The dataset on disk: label maps, shards and their index."""
