"""Tests of the expert networks and the labelling job."""
