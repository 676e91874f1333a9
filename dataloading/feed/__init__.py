"""From stored samples to the tensors of a batch."""
