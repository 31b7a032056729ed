"""KL divergence between Gaussians with full or diagonal covariance, by torch's triangular solves."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl.ops._sharding import by_parts
from fastkl.ops.multivariate._covariances import check_pair
from fastkl.reference import compute_dtype, exp_minus_one_minus, log_ratio


def _solve(scale_tril: Tensor, columns: Tensor) -> Tensor:
    """scale_tril^-1 columns, its diagonal taken to be 1; one that the batch shares is not copied for each datum."""
    while scale_tril.dim() > 2 and scale_tril.shape[0] == 1:
        scale_tril = scale_tril[0]
    if scale_tril.dim() > 2 or columns.dim() == 2:
        return torch.linalg.solve_triangular(scale_tril, columns, upper=False, unitriangular=True)
    side_by_side = columns.movedim(-2, 0)
    solved = torch.linalg.solve_triangular(scale_tril, side_by_side.flatten(1), upper=False, unitriangular=True)
    return solved.reshape(side_by_side.shape).movedim(0, -2)


@by_parts
def kl_multivariate_normal(mu: Tensor, scale_tril: Tensor, prior_mu: Tensor, prior_scale_tril: Tensor) -> Tensor:
    """KL divergence KL(q || p) of multivariate Gaussians N(mu, L L^T), in nats, one value per sample.

    KL = 1/2 [tr(S_p^-1 S_q) + (m_p - m_q)^T S_p^-1 (m_p - m_q) - D + ln det S_p / det S_q], S = L L^T, computed as
    1/2 [sum_i (exp(x_i) - 1 - x_i) + sum_{i>j} M_ij^2 + |L_p^-1 (m_p - m_q)|^2] with M = L_p^-1 L_q, x_i = ln M_ii^2:
    every term is positive, which avoids cancellation for two close Gaussians.

    Args:
        mu, prior_mu: means, [*batch, D].
        scale_tril, prior_scale_tril: L, with a positive diagonal (not checked, because that would synchronise; another
            diagonal gives NaN or infinity):

            - lower triangles [*batch, D, D], if it has more dimensions than its own mean; entries above the diagonal
              are not read;
            - diagonals [*batch, D] (standard deviations), if it has at most as many dimensions as its mean.

            For mu [N, D], a scale [N, D] or [D] is therefore a diagonal, also when N = D; one matrix that all N share
            is [1, D, D]. Each scale is compared with its own mean: prior_mu [D] with prior_scale_tril [D, D] is one
            full prior for any batch of q.

    Returns:
        [*batch], the broadcast of all four batch shapes; float32 for float16, bfloat16 and float32 input, float64 if
        any input is. Differentiable any number of times; works under torch.compile(fullgraph=True) and torch.func.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: devices differ, a scale is not square or does not match its mean, or batches do not broadcast.

    Source: Duchi 2007, "Derivations for Linear Algebra and Optimization", section 9; the diagonal form is that of
    Kingma and Welling 2014, arXiv:1312.6114, appendix B.

    >>> import torch, fastkl
    >>> mu, std = torch.zeros(2, 3), torch.ones(2, 3)
    >>> prior_mu, prior_scale_tril = torch.ones(3), 2 * torch.eye(3)
    >>> fastkl.kl_multivariate_normal(mu, std, prior_mu, prior_scale_tril)
    tensor([1.3294, 1.3294])
    """
    matrix_q, matrix_p = check_pair(mu, scale_tril, prior_mu, prior_scale_tril)
    dtype = compute_dtype(mu, prior_mu, scale_tril, prior_scale_tril)
    difference, scale_q, scale_p = prior_mu.to(dtype) - mu.to(dtype), scale_tril.to(dtype), prior_scale_tril.to(dtype)
    std_q = scale_q.diagonal(dim1=-2, dim2=-1) if matrix_q else scale_q
    std_p = scale_p.diagonal(dim1=-2, dim2=-1) if matrix_p else scale_p
    x = 2 * log_ratio(std_q, std_p)
    # L_p is diag(std_p) times a triangle with unit diagonal. Dividing by std_p before the solve keeps the elements and
    # their squares in range when those of L_p^-1 overflow.
    unit_p = scale_p / std_p.unsqueeze(-1) if matrix_p else scale_p
    whitened = difference / std_p
    whitened = _solve(unit_p, whitened.unsqueeze(-1)).squeeze(-1) if matrix_p else whitened
    total = exp_minus_one_minus(x).sum(-1) + whitened.square().sum(-1)
    if matrix_q:  # below M's diagonal
        columns = scale_q.tril() / std_p.unsqueeze(-1)
        columns = _solve(unit_p, columns) if matrix_p else columns
        total = total + columns.tril(-1).square().sum((-2, -1))
    elif matrix_p:  # M's columns are those of the triangle's inverse, each times a quotient of standard deviations
        identity = torch.eye(std_p.shape[-1], dtype=dtype, device=std_p.device)
        weights = _solve(unit_p, identity).tril(-1).square().sum(-2)
        total = total + (weights * (std_q / std_p).square()).sum(-1)
    return 0.5 * total
