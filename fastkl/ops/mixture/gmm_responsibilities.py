"""Log-responsibilities of a Gaussian mixture: ln p(k | z)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops._register import apply, differentiable, needs_closed_form, register, same, without_autocast
from fastkl.ops._sharding import by_parts
from fastkl.ops.mixture import _mixture as sweeps
from fastkl.ops.mixture import _mixture_arguments as mixtures
from fastkl.ops.mixture._gmm import (
    MIXTURE,
    at_once,
    differentiable_gradients,
    fake_gradients,
    is_small,
    joint_of,
    matched,
    nothing,
    placed,
    prepare,
    softmax_of,
    wanted,
)

_ARGUMENTS = f"Tensor z, {MIXTURE}, str precision"


@without_autocast
def _forward(z, logits, means, logvars, scale_tril, precision) -> Tensor:
    if is_small(z, means, scale_tril):
        joint = joint_of(*prepare(z, None, logits, means, logvars, scale_tril, "point"))
        return torch.log_softmax(joint, -1).flatten(0, 1)
    return sweeps.log_responsibilities(sweeps.Sweep(z, None, logits, means, logvars, scale_tril, "point", precision))


def _fake_forward(z, logits, means, logvars, scale_tril, precision) -> Tensor:
    dtype = reference.compute_dtype(z, logits, means, logvars, scale_tril)
    return z.new_empty((z.shape[0], means.shape[1]), dtype=dtype)


@without_autocast
def _backward(dlog_r, log_r, z, logits, means, logvars, scale_tril, precision, data, parameters) -> list[Tensor]:
    mixture = (logits, means, logvars, scale_tril)
    if is_small(z, means, scale_tril):
        total = dlog_r.sum(-1, keepdim=True)
        weights = dlog_r - (log_r.exp() * total).masked_fill_(total == 0, 0.0)  # NaN in rows of density 0
        found = at_once(lambda part, _: weights.view(-1, part.data, weights.shape[1]), z, None, *mixture, "point")
        return matched(wanted(found, data, parameters), z, None, mixture, data, parameters)
    sweep = sweeps.Sweep(z, None, *mixture, "point", precision)
    buffers = sweeps.gradient_buffers(mixture, sweep.dtype) if parameters else []
    rows = sweeps.gradients(sweep, sweeps.ResponsibilityWeights(sweep, dlog_r, log_r), data, buffers)
    return matched([*rows, *buffers], z, None, mixture, data, parameters)


def _fake_backward(dlog_r, log_r, z, logits, means, logvars, scale_tril, precision, data, parameters) -> list[Tensor]:
    return fake_gradients(z, None, (logits, means, logvars, scale_tril), data, parameters)


gmm_responsibilities_fwd = register(
    f"gmm_responsibilities_fwd({_ARGUMENTS}) -> Tensor",
    closed_form=_forward,
    fake=_fake_forward,
    kernel="mixture.gmm_responsibilities.fwd",
)
gmm_responsibilities_bwd = register(
    f"gmm_responsibilities_bwd(Tensor dlog_r, Tensor log_r, {_ARGUMENTS}, bool data, bool parameters) -> Tensor[]",
    closed_form=_backward,
    fake=_fake_backward,
    kernel="mixture.gmm_responsibilities.bwd",
)


@without_autocast
def _gradients(dlog_r, z, logits, means, logvars, scale_tril) -> list[Tensor | None]:
    """_backward in differentiable torch ops."""

    def weights(part, prepared) -> Tensor:
        softmax = softmax_of(part, prepared)
        gradient = dlog_r.to(part.dtype).reshape(softmax.shape)
        return gradient - softmax * gradient.sum(-1, keepdim=True)

    found = differentiable_gradients(weights, z, None, logits, means, logvars, scale_tril, "point")
    return [found[0], *found[2:]]


class _GMMResponsibilities(torch.autograd.Function):
    @staticmethod
    def forward(z, logits, means, logvars, scale_tril, precision):
        return gmm_responsibilities_fwd(z, logits, means, logvars, scale_tril, precision)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5], output)
        ctx.precision = inputs[5]

    @staticmethod
    def backward(ctx, dlog_r):
        z, *mixture, log_r = ctx.saved_tensors
        if needs_closed_form(dlog_r):
            return *_gradients(dlog_r, z, *mixture), None
        data, parameters = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:5])
        found = gmm_responsibilities_bwd(dlog_r, log_r, z, *mixture, ctx.precision, data, parameters)
        dz, _, *dmixture = placed(found, (z, None, *mixture), data, parameters)
        return dz, *dmixture, None

    @staticmethod
    def vmap(info, in_dims, z, logits, means, logvars, scale_tril, precision):
        def call(rows, mixture):
            return (apply(_GMMResponsibilities, *rows, *mixture, precision),)

        (out,), _ = mixtures.vmap_call(call, info.batch_size, in_dims, (z,), (logits, means, logvars, scale_tril))
        return out, 0


differentiable("gmm_responsibilities_fwd", _GMMResponsibilities, same)


@by_parts
def gmm_responsibilities(
    z: Tensor, logits: Tensor, means: Tensor, logvars: Tensor | float | None = None, *,
    scale_tril: Tensor | None = None, scale: str = "logvar", precision: str = "exact",
) -> Tensor:  # fmt: skip
    """Log-responsibilities of a Gaussian mixture's components, in nats.

    ln p(k | z) = ln pi_k + ln N(z; m_k, S_k) - ln p(z), pi = softmax(logits)

    Arguments and errors are those of `fastkl.gmm_log_prob`, which does not need this [..., K] tensor.

    Returns:
        [*batch, K], float32 for float16, bfloat16 and float32 input, float64 if any input is; its exponentials sum to
        1 along K. Every argument has a gradient.

    Source: Bishop 2006, "Pattern Recognition and Machine Learning", equation 9.13.

    >>> import torch, fastkl
    >>> means = torch.tensor([[-1.0], [1.0]])
    >>> fastkl.gmm_responsibilities(torch.tensor([[0.0], [1.0]]), torch.zeros(2), means).exp()
    tensor([[0.5000, 0.5000],
            [0.1192, 0.8808]])
    """
    mixtures.check_precision(precision)
    logvars = mixtures.as_logvars(means, logvars, scale)
    (z,), mixture, restore = mixtures.arranged({"z": z}, logits, means, logvars, scale_tril)
    if z.shape[0] == 0:
        return restore(nothing([z], mixture).unsqueeze(-1).expand(-1, means.shape[-2]))
    return restore(apply(_GMMResponsibilities, z, *mixture, precision))
