"""From stored samples, or a user's images, to the tensors of a batch."""
