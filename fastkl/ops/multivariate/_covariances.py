"""Checks of Gaussians given by a mean and standard deviations (diagonal) or a lower triangle (matrix)."""

from __future__ import annotations

from torch import Tensor

from fastkl.ops import _arguments as arguments


def _is_matrix(name: str, scale: Tensor, mu: Tensor) -> bool:
    """Whether a scale is a matrix: it has more dimensions than its mean. Raises if the shape contradicts that."""
    size, mu_name = mu.shape[-1], name.replace("scale_tril", "mu")
    matrix = scale.dim() > mu.dim()
    # [D, D] with mu [N, D] could mean one matrix for all rows: refuse to guess.
    unclear = not matrix and scale.dim() > 1 and scale.shape[-2] != mu.shape[-2] and scale.shape[-2] == size > 1
    if unclear or scale.dim() == 0 or scale.shape[-1] != size or (matrix and scale.shape[-2] != size):
        hint = f"; for one matrix shared by the batch write {name}[None]" if unclear else ""
        raise ValueError(
            f"{name} must be lower triangles (*batch, {size}, {size}) with more dimensions than {mu_name} "
            f"{tuple(mu.shape)}, or diagonals (*batch, {size}) with as many or fewer, got {tuple(scale.shape)}{hint}"
        )
    return matrix


def check_pair(mu: Tensor, scale_tril: Tensor, prior_mu: Tensor, prior_scale_tril: Tensor) -> tuple[bool, bool]:
    """Whether the scale of q is a matrix, and that of p."""
    scales = {"scale_tril": scale_tril, "prior_scale_tril": prior_scale_tril}
    for name, tensor in (("prior_mu", prior_mu), *scales.items()):
        if tensor is None:  # other ops have optional arguments of these names
            raise TypeError(f"{name} must be a torch.Tensor, got NoneType")
    arguments.check_tensors(mu=mu, prior_mu=prior_mu, **scales)
    shapes = tuple(mu.shape), tuple(prior_mu.shape)
    if mu.dim() == 0 or prior_mu.dim() == 0 or shapes[0][-1] != shapes[1][-1] or shapes[0][-1] == 0:
        raise ValueError(f"mu and prior_mu must be (*batch, D) with the same D > 0, got {shapes[0]} and {shapes[1]}")
    matrix_q, matrix_p = (_is_matrix(*item, mean) for item, mean in zip(scales.items(), (mu, prior_mu)))
    batches = {"mu": mu[..., 0], "prior_mu": prior_mu[..., 0]}
    batches["scale_tril"] = scale_tril[..., 0, 0] if matrix_q else scale_tril[..., 0]
    batches["prior_scale_tril"] = prior_scale_tril[..., 0, 0] if matrix_p else prior_scale_tril[..., 0]
    arguments.broadcast_shape(**batches)
    return matrix_q, matrix_p
