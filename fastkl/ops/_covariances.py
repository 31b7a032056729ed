"""Gaussians given by a mean and by a standard deviation for each dimension or a lower triangle, as users write them."""

from __future__ import annotations

from torch import Tensor

from fastkl.ops import _arguments as arguments


def _is_matrix(name: str, scale: Tensor, loc: Tensor) -> bool:
    """More dimensions than its loc: matrices, else diagonals. Raises where the shape contradicts that."""
    size, loc_name = loc.shape[-1], name.replace("scale_tril", "loc")
    matrix = scale.dim() > loc.dim()
    # [D, D] beside loc [N, D] is one matrix for all rows in some conventions: never guess.
    unclear = not matrix and scale.dim() > 1 and scale.shape[-2] != loc.shape[-2] and scale.shape[-2] == size > 1
    if unclear or scale.dim() == 0 or scale.shape[-1] != size or (matrix and scale.shape[-2] != size):
        hint = f"; for one matrix shared by the batch write {name}[None]" if unclear else ""
        raise ValueError(
            f"{name} must be lower triangles (*batch, {size}, {size}) with more dimensions than {loc_name} "
            f"{tuple(loc.shape)}, or diagonals (*batch, {size}) with as many or fewer, got {tuple(scale.shape)}{hint}"
        )
    return matrix


def check_pair(loc_q: Tensor, scale_tril_q: Tensor, loc_p: Tensor, scale_tril_p: Tensor) -> tuple[bool, bool]:
    """Whether the scale of q is a matrix, and that of p."""
    scales = {"scale_tril_q": scale_tril_q, "scale_tril_p": scale_tril_p}
    arguments.check_tensors(loc_q=loc_q, loc_p=loc_p, **scales)
    shapes = tuple(loc_q.shape), tuple(loc_p.shape)
    if loc_q.dim() == 0 or loc_p.dim() == 0 or shapes[0][-1] != shapes[1][-1] or shapes[0][-1] == 0:
        raise ValueError(f"loc_q and loc_p must be (*batch, D) with the same D > 0, got {shapes[0]} and {shapes[1]}")
    matrix_q, matrix_p = (_is_matrix(*item, loc) for item, loc in zip(scales.items(), (loc_q, loc_p)))
    batches = {"loc_q": loc_q[..., 0], "loc_p": loc_p[..., 0]}
    batches["scale_tril_q"] = scale_tril_q[..., 0, 0] if matrix_q else scale_tril_q[..., 0]
    batches["scale_tril_p"] = scale_tril_p[..., 0, 0] if matrix_p else scale_tril_p[..., 0]
    arguments.broadcast_shape(**batches)
    return matrix_q, matrix_p
