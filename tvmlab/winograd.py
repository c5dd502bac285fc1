"""Winograd's minimal filtering for 3x3 convolutions: Lavin and Gray, "Fast Algorithms for Convolutional Neural
Networks" (CVPR 2016), section 4. The transform matrices are Cook and Toom's, made from interpolation points in exact
fractions.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from tvmlab.packed_ops import blocks_of

__all__ = ["conv2d", "matrices", "transform_weight"]

_KERNEL = 3
_HALF = Fraction(1, 2)
# Interpolation points, besides infinity. With 1/2 and -2 in place of 2 and -2, F(4x4, 3x3) has nearly half the error:
# Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks" (2020).
_POINTS = {2: (0, 1, -1), 4: (0, 1, -1, _HALF, -2)}


@cache
def matrices(tile: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A^T (tile x alpha), G (alpha x 3) and B^T (alpha x alpha), alpha = tile + 2, for tile 2 or 4, in float64.

    The `tile` correlations of alpha data d with a kernel g are A^T ((G g) * (B^T d)), in alpha multiplications.

    >>> a, g, b = matrices(2)
    >>> a @ ((g @ [1, 2, 3]) * (b @ [1, 2, 3, 4]))
    array([14., 20.])
    """
    points = [Fraction(point) for point in _POINTS[tile]]
    alpha = tile + _KERNEL - 1
    finite = range(alpha - 1)
    output = [[points[j] ** i for j in finite] + [Fraction(i == tile - 1)] for i in range(tile)]
    kernel, data = [], []
    for j in finite:
        others = [points[k] for k in finite if k != j]
        scale = _product(others, points[j])
        kernel.append([points[j] ** k / scale for k in range(_KERNEL)])
        data.append([*_polynomial(others), Fraction(0)])
    kernel.append([Fraction(k == _KERNEL - 1) for k in range(_KERNEL)])
    data.append(_polynomial(points))
    return tuple(np.array(matrix, dtype=np.float64) for matrix in (output, kernel, data))  # type: ignore[return-value]


def transform_weight(weight: np.ndarray, tile: int, x: int, y: int) -> np.ndarray:
    """G g G^T of [O, I, 3, 3], packed to [alpha, alpha, ceil(O/y), ceil(I/x), x, y]; in float64, rounded at the end."""
    _, g, _ = matrices(tile)
    out, inner = weight.shape[:2]
    alpha = tile + _KERNEL - 1
    # One product with G x G (Kronecker): numpy multiplies millions of 3x3 matrices slowly.
    flat = np.kron(g, g) @ weight.reshape(out * inner, _KERNEL * _KERNEL).T.astype(np.float64)
    transformed = flat.astype(weight.dtype).reshape(alpha, alpha, out, inner)
    padded = np.pad(transformed, [(0, 0), (0, 0), (0, -out % y), (0, -inner % x)])
    split = padded.reshape(alpha, alpha, blocks_of(out, y), y, blocks_of(inner, x), x)
    return np.ascontiguousarray(split.transpose(0, 1, 2, 4, 5, 3))


def conv2d(data: Any, weight: Any, tile: int, padding: Any) -> Any:
    """3x3 convolution of stride 1, [N, I/x, H, W, x] * [alpha, alpha, O/y, I/x, x, y] -> [N, O/y, OH, OW, y].

    Stages: `data_pad` (up to whole tiles), `winograd_input` [alpha, alpha, I/x, P, x], `winograd_gemm` [alpha, alpha,
    O/y, P, y] and `winograd_output`, P being the number of tiles. Where a schedule unrolls the first two axes of
    `winograd_input`, and of `winograd_output` the position in the tile, the transforms become additions and
    multiplications by constants, and the terms of 0 vanish: the coefficients are nested selects on the loop variables.
    """
    from tvm import te, topi

    to_output, _, to_data = matrices(tile)
    batch, in_blocks, height, width, x = (int(size) for size in data.shape)
    alpha, _, out_blocks, _, _, y = (int(size) for size in weight.shape)
    top, left, bottom, right = padding
    rows, columns = height + top + bottom - 2, width + left + right - 2
    tiles_h, tiles_w = blocks_of(rows, tile), blocks_of(columns, tile)
    after = [tiles_h * tile + 2 - height - top, tiles_w * tile + 2 - width - left]
    source = data
    if any((top, left, *after)):
        source = topi.nn.pad(data, [0, 0, top, left, 0], [0, 0, *after, 0], name="data_pad")
    places = batch * tiles_h * tiles_w

    def read_tile(eps: Any, nu: Any, c: Any, p: Any, ci: Any) -> Any:
        n, row, column = p // (tiles_h * tiles_w), p // tiles_w % tiles_h * tile, p % tiles_w * tile
        return _sandwich(to_data, eps, nu, lambda i, j: source[n, c, row + i, column + j, ci], data.dtype)

    transformed = te.compute((alpha, alpha, in_blocks, places, x), read_tile, name="winograd_input")
    ic, ici = te.reduce_axis((0, in_blocks), name="ic_outer"), te.reduce_axis((0, x), name="ic_inner")
    product = te.compute(
        (alpha, alpha, out_blocks, places, y),
        lambda eps, nu, oc, p, oci: te.sum(
            transformed[eps, nu, ic, p, ici] * weight[eps, nu, oc, ic, ici, oci], axis=[ic, ici]
        ),
        name="winograd_gemm",
    )

    def write_tile(n: Any, oc: Any, oh: Any, ow: Any, oci: Any) -> Any:
        place = (n * tiles_h + oh // tile) * tiles_w + ow // tile
        return _sandwich(to_output, oh % tile, ow % tile, lambda i, j: product[i, j, oc, place, oci], data.dtype)

    return te.compute((batch, out_blocks, rows, columns, y), write_tile, name="winograd_output")


def _sandwich(matrix: np.ndarray, row: Any, column: Any, element: Any, dtype: str) -> Any:
    """Element (row, column) of M X M^T, the inner sums over X's rows: those are the same for every column.

    After unrolling, LLVM finds the repeated inner sums, so that each is computed once.
    """
    size = range(matrix.shape[1])
    inner = [_sum(_coefficient(matrix[:, i], row, dtype) * element(i, j) for i in size) for j in size]
    return _sum(_coefficient(matrix[:, j], column, dtype) * inner[j] for j in size)


def _coefficient(values: np.ndarray, index: Any, dtype: str) -> Any:
    """values[index] as nested selects, which a constant index folds to a constant.

    A zero is written as -0: x + -0 is x even for the compiler, which must keep x + 0 because of -0 + 0 = 0.
    """
    from tvm import tirx

    constants = [tirx.const(float(value) or -0.0, dtype) for value in values]
    chosen = constants.pop()
    for position in reversed(range(len(constants))):
        chosen = tirx.Select(index == position, constants[position], chosen)
    return chosen


def _sum(terms: Any) -> Any:
    first, *others = terms
    for term in others:
        first = first + term
    return first


def _product(others: list[Fraction], point: Fraction) -> Fraction:
    value = Fraction(1)
    for other in others:
        value *= point - other
    return value


def _polynomial(roots: list[Fraction]) -> list[Fraction]:
    """Coefficients of the product of (x - root), the constant first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        scaled = [root * value for value in coefficients] + [Fraction(0)]
        coefficients = [a - b for a, b in zip(shifted, scaled, strict=True)]
    return coefficients
