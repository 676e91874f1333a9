"""What kernels/gemm.py says that one product costs, for the ledger tests of ops that consist of products."""

from dataclasses import dataclass

from prismer.kernels.gemm import _tiles


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Traffic and work of kernels.

    Attributes:
        read, written: in bytes.
        dot: FLOPs of dot products.
    """

    read: int = 0
    written: int = 0
    dot: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(read=self.read + other.read, written=self.written + other.written, dot=self.dot + other.dot)


def product(M, N, K, dtype, *, bias=0, read=0, written=0, sums=0) -> Cost:
    """The issued cost of (M, K) times (K, N).

    Args:
        bias: bytes of a number of the bias, 0 without a bias.
        read, written: numbers of further (M, N) tensors that the product reads and writes.
        sums: bytes of a number of the column sums, 0 without sums.
    """
    tiles, s = _tiles(M, N, dtype), dtype.itemsize
    num_m, num_n, num_k = (-(-size // tiles[block]) for size, block in ((M, "BM"), (N, "BN"), (K, "BK")))
    # one row of tiles writes the sums at once
    partial = 4 * N * num_m if sums and num_m > 1 else 0
    return Cost(
        read=M * K * s * num_n + K * N * s * num_m + read * M * N * s + num_m * N * bias + partial,
        written=(1 + written) * M * N * s + partial + sums * N,
        dot=2 * num_m * tiles["BM"] * num_n * tiles["BN"] * num_k * tiles["BK"],
    )


def column_sums(R, D, dtype) -> Cost:
    """The issued cost of kernels/activation.py's column sums, for a bias of the dtype of its rows."""
    from prismer.kernels.activation import _backward_plan

    _, P, _ = _backward_plan(R, D, True)
    partial = 4 * P * D if P > 1 else 0
    return Cost(read=R * D * dtype.itemsize + partial, written=partial + dtype.itemsize * D)


def check(ledger, *costs: Cost) -> None:
    """Assert that the ledger holds exactly the sum of these costs."""
    total = sum(costs, Cost())
    assert (ledger.bytes_read, ledger.bytes_written, ledger.dot_flops) == (total.read, total.written, total.dot)
