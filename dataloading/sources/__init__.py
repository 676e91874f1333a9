"""Other people's datasets, read and imported."""
