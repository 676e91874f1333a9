"""Datasets in other formats (COCO, VQAv2, folders, tars), and their import into shards."""
