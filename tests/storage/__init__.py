"""Tests of places in buckets: objects, the cache of whole files, and what is read from and written to them."""
