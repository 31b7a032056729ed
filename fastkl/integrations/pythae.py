"""fastkl inside Pythae: the losses of its autoencoders.

    fastkl.integrations.pythae.enable()      # until disable(), or for a block: with pythae.enable():

| model | computed by fastkl |
|---|---|
| `VAE`, `BetaVAE` | the KL |
| `VAMP` | the density of its prior |
| `IWAE`, `CIWAE`, `MIWAE`, `PIWAE` | the importance-weighted bounds |
| `WAE_MMD`, `INFOVAE_MMD` | the MMD, and the KL |
| `BetaTCVAE` | the decomposition of the KL |

Existing models change with their class. Where losses differ, those of Pythae are wrong:

- `MIWAE` and `PIWAE` normalise their importance weights over the repetitions instead of the samples: with one
  repetition all weights are 1, and the loss is that of the ELBO.
- `IWAE`'s loss is the average of ln w under the weights, not the bound. The gradient is the same, but the reported loss
  is too low.
- `BetaTCVAE` with `use_mss` gives the weight of each datum's own posterior to the first posterior of the batch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkl.integrations import distributions
from fastkl.integrations._switch import Attribute, Layer, Switch, check_method, find
from fastkl.ops.importance.iwae import iwae
from fastkl.ops.mixture.gmm_log_prob import gmm_log_prob
from fastkl.ops.normal.kl_normal import kl_normal
from fastkl.ops.pairs.mmd import mmd
from fastkl.ops.pairs.total_correlation import total_correlation
from fastkl.reference import compute_dtype

TESTED = "0.1.2"


def reconstruction_loss(model: Any, recon_x: Tensor, x: Tensor, samples: Sequence[int] = ()) -> Tensor:
    """-ln p(x | z) by the model's configuration, up to a constant: [N, *samples]. Data may be flat or not."""
    recon_x = recon_x.reshape(len(x), *samples, -1)
    x = x.reshape(len(x), *[1] * len(samples), -1).expand_as(recon_x)
    dtype = compute_dtype(recon_x, x)  # a sum in bfloat16 is rounded to whole nats
    if model.model_config.reconstruction_loss == "bce":
        return torch.nn.functional.binary_cross_entropy(recon_x, x, reduction="none").sum(-1, dtype=dtype)
    return 0.5 * torch.nn.functional.mse_loss(recon_x, x, reduction="none").sum(-1, dtype=dtype)


def kl_of(mu: Tensor, log_var: Tensor) -> Tensor:
    """KL to N(0, I) in nats, [N]."""
    if distributions.is_small(mu.numel(), distributions.SMALL_NORMAL, mu, log_var):
        return 0.5 * (torch.expm1(log_var) - log_var + mu * mu).sum(-1)
    return kl_normal(mu, log_var, event_ndim=1)


def vae(self, recon_x, x, mu, log_var, z):
    recon_loss, kl = reconstruction_loss(self, recon_x, x), kl_of(mu, log_var)
    return (recon_loss + kl).mean(0), recon_loss.mean(0), kl.mean(0)


def beta_vae(self, recon_x, x, mu, log_var, z):
    recon_loss, kl = reconstruction_loss(self, recon_x, x), kl_of(mu, log_var)
    return (recon_loss + self.beta * kl).mean(0), recon_loss.mean(0), kl.mean(0)


def vamp_log_p_z(self, z):
    """ln p(z) without -D/2 ln(2 pi), which Pythae leaves out of ln q(z | x) as well."""
    count = self.number_components
    x = self.pseudo_inputs(self.idle_input.to(z.device)).reshape((count, *self.model_config.input_dim))
    encoded = self.encoder(x)
    means, log_vars = encoded.embedding, encoded.log_covariance
    if distributions.is_small(z.numel() * count, distributions.SMALL_MIXTURE, z, means, log_vars):
        standard = (z.unsqueeze(1) - means) * torch.exp(-0.5 * log_vars)
        log_density = -0.5 * ((standard * standard).sum(-1) + log_vars.sum(-1))
        return torch.logsumexp(log_density, 1) - math.log(count)
    constant = 0.5 * z.shape[-1] * math.log(2 * math.pi)
    return gmm_log_prob(z, z.new_zeros(count), means, log_vars) + constant


def log_weights(self, recon_x, x, mu, log_var, z) -> tuple[Tensor, Tensor, Tensor]:
    """ln w = ln p(x | z) + ln p(z) - ln q(z | x) and its parts, each [N, *samples]."""
    recon_loss = reconstruction_loss(self, recon_x, x, z.shape[1:-1])
    mu, log_var, z = (tensor.to(compute_dtype(tensor)) for tensor in (mu, log_var, z))
    log_q = -0.5 * (log_var + (z - mu).square() * torch.exp(-log_var)).sum(-1)
    kl = log_q + 0.5 * z.square().sum(-1)
    return -(recon_loss + kl), recon_loss, kl


def iwae_loss(self, recon_x, x, mu, log_var, z):
    log_w, recon_loss, kl = log_weights(self, recon_x, x, mu, log_var, z)
    return -iwae(log_w, 1).mean(), recon_loss.mean(), kl.mean()


def ciwae_loss(self, recon_x, x, mu, log_var, z):
    log_w, recon_loss, kl = log_weights(self, recon_x, x, mu, log_var, z)
    loss = -(self.beta * log_w.mean(1) + (1 - self.beta) * iwae(log_w, 1))
    return loss.mean(0), recon_loss.mean(0), kl.mean(0)


def miwae_loss(self, recon_x, x, mu, log_var, z):
    log_w, recon_loss, kl = log_weights(self, recon_x, x, mu, log_var, z)
    return -iwae(log_w, 2).mean(), recon_loss.mean(0), kl.mean(0)


def piwae_loss(self, recon_x, x, mu, log_var, z):
    log_w, recon_loss, kl = log_weights(self, recon_x, x, mu, log_var, z)
    return -iwae(log_w, 2).mean(), -iwae(log_w.flatten(1), 1).mean(), recon_loss.mean(0), kl.mean(0)


def discrepancy(self, z: Tensor, z_prior: Tensor) -> Tensor:
    """The unbiased squared MMD with the kernel of the model's configuration."""
    config = self.model_config
    scales = [1.0] if self.kernel_choice == "rbf" else self.scales
    width = config.kernel_bandwidth**2 * config.latent_dim / z.shape[-1]
    return mmd(z, z_prior, kernel=self.kernel_choice, scales=[width * scale for scale in scales])


def wae(self, recon_x, x, z, z_prior):
    square = (recon_x.reshape(len(x), -1) - x.reshape(len(x), -1)).square()
    recon_loss = self.reconstruction_loss_scale * square.sum(-1, dtype=compute_dtype(square)).mean(0)
    distance = discrepancy(self, z, z_prior)
    return recon_loss + self.model_config.reg_weight * distance, recon_loss, distance


def info_vae(self, recon_x, x, z, z_prior, mu, log_var):
    recon_loss, kl = reconstruction_loss(self, recon_x, x).mean(0), kl_of(mu, log_var).mean(0)
    distance = discrepancy(self, z, z_prior)
    loss = recon_loss + (1 - self.alpha) * kl + (self.alpha + self.lbd - 1) * distance
    return loss, recon_loss, kl, distance


def beta_tc_vae(stock):
    def loss_function(self, recon_x, x, mu, log_var, z, dataset_size):
        if not self.use_mss and not 1 < len(z) <= dataset_size:  # an epoch's last batch may be one datum
            return stock(self, recon_x, x, mu, log_var, z, dataset_size)
        recon_loss = reconstruction_loss(self, recon_x, x).mean(0)
        weights = "mss" if self.use_mss else "mws"
        parts = total_correlation(z, mu, log_var, dataset_size, weights=weights)
        reg_loss = sum(weight * part.mean(0) for weight, part in zip((self.alpha, self.beta, self.gamma), parts))
        return recon_loss + reg_loss, recon_loss, reg_loss

    return loss_function


USUAL = ("self", "recon_x", "x", "mu", "log_var", "z")
# Class -> (method, its parameters, fastkl's, or a function from Pythae's to it).
METHODS = {
    "VAE": ("loss_function", USUAL, vae),
    "BetaVAE": ("loss_function", USUAL, beta_vae),
    "VAMP": ("_log_p_z", ("self", "z"), vamp_log_p_z),
    "IWAE": ("loss_function", USUAL, iwae_loss),
    "CIWAE": ("loss_function", USUAL, ciwae_loss),
    "MIWAE": ("loss_function", USUAL, miwae_loss),
    "PIWAE": ("loss_function", USUAL, piwae_loss),
    "WAE_MMD": ("loss_function", ("self", "recon_x", "x", "z", "z_prior"), wae),
    "INFOVAE_MMD": ("loss_function", ("self", "recon_x", "x", "z", "z_prior", "mu", "log_var"), info_vae),
    "BetaTCVAE": ("loss_function", (*USUAL, "dataset_size"), beta_tc_vae),
}


def changes() -> list[Attribute]:
    version = f"Pythae {importlib.metadata.version('pythae')} (tested with {TESTED})"
    found = []
    for name, (method, parameters, new) in METHODS.items():
        model = find("pythae.models", name, version)
        check_method(model, method, parameters, version)
        found.append(Attribute(model, method, new(getattr(model, method)) if new is beta_tc_vae else new))
    return found


_switch = Switch(changes)


def enable() -> Layer:
    """Use fastkl in Pythae's models until `disable()`; as a context manager, until the block ends.

    Raises:
        ImportError: Pythae is not installed.
        UnsupportedVersion: a class has another method than fastkl expects. Nothing was replaced.
    """
    return _switch.enable()


def disable() -> None:
    """Undo the last `enable()` completely."""
    _switch.disable()
