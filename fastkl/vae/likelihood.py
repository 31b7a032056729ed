"""The distributions of a datum given the latent: log-likelihood, mean and samples from the decoder's output.

The decoder gives one number for each value of x, or `outputs` of them. All other parameters of a distribution are
learned directly: one for each feature of a vector, or one for all pixels of an image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, distributions, nn

import fastkl
from fastkl.vae.errors import UserError

PIXELS = ("bernoulli", "logistic", "categorical")  # of values in [0, 1]
COUNTS = ("poisson", "negative_binomial")
SCALED = ("normal", "laplace", "huber")  # of standardised values; each has a scale
NAMES = (*PIXELS, *SCALED, *COUNTS)
DISCRETE = ("logistic", "categorical")  # these also report bits per dimension
LEVELS = 256  # at most, of categorical pixels
HUBER = 1.345  # scales up to which the loss is quadratic; the usual one, of 95 % efficiency for normal errors


class Likelihood(nn.Module):
    """log p(x | z) summed over a datum, in nats."""

    outputs = 1  # numbers of the decoder for each value

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.ndim = len(shape)
        self.own_shape = tuple(shape) if len(shape) == 1 else (1,)  # not (): fully_shard takes no scalars

    def parameter(self) -> nn.Parameter:
        return nn.Parameter(torch.zeros(self.own_shape))

    def keep_log(self, name: str, scale: float, power: int = 1) -> None:
        """Register ln scale^power as a buffer, or for a scale of 0 a parameter in its place."""
        if scale:
            self.register_buffer(name, torch.full(self.own_shape, power * math.log(scale)))
        else:
            self.register_parameter(name, self.parameter())

    def seen(self, x: Tensor) -> Tensor:
        """The encoder's input for data x."""
        return x

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """[*batch] for x and the decoder's output [*batch, *shape]."""
        return self.terms(x, output).flatten(-self.ndim).sum(-1)

    def terms(self, x: Tensor, output: Tensor) -> Tensor:
        """log p of each value."""
        raise NotImplementedError

    def mean(self, output: Tensor) -> Tensor:
        """E[x | z], in the units of x."""
        return output


class Bernoulli(Likelihood):
    """x in [0, 1]: a value between 0 and 1 is the probability of a 1. The output is the logit."""

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        return fastkl.bernoulli_log_prob(x, output, event_ndim=self.ndim)

    def mean(self, output: Tensor) -> Tensor:
        return output.sigmoid()


class Normal(Likelihood):
    """The L2 loss. The output is the mean; the log-variance is learned, or that of a given deviation."""

    logvar: Tensor

    def __init__(self, shape: tuple[int, ...], scale: float = 0.0):
        super().__init__(shape)
        self.keep_log("logvar", scale, power=2)

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        return fastkl.normal_log_prob(x, output, self.logvar.expand_as(output), event_ndim=self.ndim)


class Laplace(Likelihood):
    """The L1 loss. The output is the mean; the logarithm of the scale, which divides errors, is learned or given."""

    log_scale: Tensor

    def __init__(self, shape: tuple[int, ...], scale: float = 0.0):
        super().__init__(shape)
        self.keep_log("log_scale", scale)

    def terms(self, x: Tensor, output: Tensor) -> Tensor:
        output = output.float()
        return distributions.Laplace(output, self.log_scale.exp().expand_as(output), validate_args=False).log_prob(x)


class Huber(Laplace):
    """The Huber loss: quadratic for errors of up to k = 1.345 scales b, and linear beyond. The output is the mean.

    -rho(u) - ln b - ln [sqrt(2 pi) erf(k / sqrt 2) + 2/k exp(-k^2 / 2)], u = (x - m) / b, rho(u) = u^2 / 2 up to k,
    and k |u| - k^2 / 2 beyond

    Source: Huber 1964, "Robust Estimation of a Location Parameter", section 4 (the least favourable distribution).
    """

    LOG_NORMALISER = math.log(
        math.sqrt(2 * math.pi) * math.erf(HUBER / math.sqrt(2)) + 2 / HUBER * math.exp(-(HUBER**2) / 2)
    )

    def terms(self, x: Tensor, output: Tensor) -> Tensor:
        error = (x - output.float()) * (-self.log_scale).exp()
        near = error.clamp(-HUBER, HUBER)
        return near * (near / 2 - error) - self.log_scale - self.LOG_NORMALISER


class Logistic(Likelihood):
    """Pixels with levels k / (levels - 1): the mass of a logistic distribution between the neighbours' midpoints.

    ln [s((x + h - m) / b) - s((x - h - m) / b)], s the logistic function, h half a level. The first and the last
    level extend to infinity. The output is m, and the logarithm of b is learned.

    Source: Kingma et al. 2016, arXiv:1606.04934, section 5.2 (the likelihood).
    """

    def __init__(self, shape: tuple[int, ...], levels: int):
        super().__init__(shape)
        self.half_level, self.log_scale = 0.5 / (levels - 1), nn.Parameter(torch.full(self.own_shape, -2.0))

    def terms(self, x: Tensor, output: Tensor) -> Tensor:
        inverse = (-self.log_scale).exp()
        distance, half = (x - output.float()) * inverse, self.half_level * inverse
        below, above = distance - half, distance + half
        # s(b) - s(a) = s(b) s(-a) (1 - exp(a - b)), which avoids the cancellation of the left-hand side
        middle = F.logsigmoid(above) + F.logsigmoid(-below) + torch.log(-torch.expm1(-2 * half))
        first, last = x < self.half_level, x > 1 - self.half_level
        return torch.where(first, F.logsigmoid(above), torch.where(last, F.logsigmoid(-below), middle))

    def mean(self, output: Tensor) -> Tensor:
        return output.clamp(0, 1)


class Categorical(Likelihood):
    """Pixels with levels k / (levels - 1). The output [..., levels, *shape] has a logit for each level."""

    def __init__(self, shape: tuple[int, ...], levels: int):
        super().__init__(shape)
        self.outputs = levels

    def terms(self, x: Tensor, output: Tensor) -> Tensor:
        drawn = self.levels(output) == (x * (self.outputs - 1)).round().unsqueeze(-self.ndim - 1)
        log_p = output.float().log_softmax(-self.ndim - 1)
        return log_p.where(drawn, 0.0).sum(-self.ndim - 1)  # not gather, whose gradient on CUDA has no fixed order

    def mean(self, output: Tensor) -> Tensor:
        return (output.softmax(-self.ndim - 1) * self.levels(output)).sum(-self.ndim - 1) / (self.outputs - 1)

    def levels(self, output: Tensor) -> Tensor:
        """0, 1, ... [outputs, 1, ..., 1], which broadcast with the output."""
        numbers = torch.arange(self.outputs, dtype=torch.float32, device=output.device)
        return numbers.view(-1, *[1] * self.ndim)


class Poisson(Likelihood):
    """Counts. The output is the logarithm of the mean; the encoder reads ln(1 + x)."""

    def seen(self, x: Tensor) -> Tensor:
        return x.log1p()

    def terms(self, x: Tensor, output: Tensor) -> Tensor:
        output = output.float()
        return x * output - output.exp() - torch.lgamma(x + 1)

    def mean(self, output: Tensor) -> Tensor:
        return output.exp()


class NegativeBinomial(Poisson):
    """Counts with mean m and variance m + m^2 / r; the logarithm of r is learned, and the output is ln m."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__(shape)
        self.log_size = self.parameter()

    def terms(self, x: Tensor, output: Tensor) -> Tensor:
        output = output.float()
        size = self.log_size.exp().expand_as(output)
        distribution = distributions.NegativeBinomial(size, logits=output - self.log_size, validate_args=False)
        return distribution.log_prob(x)


def make(name: str, shape: tuple[int, ...], levels: int, scale: float = 0.0) -> Likelihood:
    """The likelihood of this name for data of this shape; pixels have this number of levels. A scale of 0 is learned.

    Raises:
        UserError: the likelihood has no scale.
    """
    if name in SCALED:
        return {"normal": Normal, "laplace": Laplace, "huber": Huber}[name](shape, scale)
    if scale:
        raise UserError(f"--scale {scale:g} needs --likelihood {', '.join(SCALED[:-1])} or {SCALED[-1]}, got {name}")
    if name in DISCRETE:
        return {"logistic": Logistic, "categorical": Categorical}[name](shape, levels)
    return {"bernoulli": Bernoulli, "poisson": Poisson, "negative_binomial": NegativeBinomial}[name](shape)


def bits_per_dimension(nats: float, shape: tuple[int, ...]) -> float:
    """A log-probability per datum, given in nats, as bits per dimension."""
    return -nats / (math.log(2) * math.prod(shape))
