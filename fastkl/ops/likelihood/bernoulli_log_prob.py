"""Log-likelihood of independent Bernoulli variables given as logits, one value per sample."""

from __future__ import annotations

import functools

from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._call import apply, event_ndim_of_common_call
from fastkl.ops._register import register
from fastkl.ops.likelihood._likelihood import Likelihood, LikelihoodFunction, write


def _forward(logits, x, event_ndim) -> Tensor:
    density = functools.partial(reference.bernoulli_log_prob, event_ndim=event_ndim)
    return arguments.by_rows(density, x, event_ndim, [x, logits])


def _gradients(dlog_prob, logits, x, event_ndim, wanted) -> list[Tensor | None]:
    """Closed form in differentiable torch ops, None for each of (logits, x) where it is not wanted."""
    dtype = reference.compute_dtype(logits, x)
    dlog_prob = dlog_prob.to(dtype).reshape(*dlog_prob.shape, *[1] * event_ndim)
    terms = reference.bernoulli_terms_gradient(logits.to(dtype), x.to(dtype))
    return [
        reference.weighted(dlog_prob, gradient).to(tensor.dtype) if want else None
        for gradient, tensor, want in zip(terms, (logits, x), wanted)
    ]


def _backward(dlog_prob, logits, x, dlogits, dx, event_ndim) -> None:
    wanted = [dlogits is not None, dx is not None]
    write((dlogits, dx), _gradients(dlog_prob, logits, x, event_ndim, wanted))


def _fake_forward(logits, x, event_ndim) -> Tensor:
    return logits.new_empty(logits.shape[: logits.dim() - event_ndim], dtype=reference.compute_dtype(logits, x))


def _kernels():
    from fastkl.kernels.likelihood import bernoulli_log_prob

    return bernoulli_log_prob


def _loops():
    from fastkl.native import likelihood

    return likelihood


bernoulli_log_prob_fwd = register(
    "bernoulli_log_prob_fwd(Tensor logits, Tensor x, int event_ndim) -> Tensor",
    closed_form=_forward,
    fake=_fake_forward,
    kernel=lambda: _kernels().fwd,
    native=lambda: _loops().bernoulli_log_prob_fwd,
    terms=lambda logits, *_: logits.numel(),
)
bernoulli_log_prob_bwd = register(
    "bernoulli_log_prob_bwd(Tensor dlog_prob, Tensor logits, Tensor x, Tensor(a!)? dlogits, Tensor(b!)? dx, "
    "int event_ndim) -> ()",
    closed_form=_backward,
    kernel=lambda: _kernels().bwd,
    native=lambda: _loops().bernoulli_log_prob_bwd,
    terms=lambda dlog_prob, logits, *_: logits.numel(),
)
BERNOULLI = Likelihood(bernoulli_log_prob_fwd, bernoulli_log_prob_bwd, "bernoulli_log_prob_fwd", _gradients)


def bernoulli_log_prob(x: Tensor, logits: Tensor, *, event_ndim: int | None = None) -> Tensor:
    """Log-likelihood of `x` under independent Bernoulli variables with success probability sigmoid(logits), in nats.

    ln p(x) = sum_d [x_d ln sigmoid(l_d) + (1 - x_d) ln sigmoid(-l_d)] = sum_d [x_d l_d - softplus(l_d)]

    The negative of the binary cross-entropy with logits, summed over each sample.

    Args:
        x: data, broadcasts with logits (for importance samples [L, N, *event] without a copy). Values are not checked:
            grey values between 0 and 1 are allowed, and logits given by mistake are not noticed. The normalising
            constant of the continuous Bernoulli is not included. The dtype may differ from that of logits.
        logits: ln p / (1 - p), [*batch, *event]; any finite value is safe.
        event_ndim: number of last dimensions to sum. None: every dimension after the first; a 1-D tensor is one datum.
            0: no sum, one value per element. With a leading dimension of importance samples it must be given.

    Returns:
        [*batch], float32 for float16, bfloat16 and float32 input, float64 if any input is. Gradients have each input's
        dtype; that in x is computed only if x requires it. Only the inputs are saved for the backward pass.

    Raises:
        TypeError: an argument is not a floating-point tensor, or event_ndim is not an int.
        ValueError: shapes do not broadcast, devices differ, or event_ndim is out of range.

    Source: Kingma and Welling 2014, "Auto-Encoding Variational Bayes", arXiv:1312.6114, appendix C.1.

    >>> import torch, fastkl
    >>> fastkl.bernoulli_log_prob(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [100.0, -100.0]]))
    tensor([  -1.3863, -100.0000])
    """
    if known := event_ndim_of_common_call(event_ndim, (logits, x)):
        return apply(LikelihoodFunction, BERNOULLI, known, logits, x, None)
    arguments.check_tensors(x=x, logits=logits)
    shape = arguments.broadcast_shape(x=x, logits=logits)
    event_ndim = arguments.event_ndim_of_datum(event_ndim, shape)
    tensors = arguments.expand(logits, shape), arguments.expand(x, shape)
    event_ndim, logits, x = arguments.as_events(event_ndim, *tensors)
    return apply(LikelihoodFunction, BERNOULLI, event_ndim, logits, x, None)
