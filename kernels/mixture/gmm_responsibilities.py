"""Log responsibilities ln p(k | z) [R, K] of a mixture that all rows share; exact for every precision. Backward needs
no distances."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl.kernels._layout import compute_dtype
from fastkl.kernels.mixture._mixture_gradient import gradients
from fastkl.kernels.mixture.gmm_log_prob import launch_fwd


def fwd(
    z: Tensor, logits: Tensor, means: Tensor, logvars: Tensor | None, scale_tril: Tensor | None, precision: str
) -> Tensor:
    if scale_tril is not None or means.shape[0] > 1:
        return NotImplemented
    dtype = compute_dtype((z, logits, means, logvars))
    joints = torch.empty((len(z), means.shape[1]), dtype=dtype, device=z.device)
    lp = launch_fwd(z, None, logits, means, logvars, "point", joints)
    high = lp.to(dtype)
    return joints.sub_(high[:, None]).sub_((lp - high).to(dtype)[:, None])


def bwd(
    dlog_r: Tensor, log_r: Tensor,
    z: Tensor, logits: Tensor, means: Tensor, logvars: Tensor | None, scale_tril: Tensor | None,
    dz: Tensor | None, dlogits: Tensor | None, dmeans: Tensor | None, dlogvars: Tensor | None,
    dscale_tril: Tensor | None, precision: str,
) -> None:  # fmt: skip
    """As gmm_log_prob's bwd; the weights are dlog_r - exp(log_r) sum_k dlog_r."""
    if scale_tril is not None or means.shape[0] > 1:
        return NotImplemented
    log_r = log_r.contiguous()  # a hook on saved tensors may lay it out anew
    given = (dlog_r.sum(1, dtype=log_r.dtype), None, dlog_r, log_r)
    return gradients(given, (z, None, logits, means, logvars), (dz, None, dlogits, dmeans, dlogvars), "point")
