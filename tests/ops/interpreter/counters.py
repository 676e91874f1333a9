"""What interpreted kernels move and multiply, counted lane by lane."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Ledger:
    """What the kernels launched inside one `interpreted()` block did.

    Attributes:
        launches, programs: how many of each ran.
        bytes_read, bytes_written: bytes issued: every lane that is not masked off counts, also where several lanes or
            programs read the same address.
        dot_flops: 2 * M * N * K for a dot of (M, K) and (K, N), padding included.
        kernels: one name for each launch, in order.
        traffic: (kernel, argument) -> [bytes read, bytes written].
    """

    launches: int = 0
    programs: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    dot_flops: int = 0
    kernels: list[str] = field(default_factory=list)
    traffic: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def count_launch(self, kernel: str) -> None:
        self.launches += 1
        self.kernels.append(kernel)

    def count_access(self, kernel: str, argument: str, verb: str, size: int) -> None:
        """Count `size` bytes of a "load", a "store" or an "atomic", which does both."""
        read, written = size * (verb != "store"), size * (verb != "load")
        self.bytes_read += read
        self.bytes_written += written
        traffic = self.traffic.setdefault((kernel, argument), [0, 0])
        traffic[0] += read
        traffic[1] += written

    def count_dot(self, a_size: int, columns: int) -> None:
        """Count a dot of an operand of `a_size` numbers with one of so many columns."""
        self.dot_flops += 2 * a_size * columns
