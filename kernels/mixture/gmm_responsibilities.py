"""Log responsibilities ln p(k | z) [R, K] of a mixture that all rows share; exact for every precision. Backward needs
no distances."""

from __future__ import annotations

from fastkl.kernels.mixture._mixture_gradient import gradients
from fastkl.kernels.mixture.gmm_log_prob import launch_fwd


def fwd(z, logits, means, logvars, scale_tril, precision):
    if scale_tril is not None or means.shape[0] > 1:
        return NotImplemented
    lp, joints = launch_fwd(z, None, logits, means, logvars, "point", joints=True)
    high = lp.to(joints.dtype)
    return joints.sub_(high[:, None]).sub_((lp - high).to(joints.dtype)[:, None])


def bwd(dlog_r, log_r, z, logits, means, logvars, scale_tril, dz, dlogits, dmeans, dlogvars, dscale_tril, precision):
    """As gmm_log_prob's bwd; the weights are dlog_r - exp(log_r) sum_k dlog_r."""
    if scale_tril is not None or means.shape[0] > 1:
        return NotImplemented
    log_r = log_r.contiguous()  # a hook on saved tensors may lay it out anew
    given = (dlog_r.sum(1, dtype=log_r.dtype), None, dlog_r, log_r)
    return gradients(given, (z, None, logits, means, logvars), (dz, None, dlogits, dmeans, dlogvars), "point")
