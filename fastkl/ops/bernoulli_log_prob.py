"""Log-likelihood of independent Bernoulli variables given as logits, one value per sample."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._register import apply, differentiable, needs_closed_form, register, same


def _forward(logits, x, event_ndim) -> Tensor:
    density = functools.partial(reference.bernoulli_log_prob, event_ndim=event_ndim)
    return arguments.by_rows(density, x, event_ndim, [x, logits])


def _gradients(dlog_prob, logits, x, event_ndim, wanted) -> list[Tensor]:
    """Closed form in differentiable torch ops, one gradient for each of (logits, x) that is wanted."""
    dtype = reference.compute_dtype(logits, x)
    dlog_prob = dlog_prob.to(dtype).reshape(*dlog_prob.shape, *[1] * event_ndim)
    terms = reference.bernoulli_terms_gradient(logits.to(dtype), x.to(dtype))
    return [
        reference.weighted(dlog_prob, gradient).to(tensor.dtype)
        for gradient, tensor, want in zip(terms, (logits, x), wanted)
        if want
    ]


def _backward(dlog_prob, logits, x, event_ndim, wanted) -> list[Tensor]:
    like = [tensor for tensor, want in zip((logits, x), wanted) if want]
    gradients = _gradients(dlog_prob, logits, x, event_ndim, wanted)
    return [arguments.match(gradient, tensor) for gradient, tensor in zip(gradients, like)]


def _fake_forward(logits, x, event_ndim) -> Tensor:
    return logits.new_empty(logits.shape[: logits.dim() - event_ndim], dtype=reference.compute_dtype(logits, x))


def _fake_backward(dlog_prob, logits, x, event_ndim, wanted) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor, want in zip((logits, x), wanted) if want]


bernoulli_log_prob_fwd = register(
    "bernoulli_log_prob_fwd(Tensor logits, Tensor x, int event_ndim) -> Tensor",
    closed_form=_forward,
    fake=_fake_forward,
    kernel="bernoulli_log_prob.fwd",
    native="likelihood.bernoulli_log_prob_fwd",
)
bernoulli_log_prob_bwd = register(
    "bernoulli_log_prob_bwd(Tensor dlog_prob, Tensor logits, Tensor x, int event_ndim, bool[] wanted) -> Tensor[]",
    closed_form=_backward,
    fake=_fake_backward,
    kernel="bernoulli_log_prob.bwd",
    native="likelihood.bernoulli_log_prob_bwd",
)


class _BernoulliLogProb(torch.autograd.Function):
    @staticmethod
    def forward(logits, x, event_ndim):
        return bernoulli_log_prob_fwd(logits, x, event_ndim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.event_ndim = inputs[2]

    @staticmethod
    def backward(ctx, dlog_prob):
        wanted = list(ctx.needs_input_grad[:2])
        backward = _gradients if needs_closed_form(dlog_prob) else bernoulli_log_prob_bwd
        gradients = backward(dlog_prob, *ctx.saved_tensors, ctx.event_ndim, wanted)
        return gradients[0] if wanted[0] else None, gradients[-1] if wanted[1] else None, None

    @staticmethod
    def vmap(info, in_dims, logits, x, event_ndim):
        logits, x = (arguments.batch_first(t, dim, info.batch_size) for t, dim in zip((logits, x), in_dims))
        return apply(_BernoulliLogProb, logits, x, event_ndim), 0


differentiable("bernoulli_log_prob_fwd", _BernoulliLogProb, same)


def bernoulli_log_prob(x: Tensor, logits: Tensor, *, event_ndim: int | None = None) -> Tensor:
    """Log-likelihood of `x` under independent Bernoulli variables with success probability sigmoid(logits), in nats.

    ln p(x) = sum_d [x_d ln sigmoid(l_d) + (1 - x_d) ln sigmoid(-l_d)] = sum_d [x_d l_d - softplus(l_d)]

    The negative of the binary cross-entropy with logits, summed over each sample.

    Args:
        x: data, broadcasts with logits (for importance samples [L, N, *event] it is read where it lies, L times).
            Grey values between 0 and 1 and values outside are taken as they are: logits in its place are not noticed.
            The normalising constant of the continuous Bernoulli is not included. Its dtype may differ from that of
            logits.
        logits: ln p / (1 - p), [*batch, *event]; any finite value is safe.
        event_ndim: how many of the last dimensions are summed. None: every dimension after the first; one dimension
            alone is that of one datum. 0: none, each element has a value. With a dimension of importance samples in
            front it has to be given.

    Returns:
        [*batch], float32 for float16, bfloat16 and float32 input, float64 if any input is. Gradients come in each
        input's dtype, and the one in x only where it is wanted; nothing is saved for the backward pass beyond the
        inputs.

    Raises:
        TypeError: an argument is not a floating-point tensor, or event_ndim is not an int.
        ValueError: shapes that do not broadcast, mixed devices, event_ndim out of range.

    Source: Kingma and Welling 2014, "Auto-Encoding Variational Bayes", arXiv:1312.6114, appendix C.1.

    >>> import torch, fastkl
    >>> fastkl.bernoulli_log_prob(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [100.0, -100.0]]))
    tensor([  -1.3863, -100.0000])
    """
    if known := arguments.alike(event_ndim, logits, x):
        return apply(_BernoulliLogProb, logits, x, known)
    arguments.check_tensors(x=x, logits=logits)
    shape = arguments.broadcast_shape(x=x, logits=logits)
    event_ndim = arguments.event_ndim_of_datum(event_ndim, shape)
    tensors = arguments.expand(logits, shape), arguments.expand(x, shape)
    event_ndim, logits, x = arguments.as_events(event_ndim, *tensors)
    return apply(_BernoulliLogProb, logits, x, event_ndim)
