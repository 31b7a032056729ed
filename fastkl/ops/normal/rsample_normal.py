"""Reparameterised sampling from a diagonal Gaussian."""

from __future__ import annotations

from torch import Tensor

from fastkl.ops import _arguments as arguments
from fastkl.ops import _sampling as sampling
from fastkl.ops._call import apply
from fastkl.ops._register import register
from fastkl.ops._sampling import Seed
from fastkl.ops.normal._closed_form import empty_samples, sample, samples_dtype, write_normal_gradients
from fastkl.ops.normal._normal import (
    DQ,
    DRAWING_SETTINGS,
    NO_EVENT,
    NOISE,
    Drawing,
    NormalFunction,
    NormalOp,
    Q,
    terms_of_eps,
)
from fastkl.reference import SoftBounds


def _forward(mu, parameter, eps, seed, *settings) -> Tensor:
    settings = Drawing(*settings)
    eps = sampling.draw(mu.shape, eps, seed, settings.num_samples, settings.stream)
    return sample(mu, parameter, eps, settings)


def _backward(dz, mu, parameter, eps, seed, dmu, dparameter, *settings) -> None:
    settings = Drawing(*settings)
    eps = sampling.draw(mu.shape, eps, seed, settings.num_samples, settings.stream)
    write_normal_gradients((mu, parameter), (dmu, dparameter), settings, dz=dz, eps=eps)


def _fake_forward(mu, parameter, eps, seed, *settings) -> Tensor:
    return empty_samples(mu, parameter, Drawing(*settings).num_samples)


def _kernels():
    from fastkl.kernels.normal import rsample_normal

    return rsample_normal


def _loops():
    from fastkl.native import normal

    return normal


rsample_normal_fwd = register(
    f"rsample_normal_fwd({Q}, {NOISE}, {DRAWING_SETTINGS}) -> Tensor",
    closed_form=_forward,
    fake=_fake_forward,
    kernel=lambda: _kernels().fwd,
    native=lambda: _loops().rsample_normal_fwd,
    terms=terms_of_eps(2),
)
rsample_normal_bwd = register(
    f"rsample_normal_bwd(Tensor dz, {Q}, {NOISE}, {DQ}, {DRAWING_SETTINGS}) -> ()",
    closed_form=_backward,
    kernel=lambda: _kernels().bwd,
    native=lambda: _loops().rsample_normal_bwd,
    terms=terms_of_eps(3),
)
RSAMPLE_NORMAL = NormalOp(rsample_normal_fwd, rsample_normal_bwd, "rsample_normal_fwd", draws=True, has_value=False)


def rsample_normal_packed(
    head: Tensor, dim: int, *, num_samples: int | None = None, seed: Seed | None = None,
    eps: Tensor | None = None, scale: str = "logvar", bounds: SoftBounds | tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """rsample_normal(*head.chunk(2, dim), ...) whose gradient is one packed tensor, written by the kernel itself."""
    arguments.check_tensors(head=head, eps=eps)
    dim = arguments.check_packed(head, dim)
    settings = Drawing(NO_EVENT, arguments.check_scale(scale), *arguments.check_bounds(bounds), num_samples)
    seed, eps = sampling.check_noise(seed, eps, num_samples, head.chunk(2, dim)[0].shape, head.device)
    return apply(NormalFunction, RSAMPLE_NORMAL, dim, settings, head, None, None, None, eps, seed)


def rsample_normal(
    mu: Tensor | float, logvar: Tensor | float, *, num_samples: int | None = None, seed: Seed | None = None,
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
    return RSAMPLE_NORMAL.samples(mu, logvar, None, None, None, num_samples, seed, eps, scale, "logvar", bounds)


def draw_normal(
    stream: int, shape: tuple[int, ...], mu: Tensor, logvar: Tensor, seed: Tensor, scale: str = "logvar"
) -> Tensor:
    """rsample_normal with the noise of `stream`, for other ops that draw Gaussian noise."""
    settings = Drawing(NO_EVENT, scale, *arguments.NO_BOUNDS, None, stream)
    q = arguments.expand(mu, shape), arguments.expand(logvar, shape)
    z = apply(NormalFunction, RSAMPLE_NORMAL, -1, settings, *q, None, None, None, seed)
    return z.to(samples_dtype(mu, logvar))
