"""Tests of predictions, their scores, and the files that evaluation servers take."""
