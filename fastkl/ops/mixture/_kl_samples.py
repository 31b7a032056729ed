"""KL(q || mixture) by samples as a registered op: z = mu + sigma eps, in blocks of rows and samples.

Backward draws the noise again from the seed, so memory does not grow with the number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops import _sampling as sampling
from fastkl.ops._call import apply, needs_closed_form
from fastkl.ops._register import differentiable, register, same, without_autocast
from fastkl.ops.mixture import _at_once as at_once
from fastkl.ops.mixture._mixture import DMIXTURE, MIXTURE, Gradients, Mixture, by_datum, joined, outputs_for
from fastkl.ops.mixture._sweep import keep_for
from fastkl.ops.mixture._sweep_gradients import write, zeros_to_add_to
from fastkl.ops.mixture.gmm_log_prob import gmm_log_prob_bwd, gmm_log_prob_fwd

_INPUTS = f"Tensor mu, Tensor logvar, Tensor seed, {MIXTURE}"
SAMPLES_BYTES = 2 << 20  # size of one block of z


class _Block:
    """Rows first to last of mu and logvar, with one mixture per datum or one for all."""

    def __init__(self, mu: Tensor, logvar: Tensor, mixture: Mixture, first: int, last: int, data: slice) -> None:
        self.dtype = reference.compute_dtype(mu, logvar, *mixture)
        self.rows, self.data, self.size = slice(first, last), data, mu.shape[1]
        self.mu, self.logvar = mu[first:last].to(self.dtype), logvar[first:last].to(self.dtype)
        self.sigma = torch.exp(0.5 * self.logvar)
        wide: Iterator[Any] = (None if t is None else t.to(self.dtype) for t in self.of(mixture))
        self.mixture = Mixture(*wide)

    def of(self, parameters: Iterable[Tensor | None]) -> Iterator[Any]:
        """The parts of the parameters for the block's data."""
        return (t if t is None or t.shape[0] == 1 else t[self.data] for t in parameters)

    def samples(self, seed: Tensor, num_samples: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(eps [L, n, D], z [L n, D]), a few samples at a time."""
        step = max(1, SAMPLES_BYTES // max(1, self.mu.numel() * self.dtype.itemsize))
        first, last = self.rows.start * self.size, self.rows.stop * self.size
        for start in range(0, num_samples, step):
            eps = sampling.normals(seed, range(start, min(start + step, num_samples)), first, last)
            eps = eps.reshape(-1, *self.mu.shape).to(self.dtype)
            yield eps, torch.addcmul(self.mu, self.sigma, eps).flatten(0, 1)


def _blocks(mu: Tensor, logvar: Tensor, mixture: Mixture) -> Iterator[_Block]:
    step = max(1, SAMPLES_BYTES // (mu.shape[1] * reference.compute_dtype(mu).itemsize))
    period = mu.shape[0] if mixture.data == 1 else mixture.data
    for start in range(0, mu.shape[0], period):
        for first in range(0, period, step):
            last = min(first + step, period)
            yield _Block(mu, logvar, mixture, start + first, start + last, slice(first, last))


@without_autocast
def _forward(mu, logvar, seed, logits, means, logvars, scale_tril, num_samples, precision, entropy, stl) -> Tensor:
    mixture = Mixture(logits, means, logvars, scale_tril)
    kl = _fake_forward(mu, logvar, seed, *mixture)
    for block in _blocks(mu, logvar, mixture):
        half_logs = 0.5 * (block.logvar + math.log(2 * math.pi)).sum(-1)
        total = -num_samples * (half_logs if entropy == "sampled" else half_logs + 0.5 * block.size)
        for eps, z in block.samples(seed, num_samples):
            (lp,) = gmm_log_prob_fwd(z, None, *block.mixture, "point", precision, 0)
            total -= lp.view(len(eps), -1).sum(0)
            if entropy == "sampled":
                total -= 0.5 * eps.square().sum((0, 2))
        kl[block.rows] = total / num_samples
    return kl


def _fake_forward(mu, logvar, seed, logits, means, logvars, scale_tril, *settings) -> Tensor:
    return mu.new_empty(mu.shape[0], dtype=reference.compute_dtype(mu, logvar, logits, means, logvars, scale_tril))


def _add_gradients(z: Tensor, dlp: Tensor, mixture: Mixture, precision: str, total: Gradients) -> None:
    """Add the gradients of sum dlp ln p(z) to `total`."""
    inputs = (z, None, *mixture)
    kept = (*gmm_log_prob_fwd(*inputs, "point", precision, keep_for([z], mixture)), None)[1:3]
    found = outputs_for(inputs, [output is not None for output in total])
    gmm_log_prob_bwd(dlp, *kept, *inputs, *found, "point", precision)
    for output, gradient in zip(total, found):
        if output is not None and gradient is not None:
            output += gradient


@without_autocast
def _backward(
    dkl, mu, logvar, seed, logits, means, logvars, scale_tril,
    dmu, dlogvar, dlogits, dmeans, dlogvars, dscale_tril, num_samples, precision, stl,
) -> None:  # fmt: skip
    mixture = Mixture(logits, means, logvars, scale_tril)
    dtype = reference.compute_dtype(mu, logvar, *mixture)
    outputs = Gradients(dmu, dlogvar, dlogits, dmeans, dlogvars, dscale_tril)
    total = zeros_to_add_to(outputs, dtype)
    dlp = dkl.to(dtype) / -num_samples
    for block in _blocks(mu, logvar, mixture):
        weight = dlp[block.rows]
        for eps, z in block.samples(seed, num_samples):
            dz = torch.zeros_like(z) if outputs.of_rows else None
            of_block = Gradients(dz, None, *block.of(total[2:]))
            _add_gradients(z, weight.repeat(len(eps)), block.mixture, precision, of_block)
            if dz is None:
                continue
            dz = dz.view(eps.shape)
            if stl:
                dz.addcdiv_(weight.unsqueeze(-1) * eps, block.sigma)
            if total.dz is not None:
                total.dz[block.rows] += dz.sum(0)
            if total.dlogvar is not None:
                total.dlogvar[block.rows] += dz.mul_(eps).sum(0).mul_(block.sigma).mul_(0.5)
    if total.dlogvar is not None and not stl:
        total.dlogvar.sub_(0.5 * dkl.to(dtype).unsqueeze(-1))
    write(outputs, total)


def _kernels():
    from fastkl.kernels.mixture import kl_gmm

    return kl_gmm


kl_gmm_fwd = register(
    f"kl_gmm_fwd({_INPUTS}, SymInt num_samples, str precision, str entropy, bool stl) -> Tensor",  # stl is backward's
    closed_form=_forward,
    fake=_fake_forward,
    kernel=lambda: _kernels().fwd,
)
kl_gmm_bwd = register(
    f"kl_gmm_bwd(Tensor dkl, {_INPUTS}, Tensor(a!)? dmu, Tensor(b!)? dlogvar, {DMIXTURE}, "
    "SymInt num_samples, str precision, bool stl) -> ()",
    closed_form=_backward,
    kernel=lambda: _kernels().bwd,
)


@without_autocast
def _differentiable_gradients(
    dkl, mu, logvar, seed, logits, means, logvars, scale_tril, num_samples, stl
) -> list[Tensor | None]:  # fmt: skip
    """_backward in differentiable torch ops."""
    mixture = Mixture(logits, means, logvars, scale_tril)
    dtype = reference.compute_dtype(mu, logvar, *mixture)
    eps = reference.normal_noise(seed, mu.shape, num_samples).to(dtype)
    sigma, dkl = torch.exp(0.5 * logvar.to(dtype)), dkl.to(dtype)
    z = joined(mu.to(dtype) + sigma * eps)
    rows = (dkl / -num_samples).expand(num_samples, *dkl.shape).reshape(-1)

    def weights_of(part, prepared) -> Tensor:
        return at_once.softmax_of(part, prepared) * by_datum(rows, part.data).unsqueeze(-1)

    dz, _, *dmixture = at_once.differentiable_gradients(weights_of, z, None, mixture, "point")
    dz = dz.reshape(eps.shape)
    if stl:
        dz = dz - (dkl / num_samples).unsqueeze(-1) * eps / sigma
    dlogvar = 0.5 * (dz * eps).sum(0) * sigma
    dlogvar = dlogvar if stl else dlogvar - 0.5 * dkl.unsqueeze(-1)
    return [dz.sum(0).to(mu.dtype), dlogvar.to(logvar.dtype), None, *dmixture]


class KLSamples(torch.autograd.Function):
    @staticmethod
    def forward(mu, logvar, seed, logits, means, logvars, scale_tril, num_samples, precision, entropy, stl):
        return kl_gmm_fwd(mu, logvar, seed, logits, means, logvars, scale_tril, num_samples, precision, entropy, stl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:7])
        ctx.num_samples, ctx.precision, _, ctx.stl = inputs[7:]

    @staticmethod
    def backward(ctx, dkl):
        inputs, settings = ctx.saved_tensors, (ctx.num_samples, ctx.precision, ctx.stl)
        if needs_closed_form(dkl):
            return *_differentiable_gradients(dkl, *inputs, ctx.num_samples, ctx.stl), *[None] * 4
        dmu, dlogvar, _, *dmixture = outputs_for(inputs, ctx.needs_input_grad)
        kl_gmm_bwd(dkl, *inputs, dmu, dlogvar, *dmixture, *settings)
        return dmu, dlogvar, None, *dmixture, *[None] * 4

    @staticmethod
    def vmap(info, in_dims, *inputs):
        """One call per example: each draws noise from its own seed for its own rows."""
        results = [apply(KLSamples, *example) for example in arguments.examples(info.batch_size, in_dims, inputs)]
        return torch.stack(results), 0


differentiable("kl_gmm_fwd", KLSamples, same)
