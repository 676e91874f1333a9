"""Benchmarks: every op against its peers, the loader, and whole jobs."""
