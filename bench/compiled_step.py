"""A whole training step under torch.compile: the usual formulas against fastkl's ops, by size.

    python -m bench.compiled_step

The VAE has one hidden layer of 64 units and data of 64 numbers; it takes forward and backward, without the optimiser.
Formulas and ops are compared in one run, interleaved, and only if their losses agree for the same noise. The last
column is fastkl's step compiled without the checks of global names (torch.compiler.skip_guard_on_globals_unsafe).
"""

from __future__ import annotations

import argparse
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastkl
from bench.timing import Contender, Pace, measure, ratio, spread, threads

# Rows, latent dimensions, components of a mixture as the prior (0: a standard normal).
SIZES = ((32, 8, 0), (32, 8, 20), (128, 64, 0), (128, 16, 500), (128, 64, 500))
WIDTH = 64
LOG_2PI = math.log(2 * math.pi)


def formulas(x: Tensor, mu: Tensor, logvar: Tensor, decoder: nn.Module, mixture: list[Tensor], eps: Tensor | None):
    z = mu + torch.exp(0.5 * logvar) * (torch.randn_like(mu) if eps is None else eps)
    if mixture:
        logits, means, logvars = mixture
        squares = (z.unsqueeze(1) - means).square() * torch.exp(-logvars)
        joint = F.log_softmax(logits, 0) - 0.5 * (squares + logvars + LOG_2PI).sum(-1)
        kl = -0.5 * ((z - mu).square() * torch.exp(-logvar) + logvar + LOG_2PI).sum(1) - torch.logsumexp(joint, 1)
    else:
        kl = 0.5 * (logvar.exp() + mu.square() - 1 - logvar).sum(1)
    return F.binary_cross_entropy_with_logits(decoder(z), x, reduction="none").sum(1) + kl


def ops(x: Tensor, mu: Tensor, logvar: Tensor, decoder: nn.Module, mixture: list[Tensor], eps: Tensor | None):
    if mixture:
        z = fastkl.rsample_normal(mu, logvar, eps=eps)
        kl = fastkl.normal_log_prob(z, mu, logvar) - fastkl.gmm_log_prob(z, *mixture)
    else:
        z, kl = fastkl.rsample_kl(mu, logvar, eps=eps)
    return kl - fastkl.bernoulli_log_prob(x, decoder(z))


def step_of(loss: Callable[..., Tensor], latent: int, components: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """(the loss as a function of data and noise, the parameters)."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2 * latent))
    decoder = nn.Sequential(nn.Linear(latent, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    shapes = (components, (components, latent), (components, latent)) if components else ()
    mixture: list[Tensor] = [nn.Parameter(torch.randn(shape)) for shape in shapes]

    def step(x: Tensor, eps: Tensor | None = None) -> Tensor:
        mu, logvar = encoder(x).chunk(2, -1)
        return loss(x, mu, logvar, decoder, mixture, eps).mean()

    # Each step gets its own code object. Dynamo would store all steps under a shared one, and check each at every call.
    own = types.FunctionType(step.__code__.replace(), step.__globals__, "step", step.__defaults__, step.__closure__)
    return own, [*encoder.parameters(), *decoder.parameters(), *mixture]


def contender(step: Callable[..., Tensor], x: Tensor, parameters: list[Tensor]) -> Contender:
    return Contender(lambda: step(x), lambda loss: torch.autograd.grad(loss, parameters))


def row_of(size: tuple[int, int, int], pace: Pace) -> dict[str, Any]:
    """Microseconds of each step, and the ratio of the compiled formulas to it.

    Raises:
        AssertionError: the losses do not agree.
    """
    rows, latent, components = size
    generator = torch.Generator().manual_seed(1)
    x, eps = torch.rand(rows, WIDTH, generator=generator), torch.randn(rows, latent, generator=generator)
    torch.testing.assert_close(*(step_of(loss, latent, components)[0](x, eps) for loss in (formulas, ops)))
    without_checks: Any = {"options": {"guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe}}
    found = {}
    for name, loss, options in (
        ("eager", formulas, None), ("formulas", formulas, {}), ("fastkl", ops, {}),
        ("fastkl, names not checked", ops, without_checks),
    ):  # fmt: skip
        step, parameters = step_of(loss, latent, components)
        found[name] = contender(step if options is None else torch.compile(step, **options), x, parameters)
    times = measure(found, "cpu", pace)
    row: dict[str, Any] = {"rows": rows, "latent": latent, "components": components}
    for name in found:
        row[f"{name}, us"] = 1e6 * spread(times[name].both).median
        row[name] = ratio(times["formulas"], times[name]).median
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    given = parser.parse_args()
    with threads(given.threads):
        for size in SIZES:
            torch.compiler.reset()
            row = row_of(size, Pace(given.rounds, 0.05, 30.0))
            print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
