"""Gumbel-Softmax: a differentiable sample of a discrete choice."""

from __future__ import annotations

import math
import numbers

import numpy as np
import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops import _sampling as sampling
from fastkl.ops import _torch
from fastkl.ops._call import apply, needs_closed_form
from fastkl.ops._register import differentiable, register, same
from fastkl.ops._sampling import Seed
from fastkl.reference import Stream

# tau is a tensor without dimensions, or None where the number `constant` is the temperature; stream is a
# reference.Stream.
TAU, SETTINGS = "Tensor? tau, Tensor seed", "float constant, bool hard, int dim, int stream"


def _forward(logits, tau, seed, constant, hard, dim, stream) -> Tensor:
    perturbed = sampling.draw_gumbel(seed, logits.shape, stream).to(reference.compute_dtype(logits)).add_(logits)
    if tau is not None:
        return arguments.match(reference.relaxed_one_hot(perturbed, tau, hard, dim), logits)
    # The same in fewer passes, in place.
    top, index = perturbed.max(dim, keepdim=True)
    masked = top == float("-inf")
    if hard or constant == 0:
        zero = top.mul_(0.0).masked_fill_(masked, 0.0)  # NaN where no maximum is finite
        return torch.empty_like(logits).copy_(zero).scatter_(dim, index, (zero + ~masked).to(logits.dtype))
    perturbed.sub_(top.masked_fill_(masked, 0.0)).div_(max(constant, torch.finfo(perturbed.dtype).tiny))
    return arguments.match(torch.softmax(perturbed, dim).masked_fill_(masked, 0.0), logits)


def _gradients(dy, y, logits, tau, seed, constant, hard, dim, stream, tau_wanted) -> tuple[Tensor, Tensor | None]:
    """The gradients in the logits and, if it is wanted, in tau, in differentiable torch ops."""
    dtype = reference.compute_dtype(dy)
    temperature = torch.full((), constant, dtype=dtype, device=dy.device) if tau is None else tau.to(dtype)
    if hard:
        perturbed = logits.to(dtype) + sampling.draw_gumbel(seed, logits.shape, stream)
        weights = reference.relaxed_one_hot(perturbed, temperature, False, dim)
    else:  # the division by its sum corrects the rounding of a 16-bit y
        weights = y.to(dtype)
        total = weights.sum(dim, keepdim=True)
        weights = weights / total.masked_fill(total == 0, 1.0)
    dx = weights * (dy - (weights * dy).sum(dim, keepdim=True))
    positive = temperature.clamp(min=torch.finfo(dtype).tiny)
    inverse = (1 / positive).masked_fill(temperature == 0, 0.0).masked_fill(~(temperature >= 0), math.nan)
    dlogits = (dx * inverse).to((y if logits is None else logits).dtype)
    if not tau_wanted:
        return dlogits, None
    logarithm = weights.masked_fill(weights == 0, 1.0).log()  # x = ln weights + a constant, and dx sums to 0
    return dlogits, (-(dx * logarithm).sum() * inverse).to(tau.dtype)


def _backward(dy, y, logits, tau, seed, dlogits, dtau, constant, hard, dim, stream) -> None:
    if y is not None and tau is None and y.itemsize > 2 and constant > torch.finfo(y.dtype).tiny:
        torch.div(_torch.softmax_gradient(dy, y, dim), constant, out=dlogits)
        return
    gradient, of_tau = _gradients(dy, y, logits, tau, seed, constant, hard, dim, stream, dtau is not None)
    dlogits.copy_(gradient)
    if dtau is not None:
        dtau.copy_(of_tau)


def _kernels():
    from fastkl.kernels.categorical import gumbel_softmax

    return gumbel_softmax


def _loops():
    from fastkl.native import gumbel

    return gumbel


gumbel_softmax_fwd = register(
    f"gumbel_softmax_fwd(Tensor logits, {TAU}, {SETTINGS}) -> Tensor",
    closed_form=_forward,
    fake=lambda logits, *settings: torch.empty_like(logits),
    kernel=lambda: _kernels().fwd,
    native=lambda: _loops().gumbel_softmax_fwd,
)
# y is the sample, for a soft one; a hard one is drawn again from the logits. The other of the two is None.
gumbel_softmax_bwd = register(
    f"gumbel_softmax_bwd(Tensor dy, Tensor? y, Tensor? logits, {TAU}, Tensor(a!) dlogits, Tensor(b!)? dtau, {SETTINGS})"
    " -> ()",
    closed_form=_backward,
    kernel=lambda: _kernels().bwd,
    native=lambda: _loops().gumbel_softmax_bwd,
)


class _GumbelSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(logits, tau, seed, constant, hard, dim, stream):
        return gumbel_softmax_fwd(logits, tau, seed, constant, hard, dim, stream)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, tau, seed, *ctx.settings = inputs
        ctx.save_for_backward(logits if ctx.settings[1] else output, tau, seed)

    @staticmethod
    def backward(ctx, dy):
        saved, tau, seed = ctx.saved_tensors
        y, logits = (None, saved) if ctx.settings[1] else (saved, None)
        tau_wanted = ctx.needs_input_grad[1]
        if needs_closed_form(dy):
            dlogits, dtau = _gradients(dy, y, logits, tau, seed, *ctx.settings, tau_wanted)
        else:
            dlogits, dtau = torch.empty_like(saved), torch.empty_like(tau) if tau_wanted else None
            gumbel_softmax_bwd(dy, y, logits, tau, seed, dlogits, dtau, *ctx.settings)
        return dlogits, dtau, None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, logits, tau, seed, constant, hard, dim, stream):
        """vmap with one seed, which gives all examples the same noise, or with a seed for each."""
        (logits_dim, tau_dim, seed_dim), dtype = in_dims[:3], logits.dtype
        logits = arguments.batch_first(logits, logits_dim, info.batch_size)
        seeds = [seed] if seed_dim is None else seed.unbind(seed_dim)
        noise = torch.stack([reference.gumbel_noise(each, logits.shape[1:], stream) for each in seeds])
        temperature = constant if tau is None else tau
        if tau_dim is not None:
            temperature = tau.reshape(info.batch_size, *[1] * (logits.dim() - 1))
        perturbed = logits.to(reference.compute_dtype(logits)) + noise
        return reference.relaxed_one_hot(perturbed, temperature, hard, dim + 1).to(dtype), 0


differentiable("gumbel_softmax_fwd", _GumbelSoftmax, same)


def check_tau(tau: float | Tensor, logits: Tensor) -> tuple[Tensor | None, float]:
    """The temperature as (tensor, 0) or (None, number)."""
    if type(tau) is float and 0 <= tau < float("inf") and not torch.compiler.is_compiling():
        return None, tau
    if isinstance(tau, (np.generic, np.ndarray)) and tau.ndim == 0:
        # Traced, a number of NumPy's is a tensor already.
        tau = torch.as_tensor(tau) if torch.compiler.is_compiling() else tau.item()
    if isinstance(tau, Tensor):
        arguments.check_tensors(tau=tau)
        if tau.dim():
            raise ValueError(f"tau must be a number or a tensor without dimensions, got shape {tuple(tau.shape)}")
        known = arguments.number_in(tau) if type(tau) in (Tensor, torch.nn.Parameter) else None
        if known is not None:
            _check_temperature(known)
        return tau.to(logits.device), 1.0
    if isinstance(tau, bool) or not isinstance(tau, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"tau must be a number or a tensor without dimensions, got {type(tau).__name__}")
    _check_temperature(tau)
    if torch.compiler.is_compiling():  # a number would be part of the graph; only a product keeps it out
        return torch.ones((), dtype=reference.compute_dtype(logits), device=logits.device) * tau, 1.0
    return None, float(tau)


def _check_temperature(tau: float) -> None:
    if not 0 <= tau < float("inf"):
        raise ValueError(f"tau must be a finite number, 0 or larger, got {tau}")


def gumbel_softmax(
    logits: Tensor, tau: float | Tensor = 1.0, hard: bool = False, dim: int = -1, *,
    seed: Seed | None = None, eps: float | None = None,
) -> Tensor:  # fmt: skip
    """A relaxed one-hot sample of softmax(logits), differentiable in the logits and in the temperature.

    y = softmax((logits + g) / tau), g = -ln(-ln u) standard Gumbel noise; argmax y is distributed as softmax(logits)

    Args:
        logits: unnormalised log-probabilities, of any shape; -inf excludes a class: its weight and gradient are 0. If
            every class is excluded, all weights are 0.
        tau: the temperature, a number or a 0-d tensor (which may require a gradient); both can be annealed without
            recompiling. At 0 the sample is the limit, exactly one-hot, with gradient 0. A tensor on a GPU is not read
            by the host: a negative or NaN value gives NaN instead of an error.
        hard: the value is exactly one-hot, the gradient that of the soft sample (straight-through).
        dim: the dimension of the classes.
        seed: an int or a 0-d int64 tensor that gives the same noise on every device, or (seed, rank), as for
            `fastkl.rsample_kl`; None takes it from torch's generator.
        eps: ignored, as in torch.nn.functional.gumbel_softmax, where it is the fourth positional argument; here the
            fourth one is `dim`.

    Returns:
        y in the shape and dtype of the logits, computed in float32 (float64 for float64) and finite in float16 at any
        temperature. The noise has float32's precision. A soft sample saves only y for the backward pass, a hard one
        the logits and an 8-byte seed.

    Raises:
        TypeError: logits are not a floating-point tensor, tau is neither number nor tensor, dim is not an int.
        ValueError: tau is negative, infinite or NaN, or has dimensions; dim is out of range; there are no classes.

    Source: Jang, Gu and Poole 2017, arXiv:1611.01144; Maddison, Mnih and Teh 2017, arXiv:1611.00712.

    >>> import torch, fastkl
    >>> logits = torch.tensor([0.5, 0.2, 0.3, 0.0]).log().expand(100_000, 4)
    >>> y = fastkl.gumbel_softmax(logits, tau=0.5, hard=True, seed=0)
    >>> [f"{share:.2f}" for share in y.mean(0)]
    ['0.50', '0.20', '0.30', '0.00']
    """
    return draw_choice(Stream.GUMBEL, logits, tau, hard, dim, seed)


def draw_choice(stream: int, logits: Tensor, tau: float | Tensor, hard: bool, dim: int, seed: Seed | None) -> Tensor:
    """gumbel_softmax with the noise of `stream`, for other ops that draw a choice."""
    arguments.check_tensors(logits=logits)
    if isinstance(dim, float):
        raise TypeError(f"dim must be an int, got {dim}; torch's fourth argument, eps, has no effect: leave it out")
    if logits.dim() == 0:
        raise ValueError("logits must have at least one dimension, that of the classes, got shape ()")
    dim = arguments.check_dim(dim, "logits", logits)
    if logits.shape[dim] == 0:
        raise ValueError(f"logits must have at least one class along dim={dim}, got shape {tuple(logits.shape)}")
    tensor, constant = check_tau(tau, logits)
    seed = sampling.check_seed(seed, logits.device, "logits")
    return apply(_GumbelSoftmax, logits, tensor, seed, constant, bool(hard), dim, stream)
