"""Samples of Gaussian mixtures: differentiable relaxed ones, and plain ones for generation."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops import _sampling as sampling
from fastkl.ops._register import no_autocast
from fastkl.ops._sampling import Seed
from fastkl.ops._scales import as_logvar
from fastkl.ops._sharding import by_parts
from fastkl.ops._torch import transforms_active
from fastkl.ops.categorical.gumbel_softmax import draw_choice
from fastkl.ops.mixture import _canonical as parameters
from fastkl.ops.normal.rsample_normal import draw_normal
from fastkl.reference import Stream

# Bytes of the temporaries of a block of rows, for full covariances.
CHUNK = 32 * 2**20


def _check(logits, means, logvars, scale_tril, num_samples) -> tuple[torch.Size, torch.dtype]:
    """(batch shape, dtype of the samples)."""
    if num_samples is not None:
        arguments.check_int("num_samples", num_samples, 1)
    parameters.check_shapes({}, logits, means, logvars, scale_tril)
    dtype = means.dtype
    for other in (logvars, scale_tril):
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    return parameters.batch_shape({}, logits, means, logvars, scale_tril), dtype


def _mix(weights: Tensor, values: Tensor) -> Tensor:
    """sum_k weights_k values_k: [S, *batch, K] and [*batch, K, C] -> [S, *batch, C], without a larger temporary."""
    values = parameters.collapse(values, 2)
    if values.shape[-2] == 1 < weights.shape[-1]:  # tied: the weights sum to 1
        return values.squeeze(-2)
    return weights @ values if values.dim() == 2 else torch.einsum("s...k,...kc->s...c", weights, values)


def relaxed_component(weights: Tensor, means: Tensor, logvars: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation sum_k y_k m_k, sum_k y_k sigma_k of a relaxed choice y [S, *batch, K]."""
    if logvars is None:
        return _mix(weights, means), weights.new_ones(1)
    sigma = _mix(weights, (0.5 * parameters.by_component(logvars)).exp())
    # Sigma is 0 if all components are excluded, or if the chosen one's deviation underflows.
    return _mix(weights, means), sigma.clamp(min=torch.finfo(sigma.dtype).tiny)


def _mix_noise(weights: Tensor, eps: Tensor, scale_tril: Tensor) -> Tensor:
    """sum_k weights_k L_k eps: [R, K], [R, D] and [K, D, D] or [R, K, D, D] -> [R, D]."""
    if scale_tril.dim() == 4:
        return torch.einsum("rk,rkij,rj->ri", weights, scale_tril.tril(), eps)
    outer = (weights.unsqueeze(-1) * eps.unsqueeze(-2)).flatten(1)  # [R, K D], one matrix product for all components
    return outer @ scale_tril.tril().mT.flatten(0, 1)


def _by_chunks(function, bytes_per_row: int, *rows: Tensor) -> Tensor:
    """A function applied to blocks of rows, with its temporaries recomputed in the backward pass instead of saved."""
    count = max(1, CHUNK // max(1, bytes_per_row))
    if torch.compiler.is_compiling() or rows[0].shape[0] <= count:  # no split by size in a graph, whose N may vary
        return function(*rows)
    blocks = zip(*(tensor.split(count) for tensor in rows))
    if transforms_active():  # checkpoint does not support them
        return torch.cat([function(*block) for block in blocks])
    return torch.cat([checkpoint(function, *block, use_reentrant=False) for block in blocks])


def rsample_gmm(
    logits: Tensor, means: Tensor, logvars: Tensor | float | None = None, *, scale_tril: Tensor | None = None,
    scale: str = "logvar", tau: float | Tensor = 1.0, hard: bool = False, num_samples: int | None = None,
    seed: Seed | None = None,
) -> Tensor:  # fmt: skip
    """A relaxed sample of a Gaussian mixture, differentiable in all its parameters.

    z = sum_k y_k m_k + (sum_k y_k sigma_k) eps, y = gumbel_softmax(logits, tau), eps ~ N(0, I)
    z = sum_k y_k (m_k + L_k eps) for full covariances

    All components share one noise vector. For one-hot y, only the chosen component's noise matters, so z has the
    distribution of ancestral sampling with one noise vector per sample instead of K. This holds with `hard` or as
    tau -> 0; at larger tau z lies between the components.

    Args:
        logits: unnormalised log-weights, [K] or [*batch, K]; -inf excludes a component.
        means: [K, D], or [*batch, K, D] for one mixture per datum.
        logvars: log-variances [K, D], [K, 1] (spherical), [1, D] or [D] (tied), a number (for all), or
            with batch dimensions; None is 0.
        scale_tril: instead of logvars, Cholesky factors [K, D, D] or [*batch, K, D, D]; only lower triangles are read.
        scale: the meaning of logvars: "logvar", "log_std", "std" or "softplus", as for `fastkl.kl_normal`.
        tau, hard: as for `fastkl.gumbel_softmax`; tau may be a tensor that requires a gradient.
        num_samples: number of draws for each datum, in a new first dimension.
        seed: an int or a 0-d int64 tensor that repeats the same sample, or (seed, rank), as for `fastkl.rsample_kl`;
            None takes it from torch's generator.

    Returns:
        z, [*batch, D] or [num_samples, *batch, D], in the dtype of the means and covariances. Components shared by the
        batch need no tensor of size [N, K, D]; full covariances need temporaries of 32 MiB.

    Raises:
        TypeError, ValueError: as gumbel_softmax; shapes do not match; logvars and scale_tril are both given.

    Source: Jang, Gu and Poole 2017, arXiv:1611.01144; Maddison, Mnih and Teh 2017, arXiv:1611.00712.

    >>> import torch, fastkl
    >>> means = torch.tensor([[-3.0], [3.0]], requires_grad=True)
    >>> z = fastkl.rsample_gmm(torch.zeros(2), means, tau=0.5, hard=True, num_samples=10_000, seed=0)
    >>> f"{z.mean():.1f} {z.std():.1f}"
    '0.0 3.1'
    >>> z.mean().backward()
    >>> means.grad.isfinite().all().item()
    True
    """
    spread = parameters.as_logvars(means, logvars)
    batch, dtype = _check(logits, means, spread, scale_tril, num_samples)
    spread = as_logvar("scale", spread, scale, means)
    components, size = means.shape[-2:]
    seed = sampling.check_seed(seed, logits.device, "logits")
    shape = (1 if num_samples is None else num_samples, *batch)
    with no_autocast(logits.device.type):
        # 16-bit parameters are mixed in float32, because a small standard deviation is subnormal in float16.
        out_dtype, dtype = dtype, dtype if dtype == torch.float64 else torch.float32
        logits = logits.to(dtype).expand(*shape, components)
        weights = draw_choice(Stream.RELAXED_CHOICE, logits, tau, hard, -1, (seed, 0))
        mean, sigma = relaxed_component(weights, means.to(dtype), None if spread is None else spread.to(dtype))
        if scale_tril is None:
            z = draw_normal(Stream.RELAXED_NOISE, (*shape, size), mean, sigma, seed, scale="std")
        else:
            zero = torch.zeros((), dtype=dtype, device=logits.device)
            eps = draw_normal(Stream.RELAXED_NOISE, (*shape, size), zero, zero, seed)
            z = mean + _full(weights, eps, scale_tril.to(dtype))
        z = z.to(out_dtype)
    return z.squeeze(0) if num_samples is None else z


def _full(weights: Tensor, eps: Tensor, scale_tril: Tensor) -> Tensor:
    scale_tril = parameters.collapse(scale_tril, 3)
    components, size = scale_tril.shape[-3:-1]
    rows = (weights.flatten(0, -2), eps.flatten(0, -2))
    row_bytes = components * size * eps.itemsize
    if scale_tril.dim() == 3:
        z = _by_chunks(lambda w, e: _mix_noise(w, e, scale_tril), row_bytes, *rows)
    else:
        own = scale_tril.expand(*weights.shape[1:-1], *scale_tril.shape[-3:]).flatten(0, -4)  # per datum, not sample
        datum = torch.arange(rows[0].shape[0], device=own.device) % own.shape[0]
        z = _by_chunks(lambda w, e, n: _mix_noise(w, e, own[n]), row_bytes * size, *rows, datum)
    return z.view(eps.shape)


def _uniform(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """float64 in [0, 1) with 53 random bits, from two Philox words."""
    index = torch.arange(math.prod(shape), device=seed.device)
    words = reference.philox(seed, index & 0xFFFFFFFF, index >> 32, 0, Stream.CHOICE)
    return (((words[0] << 32 | words[1]) >> 11 & (1 << 53) - 1).double() * 2.0**-53).view(shape)


def _choose(logits: Tensor, num_samples: int, batch: torch.Size, seed: Tensor) -> Tensor:
    """Components [num_samples, *batch] by inversion of the distribution function; a weight of 0 is never drawn."""
    logits = parameters.collapse(logits, 1)
    weights = sampling.running_sum(torch.softmax(logits.double(), -1))
    total = weights[..., -1:]
    if total.device.type == "cpu" and arguments.number_in((total > 0).all()) is False:
        raise ValueError("logits must have a finite largest entry in each row, got NaN or only weights of 0")
    below = torch.nextafter(total, torch.zeros_like(total))  # u * total may round to the total, past the last component
    u = _uniform(seed, (num_samples, *batch))
    if logits.dim() == 1:
        return torch.searchsorted(weights, torch.minimum(u * total, below), right=True).clamp_(
            max=weights.shape[-1] - 1
        )
    u = u.movedim(0, -1)  # [*batch, num_samples]
    weights = weights.expand(*batch, weights.shape[-1])
    index = torch.searchsorted(weights.contiguous(), torch.minimum(u * total, below).contiguous(), right=True)
    # NaN weights are not checked on a GPU, which would synchronise. The clamp keeps the index in range.
    return index.clamp_(max=weights.shape[-1] - 1).movedim(-1, 0)


def _take(values: Tensor, component: Tensor, event_ndim: int) -> Tensor:
    """values[..., k, *event] of each sample's component, or the single entry if all components share it."""
    values = parameters.collapse(values, event_ndim + 1)
    dim = values.dim() - event_ndim - 1
    if values.shape[dim] == 1:
        return values.squeeze(dim)
    if dim == 0:
        return values[component]
    values = values.expand(*component.shape[1:], *values.shape[dim:])
    grid = torch.meshgrid(*(torch.arange(n, device=values.device) for n in component.shape[1:]), indexing="ij")
    place = (*grid, component)
    return values[place]


@by_parts
@torch.no_grad()
def sample_gmm(
    logits: Tensor, means: Tensor, logvars: Tensor | float | None = None, *, scale_tril: Tensor | None = None,
    scale: str = "logvar", num_samples: int, seed: Seed | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Samples of a Gaussian mixture and their components, without gradient.

    k ~ softmax(logits), z ~ N(m_k, S_k)

    Args:
        logits, means, logvars, scale_tril, scale, seed: as for `fastkl.rsample_gmm`.
        num_samples: number of samples for each datum.

    Returns:
        (z, component): [num_samples, *batch, D] in the dtype of the means and covariances, [num_samples, *batch] int64.
        The component comes from a binary search, without a tensor of size samples x K. A component of weight 0 is never
        drawn.

    Raises:
        TypeError, ValueError: as rsample_gmm.

    Source: Bishop 2006, "Pattern Recognition and Machine Learning", section 8.1.2 (ancestral sampling).

    >>> import torch, fastkl
    >>> logits, means = torch.tensor([0.25, 0.75]).log(), torch.tensor([[-3.0, 0.0], [3.0, 1.0]])
    >>> z, component = fastkl.sample_gmm(logits, means, num_samples=10_000, seed=0)
    >>> z.shape, f"{component.double().mean():.2f}"
    (torch.Size([10000, 2]), '0.75')
    """
    if num_samples is None:
        raise TypeError("num_samples must be an int, got None")
    spread = parameters.as_logvars(means, logvars)
    batch, dtype = _check(logits, means, spread, scale_tril, num_samples)
    spread = as_logvar("scale", spread, scale, means)
    logits, means = logits.detach(), means.detach()
    spread, scale_tril = (None if t is None else t.detach() for t in (spread, scale_tril))
    seed = sampling.check_seed(seed, logits.device, "logits")
    component = _choose(logits, num_samples, batch, seed)
    # With 16-bit parameters the sum of full covariances is made in float32 and rounded at the end.
    wide = dtype if scale_tril is None else torch.promote_types(dtype, torch.float32)
    mean = _take(means.to(wide), component, 1).expand(*component.shape, means.shape[-1])
    zero = torch.zeros((), dtype=wide, device=mean.device)
    if scale_tril is None:
        spread = zero.expand(1, 1) if spread is None else parameters.by_component(spread)
        logvar = _take(spread.to(torch.promote_types(dtype, spread.dtype)), component, 1)
        return draw_normal(Stream.CHOICE_NOISE, mean.shape, mean, logvar, seed).to(dtype), component
    eps = draw_normal(Stream.CHOICE_NOISE, mean.shape, zero, zero, seed)
    scale_tril, matrix = scale_tril.to(wide), means.shape[-1] ** 2 * wide.itemsize
    rows = max(1, CHUNK // max(1, matrix * component[0].numel()))
    if torch.compiler.is_compiling():
        rows = component.shape[0]
    parts = []
    for k, m, e in zip(component.split(rows), mean.split(rows), eps.split(rows)):
        parts.append((m + (_take(scale_tril, k, 2).tril() @ e.unsqueeze(-1)).squeeze(-1)).to(dtype))
    return torch.cat(parts), component
