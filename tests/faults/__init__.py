"""Tests with drawn faults: damaged files, odd texts, wrong settings."""
