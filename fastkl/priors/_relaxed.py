"""The KL to a mixture with a relaxed choice of the component: method="relaxed" of a mixture prior."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._register import no_autocast
from fastkl.ops._sampling import Seed
from fastkl.ops.categorical.gumbel_softmax import check_tau, draw_choice
from fastkl.ops.mixture.gmm_responsibilities import gmm_responsibilities
from fastkl.ops.mixture.rsample_gmm import relaxed_component
from fastkl.ops.normal.kl_normal import kl_normal


def kl_relaxed(
    mu: Tensor, logvar: Tensor, z: Tensor, mixture: tuple, tau: float | Tensor, precision: str,
    seed: Seed | None, gumbel: Tensor | None,
) -> Tensor:  # fmt: skip
    """MixturePrior.kl_relaxed for q = N(mu, exp(logvar)) and the mixture (logits, means, logvars, scale_tril)."""
    logits, means, logvars, scale_tril = mixture
    if scale_tril is not None:
        raise ValueError("method='relaxed' interpolates standard deviations: the covariance must be 'diag', "
                         "'spherical' or 'tied', got 'full'")  # fmt: skip
    arguments.check_tensors(z=z, **({} if gumbel is None else {"gumbel": gumbel}))
    if z.dim() != mu.dim() + 1 or z.shape[1:] != mu.shape:
        raise ValueError(f"z must be ({', '.join(['L', *map(str, mu.shape)])}), L draws from q, got {tuple(z.shape)}")
    choices = (*z.shape[:-1], logits.shape[-1])
    if gumbel is not None and gumbel.shape != choices:
        raise ValueError(f"gumbel must be {choices}, a number for each draw and component, got {tuple(gumbel.shape)}")
    # Cast first: the gradients of all parts are summed in this dtype.
    dtype = reference.compute_dtype(mu, logvar, z, logits, means, logvars)
    mu, logvar, z, logits, means = (tensor.to(dtype) for tensor in (mu, logvar, z, logits, means))
    logvars = None if logvars is None else logvars.to(dtype)
    with no_autocast(z.device.type):
        log_r = gmm_responsibilities(z, logits, means, logvars, precision=precision)
        if gumbel is None:
            weights = draw_choice(reference.Stream.KL_CHOICE, log_r, tau, False, -1, seed)
        else:
            tensor, number = check_tau(tau, log_r)
            weights = reference.relaxed_one_hot(log_r + gumbel.to(dtype), number if tensor is None else tensor)
        component = relaxed_component(weights, means, logvars)
        kl = kl_normal(mu, logvar, component[0], 2.0 * component[1].log(), event_ndim=1)
        log_pi = torch.log_softmax(logits, -1)
        # A component of probability 0 adds 0. Unmasked, a weight of 0 gives -inf - -inf, and an underflow 0 * -inf.
        surprise = (log_r - log_pi).masked_fill(log_r == float("-inf"), 0.0)
        return (kl + (log_r.exp() * surprise).sum(-1)).mean(0)
