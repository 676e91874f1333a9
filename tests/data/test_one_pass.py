"""Proves that one pass over a list gives each wanted part, and that work runs only so far ahead of its consumer.

Run: pytest tests/data/test_one_pass.py
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest

from prismer.dataloading.sources.one_pass import submit_ahead, wanted_parts


@pytest.mark.parametrize("read", [0, 1, 3])
@pytest.mark.parametrize("wanted", [[0, 1, 2, 3], [1, 3], [2], [], [0, 4, 9]])
def test_each_wanted_part_has_its_items_however_many_of_them_are_read(wanted, read):
    found = {number: list(islice(part, read)) for number, part in wanted_parts(range(11), 3, wanted)}
    parts = {number: list(range(3 * number, min(3 * number + 3, 11))) for number in wanted}
    assert found == {number: part[:read] for number, part in parts.items()}


def test_work_is_submitted_only_so_far_ahead_and_in_order():
    begun = []

    def items():
        for i in range(9):
            begun.append(i)
            yield i

    with ThreadPoolExecutor(2) as pool:
        for i, (item, future) in enumerate(submit_ahead(pool, lambda i: i * i, items(), 2)):
            assert (item, future.result()) == (i, i * i)
            assert begun == list(range(min(i + 3, 9)))
