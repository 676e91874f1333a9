"""From a model and a dataset to numbers: predictions, scores, and the files that evaluation servers take."""
