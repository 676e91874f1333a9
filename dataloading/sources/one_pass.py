"""One pass over a long list: the parts of it that are wanted, and work that threads do ahead of their consumer."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def wanted_parts(items: Iterable[Item], size: int, wanted: Collection[int]) -> Iterator[tuple[int, Iterator[Item]]]:
    """The wanted parts of a list: part k holds items k size .. (k + 1) size - 1. Only one item is in memory at a time.

    Args:
        items: the list, iterated once.
        size: items of a part.
        wanted: numbers of parts.

    Returns:
        The number and the items of each wanted part, in order.
    """
    iterator, number, left = iter(items), 0, set(wanted)
    while left:
        part = islice(iterator, size)
        if number in left:
            yield number, part
            left.remove(number)
        # skips the rest of the part, or all of it if it is not wanted
        for _ in part:
            pass
        number += 1


def submit_ahead(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], limit: int
) -> Iterator[tuple[Item, Future[Result]]]:
    """(item, future of work(item)) in order, with at most `limit` later items submitted ahead."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) > limit:
            yield waiting.popleft()
    yield from waiting
