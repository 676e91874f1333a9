"""Tests of stored samples, importers, the loader and the embedded dataset."""
