"""Sufficient statistics of expectation maximisation for a Gaussian mixture, in one pass over the data."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._call import apply
from fastkl.ops._register import register, without_autocast
from fastkl.ops._sharding import by_parts
from fastkl.ops.mixture import _at_once as at_once
from fastkl.ops.mixture._canonical import as_logvars, canonical
from fastkl.ops.mixture._mixture import MIXTURE, Mixture
from fastkl.ops.mixture._sweep import Sweep, keep_for
from fastkl.ops.mixture._sweep_gradients import moments


class GMMMoments(NamedTuple):
    """The result of `fastkl.gmm_moments`: r_nk = p(k | z_n), and moments about the components' present means."""

    log_prob: Tensor  # [*batch] ln p(z_n) in nats
    counts: Tensor  # [K] sum_n r_nk
    first: Tensor  # [K, D] sum_n r_nk (z_n - m_k)
    second: Tensor  # [K, D] sum_n r_nk (z_n - m_k)^2; with scale_tril [K, D, D], of the outer products


@without_autocast
def _forward(z, logits, means, logvars, scale_tril) -> list[Tensor]:
    mixture = Mixture(logits, means, logvars, scale_tril)
    if at_once.is_small(z, mixture):
        part, prepared = at_once.prepare(z, None, mixture, "point")
        joint = at_once.joint_of(part, prepared)
        return [joint.logsumexp(-1).flatten(), *part.moments(prepared, torch.softmax(joint, -1))]
    sweep = Sweep(z, None, mixture, "point", "exact")
    return moments(sweep, keep_for([z], mixture))


def _fake_forward(z, logits, means, logvars, scale_tril) -> list[Tensor]:
    dtype = reference.compute_dtype(z, logits, means, logvars, scale_tril)
    shapes = [z.shape[:1], means.shape[1:2], means.shape[1:], (means if scale_tril is None else scale_tril).shape[1:]]
    return [z.new_empty(shape, dtype=dtype) for shape in shapes]


def _kernels():
    from fastkl.kernels.mixture import gmm_moments

    return gmm_moments


def _loops():
    from fastkl.native import mixture

    return mixture


gmm_moments_fwd = register(
    f"gmm_moments_fwd(Tensor z, {MIXTURE}) -> Tensor[]",
    closed_form=_forward,
    fake=_fake_forward,
    kernel=lambda: _kernels().fwd,
    native=lambda: _loops().gmm_moments_fwd,
)


class _GMMMoments(torch.autograd.Function):
    """The op with a rule for vmap; it has no gradient."""

    @staticmethod
    def forward(z, logits, means, logvars, scale_tril):
        return tuple(gmm_moments_fwd(z, logits, means, logvars, scale_tril))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        """One call per example, because each example has separate sums."""
        results = [apply(_GMMMoments, *example) for example in arguments.examples(info.batch_size, in_dims, inputs)]
        return tuple(torch.stack(parts) for parts in zip(*results)), (0,) * 4


@by_parts
def gmm_moments(
    z: Tensor, logits: Tensor, means: Tensor, logvars: Tensor | float | None = None, *,
    scale_tril: Tensor | None = None, scale: str = "logvar",
) -> GMMMoments:  # fmt: skip
    """Log-density and responsibility-weighted moments of data under a Gaussian mixture; not differentiable.

    r_nk = p(k | z_n); counts_k = sum_n r_nk, first_k = sum_n r_nk (z_n - m_k), second_k = sum_n r_nk (z_n - m_k)^2

    The moments are about the present means, which avoids cancellation: the M-step is m_k + first_k / counts_k and
    second_k / counts_k - (first_k / counts_k)^2.

    Args:
        z: [*batch, D].
        logits, means, logvars, scale_tril, scale: one mixture for all data, as for `fastkl.gmm_log_prob`.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: as `fastkl.gmm_log_prob`, and if the components differ by datum.

    Source: Dempster, Laird and Rubin 1977; Bishop 2006, "Pattern Recognition and Machine Learning", section 9.2.2.

    >>> import torch, fastkl
    >>> z, means = torch.tensor([[-1.0], [1.0], [3.0]]), torch.tensor([[-1.0], [1.0]])
    >>> moments = fastkl.gmm_moments(z, torch.zeros(2), means)
    >>> means + moments.first / moments.counts[:, None]  # one step of EM
    tensor([[-0.7523],
            [ 1.8794]])
    """
    given: Any = (z, logits, means, as_logvars(means, logvars, scale), scale_tril)
    z, *parameters = (t.detach() if isinstance(t, Tensor) else t for t in given)
    found = canonical({"z": z}, *parameters, reorder=False)
    if any(tensor is not None and tensor.shape[0] > 1 for tensor in found.mixture):
        raise ValueError("gmm_moments sums over data of one mixture, but logits, means or covariances differ by datum")
    log_prob, counts, first, second = apply(_GMMMoments, *found.rows, *found.mixture)
    return GMMMoments(found.restore(log_prob), counts, first, second)
