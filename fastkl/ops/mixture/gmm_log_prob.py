"""Log-density of a Gaussian mixture, one value per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._call import apply, needs_closed_form
from fastkl.ops._register import differentiable, register, same, without_autocast
from fastkl.ops._sharding import by_parts
from fastkl.ops.mixture import _at_once as at_once
from fastkl.ops.mixture import _components as components
from fastkl.ops.mixture._canonical import PRECISIONS, as_logvars, canonical
from fastkl.ops.mixture._mixture import DMIXTURE, MIXTURE, Gradients, Mixture, by_datum, outputs_for
from fastkl.ops.mixture._sweep import Sweep, keep_for, log_prob
from fastkl.ops.mixture._sweep_gradients import DensityWeights, add_gradients, write, zeros_to_add_to
from fastkl.ops.mixture._vmap import vmap_call

_INPUTS = f"Tensor z, Tensor? logvar, {MIXTURE}"


@without_autocast
def values(z, logvar, logits, means, logvars, scale_tril, form, precision, keep) -> list[Tensor]:
    """[ln p [R]]; with keep >= 1 also ln p in float64, with keep = 2 also the responsibilities [R, K]."""
    mixture = Mixture(logits, means, logvars, scale_tril)
    if not at_once.is_small(z, mixture):
        return log_prob(Sweep(z, logvar, mixture, form, precision), keep)
    joint = at_once.joint_of(*at_once.prepare(z, logvar, mixture, form)).flatten(0, 1)
    lp = joint.logsumexp(-1)
    results = [lp, lp.to(torch.float64, copy=True)][: keep + 1]
    return [*results, torch.softmax(joint, -1)] if keep == 2 else results


def fake_values(z, logvar, logits, means, logvars, scale_tril, form, precision, keep) -> list[Tensor]:
    dtype = reference.compute_dtype(z, logvar, logits, means, logvars, scale_tril)
    lp = z.new_empty(z.shape[0], dtype=dtype)
    return [lp, torch.empty_like(lp, dtype=torch.float64), lp.new_empty(lp.shape[0], means.shape[1])][: keep + 1]


def found_at_once(
    dlp: Tensor, responsibilities: Tensor | None, z: Tensor, logvar: Tensor | None, mixture: Mixture, form: str
) -> Gradients:
    """Gradients of small tensors. Responsibilities that were not kept are the softmax of the joint: exp(joint - ln p)
    would mix two roundings."""

    def weights_of(part, prepared) -> Tensor:
        own = responsibilities
        if own is None:
            own = at_once.softmax_of(part, prepared).reshape(dlp.shape[0], -1)  # len would fix the number of rows
        scale = dlp.unsqueeze(-1)
        weights = (own * scale).masked_fill_(scale == 0, 0.0)  # NaN in rows of density 0
        return by_datum(weights, part.data)

    return at_once.gradients(weights_of, z, logvar, mixture, form)


@without_autocast
def _backward(
    dlp, lp, responsibilities, z, logvar, logits, means, logvars, scale_tril,
    dz, dlogvar, dlogits, dmeans, dlogvars, dscale_tril, form, precision,
) -> None:  # fmt: skip
    mixture = Mixture(logits, means, logvars, scale_tril)
    outputs = Gradients(dz, dlogvar, dlogits, dmeans, dlogvars, dscale_tril)
    if at_once.is_small(z, mixture):
        found = found_at_once(dlp, responsibilities, z, logvar, mixture, form)
    else:
        sweep = Sweep(z, logvar, mixture, form, precision)
        found = zeros_to_add_to(outputs, sweep.dtype)
        add_gradients(sweep, DensityWeights(sweep, dlp, lp, responsibilities), found)
    write(outputs, found, logits)


def _kernels():
    from fastkl.kernels.mixture import gmm_log_prob

    return gmm_log_prob


def _loops():
    from fastkl.native import mixture

    return mixture


gmm_log_prob_fwd = register(
    f"gmm_log_prob_fwd({_INPUTS}, str form, str precision, int keep) -> Tensor[]",
    closed_form=values,
    fake=fake_values,
    kernel=lambda: _kernels().fwd,
    native=lambda: _loops().gmm_log_prob_fwd,
    terms=lambda z, logvar, logits, means, *_: z.numel() * means.shape[1],
)
gmm_log_prob_bwd = register(
    f"gmm_log_prob_bwd(Tensor dlp, Tensor lp, Tensor? responsibilities, {_INPUTS}, "
    f"Tensor(a!)? dz, Tensor(b!)? dlogvar, {DMIXTURE}, str form, str precision) -> ()",
    closed_form=_backward,
    kernel=lambda: _kernels().bwd,
    native=lambda: _loops().gmm_log_prob_bwd,
    terms=lambda dlp, lp, responsibilities, z, logvar, logits, means, *_: z.numel() * means.shape[1],
)


@without_autocast
def differentiable_gradients(dlp, z, logvar, logits, means, logvars, scale_tril, form) -> list[Tensor | None]:
    """_backward in differentiable torch ops."""
    mixture = Mixture(logits, means, logvars, scale_tril)
    rows = by_datum(dlp.to(reference.compute_dtype(z, logvar, *mixture)), mixture.data).unsqueeze(-1)

    def weights_of(part, prepared) -> Tensor:
        return at_once.softmax_of(part, prepared) * rows

    return at_once.differentiable_gradients(weights_of, z, logvar, mixture, form)


class GMMLogProb(torch.autograd.Function):
    @staticmethod
    def forward(z, logvar, logits, means, logvars, scale_tril, form, precision, keep):
        return tuple(gmm_log_prob_fwd(z, logvar, logits, means, logvars, scale_tril, form, precision, keep))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6], *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else torch makes zeros as large as the kept weights
        ctx.form, ctx.precision = inputs[6:8]

    @staticmethod
    def backward(ctx, dlp, *_):
        if dlp is None:
            return (None,) * 9
        saved = ctx.saved_tensors
        inputs, kept = saved[:6], saved[6:]
        if needs_closed_form(dlp):
            return *differentiable_gradients(dlp, *inputs, ctx.form), None, None, None
        outputs = outputs_for(inputs, ctx.needs_input_grad)
        lp, responsibilities = (*kept, None)[:2]
        gmm_log_prob_bwd(dlp, lp, responsibilities, *inputs, *outputs, ctx.form, ctx.precision)
        return *outputs, None, None, None

    @staticmethod
    def vmap(info, in_dims, z, logvar, logits, means, logvars, scale_tril, form, precision, keep):
        def call(rows, mixture):
            return apply(GMMLogProb, *rows, *mixture, form, precision, min(keep, keep_for(rows, mixture)))

        return vmap_call(call, info.batch_size, in_dims, (z, logvar), (logits, means, logvars, scale_tril))


differentiable("gmm_log_prob_fwd", GMMLogProb, same)


def keep_now(rows: list[Tensor], mixture: Mixture) -> int:
    """keep_for if the call may need a gradient, else 0."""
    if not torch.is_grad_enabled():
        return 0
    return 1 if torch.compiler.is_compiling() else keep_for(rows, mixture)  # one graph for any number of rows


def density(
    rows: dict[str, Tensor], logits: Tensor, means: Tensor, logvars: Tensor | None, scale_tril: Tensor | None,
    form: str, precision: str, groups: components.Groups = (),
) -> Tensor:  # fmt: skip
    """The log-density [*batch] of rows {"z": z} or {"mu": mu, "logvar": logvar}; logvars are log-variances."""
    arguments.check_choice("precision", precision, PRECISIONS)
    if groups:
        return components.density(wide_density, rows, (logits, means, logvars, scale_tril), form, precision, groups)
    found = canonical(rows, logits, means, logvars, scale_tril)
    z, logvar = found.rows[0], None if len(found.rows) == 1 else found.rows[1]
    if z.shape[0] == 0:
        return found.restore(nothing(found.rows, found.mixture))
    keep = keep_now(found.rows, found.mixture)
    return found.restore(apply(GMMLogProb, z, logvar, *found.mixture, form, precision, keep)[0])


def wide_density(
    rows: dict[str, Tensor], logits: Tensor, means: Tensor, logvars: Tensor | None, scale_tril: Tensor | None,
    form: str, precision: str,
) -> Tensor:  # fmt: skip
    """`density` in float64, as far as the sums over dimensions are; it keeps no responsibilities for backward."""
    found = canonical(rows, logits, means, logvars, scale_tril)
    z, logvar = found.rows[0], None if len(found.rows) == 1 else found.rows[1]
    if z.shape[0] == 0:
        return found.restore(nothing(found.rows, found.mixture).double())
    lp, wide = apply(GMMLogProb, z, logvar, *found.mixture, form, precision, 1)
    return found.restore(lp.double() + (wide - lp.detach()).nan_to_num(0.0, 0.0, 0.0))  # lp may be infinite


def nothing(rows: list[Tensor], mixture: Mixture) -> Tensor:
    """The empty result [0] for no rows; every argument gets a gradient of zeros through it."""
    dtype = reference.compute_dtype(*rows, *mixture)
    touched = sum(tensor.to(dtype).sum() * 0 for tensor in (*rows[1:], *mixture) if tensor is not None)
    return rows[0].to(dtype).sum(-1) + touched


@by_parts
def gmm_log_prob(
    z: Tensor, logits: Tensor, means: Tensor, logvars: Tensor | float | None = None, *,
    scale_tril: Tensor | None = None, scale: str = "logvar", precision: str = "exact", _groups: components.Groups = (),
) -> Tensor:  # fmt: skip
    """Log-density of a Gaussian mixture, in nats, one value per sample.

    ln p(z) = logsumexp_k [ln pi_k + ln N(z; m_k, S_k)], pi = softmax(logits)

    Args:
        z: [*batch, D].
        logits: [K], or one row for each datum, [*batch, K]; not normalised. -inf is a component of weight 0.
        means: [K, D], or one mixture for each datum, [*batch, K, D], with size 1 in dimensions that share it. Expanded
            dimensions (stride 0, as in a plate) are treated as one mixture: the gradient reaches the tensor that was
            expanded, and every entry of the expanded tensor's own gradient (retain_grad) is the mean.
        logvars: ln of the components' variances: [*batch, K, D] diagonal, [K, 1] spherical, [1, D] or [D] tied, or a
            number for all; without logvars and scale_tril every variance is 1.
        scale_tril: [*batch, K, D, D], lower triangles L_k with a positive diagonal, S_k = L_k L_k^T; entries above the
            diagonal are not read. Excludes logvars.
        scale: the meaning of logvars: "logvar", "log_std", "std" or "softplus", as for `fastkl.kl_normal`; others than
            "logvar" are converted in float32.
        precision: "exact" uses differences (z - m) / sigma, which are accurate for narrow and distant components.
            "tf32x3" and "tf32" expand the square around the mean of the means, on a GPU on tensor cores. On a CPU every
            precision uses differences. Without a C compiler, "exact" expands the square in float64 if that is as
            accurate, and the other two in float32. Largest errors in nats of the compiled kernels, emulated, at
            K = 100, D = 40, against float64 (broadcasting in float32: 8e-6 and 1e-5):

            ======================================  ======  =======  ======
            components                              exact   tf32x3   tf32
            ======================================  ======  =======  ======
            unit Gaussians around the origin        8e-6    8e-6     0.01
            sigma = 0.1, means of size 10           6e-5    0.06     400
            ======================================  ======  =======  ======

    Returns:
        [*batch], float32 for float16, bfloat16 and float32 input, float64 if any input is. Every argument has a
        gradient, in its dtype. The backward pass needs ln p, saved in float64, and on a CPU the responsibilities
        [rows, K] if they take at most 10 MiB.

    A mixture too large for one device: give DTensors, the mixture's sharded along K and z not sharded over the same
    processes. Each of R processes computes its own components and keeps their gradients. For N rows it sends
    8 (R - 1) (N + 1) bytes forward, in one all-gather, and backward, if z requires a gradient, 2 (R - 1) / R times the
    bytes of z, in one all-reduce. A second derivative raises an error.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes do not match, devices differ, logvars and scale_tril are both given, scale or precision is
            unknown; on a CPU also for a singular scale_tril.
        RuntimeError: the gradient of a mixture with sharded components is differentiated.

    Source: Dilokthanakul et al. 2016, "Deep Unsupervised Clustering with Gaussian Mixture Variational Autoencoders",
    arXiv:1611.02648; Bishop 2006, "Pattern Recognition and Machine Learning", equation 9.7.

    >>> import torch, fastkl
    >>> z, means = torch.zeros(2, 3), torch.zeros(4, 3)
    >>> fastkl.gmm_log_prob(z, torch.randn(4), means)  # four equal components: one standard normal
    tensor([-2.7568, -2.7568])
    """
    logvars = as_logvars(means, logvars, scale)
    return density({"z": z}, logits, means, logvars, scale_tril, "point", precision, _groups)
