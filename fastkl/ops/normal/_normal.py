"""Shared by the five ops of a diagonal normal: schemas, settings, and one autograd.Function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops import _sampling as sampling
from fastkl.ops._call import apply, event_ndim_of_common_call, needs_closed_form
from fastkl.ops._register import differentiable
from fastkl.ops._sampling import Seed
from fastkl.ops._scales import as_logvar
from fastkl.ops.normal._closed_form import bounds_of, normal_gradients, samples_dtype
from fastkl.reference import SoftBounds, Stream

# Parts of the ops' schemas. mu and the parameter have one shape. The prior is None, of that shape, or of the event's
# shape if the batch shares it. Exactly one of eps ([L, *shape], or [*shape] without num_samples) and seed (int64, no
# dimensions) is given. A backward op writes into the given outputs; the prior's two are None if not wanted.
Q, PRIOR, NOISE = "Tensor mu, Tensor parameter", "Tensor? prior_mu, Tensor? prior_logvar", "Tensor? eps, Tensor? seed"
DQ, DPRIOR = "Tensor(a!) dmu, Tensor(b!) dparameter", "Tensor(c!)? dprior_mu, Tensor(d!)? dprior_logvar"
SETTINGS = "int event_ndim, str scale, float low, float high, bool live"
DRAWING_SETTINGS = f"{SETTINGS}, SymInt? num_samples, int stream"


# event_ndim of an op that only draws: every element is a sample by itself.
NO_EVENT = 0


class Settings(NamedTuple):
    """The last arguments of an op that does not draw samples."""

    event_ndim: int
    scale: str
    low: float
    high: float
    live: bool


class Drawing(NamedTuple):
    """The last arguments of an op that draws samples."""

    event_ndim: int
    scale: str
    low: float
    high: float
    live: bool
    num_samples: int | None
    stream: int = Stream.POSTERIOR


def of_rows(dvalue: Tensor, mu: Tensor, event_ndim: int) -> Tensor:
    """The gradient of one value per row, shaped to broadcast with mu."""
    return dvalue.reshape(*dvalue.shape, *[1] * event_ndim)


def terms_of_eps(index: int) -> Callable[..., float]:
    """`terms` in `register` of an op that draws: the compiler cannot trace the closed form of the noise of a seed."""
    return lambda *args: math.inf if args[index] is None else args[index].numel()


def fake_value(
    mu: Tensor, parameter: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None, *settings
) -> Tensor:
    """The fake of one value per row."""
    dtype = reference.compute_dtype(mu, parameter, prior_mu, prior_logvar)
    return mu.new_empty(mu.shape[: mu.dim() - settings[0]], dtype=dtype)


class NormalOp:
    """A forward and a backward op. Their schemas have Q, PRIOR and SETTINGS; if they draw samples Q, PRIOR, NOISE and
    DRAWING_SETTINGS, and if they only draw, no PRIOR. The forward op returns (z, value), or one of the two; the
    backward op takes the gradients of these first, and after its inputs DQ and (with PRIOR) DPRIOR.
    """

    def __init__(
        self, fwd: Callable, bwd: Callable, name: str, *, draws: bool = False, has_value: bool = True,
        spread: Callable[[Tensor, Tensor, int], Tensor] = of_rows,
        terms_gradient: Callable[..., tuple[Tensor, ...]] = reference.kl_terms_gradient,
    ) -> None:  # fmt: skip
        self.fwd, self.bwd, self.draws, self.has_value = fwd, bwd, draws, has_value
        self.spread, self.terms_gradient = spread, terms_gradient
        self.averages = spread is not of_rows  # over the batch, for one value per dimension of the event
        differentiable(name, NormalFunction, self.inputs_of_function)

    def inputs_of_function(self, mu, parameter, *rest) -> tuple:
        """The Function's inputs, from the arguments of `fwd`."""
        prior, rest = (rest[:2], rest[2:]) if self.has_value else ((None, None), rest)
        noise, rest = (rest[:2], rest[2:]) if self.draws else ((None, None), rest)
        settings = Drawing(*rest) if self.draws else Settings(*rest)
        return self, -1, settings, mu, parameter, *prior, *noise

    def value(
        self, mu: Any, logvar: Any, prior_mu: Any, prior_logvar: Any, event_ndim: int | None, scale: str,
        prior_scale: str, bounds: SoftBounds | tuple[float, float] | None,
    ) -> Tensor:  # fmt: skip
        """The op's value of a public function's arguments, which are checked here and may broadcast."""
        unusual = (prior_mu, prior_logvar, bounds, None if prior_scale == "logvar" else prior_scale)
        if known := event_ndim_of_common_call(event_ndim, (mu, logvar), scale, *unusual):
            settings = Settings(known, scale, *arguments.NO_BOUNDS)
            return apply(NormalFunction, self, -1, settings, mu, logvar, None, None, None, None)
        mu, logvar, prior_mu, prior_logvar = arguments.as_parameters(mu, logvar, prior_mu, prior_logvar)
        arguments.check_tensors(mu=mu, logvar=logvar, prior_mu=prior_mu, prior_logvar=prior_logvar)
        prior_logvar = as_logvar("prior_scale", prior_logvar, prior_scale, mu, logvar, prior_mu)
        shape = arguments.broadcast_shape(mu=mu, logvar=logvar, prior_mu=prior_mu, prior_logvar=prior_logvar)
        event_ndim = arguments.event_ndim_of_datum(event_ndim, shape)
        prior = arguments.expand_prior(prior_mu, prior_logvar, mu, shape, event_ndim)
        q = arguments.expand(mu, shape), arguments.expand(logvar, shape)
        event_ndim, *tensors = arguments.as_events(event_ndim, *q, *prior)
        settings = Settings(event_ndim, arguments.check_scale(scale), *arguments.check_bounds(bounds))
        return apply(NormalFunction, self, -1, settings, *tensors, None, None)

    def samples(
        self, mu: Any, logvar: Any, prior_mu: Any, prior_logvar: Any, event_ndim: int | None, num_samples: int | None,
        seed: Seed | None, eps: Tensor | None, scale: str, prior_scale: str,
        bounds: SoftBounds | tuple[float, float] | None,
    ) -> Any:  # fmt: skip
        """z, or (z, value), of a public function's arguments, which are checked here and may broadcast."""
        unusual = (prior_mu, prior_logvar, bounds, None if prior_scale == "logvar" else prior_scale, eps, num_samples)
        if known := event_ndim_of_common_call(event_ndim, (mu, logvar), scale, *unusual):
            seed = sampling.check_seed(seed, mu.device, "mu")
            drawing = Drawing(known if self.has_value else NO_EVENT, scale, *arguments.NO_BOUNDS, None)
            return apply(NormalFunction, self, -1, drawing, mu, logvar, None, None, None, seed)
        given = mu, logvar
        mu, logvar, prior_mu, prior_logvar = arguments.as_parameters(*given, prior_mu, prior_logvar)
        arguments.check_tensors(mu=mu, logvar=logvar, prior_mu=prior_mu, prior_logvar=prior_logvar, eps=eps)
        prior_logvar = as_logvar("prior_scale", prior_logvar, prior_scale, mu, logvar, prior_mu)
        shape = arguments.broadcast_shape(mu=mu, logvar=logvar)
        arguments.check_prior_fits(shape, prior_mu=prior_mu, prior_logvar=prior_logvar)
        settings = (arguments.check_scale(scale), *arguments.check_bounds(bounds), num_samples)
        seed, eps = sampling.check_noise(seed, eps, num_samples, shape, mu.device)
        q, dtype = (arguments.expand(mu, shape), arguments.expand(logvar, shape)), samples_dtype(*given)
        if not self.has_value:
            return apply(NormalFunction, self, -1, Drawing(NO_EVENT, *settings), *q, None, None, eps, seed).to(dtype)
        event_ndim = arguments.event_ndim_of_datum(event_ndim, shape)
        prior = arguments.expand_prior(prior_mu, prior_logvar, mu, shape, event_ndim)
        op_ndim, *tensors = arguments.as_events(event_ndim, *q, *prior, eps)
        z, value = apply(NormalFunction, self, -1, Drawing(op_ndim, *settings), *tensors, seed)
        return (z if event_ndim else z.squeeze(-1)).to(dtype), value

    def gradients(self, dz, dvalue, mu, parameter, prior_mu, prior_logvar, eps, seed, settings) -> list[Tensor]:
        """Gradients in mu, the parameter and, if dvalue is given, the prior's tensors, by differentiable torch ops."""
        inputs, incoming = [mu, parameter], {"dz": dz, "terms_gradient": self.terms_gradient}
        if dz is not None:
            incoming["eps"] = sampling.noise(mu.shape, eps, seed, settings.num_samples, settings.stream)
        if dvalue is not None:  # skip the KL instead of using a zero gradient: an infinite KL would give NaN
            incoming["dvalue"] = self.spread(dvalue, mu, settings.event_ndim)
            inputs += (prior_mu, prior_logvar)
        return normal_gradients(inputs, settings.scale, bounds_of(settings), **incoming)


class NormalFunction(torch.autograd.Function):
    """Takes mu and the parameter, or instead of mu a head that packs both along packed_dim. The head's gradient is
    packed too: the backward op writes into the two halves of one tensor."""

    @staticmethod
    def forward(op, packed_dim, settings, mu, parameter, prior_mu, prior_logvar, eps, seed):
        if parameter is None:
            mu, parameter = mu.chunk(2, packed_dim)
        if not op.draws:
            return op.fwd(mu, parameter, prior_mu, prior_logvar, *settings)
        if not op.has_value:
            return op.fwd(mu, parameter, eps, seed, *settings)
        return op.fwd(mu, parameter, prior_mu, prior_logvar, eps, seed, *settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, ctx.packed_dim, ctx.settings = inputs[:3]
        ctx.save_for_backward(*inputs[3:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *incoming):
        op, packed_dim, settings = ctx.op, ctx.packed_dim, ctx.settings
        mu, parameter, prior_mu, prior_logvar, eps, seed = tensors = ctx.saved_tensors
        dz, dvalue = incoming if len(incoming) == 2 else (*incoming, None) if op.draws else (None, *incoming)
        if dz is None and dvalue is None:
            return (None,) * 9
        dmu = dparameter = dprior_mu = dprior_logvar = deps = None
        packed = parameter is None
        if packed:
            mu, parameter = mu.chunk(2, packed_dim)
        prior_wanted = prior_mu is not None and (ctx.needs_input_grad[5] or ctx.needs_input_grad[6])
        if prior_wanted:
            allocate = torch.zeros_like if dvalue is None else torch.empty_like
            dprior_mu, dprior_logvar = allocate(prior_mu), allocate(prior_logvar)
        if needs_closed_form(*incoming):
            dmu, dparameter, *dprior = op.gradients(dz, dvalue, mu, parameter, *tensors[2:], settings)
            if packed:
                dmu, dparameter = torch.cat((dmu, dparameter), packed_dim), None
            if prior_wanted and dprior:
                dprior_mu, dprior_logvar = dprior
        else:
            dmu, dparameter = torch.empty_like(tensors[0]), None if packed else torch.empty_like(parameter)
            dq = dmu.chunk(2, packed_dim) if packed else (dmu, dparameter)
            dprior = (dprior_mu, dprior_logvar) if dvalue is not None else (None, None)
            if not op.draws:
                op.bwd(dvalue, mu, parameter, prior_mu, prior_logvar, *dq, *dprior, *settings)
            elif not op.has_value:
                op.bwd(dz, mu, parameter, eps, seed, *dq, *settings)
            else:
                op.bwd(dz, dvalue, mu, parameter, prior_mu, prior_logvar, eps, seed, *dq, *dprior, *settings)
        if ctx.needs_input_grad[7] and dz is not None:
            deps = sampling.noise_gradient(dz, mu, parameter, eps, settings.scale, bounds_of(settings))
        return None, None, None, dmu, dparameter, dprior_mu, dprior_logvar, deps, None

    @staticmethod
    def vmap(info, in_dims, op, packed_dim, settings, mu, parameter, prior_mu, prior_logvar, eps, seed):
        size, dims = info.batch_size, in_dims[3:]
        if op.averages:  # do not average over the new dimension, the event's first
            tensors = [
                None
                if tensor is None
                else arguments.batch_first(tensor, dim, size).movedim(0, -settings.event_ndim - 1)
                for tensor, dim in zip((mu, parameter, prior_mu, prior_logvar), dims)
            ]
            settings = settings._replace(event_ndim=settings.event_ndim + 1)
            return apply(NormalFunction, op, packed_dim, settings, *tensors, None, None), 0
        dtype = samples_dtype(mu, parameter)
        mu, packed_dim = arguments.batch_first(mu, dims[0], size), packed_dim + 1
        if parameter is not None:
            parameter = arguments.batch_first(parameter, dims[1], size)
        shape = mu.shape if parameter is not None else mu.chunk(2, packed_dim)[0].shape
        prior = arguments.batch_first_prior((prior_mu, prior_logvar), dims[2:4], shape, settings.event_ndim)
        if op.draws:
            drawing = (settings.num_samples, settings.stream)
            eps, seed = sampling.batch_noise(size, shape[1:], eps, seed, dims[4:], *drawing)
        found = apply(NormalFunction, op, packed_dim, settings, mu, parameter, *prior, eps, seed)
        if not op.draws:
            return found, 0
        z, *values = found if op.has_value else (found,)
        z, dim_of_z = z.to(dtype), 0 if settings.num_samples is None else 1
        return ((z, *values), (dim_of_z, 0)) if values else (z, dim_of_z)
