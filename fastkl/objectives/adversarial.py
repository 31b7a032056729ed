"""The adversarial autoencoder: latents are matched to the prior by a discriminator between the two."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fastkl import distributions
from fastkl.objectives._loss import (
    LogLikelihood,
    Loss,
    check,
    draws,
    flat,
    made_of,
    prior_draws,
    reconstruction_of,
    sampled_kl,
)
from fastkl.ops import _arguments as arguments
from fastkl.ops._arguments import check_weight
from fastkl.priors._prior import Prior


class Discriminator(nn.Sequential):
    """z [N, D] -> the log-odds [N] that z is a draw from the prior.

    Args:
        dim: D. hidden: widths of the hidden layers.

    >>> import torch, fastkl
    >>> fastkl.objectives.Discriminator(2)(torch.zeros(3, 2)).shape
    torch.Size([3])
    """

    def __init__(self, dim: int, hidden: Sequence[int] = (256, 256)):
        widths = [arguments.check_int("dim", dim, 1), *(arguments.check_int("hidden", width, 1) for width in hidden)]
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            layers += [nn.Linear(narrow, wide), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Linear(widths[-1], 1), nn.Flatten(0))


def aae(
    posterior: distributions.DiagonalNormal, prior: Prior | None, log_likelihood: LogLikelihood,
    discriminator: nn.Module, *, penalty: float | Tensor = 1.0, eps: Tensor | None = None,
    prior_samples: Tensor | None = None,
) -> tuple[Loss, Tensor]:  # fmt: skip
    """The adversarial autoencoder: (Loss of the autoencoder, loss of the discriminator).

    autoencoder: -E_q[ln p(x | z)] + lambda E[-ln D(z)]; discriminator: E[-ln D(y)] + E[-ln(1 - D(z))], y ~ p

    D = sigmoid of the discriminator's output. The first loss has no gradient in the discriminator, and the second has
    gradients only there. One backward pass of their sum therefore serves two optimisers:

        loss, discriminator_loss = objectives.aae(q, None, log_likelihood, discriminator)
        (loss.loss + discriminator_loss).backward()
        optimizer.step(), discriminator_optimizer.step()

    The encoder's loss is the non-saturating one. A learned prior is trained against the discriminator as well, by
    E[-ln(1 - D(y))].

    Args:
        posterior, prior, log_likelihood: as for `elbo`.
        discriminator: maps z [N, D] to log-odds [N], as `Discriminator` does.
        penalty: lambda, a number or a tensor with one value.
        eps, prior_samples: as for `wae_mmd`.

    Returns:
        (Loss(loss, terms), discriminator_loss): terms are reconstruction, kl (for the log only), adversarial,
        discriminator and accuracy (the share of draws that the discriminator classifies right: 1/2 at equilibrium).

    Raises:
        TypeError: discriminator is not an nn.Module. ValueError: its output is not one number per draw; as `wae_mmd`.

    Source: Makhzani et al. 2016, "Adversarial Autoencoders", arXiv:1511.05644, section 2; Goodfellow et al. 2014,
    arXiv:1406.2661, section 3 (the non-saturating loss).

    >>> import torch, fastkl
    >>> q = fastkl.DiagonalNormal(torch.randn(64, 2, requires_grad=True), torch.zeros(64, 2))
    >>> discriminator = fastkl.objectives.Discriminator(2)
    >>> (loss, terms), own = fastkl.objectives.aae(q, None, lambda z: z.sum(-1), discriminator)
    >>> (loss + own).backward()
    """
    check(posterior, prior, log_likelihood)
    if not isinstance(discriminator, nn.Module):
        raise TypeError(f"discriminator must be a torch.nn.Module, got {type(discriminator).__name__}")
    penalty = check_weight("penalty", penalty)
    z = draws(posterior, 1, eps)
    reconstruction = reconstruction_of(posterior, log_likelihood, z)[0]
    with torch.no_grad():
        kl = sampled_kl(posterior, prior, z)
    rows, target = flat(posterior, z).flatten(0, -2), prior_draws(posterior, prior, prior_samples)
    frozen = {name: tensor.detach() for name, tensor in discriminator.named_parameters()}
    adversarial = softplus(-_odds(discriminator, rows, frozen)).mean()
    if target.requires_grad:
        adversarial = adversarial + softplus(_odds(discriminator, target, frozen)).mean()
    of_prior, of_latents = _odds(discriminator, target.detach()), _odds(discriminator, rows.detach())
    own = softplus(-of_prior).mean() + softplus(of_latents).mean()
    right = torch.cat([of_prior > 0, of_latents < 0]).to(own.dtype)
    loss = penalty * adversarial - reconstruction.mean()
    terms = {"adversarial": adversarial, "discriminator": own, "accuracy": right}
    return made_of(loss, reconstruction=reconstruction, kl=kl, **terms), own


def _odds(discriminator: nn.Module, z: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
    out = discriminator(z) if parameters is None else torch.func.functional_call(discriminator, parameters, (z,))
    if not isinstance(out, Tensor) or out.numel() != z.shape[0]:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"discriminator must return one number for each of {z.shape[0]} draws, got {got}")
    return out.reshape(-1).to(torch.promote_types(out.dtype, torch.float32))
