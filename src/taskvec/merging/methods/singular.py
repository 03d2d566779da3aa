"""Singular vectors of matrices that are read in pieces of columns: no copy in float64 is ever held.

A matrix has at most as many rows as columns (it is transposed otherwise). Its left singular vectors come from the Gram
matrix of its rows, or where that is not exact enough from the triangle R of a QR decomposition; both are summed over
pieces. Right ones are not stored: V^T = S^-1 U^T M is computed piece by piece where it is read. Vectors whose singular
value is below float32's rounding of the largest one say nothing and are left out, so that no result depends on how a
null space happens to be completed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command lists methods without loading torch
    from jaxtyping import Float32, Float64
    from torch import Tensor

    Read = Callable[[slice], Float64[Tensor, "rows piece"]]

PIECE, LARGE_PIECE = 1 << 16, 1 << 24
"""Elements of a matrix that are in memory in float64 at once, and on a GPU, which small pieces would leave waiting."""
ROUNDING = 2.0**-23
"""The relative rounding of float32."""
WORST = 1e-9
"""The ratio of the squares of singular values below which a Gram matrix is not exact enough."""


@dataclass(frozen=True)
class Columns:
    """A matrix that is read in pieces of columns; ``size`` is the norm of what it was made from.

    ``piece`` is how many elements are read at once (``piece_on``).
    """

    read: Read
    rows: int
    count: int
    piece: int
    size: float = 0

    def __iter__(self) -> Iterator[tuple[slice, Float64[Tensor, "rows piece"]]]:
        """Yield the places of all pieces, and the pieces."""
        step = max(1, self.piece // max(1, self.rows))
        for start in range(0, self.count, step):
            place = slice(start, min(start + step, self.count))
            yield place, self.read(place)


def piece_on(matrix: Tensor) -> int:
    """Return how many elements are in float64 at once where a matrix lies."""
    return PIECE if matrix.device.type == "cpu" else LARGE_PIECE


@dataclass(frozen=True)
class TruncatedSVD:
    """The largest singular values of a matrix with their vectors: U, S, and V^T by pieces of columns."""

    left: Float64[Tensor, "rows rank"]
    values: Float64[Tensor, " rank"]
    matrix: Columns

    def right(self, place: slice) -> Float64[Tensor, "rank piece"]:
        """Return some columns of V^T."""
        return (self.left.mT @ self.matrix.read(place)).div_(self.values[:, None])


def decompose(matrix: Columns, most: int | None = None) -> TruncatedSVD:
    """Return the singular values and vectors of a matrix without null ones, the ``most`` largest at most.

    A value is null below the rounding of the largest one, or of the matrix's ``size``.
    """
    import torch

    squares, left = torch.linalg.eigh(_gram(matrix))
    most = len(squares) if most is None else min(most, len(squares))
    if most and squares[-most] < WORST * squares[-1]:
        del left
        left, values, _ = torch.linalg.svd(_triangle(matrix).mT, full_matrices=False)
    else:
        left, values = left.flip(1), squares.flip(0).clamp(min=0).sqrt()
    count = min(most, int((values > ROUNDING * values[:1].clamp(min=matrix.size)).sum()))
    return TruncatedSVD(left[:, :count].clone(), values[:count].clone(), matrix)


def _gram(matrix: Columns) -> Float64[Tensor, "rows rows"]:
    pieces = (piece for _, piece in matrix)
    first = next(pieces)
    gram = first @ first.mT
    for piece in pieces:
        gram.addmm_(piece, piece.mT)
    return gram


def _triangle(matrix: Columns) -> Float64[Tensor, "rank rows"]:
    import torch

    pieces = (piece for _, piece in matrix)
    upper: Tensor = torch.linalg.qr(next(pieces).mT, mode="r").R
    for piece in pieces:
        upper = torch.linalg.qr(torch.cat([upper, piece.mT]), mode="r").R
    return upper


def multiply(factor: Float64[Tensor, "new rows"], matrix: Columns) -> Float32[Tensor, "new columns"]:
    """Return the product of a small matrix with one that is read in pieces."""
    import torch

    product = factor.new_empty(len(factor), matrix.count, dtype=torch.float32)
    for place, piece in matrix:
        product[:, place] = factor @ piece
    return product


def orthogonaliser(matrix: Columns) -> Float64[Tensor, "rows rows"]:
    """Return what a matrix is to be multiplied with from the left to be U V^T of its SVD: U S^-1 U^T."""
    svd = decompose(matrix)
    return (svd.left / svd.values) @ svd.left.mT


def nearest_orthogonal(matrix: Float64[Tensor, "rows columns"]) -> Float64[Tensor, "rows columns"]:
    """Return U V^T of the SVD, the nearest matrix with orthonormal columns (or rows): the Procrustes solution."""
    if matrix.shape[0] > matrix.shape[1]:
        return nearest_orthogonal(matrix.mT).mT
    columns = Columns(lambda place: matrix[:, place], len(matrix), matrix.shape[1], piece_on(matrix))
    return orthogonaliser(columns) @ matrix


def joined(parts: Sequence[TruncatedSVD], values: Float64[Tensor, " *rank"]) -> Float32[Tensor, "rows columns"]:
    """Return U' S V'^T, U' and V' nearest orthogonal to the left and the right singular vectors of several matrices."""
    import torch

    rank, columns = sum(len(part.values) for part in parts), parts[0].matrix.count
    piece = parts[0].matrix.piece
    rights = Columns(lambda place: torch.cat([part.right(place) for part in parts]), rank, columns, piece)
    right = orthogonaliser(rights)
    left = nearest_orthogonal(torch.cat([part.left for part in parts], 1)).mul_(values)
    return multiply(left @ right, rights)
