"""Reparameterised sampling and the KL in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops import _sampling as sampling
from fastkl.ops._call import apply
from fastkl.ops._register import register
from fastkl.ops._sampling import Seed
from fastkl.ops.normal._closed_form import by_rows, empty_samples, sample, write_normal_gradients
from fastkl.ops.normal._normal import (
    DPRIOR,
    DQ,
    DRAWING_SETTINGS,
    NOISE,
    PRIOR,
    Drawing,
    NormalFunction,
    NormalOp,
    Q,
    fake_value,
    of_rows,
    terms_of_eps,
)
from fastkl.reference import SoftBounds


def _forward(mu, parameter, prior_mu, prior_logvar, eps, seed, *settings) -> tuple[Tensor, Tensor]:
    settings = Drawing(*settings)
    eps = sampling.draw(mu.shape, eps, seed, settings.num_samples, settings.stream)
    z = sample(mu, parameter, eps, settings)
    return z, by_rows(reference.kl_normal, (mu, parameter, prior_mu, prior_logvar), settings)


def _backward(
    dz, dkl, mu, parameter, prior_mu, prior_logvar, eps, seed, dmu, dparameter, dprior_mu, dprior_logvar, *settings
) -> None:  # fmt: skip
    inputs, outputs = (mu, parameter, prior_mu, prior_logvar), (dmu, dparameter, dprior_mu, dprior_logvar)
    settings, incoming = Drawing(*settings), {"dz": dz}
    if dz is not None:
        incoming["eps"] = sampling.draw(mu.shape, eps, seed, settings.num_samples, settings.stream)
    if dkl is not None:
        incoming["dvalue"] = of_rows(dkl, mu, settings.event_ndim)
        write_normal_gradients(inputs, outputs, settings, **incoming)
    else:  # not a KL gradient of zero, which would turn an infinite KL into NaN
        write_normal_gradients(inputs[:2], outputs[:2], settings, **incoming)


def _fake_forward(mu, parameter, prior_mu, prior_logvar, eps, seed, *settings) -> tuple[Tensor, Tensor]:
    z = empty_samples(mu, parameter, Drawing(*settings).num_samples)
    return z, fake_value(mu, parameter, prior_mu, prior_logvar, *settings)


def _kernels():
    from fastkl.kernels.normal import rsample_kl

    return rsample_kl


def _loops():
    from fastkl.native import normal

    return normal


rsample_kl_fwd = register(
    f"rsample_kl_fwd({Q}, {PRIOR}, {NOISE}, {DRAWING_SETTINGS}) -> (Tensor, Tensor)",
    closed_form=_forward,
    fake=_fake_forward,
    kernel=lambda: _kernels().fwd,
    native=lambda: _loops().rsample_kl_fwd,
    terms=terms_of_eps(4),
)
# Without dkl the prior has no part in the gradient, and dprior_mu and dprior_logvar are None.
rsample_kl_bwd = register(
    f"rsample_kl_bwd(Tensor? dz, Tensor? dkl, {Q}, {PRIOR}, {NOISE}, {DQ}, {DPRIOR}, {DRAWING_SETTINGS}) -> ()",
    closed_form=_backward,
    kernel=lambda: _kernels().bwd,
    native=lambda: _loops().rsample_kl_bwd,
    terms=terms_of_eps(6),
)
RSAMPLE_KL = NormalOp(rsample_kl_fwd, rsample_kl_bwd, "rsample_kl_fwd", draws=True)


def rsample_kl_packed(
    head: Tensor, dim: int, prior_mu: Any = None, prior_logvar: Any = None, *,
    event_ndim: int, num_samples: int | None = None, seed: Seed | None = None, eps: Tensor | None = None,
    scale: str = "logvar", bounds: SoftBounds | tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """rsample_kl(*head.chunk(2, dim), ...) whose gradient is one packed tensor, written by the kernel itself."""
    prior_mu, prior_logvar = arguments.as_tensors(head, prior_mu, prior_logvar)
    arguments.check_tensors(head=head, prior_mu=prior_mu, prior_logvar=prior_logvar, eps=eps)
    dim = arguments.check_packed(head, dim)
    shape = head.chunk(2, dim)[0].shape
    event_ndim = arguments.event_ndim_of_datum(event_ndim, shape, "the posterior's shape")
    arguments.check_prior_fits(shape, prior_mu=prior_mu, prior_logvar=prior_logvar)
    prior = arguments.expand_prior(prior_mu, prior_logvar, head, shape, event_ndim)
    settings = (arguments.check_scale(scale), *arguments.check_bounds(bounds), num_samples)
    seed, eps = sampling.check_noise(seed, eps, num_samples, shape, head.device)
    op_ndim, head, *tensors = arguments.as_events(event_ndim, head, *prior, eps)
    z, kl = apply(NormalFunction, RSAMPLE_KL, dim, Drawing(op_ndim, *settings), head, None, *tensors, seed)
    return (z if event_ndim else z.squeeze(-1)), kl


def rsample_kl(
    mu: Tensor | float, logvar: Tensor | float, prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None, *, event_ndim: int | None = None, num_samples: int | None = None,
    seed: Seed | None = None, eps: Tensor | None = None, scale: str = "logvar",
    prior_scale: str = "logvar", bounds: SoftBounds | tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A reparameterised sample and its KL divergence, in one pass over the parameters.

    z = mu + exp(logvar / 2) eps, eps ~ N(0, I);  kl as `fastkl.kl_normal`, in nats

    Args:
        mu, logvar, prior_mu, prior_logvar, event_ndim, scale, prior_scale, bounds: as for `fastkl.kl_normal`; bounds
            also apply to the sample's sigma. The prior must not be larger than the posterior, because each posterior
            has one z.
        num_samples: L samples of each posterior, [L, *batch, *event]; None for one sample without that dimension.
        seed: an int, or a 0-d int64 tensor on mu's device: the same seed gives the same noise on every device and for
            every dtype (up to rounding). Under torch.distributed each rank draws other noise from it; a pair (seed,
            rank) gives the noise of that rank on any process, so (seed, 0) is shared, and equal to that of one process.
            None takes the seed from torch's generator of mu's device, so torch.manual_seed reproduces a run.
        eps: noise instead of a seed, of the samples' shape (quasi-Monte-Carlo, exact comparisons).

    Returns:
        (z, kl): z in the parameters' dtype, [*batch, *event] or [L, *batch, *event]; kl [*batch] as from kl_normal.
        The kernel draws the noise by Philox, again in its backward pass, so only the 8-byte seed is saved.

    Raises:
        TypeError, ValueError: as kl_normal; seed and eps are both given, one has a wrong shape, or num_samples < 1.

    Source: Kingma and Welling 2014, arXiv:1312.6114, section 2.4; Salmon et al. 2011, "Parallel random numbers: as easy
        as 1, 2, 3" (Philox4x32-7).

    >>> import torch, fastkl
    >>> z, kl = fastkl.rsample_kl(torch.zeros(2, 3), torch.zeros(2, 3), num_samples=5, seed=0)
    >>> z.shape, kl
    (torch.Size([5, 2, 3]), tensor([0., 0.]))
    """
    noise = num_samples, seed, eps
    return RSAMPLE_KL.samples(mu, logvar, prior_mu, prior_logvar, event_ndim, *noise, scale, prior_scale, bounds)
