"""Both bounds on the KL divergence from a diagonal Gaussian to a Gaussian mixture, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._register import apply, differentiable, needs_closed_form, register, same
from fastkl.ops._scales import as_logvar
from fastkl.ops._sharding import by_parts
from fastkl.ops.mixture import _gmm
from fastkl.ops.mixture import _mixture_arguments as mixtures

_ARGUMENTS = f"Tensor mu, Tensor logvar, {_gmm.MIXTURE}, str precision"


def _forward(mu, logvar, logits, means, logvars, scale_tril, precision, keep) -> list[Tensor]:
    """[lower, upper], and the tensors that the two log-densities save for backward.

    The two share no computation: in torch ops the upper bound's squares are matrix products; the lower bound's are not,
    because their variances depend on row and component. The mixture's kernels are used if there are any.
    """
    inputs = (mu, logvar, logits, means, logvars, scale_tril)
    lower, *kept = _gmm.gmm_log_prob_fwd(*inputs, "convolved", precision, keep)
    upper, *also_kept = _gmm.gmm_log_prob_fwd(*inputs, "expected", precision, keep)
    negative_entropy = -reference.normal_entropy(logvar, lower.dtype)
    return [negative_entropy - lower, negative_entropy - upper, *kept, *also_kept]


def _fake_forward(mu, logvar, logits, means, logvars, scale_tril, precision, keep) -> list[Tensor]:
    settings = (mu, logvar, logits, means, logvars, scale_tril, "convolved", precision, keep)
    (lower, *kept), (upper, *also_kept) = (_gmm.fake_values(*settings) for _ in range(2))
    return [lower, upper, *kept, *also_kept]


def _incoming(dlower, dupper, kept):
    """(form, gradient, saved tensors) of each bound that has a gradient."""
    half = len(kept) // 2
    both = ("convolved", dlower, kept[:half]), ("expected", dupper, kept[half:])
    return [each for each in both if each[1] is not None]


def _backward(
    dlower, dupper, kept, mu, logvar, logits, means, logvars, scale_tril, precision, data, parameters
) -> list[Tensor]:
    inputs = (mu, logvar, logits, means, logvars, scale_tril)
    dtype = reference.compute_dtype(*inputs)
    wide = [t.to(dtype) if t is not None and t.itemsize == 2 else t for t in inputs]  # sums are rounded once, below
    total: list[Tensor] = []
    for form, gradient, saved in _incoming(dlower, dupper, kept):
        found = _gmm.gmm_log_prob_bwd(-gradient, saved, *wide, form, precision, data, parameters)
        if data:
            found[1] = torch.sub(found[1], gradient.to(found[1].dtype).unsqueeze(-1), alpha=0.5)  # -H(q)
        total = [a + b for a, b in zip(total, found)] if total else found
    return _gmm.matched(total, mu, logvar, inputs[2:], data, parameters)


def _fake_backward(
    dlower, dupper, kept, mu, logvar, logits, means, logvars, scale_tril, precision, data, parameters
) -> list[Tensor]:
    return _gmm.fake_gradients(mu, logvar, (logits, means, logvars, scale_tril), data, parameters)


kl_gmm_bounds_fwd = register(
    f"kl_gmm_bounds_fwd({_ARGUMENTS}, int keep) -> Tensor[]",
    closed_form=_forward,
    fake=_fake_forward,
    kernel="mixture.kl_gmm_bounds.fwd",
)
kl_gmm_bounds_bwd = register(
    f"kl_gmm_bounds_bwd(Tensor? dlower, Tensor? dupper, Tensor[] kept, {_ARGUMENTS}, bool data, bool parameters)"
    " -> Tensor[]",
    closed_form=_backward,
    fake=_fake_backward,
    kernel="mixture.kl_gmm_bounds.bwd",
)


def _gradients(dlower, dupper, *inputs) -> list[Tensor | None]:
    """_backward in differentiable torch ops."""
    total: list[Tensor | None] = [None] * len(inputs)
    for form, gradient, _ in _incoming(dlower, dupper, ()):
        found = _gmm.log_prob_gradients(-gradient, *inputs, form)
        found[1] = found[1] - 0.5 * gradient.unsqueeze(-1).to(found[1].dtype)  # -H(q)
        total = [a if b is None else b if a is None else a + b for a, b in zip(found, total)]
    return total


class _Bounds(torch.autograd.Function):
    @staticmethod
    def forward(mu, logvar, logits, means, logvars, scale_tril, precision, keep):
        return tuple(kl_gmm_bounds_fwd(mu, logvar, logits, means, logvars, scale_tril, precision, keep))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6], *output[2:])
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)  # one bound alone is half of the work
        ctx.precision = inputs[6]

    @staticmethod
    def backward(ctx, dlower, dupper, *_):
        given = [gradient for gradient in (dlower, dupper) if gradient is not None]
        if not given:
            return (None,) * 8
        saved = ctx.saved_tensors
        inputs, kept = saved[:6], saved[6:]
        if needs_closed_form(*given):
            return *_gradients(dlower, dupper, *inputs), None, None
        data, parameters = any(ctx.needs_input_grad[:2]), any(ctx.needs_input_grad[2:6])
        found = kl_gmm_bounds_bwd(dlower, dupper, list(kept), *inputs, ctx.precision, data, parameters)
        return *_gmm.placed(found, inputs, data, parameters), None, None

    @staticmethod
    def vmap(info, in_dims, mu, logvar, logits, means, logvars, scale_tril, precision, keep):
        def call(rows, mixture):
            return apply(_Bounds, *rows, *mixture, precision, min(keep, _gmm.keep_for_rows(rows, mixture)))

        return mixtures.vmap_call(call, info.batch_size, in_dims, (mu, logvar), (logits, means, logvars, scale_tril))


differentiable("kl_gmm_bounds_fwd", _Bounds, same)


@by_parts
def kl_gmm_bounds(
    mu: Tensor, logvar: Tensor, logits: Tensor, means: Tensor, logvars: Tensor | float | None = None, *,
    scale_tril: Tensor | None = None, scale: str = "logvar", prior_scale: str = "logvar", precision: str = "exact",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(lower, upper) bounds on KL(q || mixture), in nats, one pair per sample.

    Arguments, errors and sources are those of `fastkl.kl_gmm`, methods "lower" and "upper". On a GPU both come from one
    pass if components are diagonal, all rows share them and their weights, and precision is "exact". In float32 the
    lower bound is then NaN if q's log-variance is more than 144 above a component's, or above 177.

    >>> import torch, fastkl
    >>> lower, upper = fastkl.kl_gmm_bounds(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(3), torch.randn(3, 2))
    >>> bool(lower < upper)
    True
    """
    mixtures.check_precision(precision)
    arguments.check_tensors(mu=mu, logvar=logvar)
    logvar = as_logvar("scale", logvar, scale, mu)
    logvars = mixtures.as_logvars(means, logvars, prior_scale, "prior_scale")
    rows, mixture, restore = mixtures.arranged({"mu": mu, "logvar": logvar}, logits, means, logvars, scale_tril)
    if rows[0].shape[0] == 0:
        nothing = restore(_gmm.nothing(rows, mixture))
        return nothing, nothing.clone()
    lower, upper, *_ = apply(_Bounds, *rows, *mixture, precision, _gmm.keep_now(rows, mixture))
    return restore(lower), restore(upper)
