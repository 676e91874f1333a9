"""What made the shipped assets, and the check for the day there is a GPU (gpu_check.py)."""
