"""Counts what torch is asked to do: operators that launch something, views and allocations left out."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

NO_LAUNCH = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")


class Counting(TorchDispatchMode):
    """Counts the operators that do something."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func._schema.name.removeprefix("aten::") not in NO_LAUNCH:
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))
