"""The mixture log-density as a registered op with its gradient, which several public functions use.

`form` is the term of each component at a row z, with q = N(z, diag exp(logvar)): "point" is ln N(z; m, S), "expected"
is E_q[ln N(.; m, S)], "convolved" is ln N(z; m, S + exp(logvar)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._register import apply, differentiable, needs_closed_form, register, same, without_autocast
from fastkl.ops.mixture import _mixture as sweeps
from fastkl.ops.mixture import _mixture_arguments as mixtures
from fastkl.ops.mixture._components import Differences, Full, Mixture

MIXTURE = "Tensor logits, Tensor means, Tensor? logvars, Tensor? scale_tril"
_ARGUMENTS = f"Tensor z, Tensor? logvar, {MIXTURE}, str form, str precision"
# Up to this product of rows, components and dimensions everything is computed at once: a sweep has more call overhead.
SMALL = 1 << 17


def joined(tensor: Tensor) -> Tensor:
    """[S, B, ...] -> [R, ...]."""
    return tensor.reshape(-1, *tensor.shape[2:])


def is_small(z: Tensor, means: Tensor, scale_tril: Tensor | None) -> bool:
    matrices = 0 if scale_tril is None else scale_tril.numel()
    return max(z.shape[0] * means.shape[1] * means.shape[2], matrices) <= SMALL


def prepare(z, logvar, logits, means, logvars, scale_tril, form):
    """(part, prepared) for all components and rows at once."""
    dtype = reference.compute_dtype(z, logvar, logits, means, logvars, scale_tril)
    data = max(logits.shape[0], means.shape[0])
    kind, mixture = Differences if scale_tril is None else Full, Mixture(logits, means, logvars, scale_tril)
    part = kind(mixture, arguments.EVERYTHING, form, dtype)
    logvar = None if logvar is None else sweeps.by_datum(logvar.to(dtype), data)
    return part, part.prepare(sweeps.by_datum(z.to(dtype), data), logvar, arguments.EVERYTHING)


def joint_of(part, prepared) -> Tensor:
    """ln pi_k + the form's term of component k [S, B, K], differentiable."""
    return part.joint(prepared, torch.log_softmax(part.mixture.logits.to(part.dtype), -1))


def softmax_of(part, prepared) -> Tensor:
    """The responsibilities [S, B, K], differentiable."""
    return torch.softmax(joint_of(part, prepared), -1)


@without_autocast
def values(z, logvar, logits, means, logvars, scale_tril, form, precision, keep) -> list[Tensor]:
    """The same list as _mixture.log_prob."""
    if is_small(z, means, scale_tril):
        joint = joint_of(*prepare(z, logvar, logits, means, logvars, scale_tril, form)).flatten(0, 1)
        lp = joint.logsumexp(-1)
        results = [lp, lp.to(torch.float64, copy=True)]
        return [*results, torch.softmax(joint, -1)] if keep == 2 else results[: keep + 1]
    return sweeps.log_prob(sweeps.Sweep(z, logvar, logits, means, logvars, scale_tril, form, precision), keep)


def fake_values(z, logvar, logits, means, logvars, scale_tril, form, precision, keep) -> list[Tensor]:
    lp = z.new_empty(z.shape[0], dtype=reference.compute_dtype(z, logvar, logits, means, logvars, scale_tril))
    return [lp, torch.empty_like(lp, dtype=torch.float64), lp.new_empty(lp.shape[0], means.shape[1])][: keep + 1]


@without_autocast
def _backward(dlp, kept, z, logvar, logits, means, logvars, scale_tril, form, precision, data, parameters):
    mixture = (logits, means, logvars, scale_tril)
    rows, sums = summed_gradients(dlp, kept, z, logvar, mixture, form, precision, data, parameters)
    if parameters:
        sweeps.subtract_softmax(sums[0], logits)
    return matched([*rows, *sums], z, logvar, mixture, data, parameters)


def _at_once(dlp, kept, z, logvar, mixture, form) -> list[Tensor | None]:
    """All gradients at once. Responsibilities that were not kept are the softmax of the joint: exp(joint - ln p) would
    mix two roundings."""

    def weights_of(part, prepared) -> Tensor:
        responsibilities = kept[1] if len(kept) == 2 else softmax_of(part, prepared).reshape(len(dlp), -1)
        scale = dlp.unsqueeze(-1)
        weights = (responsibilities * scale).masked_fill_(scale == 0, 0.0)  # NaN in rows of density 0
        return weights.view(-1, part.data, responsibilities.shape[1])

    return at_once(weights_of, z, logvar, *mixture, form)


def summed_gradients(
    dlp, kept, z, logvar, mixture, form, precision, data: bool, parameters: bool, buffers: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """(gradients of the rows if `data`, gradients of the mixture if `parameters`), in the compute dtype.

    They are [dz, dlogvar if given] and [sum of the weights [I, K], dmeans, dlogvars or dscale_tril if given]. The
    latter are added to `buffers` if given; else they may still have to be summed to the parameters' shapes.
    """
    _, means, _, scale_tril = mixture
    if is_small(z, means, scale_tril):
        found = _at_once(dlp, kept, z, logvar, mixture, form)
        sums = wanted(found, False, parameters)
        for buffer, gradient in zip(buffers or (), sums):
            buffer += gradient.sum_to_size(buffer.shape)
        return wanted(found, data, False), sums
    sweep = sweeps.Sweep(z, logvar, *mixture, form, precision)
    if buffers is None:
        buffers = sweeps.gradient_buffers(mixture, sweep.dtype) if parameters else []
    return sweeps.gradients(sweep, sweeps.Weights(sweep, dlp, *kept), data, buffers), buffers


def wanted(tensors, data: bool, parameters: bool) -> list[Tensor]:
    """Those of (z, logvar, logits, means, logvars, scale_tril) that are not None and are wanted."""
    return [tensor for tensor, ask in zip(tensors, _asked(data, parameters)) if ask and tensor is not None]


def placed(gradients, inputs, data: bool, parameters: bool) -> list[Tensor | None]:
    """The inverse of `wanted`: each gradient at the position of its input, None elsewhere."""
    found = iter(gradients)
    asked = _asked(data, parameters)
    return [next(found) if ask and tensor is not None else None for tensor, ask in zip(inputs, asked)]


def _asked(data: bool, parameters: bool) -> tuple[bool, ...]:
    return data, data, *[parameters] * 4


def matched(gradients, z, logvar, mixture, data: bool, parameters: bool) -> list[Tensor]:
    """Each gradient in the shape, dtype and layout of its input."""
    inputs = wanted((z, logvar, *mixture), data, parameters)
    return [arguments.match(gradient.sum_to_size(tensor.shape), tensor) for gradient, tensor in zip(gradients, inputs)]


def fake_gradients(z, logvar, mixture, data: bool, parameters: bool) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in wanted((z, logvar, *mixture), data, parameters)]


def _fake_backward(dlp, kept, z, logvar, logits, means, logvars, scale_tril, form, precision, data, parameters):
    return fake_gradients(z, logvar, (logits, means, logvars, scale_tril), data, parameters)


gmm_log_prob_fwd = register(
    f"gmm_log_prob_fwd({_ARGUMENTS}, int keep) -> Tensor[]",
    closed_form=values,
    fake=fake_values,
    kernel="mixture.gmm_log_prob.fwd",
    native="mixture.gmm_log_prob_fwd",
)
gmm_log_prob_bwd = register(
    f"gmm_log_prob_bwd(Tensor dlp, Tensor[] kept, {_ARGUMENTS}, bool data, bool parameters) -> Tensor[]",
    closed_form=_backward,
    fake=_fake_backward,
    kernel="mixture.gmm_log_prob.bwd",
    native="mixture.gmm_log_prob_bwd",
)


def at_once(weights_of, z, logvar, logits, means, logvars, scale_tril, form) -> list[Tensor | None]:
    """(dz, dlogvar, sum of the weights [I, K], dmeans, dlogvars, dscale_tril) in plain differentiable torch ops.

    They have the compute dtype; those of the mixture must still be summed to its shapes. weights_of(part, prepared)
    gives the weights [S, B, K]. Without blocks: for small tensors and for second derivatives.
    """
    part, prepared = prepare(z, logvar, logits, means, logvars, scale_tril, form)
    weights = weights_of(part, prepared)
    dz, dlogvar, dmeans, dspread = part.gradients(prepared, weights)
    dlogvar = None if logvar is None else joined(dlogvar)
    dlogvars, dscale_tril = (dspread, None) if scale_tril is None else (None, dspread)
    dlogits = joined(weights).sum(0, keepdim=True) if logits.shape[0] == 1 else weights.sum(0)
    return [joined(dz), dlogvar, dlogits, dmeans, None if logvars is None else dlogvars, dscale_tril]


def differentiable_gradients(weights_of, *inputs_and_form) -> list[Tensor | None]:
    """at_once with the gradient in the logits themselves, and each gradient in its input's shape and dtype."""
    *inputs, _ = inputs_and_form
    found = at_once(weights_of, *inputs_and_form)
    found[2] = found[2] - torch.softmax(inputs[2].to(found[2].dtype), -1) * found[2].sum(-1, keepdim=True)
    return [
        None if gradient is None else gradient.sum_to_size(tensor.shape).to(tensor.dtype)
        for gradient, tensor in zip(found, inputs)
    ]


@without_autocast
def log_prob_gradients(dlp, z, logvar, logits, means, logvars, scale_tril, form) -> list[Tensor | None]:
    """_backward in differentiable torch ops."""
    inputs = (z, logvar, logits, means, logvars, scale_tril)
    dtype = reference.compute_dtype(*inputs)
    rows = sweeps.by_datum(dlp.to(dtype), max(logits.shape[0], means.shape[0])).unsqueeze(-1)
    return differentiable_gradients(lambda *prepared: softmax_of(*prepared) * rows, *inputs, form)


class _GMMLogProb(torch.autograd.Function):
    @staticmethod
    def forward(z, logvar, logits, means, logvars, scale_tril, form, precision, keep):
        return tuple(gmm_log_prob_fwd(z, logvar, logits, means, logvars, scale_tril, form, precision, keep))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6], *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else torch makes zeros as large as the kept weights
        ctx.settings = inputs[6:8]

    @staticmethod
    def backward(ctx, dlp, *_):
        if dlp is None:
            return (None,) * 9
        saved = ctx.saved_tensors
        inputs, kept = saved[:6], saved[6:]
        if needs_closed_form(dlp):
            return *log_prob_gradients(dlp, *inputs, ctx.settings[0]), None, None, None
        data, parameters = any(ctx.needs_input_grad[:2]), any(ctx.needs_input_grad[2:6])
        found = gmm_log_prob_bwd(dlp, list(kept), *inputs, *ctx.settings, data, parameters)
        return *placed(found, inputs, data, parameters), None, None, None

    @staticmethod
    def vmap(info, in_dims, z, logvar, logits, means, logvars, scale_tril, form, precision, keep):
        def call(rows, mixture):
            return apply(_GMMLogProb, *rows, *mixture, form, precision, min(keep, keep_for_rows(rows, mixture)))

        return mixtures.vmap_call(call, info.batch_size, in_dims, (z, logvar), (logits, means, logvars, scale_tril))


differentiable("gmm_log_prob_fwd", _GMMLogProb, same)


def keep_for_rows(rows, mixture) -> int:
    """keep_for with the arguments of one call."""
    return sweeps.keep_for(rows[0], mixture[0], reference.compute_dtype(*rows, *mixture))


def keep_now(rows, mixture) -> int:
    """keep_for if the call may need a gradient, else 0."""
    if not torch.is_grad_enabled():
        return 0
    return 1 if torch.compiler.is_compiling() else keep_for_rows(rows, mixture)  # one graph for any number of rows


def log_prob(rows: dict[str, Tensor], logits, means, logvars, scale_tril, form: str, precision: str) -> Tensor:
    """The log-density [*batch], from arguments as users give them."""
    mixtures.check_precision(precision)
    rows, mixture, restore = mixtures.arranged(rows, logits, means, logvars, scale_tril)
    if rows[0].shape[0] == 0:
        return restore(nothing(rows, mixture))
    z, logvar = (*rows, None)[:2]
    return restore(apply(_GMMLogProb, z, logvar, *mixture, form, precision, keep_now(rows, mixture))[0])


def nothing(rows: list[Tensor], mixture) -> Tensor:
    """The empty result [0] for no rows; every argument gets a gradient of zeros through it."""
    dtype = reference.compute_dtype(*rows, *mixture)
    touched = sum(tensor.to(dtype).sum() * 0 for tensor in (*rows[1:], *mixture) if tensor is not None)
    return rows[0].to(dtype).sum(-1) + touched
