"""Sliced Wasserstein distances between samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops import _sampling as sampling
from fastkl.ops._register import no_autocast
from fastkl.ops._sampling import Seed
from fastkl.ops._sharding import by_parts
from fastkl.ops._sweep import Sweep
from fastkl.ops._torch import forward_mode, known_equal
from fastkl.ops.normal.rsample_normal import draw_normal

# Bytes of the temporaries of a block of projections, and bytes per point and projection.
CHUNK = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
POINT_BYTES = 48


def _sort(values: Tensor) -> tuple[Tensor, Tensor]:
    """values.sort(-1). On a CPU, value and index of a float32 are packed in one int64, which sorts six times faster."""
    differentiable = torch.is_grad_enabled() or forward_mode()
    plain = torch.compiler.is_compiling() or differentiable or values.device.type != "cpu"
    if plain or values.dtype != torch.float32:
        return values.sort(-1)
    bits = values.numpy().view(np.int32)
    keys = (bits ^ (bits >> 31 & 0x7FFFFFFF)).astype(np.int64) << 32 | np.arange(values.shape[-1])
    keys.sort(-1)
    bits = (keys >> 32).astype(np.int32)
    bits ^= bits >> 31 & 0x7FFFFFFF
    return torch.from_numpy(bits.view(np.float32)), torch.from_numpy(keys & 0xFFFFFFFF)


def _sums_of_pieces(values: Tensor, pieces: Tensor, n: int) -> Tensor:
    """[L, n + m] -> [L, n]: for each of n quantiles the sum over its pieces, in their order. The pieces come from
    reference.quantile_segments, which cuts the quantiles of one sample at those of the other."""
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        return values.new_zeros(values.shape[0], n).index_add(1, pieces, values)
    # index_add uses atomics, whose order varies. A quantile has at most ceil(m / n) + 1 pieces.
    m = values.shape[1] - n
    rank = torch.arange(n + 1, device=values.device)
    begin = rank + rank * m // n
    piece = begin[:-1, None] + torch.arange(1 - (-m // n), device=values.device)
    own = torch.where(piece < begin[1:, None], values[:, piece.clamp(max=n + m - 1)], 0.0)
    return own.sum(-1)


def _block(
    x: Tensor, y: Tensor, unit: Tensor, p: float, wanted: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """(sum over projections of W_p^p, its wanted gradients in x and y), differentiable."""
    n, m = x.shape[0], y.shape[0]
    (first, first_order), (second, second_order) = (_sort(unit @ points.T) for points in (x, y))
    mass: Tensor | float = 1 / n
    pieces: list[Tensor] = []
    if known_equal(n, m):
        difference = first - second
    else:
        lengths, *pieces = reference.quantile_segments(n, m, x.device)
        mass = lengths.to(x.dtype) / (n * m)
        difference = first[:, pieces[0]] - second[:, pieces[1]]
    if p == 2:
        power, slope = difference.square(), 2 * difference
    else:
        size = difference.abs()
        power, slope = size**p, p * size ** (p - 1) * difference.sign()
    gradients: list[Tensor | None] = []
    for index, (order, want) in enumerate(zip((first_order, second_order), wanted)):
        if not want:
            gradients.append(None)
            continue
        moved = (1 - 2 * index) * mass * slope
        if pieces:
            moved = _sums_of_pieces(moved, pieces[index], order.shape[1])
        gradients.append(torch.zeros_like(moved).scatter(1, order, moved).T @ unit)
    return (power * mass).sum(), gradients


def _blocks(x: Tensor, y: Tensor, unit: Tensor, p: float, *wanted: bool) -> list[Tensor]:
    """[mean over projections of W_p^p, its wanted gradients], computed by blocks of projections. Sorting takes most of
    the time, and gives both."""
    x, y = x.to(unit.dtype), y.to(unit.dtype)
    blocks = [unit]
    if not torch.compiler.is_compiling():  # no split by size in a graph, whose N may vary
        most = CHUNK.get(x.device.type, CHUNK["cuda"])
        blocks = list(unit.split(max(1, most // (POINT_BYTES * (x.shape[0] + y.shape[0])))))
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    totals: list[Tensor] = []
    for block in blocks:
        part, gradients = _block(x, y, block, p, wanted)
        total = total + part.double()
        found = [gradient for gradient in gradients if gradient is not None]
        totals = [a + b for a, b in zip(totals, found)] if totals else found
    return [(sum_ / unit.shape[0]).to(unit.dtype) for sum_ in (total, *totals)]


def _gradients(x: Tensor, y: Tensor, unit: Tensor, p: float, *wanted: bool) -> list[Tensor | None]:
    """The wanted gradients in x, y and (never) in the directions, in differentiable torch ops."""
    _, gradients = _block(x.to(unit.dtype), y.to(unit.dtype), unit, p, wanted)
    return [None if gradient is None else gradient / unit.shape[0] for gradient in gradients] + [None]


SLICED = Sweep(_blocks, _gradients)


@by_parts
def sliced_wasserstein(x: Tensor, y: Tensor, num_projections: int, p: float = 2, seed: Seed | None = None) -> Tensor:
    """The p-th power of the sliced p-Wasserstein distance of two samples, by random projections.

    SW_p^p = mean over unit vectors t of W_p^p(t^T x, t^T y), W_p^p(u, v) = int_0^1 |F_u^-1(s) - F_v^-1(s)|^p ds

    The sliced-Wasserstein autoencoder minimises this mean of p-th powers; POT's sliced_wasserstein_distance is its p-th
    root. In one dimension W_p^p comes from sorting, and for unequal sizes from merging the quantiles.

    Args:
        x, y: points [N, D] and [M, D], all of the same mass.
        num_projections: number of directions: normalised normal noise from the seed, the same on every device.
        p: the power, at least 1.
        seed: an int or a 0-d int64 tensor that repeats the same directions, or (seed, rank), as for
            `fastkl.rsample_kl`, where (seed, 0) gives all processes the same; None takes it from torch's generator.

    Returns:
        One number, float32 for float16, bfloat16 and float32 input, float64 for float64 input. It needs no tensor of
        size N x M; temporaries take 32 MiB on a CPU, 256 MiB on a GPU (under torch.compile, all projections at once).
        The forward pass computes the gradient and saves it: [N, D] and [M, D].

    Raises:
        TypeError: x or y is not a floating-point tensor, num_projections is not an int, p is not a number.
        ValueError: x and y are not [N, D] and [M, D], num_projections < 1, p < 1.

    Source: Kolouri et al. 2018, "Sliced-Wasserstein Autoencoder", arXiv:1804.01947, equation 15; Bonneel et al. 2015,
    "Sliced and Radon Wasserstein Barycenters of Measures".

    >>> import torch, fastkl
    >>> x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    >>> f"{fastkl.sliced_wasserstein(x, x + 2.0, 20_000, seed=0):.1f}"  # |shift|^2 / D
    '4.0'
    """
    arguments.check_samples(x=x, y=y)
    num_projections, p = arguments.check_int("num_projections", num_projections, 1), arguments.check_number("p", p)
    if p < 1:
        raise ValueError(f"p must be at least 1, got {p}")
    seed = sampling.check_seed(seed, x.device, "x")
    zero = torch.zeros((), dtype=reference.compute_dtype(x, y), device=x.device)
    noise = draw_normal(reference.Stream.DIRECTIONS, (num_projections, x.shape[1]), zero, zero, seed)
    unit = reference.directions(noise)
    with no_autocast(x.device.type):
        return SLICED.value([p], x, y, unit)
