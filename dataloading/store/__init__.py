"""Datasets on disk: label maps, the JSON of samples, shards and their index files."""
