"""Large symmetric matrices of which half is held, and their triangular factor.

    rows[k] (B, I - k B): block row k from its diagonal block on; B is SIDE, less in the last one

So two of them take the memory of one full matrix, and a sum of x^T x half of the arithmetic. The factor takes the
matrix's own place: R, upper triangular, with R R^T = H. It is the Cholesky factor of H with rows and columns in reverse
order, reversed back. Blocks on the diagonal are factored in float64, all else is products of blocks in float32.

Shapes: I the matrix's side, T rows that are summed over, N any number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from lightrm.kernels.products import add_large_product, large_product

SIDE = 512  # of a block


@dataclass(frozen=True, slots=True)
class Symmetric:
    """A symmetric matrix, float32; see above. Methods that end in an underscore change it."""

    rows: tuple[torch.Tensor, ...]

    @classmethod
    def zeros(cls, size: int, device: torch.device | None = None) -> Symmetric:
        shapes = [(end - start, size - start) for start, end in pairwise([*range(0, size, SIDE), size])]
        counts = [high * wide for high, wide in shapes]
        whole = torch.zeros(sum(counts), device=device)  # one piece of memory, which leaves no holes
        return cls(tuple(part.view(shape) for part, shape in zip(whole.split(counts), shapes, strict=True)))

    @classmethod
    def of(cls, full_II: torch.Tensor) -> Symmetric:
        """Take the upper half of a full matrix."""
        made = cls.zeros(len(full_II), full_II.device)
        for start, end, row in made.spans():
            row.copy_(full_II[start:end, start:])
        return made

    @property
    def size(self) -> int:
        return self.rows[0].shape[1]

    def spans(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield where each block row starts and ends, and the row."""
        for row in self.rows:
            start = self.size - row.shape[1]
            yield start, start + len(row), row

    def full(self) -> torch.Tensor:
        made = self.rows[0].new_empty(self.size, self.size)
        for start, end, row in self.spans():
            made[start:end, start:] = row
            made[start:, start:end] = row.T
        return made

    def part(self, share: float) -> float:
        """Return a share of the diagonal's mean, but never zero."""
        return max(share * float(torch.cat([row.diagonal() for row in self.rows]).mean()), 1e-12)

    def clone(self) -> Symmetric:
        return Symmetric.zeros(self.size, self.rows[0].device).add_(self)

    def add_(self, other: Symmetric) -> Symmetric:
        for row, more in zip(self.rows, other.rows, strict=True):
            row.add_(more)
        return self

    def add_rows_(self, x_IT: torch.Tensor) -> Symmetric:
        """Add x x^T."""
        for start, end, row in self.spans():
            add_large_product(row, x_IT[start:end], x_IT[start:])
        return self

    def add_pair_(self, a_I: torch.Tensor, b_I: torch.Tensor) -> Symmetric:
        """Add a b^T + b a^T."""
        for start, end, row in self.spans():
            row.addr_(a_I[start:end], b_I[start:]).addr_(b_I[start:end], a_I[start:])
        return self

    def damp_(self, more: float) -> Symmetric:
        """Add a number to the diagonal."""
        for row in self.rows:
            row.diagonal().add_(more)
        return self

    def times(self, x_NI: torch.Tensor) -> torch.Tensor:
        """Return x @ H."""
        y_NI = torch.zeros_like(x_NI)
        for start, end, row in self.spans():
            y_NI[:, start:] += large_product(x_NI[:, start:end], row.T)
            y_NI[:, start:end] += large_product(x_NI[:, end:], row[:, len(row) :])
        return y_NI

    def factor_(self) -> Factor:
        """Return R, which takes the place of this matrix. Raises torch.linalg.LinAlgError if it is not positive."""
        inverses: list[torch.Tensor] = []
        for k in reversed(range(len(self.rows))):
            row = self.rows[k]
            for j in reversed(range(k, len(self.rows))):
                below = self.rows[j]
                end = row.shape[1] - (below.shape[1] - len(below))
                block = row[:, end - len(below) : end]
                block -= large_product(row[:, end:], below[:, len(below) :])
                if j > k:
                    block.copy_(large_product(block, inverses[j - len(self.rows)]))
                else:
                    upper = torch.linalg.cholesky(block.double().flip(0, 1)).flip(0, 1)
                    block.copy_(upper)
                    inverses.insert(0, inverse(upper).float())
        return Factor(self, tuple(inverses))


@dataclass(frozen=True, slots=True)
class Factor:
    """R, upper triangular. held: its blocks in the place of the matrix. inverses: of the blocks on the diagonal."""

    held: Symmetric
    inverses: tuple[torch.Tensor, ...]

    def columns(self, start: int, end: int) -> torch.Tensor:
        """Return R[:end, start:end], contiguous."""
        parts = []
        for first, last, row in self.held.spans():
            if first < end:
                part = row[: min(last, end) - first, max(start - first, 0) : end - first]
                left = end - start - part.shape[1]
                parts.append(torch.cat([part.new_zeros(len(part), left), part], 1) if left else part)
        return torch.cat(parts)

    def solved_(self, x_NI: torch.Tensor) -> torch.Tensor:
        """Return x @ inverse(R R^T), in the place of x. Quick if the columns of x have no gaps."""
        x_IN, found = x_NI.T, list(zip(self.held.spans(), self.inverses, strict=True))
        for (start, end, row), inverted in reversed(found):  # R y = x
            block = x_IN[start:end] - large_product(row[:, len(row) :], x_IN[end:].T)
            x_IN[start:end] = large_product(inverted, block.T)
        for (start, end, row), inverted in found:  # R^T z = y
            x_IN[start:end] = large_product(inverted.T, x_IN[start:end].T)
            add_large_product(x_IN[end:], -row[:, len(row) :].T, x_IN[start:end].T)
        return x_NI


def inverse(upper: torch.Tensor) -> torch.Tensor:
    """Return the inverse of a small upper triangular matrix, float64."""
    one = torch.eye(len(upper), dtype=torch.float64, device=upper.device)
    solved: torch.Tensor = torch.linalg.solve_triangular(upper.double(), one, upper=True)
    return solved.contiguous()
