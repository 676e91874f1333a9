"""Fixtures for the tests of ops."""

import pytest


@pytest.fixture(params=("baseline", "avx2", "avx512"))
def isa(request, monkeypatch):
    """Run native ops on one instruction set, whose name the fixture returns."""
    from tests.ops.native_sets import HERE

    if request.param not in HERE:
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("PRISMER_CPU_ISA", request.param)
    return request.param
