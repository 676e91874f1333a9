"""Training: settings, data, ZeRO, the loop, run folders and evaluation."""
