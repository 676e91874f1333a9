"""The embedded dataset: ray-cast scenes with exact labels and texts."""
