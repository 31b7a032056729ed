"""Squared 2-Wasserstein distance between Gaussians with full or diagonal covariance, by torch's SVD."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl.ops._call import apply, needs_closed_form
from fastkl.ops._register import no_autocast
from fastkl.ops._sharding import by_parts
from fastkl.ops.multivariate._covariances import check_pair
from fastkl.reference import compute_dtype


class _Rotation(torch.autograd.Function):
    """The orthogonal U that maximises tr(U^T A): U = W V^T of A = W diag(s) V^T.

    Its derivative divides by s_i + s_j, so repeated singular values are harmless; that of W and V divides by s_i - s_j.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix):
        left, values, right = torch.linalg.svd(matrix)
        return left @ right, left, values, right

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, gradient, *_):
        if gradient is None:
            return None
        left, values, right = ctx.saved_tensors
        inner = left.mT @ gradient @ right.mT
        inner = (inner - inner.mT) / (values.unsqueeze(-1) + values.unsqueeze(-2)).clamp(min=1e-30)
        return left @ inner @ right


class _SquaredDistance(torch.autograd.Function):
    """min over orthogonal U of |L_q - L_p U|^2 (Frobenius), and the gradient at that U, by the envelope theorem.

    The minimum is tr(S_q + S_p) - 2 sum s; as a sum of squares it avoids cancellation for two close Gaussians.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(scale_q, scale_p):
        rotation = apply(_Rotation, scale_p.mT @ scale_q)[0]
        return (scale_q - scale_p @ rotation).square().sum((-2, -1)), rotation

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, ddistance, _):
        if ddistance is None:
            return None, None
        scale_q, scale_p, rotation = ctx.saved_tensors
        if needs_closed_form(ddistance):  # the second derivative includes that of the rotation
            rotation = apply(_Rotation, scale_p.mT @ scale_q)[0]
        weight = 2 * ddistance.unsqueeze(-1).unsqueeze(-1)
        return weight * (scale_q - scale_p @ rotation), weight * (scale_p - scale_q @ rotation.mT)


@by_parts
def wasserstein2_multivariate_normal(
    mu: Tensor, scale_tril: Tensor, prior_mu: Tensor, prior_scale_tril: Tensor
) -> Tensor:
    """Squared 2-Wasserstein distance of multivariate Gaussians N(mu, L L^T), one value per sample.

    W_2^2(q, p) = |m_q - m_p|^2 + tr(S_q + S_p - 2 (S_p^1/2 S_q S_p^1/2)^1/2), S = L L^T (Bures), computed as
    |m_q - m_p|^2 + min_U |L_q - L_p U|^2 over orthogonal U, which the singular vectors of L_p^T L_q give: a sum of
    squares, which avoids cancellation for two close Gaussians. The gradient, 2 (L_q - L_p U) in L_q, and the second
    derivative are finite for equal Gaussians and for repeated eigenvalues.

    Args:
        mu, scale_tril, prior_mu, prior_scale_tril: as for `fastkl.kl_multivariate_normal`: scales are lower triangles
            [*batch, D, D] if they have more dimensions than their own mean, else standard deviations [*batch, D];
            [1, D, D] is one matrix for all. A singular L is allowed.

    Returns:
        [*batch], in squared units of z; float32 for float16, bfloat16 and float32 input, float64 if any input is.
        Differentiable twice.

    Raises:
        TypeError, ValueError: as kl_multivariate_normal.

    Source: Dowson and Landau 1982, "The Frechet distance between multivariate normal distributions", equation 4;
    Bhatia, Jain and Lim 2019, "On the Bures-Wasserstein distance between positive definite matrices", theorem 1.

    >>> import torch, fastkl
    >>> mu, scale_tril = torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3)
    >>> fastkl.wasserstein2_multivariate_normal(mu, scale_tril, torch.ones(3), 2 * torch.eye(3))
    tensor([6., 6.])
    """
    matrix_q, matrix_p = check_pair(mu, scale_tril, prior_mu, prior_scale_tril)
    dtype = compute_dtype(mu, scale_tril, prior_mu, prior_scale_tril)
    distance = (mu.to(dtype) - prior_mu.to(dtype)).square().sum(-1)
    scale_q, scale_p = scale_tril.to(dtype), prior_scale_tril.to(dtype)
    if not (matrix_q or matrix_p):
        return distance + (scale_q - scale_p).square().sum(-1)
    scale_q = scale_q.tril() if matrix_q else torch.diag_embed(scale_q)
    scale_p = scale_p.tril() if matrix_p else torch.diag_embed(scale_p)
    shape = torch.broadcast_shapes(scale_q.shape, scale_p.shape)
    with no_autocast(distance.device.type):
        return distance + apply(_SquaredDistance, scale_q.expand(shape), scale_p.expand(shape))[0]
