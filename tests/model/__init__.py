"""Tests of the model, its weights and its inference."""
