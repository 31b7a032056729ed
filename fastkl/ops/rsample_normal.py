"""Reparameterised sampling from a diagonal Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl.ops import _arguments as arguments
from fastkl.ops import _sampling as sampling
from fastkl.ops import _short as short
from fastkl.ops._closed_form import empty_samples, fill_normal_gradients, normal_gradients, sample, samples_dtype
from fastkl.ops._register import apply, differentiable, needs_closed_form, register
from fastkl.reference import SoftBounds, Stream

# As in rsample_kl, without an event or a prior; the noise of a seed is that of `stream`, a reference.Stream.
_SETTINGS = (
    "Tensor[] q, Tensor? seed, Tensor? eps, SymInt? num_samples, int packed_dim, str scale, float low, float high, "
    "bool live, int stream"
)


def _forward(q, seed, eps, num_samples, packed_dim, scale, low, high, live, stream) -> Tensor:
    eps = sampling.draw(q, packed_dim, seed, eps, num_samples, stream)
    return sample(q, packed_dim, eps, num_samples, scale, arguments.as_bounds(low, high, live))


def _gradients(dz, q, seed, eps, num_samples, packed_dim, scale, low, high, live, stream) -> list[Tensor]:
    eps = sampling.noise(q, packed_dim, seed, eps, num_samples, stream)
    return normal_gradients(q, packed_dim, [], scale, arguments.as_bounds(low, high, live), dz=dz, eps=eps)


def _backward(dz, q, seed, eps, num_samples, packed_dim, scale, low, high, live, stream) -> list[Tensor]:
    eps = sampling.draw(q, packed_dim, seed, eps, num_samples, stream)
    return fill_normal_gradients(q, packed_dim, [], scale, arguments.as_bounds(low, high, live), dz=dz, eps=eps)


def _fake_forward(q, seed, eps, num_samples, packed_dim, *settings) -> Tensor:
    return empty_samples(q, packed_dim, num_samples)


def _fake_backward(dz, q, *settings) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in q]


rsample_normal_fwd = register(
    f"rsample_normal_fwd({_SETTINGS}) -> Tensor",
    closed_form=_forward,
    fake=_fake_forward,
    kernel="rsample_normal.fwd",
    native="normal.rsample_normal_fwd",
)
rsample_normal_bwd = register(
    f"rsample_normal_bwd(Tensor dz, {_SETTINGS}) -> Tensor[]",
    closed_form=_backward,
    fake=_fake_backward,
    kernel="rsample_normal.bwd",
    native="normal.rsample_normal_bwd",
)


def _differentiate(dz, q, seed, eps, settings) -> list[Tensor]:
    return (_gradients if needs_closed_form(dz) else rsample_normal_bwd)(dz, q, seed, eps, *settings)


def _differentiate_drawn(dz, mu, logvar, seed, settings) -> list[Tensor]:
    num_samples, packed_dim, _, *rest = settings
    return _differentiate(dz, [mu, logvar], seed, None, (num_samples, packed_dim, *rest, Stream.POSTERIOR))


class _RsampleNormal(torch.autograd.Function):
    @staticmethod
    def forward(mu, parameter, eps, seed, num_samples, packed_dim, scale, low, high, live, stream):
        q = [mu] if parameter is None else [mu, parameter]
        return rsample_normal_fwd(q, seed, eps, num_samples, packed_dim, scale, low, high, live, stream)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])
        ctx.settings = inputs[4:]

    @staticmethod
    def backward(ctx, dz):
        mu, parameter, eps, seed = ctx.saved_tensors
        _, packed_dim, scale, *bounds, _ = ctx.settings
        q = [mu] if parameter is None else [mu, parameter]
        dq = _differentiate(dz, q, seed, eps, ctx.settings)
        deps = None
        if ctx.needs_input_grad[2]:
            deps = sampling.noise_gradient(dz, q, packed_dim, eps, scale, arguments.as_bounds(*bounds))
        return (*arguments.padded(dq), deps, *[None] * (1 + len(ctx.settings)))

    @staticmethod
    def vmap(info, in_dims, mu, parameter, eps, seed, num_samples, packed_dim, *settings):
        out_dtype = samples_dtype(mu, parameter)
        q = arguments.batch_first_all((mu, parameter), in_dims, info.batch_size)
        dims = (in_dims[3], in_dims[2])
        seed, eps = sampling.batch_noise(info, q, packed_dim + 1, dims, seed, eps, num_samples, settings[-1])
        parameter = q[1] if len(q) == 2 else None
        z = apply(_RsampleNormal, q[0], parameter, eps, seed, num_samples, packed_dim + 1, *settings)
        return z.to(out_dtype), 0 if num_samples is None else 1


differentiable(
    "rsample_normal_fwd", _RsampleNormal, lambda q, seed, eps, *settings: (*arguments.padded(q), eps, seed, *settings)
)


def rsample_normal_packed(
    head: Tensor, dim: int, *, num_samples: int | None = None, seed: int | Tensor | None = None,
    eps: Tensor | None = None, scale: str = "logvar", bounds: SoftBounds | tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """rsample_normal(*head.chunk(2, dim), ...) whose gradient is one packed tensor, written by the kernel itself."""
    arguments.check_tensors(head=head, eps=eps)
    dim = arguments.check_packed(head, dim)
    settings = (dim, arguments.check_scale(scale), *arguments.check_bounds(bounds))
    seed, eps = sampling.check_noise(seed, eps, num_samples, head.chunk(2, dim)[0].shape, head.device)
    return apply(_RsampleNormal, head, None, eps, seed, num_samples, *settings, Stream.POSTERIOR)


def rsample_normal(
    mu: Tensor | float, logvar: Tensor | float, *, num_samples: int | None = None, seed: int | Tensor | None = None,
    eps: Tensor | None = None, scale: str = "logvar", bounds: SoftBounds | tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """A reparameterised sample of a diagonal Gaussian.

    z = mu + exp(logvar / 2) eps, eps ~ N(0, I)

    Args:
        mu, logvar: mean and log-variance (or another parameter, see `scale`), which broadcast; one may be a number.
        num_samples, seed, eps, scale, bounds: as for `fastkl.rsample_kl`, which with the same seed draws the same z.

    Returns:
        z in the parameters' dtype, [*shape], or [num_samples, *shape]. Only the inputs and the 8-byte seed are saved.

    Raises:
        TypeError, ValueError: as rsample_kl.

    Source: Kingma and Welling 2014, arXiv:1312.6114, section 2.4; Salmon et al. 2011 (Philox4x32-7).

    >>> import torch, fastkl
    >>> _ = torch.manual_seed(0)
    >>> z = fastkl.rsample_normal(torch.full((100_000,), 3.0), torch.zeros(1))
    >>> f"{z.mean():.2f} {z.std():.2f}"
    '3.00 1.00'
    """
    if isinstance(mu, Tensor) and arguments.is_common_call(mu, logvar, mu.dim(), scale, num_samples, eps, bounds):
        seed = sampling.check_seed(seed, mu.device, "mu")
        if way := short.find("rsample_normal", mu, logvar, mu.dim(), scale, _differentiate_drawn, seed):
            return short.sample(way, mu, logvar, seed)
        return apply(_RsampleNormal, mu, logvar, None, seed, None, -1, scale, *arguments.NO_BOUNDS, Stream.POSTERIOR)
    given = (mu, logvar)
    mu, logvar = arguments.as_parameters(*given)
    arguments.check_tensors(mu=mu, logvar=logvar, eps=eps)
    shape = arguments.broadcast_shape(mu=mu, logvar=logvar)
    settings = (-1, arguments.check_scale(scale), *arguments.check_bounds(bounds))
    seed, eps = sampling.check_noise(seed, eps, num_samples, shape, mu.device)
    inputs = (arguments.expand(mu, shape), arguments.expand(logvar, shape), eps, seed, num_samples)
    return apply(_RsampleNormal, *inputs, *settings, Stream.POSTERIOR).to(samples_dtype(*given))


def draw_normal(
    stream: int, shape: tuple[int, ...], mu: Tensor, logvar: Tensor, seed: Tensor, scale: str = "logvar"
) -> Tensor:
    """rsample_normal with the noise of `stream`, for other ops that draw Gaussian noise."""
    inputs = (arguments.expand(mu, shape), arguments.expand(logvar, shape), None, seed, None, -1)
    return apply(_RsampleNormal, *inputs, scale, *arguments.NO_BOUNDS, stream).to(samples_dtype(mu, logvar))
