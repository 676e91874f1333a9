"""Samples drawn as pictures for people."""
