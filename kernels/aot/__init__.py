"""Kernels compiled ahead of time, without a GPU, and held to a budget: what `prismer.kernels.inspect` prints."""
