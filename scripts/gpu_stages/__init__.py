"""The stages of scripts/gpu_check.py. They import only prismer's kernels and model, and give records."""
