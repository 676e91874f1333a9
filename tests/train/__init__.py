"""Tests of training runs, ZeRO and resumption."""
