"""Log-responsibilities of a Gaussian mixture: ln p(k | z)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._call import apply, needs_closed_form
from fastkl.ops._register import differentiable, register, same, without_autocast
from fastkl.ops._sharding import by_parts
from fastkl.ops.mixture import _at_once as at_once
from fastkl.ops.mixture._canonical import PRECISIONS, as_logvars, canonical
from fastkl.ops.mixture._mixture import DMIXTURE, MIXTURE, Gradients, Mixture, by_datum, outputs_for
from fastkl.ops.mixture._sweep import Sweep, log_responsibilities
from fastkl.ops.mixture._sweep_gradients import ResponsibilityWeights, add_gradients, write, zeros_to_add_to
from fastkl.ops.mixture._vmap import vmap_call
from fastkl.ops.mixture.gmm_log_prob import nothing


@without_autocast
def _forward(z, logits, means, logvars, scale_tril, precision) -> Tensor:
    mixture = Mixture(logits, means, logvars, scale_tril)
    if at_once.is_small(z, mixture):
        joint = at_once.joint_of(*at_once.prepare(z, None, mixture, "point"))
        return torch.log_softmax(joint, -1).flatten(0, 1)
    return log_responsibilities(Sweep(z, None, mixture, "point", precision))


def _fake_forward(z, logits, means, logvars, scale_tril, precision) -> Tensor:
    dtype = reference.compute_dtype(z, logits, means, logvars, scale_tril)
    return z.new_empty((z.shape[0], means.shape[1]), dtype=dtype)


@without_autocast
def _backward(
    dlog_r, log_r, z, logits, means, logvars, scale_tril, dz, dlogits, dmeans, dlogvars, dscale_tril, precision
) -> None:
    mixture = Mixture(logits, means, logvars, scale_tril)
    outputs = Gradients(dz, None, dlogits, dmeans, dlogvars, dscale_tril)
    if at_once.is_small(z, mixture):
        total = dlog_r.sum(-1, keepdim=True)
        weights = dlog_r - (log_r.exp() * total).masked_fill_(total == 0, 0.0)  # NaN in rows of density 0
        found = at_once.gradients(lambda part, _: by_datum(weights, part.data), z, None, mixture, "point")
    else:
        sweep = Sweep(z, None, mixture, "point", precision)
        found = zeros_to_add_to(outputs, sweep.dtype)
        add_gradients(sweep, ResponsibilityWeights(sweep, dlog_r, log_r), found)
    write(outputs, found)


def _kernels():
    from fastkl.kernels.mixture import gmm_responsibilities

    return gmm_responsibilities


def _loops():
    from fastkl.native import mixture

    return mixture


gmm_responsibilities_fwd = register(
    f"gmm_responsibilities_fwd(Tensor z, {MIXTURE}, str precision) -> Tensor",
    closed_form=_forward,
    fake=_fake_forward,
    kernel=lambda: _kernels().fwd,
    native=lambda: _loops().gmm_responsibilities_fwd,
)
gmm_responsibilities_bwd = register(
    f"gmm_responsibilities_bwd(Tensor dlog_r, Tensor log_r, Tensor z, {MIXTURE}, Tensor(a!)? dz, {DMIXTURE}, "
    "str precision) -> ()",
    closed_form=_backward,
    kernel=lambda: _kernels().bwd,
    native=lambda: _loops().gmm_responsibilities_bwd,
)


@without_autocast
def _differentiable_gradients(dlog_r, z, logits, means, logvars, scale_tril) -> list[Tensor | None]:
    """_backward in differentiable torch ops."""

    def weights_of(part, prepared) -> Tensor:
        softmax = at_once.softmax_of(part, prepared)
        gradient = dlog_r.to(part.dtype).reshape(softmax.shape)
        return gradient - softmax * gradient.sum(-1, keepdim=True)

    mixture = Mixture(logits, means, logvars, scale_tril)
    dz, _, *dmixture = at_once.differentiable_gradients(weights_of, z, None, mixture, "point")
    return [dz, *dmixture]


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
        *inputs, log_r = ctx.saved_tensors
        if needs_closed_form(dlog_r):
            return *_differentiable_gradients(dlog_r, *inputs), None
        outputs = outputs_for(inputs, ctx.needs_input_grad)
        gmm_responsibilities_bwd(dlog_r, log_r, *inputs, *outputs, ctx.precision)
        return *outputs, None

    @staticmethod
    def vmap(info, in_dims, z, logits, means, logvars, scale_tril, precision):
        def call(rows, mixture):
            return (apply(_GMMResponsibilities, *rows, *mixture, precision),)

        (out,), _ = vmap_call(call, info.batch_size, in_dims, (z,), (logits, means, logvars, scale_tril))
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
    arguments.check_choice("precision", precision, PRECISIONS)
    logvars = as_logvars(means, logvars, scale)
    found = canonical({"z": z}, logits, means, logvars, scale_tril)
    (rows,), mixture = found.rows, found.mixture
    if rows.shape[0] == 0:
        return found.restore(nothing([rows], mixture).unsqueeze(-1).expand(-1, means.shape[-2]))
    return found.restore(apply(_GMMResponsibilities, rows, *mixture, precision))
