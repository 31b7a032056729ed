"""Both bounds on the KL divergence from a diagonal Gaussian to a Gaussian mixture, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._call import apply, needs_closed_form
from fastkl.ops._register import differentiable, register, same
from fastkl.ops._scales import as_logvar
from fastkl.ops._sharding import by_parts
from fastkl.ops.mixture import _components as components
from fastkl.ops.mixture import gmm_log_prob as density
from fastkl.ops.mixture._canonical import PRECISIONS, as_logvars, canonical
from fastkl.ops.mixture._mixture import DMIXTURE, MIXTURE, Gradients, outputs_for
from fastkl.ops.mixture._sweep import keep_for
from fastkl.ops.mixture._sweep_gradients import write
from fastkl.ops.mixture._vmap import vmap_call
from fastkl.ops.mixture.kl_gmm import bound

_INPUTS = f"Tensor mu, Tensor logvar, {MIXTURE}"
# The tensors that each bound keeps of its log-density: ln p, and on a CPU the responsibilities, see keep_for.
_KEPT = ", ".join(f"Tensor {bound}_lp, Tensor? {bound}_responsibilities" for bound in ("lower", "upper"))


def _forward(mu, logvar, logits, means, logvars, scale_tril, precision, keep) -> list[Tensor]:
    """[lower, upper], and the tensors that the two log-densities keep for backward.

    The two share no computation: in torch ops the upper bound's squares are matrix products; the lower bound's are not,
    because their variances depend on row and component. The mixture's kernels are used if there are any.
    """
    inputs = (mu, logvar, logits, means, logvars, scale_tril)
    lower, *kept = density.gmm_log_prob_fwd(*inputs, "convolved", precision, keep)
    upper, *also_kept = density.gmm_log_prob_fwd(*inputs, "expected", precision, keep)
    negative_entropy = -reference.normal_entropy(logvar, lower.dtype)
    return [negative_entropy - lower, negative_entropy - upper, *kept, *also_kept]


def _fake_forward(mu, logvar, logits, means, logvars, scale_tril, precision, keep) -> list[Tensor]:
    settings = (mu, logvar, logits, means, logvars, scale_tril, "convolved", precision, keep)
    (lower, *kept), (upper, *also_kept) = (density.fake_values(*settings) for _ in range(2))
    return [lower, upper, *kept, *also_kept]


def _backward(
    dlower, dupper, lower_lp, lower_responsibilities, upper_lp, upper_responsibilities,
    mu, logvar, logits, means, logvars, scale_tril, dmu, dlogvar, dlogits, dmeans, dlogvars, dscale_tril, precision,
) -> None:  # fmt: skip
    inputs = (mu, logvar, logits, means, logvars, scale_tril)
    outputs = Gradients(dmu, dlogvar, dlogits, dmeans, dlogvars, dscale_tril)
    dtype = reference.compute_dtype(*inputs)
    wide = [t.to(dtype) if t is not None and t.itemsize == 2 else t for t in inputs]
    wanted = [output is not None for output in outputs]
    narrow = any(output is not None and output.itemsize == 2 for output in outputs)
    total = Gradients(*outputs_for(wide, wanted)) if narrow else outputs  # sums are rounded once, when written
    given = []
    if dlower is not None:
        given.append(("convolved", dlower, lower_lp, lower_responsibilities))
    if dupper is not None:
        given.append(("expected", dupper, upper_lp, upper_responsibilities))
    for place, (form, gradient, *kept) in enumerate(given):
        found = Gradients(*outputs_for(wide, wanted)) if place else total
        density.gmm_log_prob_bwd(-gradient, *kept, *wide, *found, form, precision)
        if found.dlogvar is not None:
            found.dlogvar.sub_(gradient.to(found.dlogvar.dtype).unsqueeze(-1), alpha=0.5)  # -H(q)
        for output, more in zip(total, found if place else ()):
            if output is not None and more is not None:
                output += more
    write(outputs, total)


def _kernels():
    from fastkl.kernels.mixture import kl_gmm_bounds

    return kl_gmm_bounds


kl_gmm_bounds_fwd = register(
    f"kl_gmm_bounds_fwd({_INPUTS}, str precision, int keep) -> Tensor[]",
    closed_form=_forward,
    fake=_fake_forward,
    kernel=lambda: _kernels().fwd,
)
kl_gmm_bounds_bwd = register(
    f"kl_gmm_bounds_bwd(Tensor? dlower, Tensor? dupper, {_KEPT}, {_INPUTS}, Tensor(a!)? dmu, Tensor(b!)? dlogvar, "
    f"{DMIXTURE}, str precision) -> ()",
    closed_form=_backward,
    kernel=lambda: _kernels().bwd,
)


def _differentiable_gradients(dlower, dupper, *inputs) -> list[Tensor | None]:
    """_backward in differentiable torch ops."""
    total: list[Tensor | None] = [None] * len(inputs)
    for form, gradient in (("convolved", dlower), ("expected", dupper)):
        if gradient is None:
            continue
        found = density.differentiable_gradients(-gradient, *inputs, form)
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
            return *_differentiable_gradients(dlower, dupper, *inputs), None, None
        outputs = outputs_for(inputs, ctx.needs_input_grad)
        half = len(kept) // 2
        kept = (*(*kept[:half], None)[:2], *(*kept[half:], None)[:2])
        kl_gmm_bounds_bwd(dlower, dupper, *kept, *inputs, *outputs, ctx.precision)
        return *outputs, None, None

    @staticmethod
    def vmap(info, in_dims, mu, logvar, logits, means, logvars, scale_tril, precision, keep):
        def call(rows, mixture):
            return apply(_Bounds, *rows, *mixture, precision, min(keep, keep_for(rows, mixture)))

        return vmap_call(call, info.batch_size, in_dims, (mu, logvar), (logits, means, logvars, scale_tril))


differentiable("kl_gmm_bounds_fwd", _Bounds, same)


@by_parts
def kl_gmm_bounds(
    mu: Tensor, logvar: Tensor, logits: Tensor, means: Tensor, logvars: Tensor | float | None = None, *,
    scale_tril: Tensor | None = None, scale: str = "logvar", prior_scale: str = "logvar", precision: str = "exact",
    _groups: components.Groups = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(lower, upper) bounds on KL(q || mixture), in nats, one pair per sample.

    Arguments, errors and sources are those of `fastkl.kl_gmm`, methods "lower" and "upper". On a GPU both come from one
    pass if components are diagonal, all rows share them and their weights, and precision is "exact". In float32 the
    lower bound is then NaN if q's log-variance is more than 144 above a component's, or above 177. With DTensors whose
    components are sharded, each is a pass of its own and sends what `fastkl.kl_gmm` sends forward.

    >>> import torch, fastkl
    >>> lower, upper = fastkl.kl_gmm_bounds(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(3), torch.randn(3, 2))
    >>> bool(lower < upper)
    True
    """
    arguments.check_choice("precision", precision, PRECISIONS)
    arguments.check_tensors(mu=mu, logvar=logvar)
    logvar = as_logvar("scale", logvar, scale, mu)
    logvars = as_logvars(means, logvars, prior_scale, "prior_scale")
    if _groups:
        forms = ("convolved", "expected")
        lower, upper = (
            bound(mu, logvar, logits, means, logvars, scale_tril, form, precision, _groups) for form in forms
        )
        return lower, upper
    found = canonical({"mu": mu, "logvar": logvar}, logits, means, logvars, scale_tril)
    rows, mixture = found.rows, found.mixture
    if rows[0].shape[0] == 0:
        nothing = found.restore(density.nothing(rows, mixture))
        return nothing, nothing.clone()
    lower, upper, *_ = apply(_Bounds, *rows, *mixture, precision, density.keep_now(rows, mixture))
    return found.restore(lower), found.restore(upper)
