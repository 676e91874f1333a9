"""Fixtures of the tests of ops."""

import pytest


@pytest.fixture(params=("baseline", "avx2", "avx512"))
def isa(request, monkeypatch):
    """Native ops on one instruction set."""
    from tests.ops.native_sets import HERE

    if request.param not in HERE:
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("PRISMER_CPU_ISA", request.param)
    return request.param
