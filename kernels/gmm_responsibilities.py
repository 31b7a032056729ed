"""Log responsibilities ln p(k | z) [R, K] of a mixture that all rows share; backward needs no distances."""

from __future__ import annotations

from fastkl.kernels._mixture_gradient import gradients
from fastkl.kernels.gmm_log_prob import launch_fwd


def refuse(means, scale_tril, precision):
    if scale_tril is not None or means.shape[0] > 1 or precision != "exact":
        raise NotImplementedError("only for one mixture, without scale_tril, at precision='exact'")


def fwd(z, logits, means, logvars, scale_tril, precision):
    refuse(means, scale_tril, precision)
    lp, joints = launch_fwd(z, None, logits, means, logvars, "point", joints=True)
    return joints.sub_(lp[:, None])


def bwd(dlog_r, log_r, z, logits, means, logvars, scale_tril, precision, data, parameters):
    """As gmm_log_prob's bwd; the weights are dlog_r - exp(log_r) sum_k dlog_r."""
    refuse(means, scale_tril, precision)
    total = dlog_r.sum(1, dtype=log_r.dtype)
    return gradients((total, None, dlog_r, log_r), z, None, logits, means, logvars, "point", data, parameters)
