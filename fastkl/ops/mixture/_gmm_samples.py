"""KL(q || mixture) by samples as a registered op: z = mu + sigma eps, in blocks of rows and samples.

Backward draws the noise again from the seed, so memory does not grow with the number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops import _sampling as sampling
from fastkl.ops._register import apply, differentiable, needs_closed_form, register, same, without_autocast
from fastkl.ops.mixture import _mixture as sweeps
from fastkl.ops.mixture._gmm import (
    MIXTURE,
    differentiable_gradients,
    fake_gradients,
    joined,
    matched,
    placed,
    softmax_of,
    summed_gradients,
    values,
)

_ARGUMENTS = f"Tensor mu, Tensor logvar, Tensor seed, {MIXTURE}, SymInt num_samples, str precision"
SAMPLES_BYTES = 2 << 20  # size of one block of z


class _Block:
    """Rows first to last of mu and logvar, with one mixture per datum or one for all."""

    def __init__(self, mu, logvar, mixture, first: int, last: int, data: slice):
        self.dtype = reference.compute_dtype(mu, logvar, *mixture)
        self.rows, self.data, self.size = slice(first, last), data, mu.shape[1]
        self.mu, self.logvar = mu[first:last].to(self.dtype), logvar[first:last].to(self.dtype)
        self.sigma = torch.exp(0.5 * self.logvar)
        self.mixture = self.of(mixture)

    def of(self, parameters) -> list[Tensor | None]:
        return [t if t is None or t.shape[0] == 1 else t[self.data] for t in parameters]

    def samples(self, seed: Tensor, num_samples: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(eps [L, n, D], z [L n, D]), a few samples at a time."""
        step = max(1, SAMPLES_BYTES // max(1, self.mu.numel() * self.dtype.itemsize))
        first, last = self.rows.start * self.size, self.rows.stop * self.size
        for start in range(0, num_samples, step):
            eps = sampling.normals(seed, range(start, min(start + step, num_samples)), first, last)
            eps = eps.reshape(-1, *self.mu.shape).to(self.dtype)
            yield eps, torch.addcmul(self.mu, self.sigma, eps).flatten(0, 1)


def _blocks(mu: Tensor, logvar: Tensor, mixture) -> Iterator[_Block]:
    data = max(mixture[0].shape[0], mixture[1].shape[0])
    step = max(1, SAMPLES_BYTES // (mu.shape[1] * reference.compute_dtype(mu).itemsize))
    period = mu.shape[0] if data == 1 else data
    for start in range(0, mu.shape[0], period):
        for first in range(0, period, step):
            last = min(first + step, period)
            yield _Block(mu, logvar, mixture, start + first, start + last, slice(first, last))


@without_autocast
def _forward(mu, logvar, seed, logits, means, logvars, scale_tril, num_samples, precision, entropy, stl) -> Tensor:
    mixture = (logits, means, logvars, scale_tril)
    kl = mu.new_empty(mu.shape[0], dtype=reference.compute_dtype(mu, logvar, *mixture))
    for block in _blocks(mu, logvar, mixture):
        half_logs = 0.5 * (block.logvar + math.log(2 * math.pi)).sum(-1)
        total = -num_samples * (half_logs if entropy == "sampled" else half_logs + 0.5 * block.size)
        for eps, z in block.samples(seed, num_samples):
            total -= values(z, None, *block.mixture, "point", precision, 0)[0].view(len(eps), -1).sum(0)
            if entropy == "sampled":
                total -= 0.5 * eps.square().sum((0, 2))
        kl[block.rows] = total / num_samples
    return kl


@without_autocast
def _backward(dkl, mu, logvar, seed, logits, means, logvars, scale_tril, num_samples, precision, stl, data, parameters):
    mixture = (logits, means, logvars, scale_tril)
    dtype = reference.compute_dtype(mu, logvar, *mixture)
    rows = [torch.zeros(mu.shape, dtype=dtype, device=mu.device) for _ in range(2 if data else 0)]
    buffers = sweeps.gradient_buffers(mixture, dtype) if parameters else []
    dlp = dkl.to(dtype) / -num_samples
    for block in _blocks(mu, logvar, mixture):
        weight = dlp[block.rows]
        for eps, z in block.samples(seed, num_samples):
            _, *kept = values(z, None, *block.mixture, "point", precision, sweeps.keep_for(z, logits, dtype))
            settings = (block.mixture, "point", precision, data, parameters, block.of(buffers))
            found, _ = summed_gradients(weight.repeat(len(eps)), kept, z, None, *settings)
            if data:
                dz = found[0].view(eps.shape)
                if stl:
                    dz.addcdiv_(weight.unsqueeze(-1) * eps, block.sigma)
                rows[0][block.rows] += dz.sum(0)
                rows[1][block.rows] += dz.mul_(eps).sum(0).mul_(block.sigma).mul_(0.5)
    if data and not stl:
        rows[1] -= 0.5 * dkl.to(dtype).unsqueeze(-1)
    if parameters:
        sweeps.subtract_softmax(buffers[0], logits)
    return matched([*rows, *buffers], mu, logvar, mixture, data, parameters)


def _fake_forward(mu, logvar, seed, logits, means, logvars, scale_tril, num_samples, precision, entropy, stl) -> Tensor:
    return mu.new_empty(mu.shape[0], dtype=reference.compute_dtype(mu, logvar, logits, means, logvars, scale_tril))


def _fake_backward(
    dkl, mu, logvar, seed, logits, means, logvars, scale_tril, num_samples, precision, stl, data, parameters
):
    return fake_gradients(mu, logvar, (logits, means, logvars, scale_tril), data, parameters)


kl_gmm_fwd = register(
    f"kl_gmm_fwd({_ARGUMENTS}, str entropy, bool stl) -> Tensor",  # stl only affects the gradient
    closed_form=_forward,
    fake=_fake_forward,
    kernel="mixture.kl_gmm.fwd",
)
kl_gmm_bwd = register(
    f"kl_gmm_bwd(Tensor dkl, {_ARGUMENTS}, bool stl, bool data, bool parameters) -> Tensor[]",
    closed_form=_backward,
    fake=_fake_backward,
    kernel="mixture.kl_gmm.bwd",
)


@without_autocast
def _gradients(dkl, mu, logvar, seed, logits, means, logvars, scale_tril, num_samples, stl) -> list[Tensor | None]:
    """The backward pass in differentiable torch ops."""
    mixture = (logits, means, logvars, scale_tril)
    dtype = reference.compute_dtype(mu, logvar, *mixture)
    eps = reference.normal_noise(seed, mu.shape, num_samples).to(dtype)
    sigma, dkl = torch.exp(0.5 * logvar.to(dtype)), dkl.to(dtype)
    z = joined(mu.to(dtype) + sigma * eps)
    rows = (dkl / -num_samples).expand(num_samples, *dkl.shape)
    rows = rows.reshape(-1, max(logits.shape[0], means.shape[0]))
    found = differentiable_gradients(
        lambda *prepared: softmax_of(*prepared) * rows.unsqueeze(-1), z, None, *mixture, "point"
    )
    dz = found[0].reshape(eps.shape)
    if stl:
        dz = dz - (dkl / num_samples).unsqueeze(-1) * eps / sigma
    dlogvar = 0.5 * (dz * eps).sum(0) * sigma
    dlogvar = dlogvar if stl else dlogvar - 0.5 * dkl.unsqueeze(-1)
    return [dz.sum(0).to(mu.dtype), dlogvar.to(logvar.dtype), None, *found[2:]]


class KLSamples(torch.autograd.Function):
    @staticmethod
    def forward(mu, logvar, seed, logits, means, logvars, scale_tril, num_samples, precision, entropy, stl):
        return kl_gmm_fwd(mu, logvar, seed, logits, means, logvars, scale_tril, num_samples, precision, entropy, stl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:7])
        ctx.settings = (*inputs[7:9], inputs[10])

    @staticmethod
    def backward(ctx, dkl):
        inputs, (num_samples, precision, stl) = ctx.saved_tensors, ctx.settings
        if needs_closed_form(dkl):
            return *_gradients(dkl, *inputs, num_samples, stl), *[None] * 4
        data, parameters = any(ctx.needs_input_grad[:2]), any(ctx.needs_input_grad[3:7])
        found = kl_gmm_bwd(dkl, *inputs, num_samples, precision, stl, data, parameters)
        dmu, dlogvar, *dmixture = placed(found, (*inputs[:2], *inputs[3:]), data, parameters)
        return dmu, dlogvar, None, *dmixture, *[None] * 4

    @staticmethod
    def vmap(info, in_dims, *inputs):
        """One call per example: each draws noise from its own seed for its own rows."""
        results = [apply(KLSamples, *example) for example in arguments.examples(info.batch_size, in_dims, inputs)]
        return torch.stack(results), 0


differentiable("kl_gmm_fwd", KLSamples, same)
