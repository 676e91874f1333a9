"""Several datasets in one run: which ones and how much of each, one view of their samples, and the order of them."""
