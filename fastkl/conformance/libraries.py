"""Each library's functions for the questions of the cases.

A library is imported only when it is checked. A function takes the case's inputs as tensors.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Answers = dict[str, Callable[..., Any]]


def by_std(kl_of_std: Callable[..., Any]) -> Callable[..., Any]:
    """The answer to "kl" for a library that takes standard deviations. Not in 16 bits, where this conversion would
    cause the error."""

    def kl(mu: Tensor, logvar: Tensor) -> Any:
        return NotImplemented if logvar.itemsize == 2 else kl_of_std(mu, (0.5 * logvar).exp())

    return kl


def mean_of(kl: Callable[..., Any]) -> Callable[..., Any]:
    """The answer to "mean kl": the loss of a training step, as users of the library write it."""

    def mean_kl(mu: Tensor, logvar: Tensor) -> Any:
        found = kl(mu, logvar)
        return found if found is NotImplemented else found.mean()

    return mean_kl


def fastkl_answers() -> Answers:
    import fastkl

    def mixture(z: Tensor, weights: Tensor, means: Tensor, stds: Tensor) -> Tensor:
        return fastkl.gmm_log_prob(z, weights.log(), means, stds, scale="std")

    def transport(x: Tensor, y: Tensor, blur: float) -> Tensor:
        return fastkl.sinkhorn_divergence(x, y, blur, scaling=0.9)

    return {
        "kl": fastkl.kl_normal,
        "mean kl": mean_of(fastkl.kl_normal),
        "kl of std": lambda mu, std: fastkl.kl_normal(mu, std, scale="std"),
        "kl of two": fastkl.kl_normal,
        "mixture": mixture,
        "iwae": lambda log_w: fastkl.iwae(log_w, 2),
        "decomposition": lambda *inputs: torch.stack([part.mean() for part in fastkl.total_correlation(*inputs)]),
        "choice": lambda logits, tau: fastkl.gumbel_softmax(logits, tau).max(-1).values,
        "mmd": lambda x, y: fastkl.mmd(x, y, scales=[1.0]),
        "transport": transport,
        "one dimension": lambda x, y: fastkl.sliced_wasserstein(x, y, 10),
    }


def torch_answers(distributions: Any = torch.distributions, kl_divergence: Any = None) -> Answers:
    d, kl_of = distributions, kl_divergence or torch.distributions.kl_divergence

    def independent(mu: Tensor, std: Tensor) -> Any:
        return d.Independent(d.Normal(mu, std), mu.dim() - 1)

    def kl_of_std(mu: Tensor, std: Tensor) -> Tensor:
        return kl_of(independent(mu, std), independent(torch.zeros_like(mu), torch.ones_like(std)))

    def kl_of_two(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
        return kl_of(independent(mu, (0.5 * logvar).exp()), independent(prior_mu, (0.5 * prior_logvar).exp()))

    def mixture(z: Tensor, weights: Tensor, means: Tensor, stds: Tensor) -> Tensor:
        return d.MixtureSameFamily(d.Categorical(probs=weights), d.Independent(d.Normal(means, stds), 1)).log_prob(z)

    kl = by_std(kl_of_std)
    answers: Answers = {
        "kl": kl,
        "mean kl": mean_of(kl),
        "kl of std": kl_of_std,
        "kl of two": kl_of_two,
        "mixture": mixture,
    }
    if d is torch.distributions:
        choice = torch.nn.functional.gumbel_softmax
        answers["choice"] = lambda logits, tau: choice(logits, tau).max(-1).values
    return answers


def diffusers_answers() -> Answers:
    posterior = importlib.import_module("diffusers.models.autoencoders.vae").DiagonalGaussianDistribution

    oobleck = importlib.import_module("diffusers.models.autoencoders.autoencoder_oobleck")

    def of(mu: Tensor, logvar: Tensor) -> Any:
        """Treat vectors as images of one pixel."""
        head = torch.cat([mu, logvar], 1)
        return posterior(head if mu.dim() > 2 else head[..., None, None])

    def kl(mu: Tensor, logvar: Tensor) -> Any:
        return NotImplemented if mu.dim() == 3 else of(mu, logvar).kl()  # made for images, but also used for video

    def kl_of_two(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Any:
        clamped = min(logvar.min(), prior_logvar.min()) < -30
        return NotImplemented if clamped else of(mu, logvar).kl(of(prior_mu, prior_logvar))

    def kl_of_std(mu: Tensor, std: Tensor) -> Any:
        """The KL of the audio autoencoder, with std = softplus + 1e-4, for one datum of one sample."""
        if std.itemsize == 2 or std.min() < 1e-3:
            return NotImplemented
        head = torch.cat([mu, (std - 1e-4).expm1().log()], 1)[..., None]
        return oobleck.OobleckDiagonalGaussianDistribution(head).kl()[None]

    return {"kl": kl, "mean kl": mean_of(kl), "kl of two": kl_of_two, "kl of std": kl_of_std}


def pythae_answers() -> Answers:
    models = importlib.import_module("pythae.models")
    mse = SimpleNamespace(reconstruction_loss="mse")

    def kl(mu: Tensor, logvar: Tensor) -> Any:
        if mu.dim() > 2:
            return NotImplemented  # its latents are vectors
        nothing = mu.new_zeros(1, 1)
        losses = [
            models.VAE.loss_function(SimpleNamespace(model_config=mse), nothing, nothing, m[None], v[None], m[None])[2]
            for m, v in zip(mu, logvar)
        ]
        return torch.stack(losses)

    def iwae(log_w: Tensor) -> Tensor:
        """The bound by MIWAE, for a decoder with these ln w: minus half the squared difference, at z = 0."""
        losses = []
        for repetitions in log_w[0]:
            shape, top = (1, 1, len(repetitions)), repetitions.max()
            recon, zero = (2 * (top - repetitions)).sqrt().reshape(*shape, 1), log_w.new_zeros(*shape, 1)
            model = SimpleNamespace(model_config=mse, gradient_n_estimates=1, n_samples=len(repetitions))
            loss = models.MIWAE.loss_function(model, recon, log_w.new_zeros(1, 1), zero, zero, zero)[0]
            losses.append(top - loss)
        return torch.stack(losses)[None]

    def decomposition(z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int) -> Tensor:
        nothing, parts = z.new_zeros(len(z), 1), []
        for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
            alpha, beta, gamma = weights
            config = models.BetaTCVAEConfig((1,), z.shape[1], alpha=alpha, beta=beta, gamma=gamma, use_mss=True)
            model = models.BetaTCVAE(config)
            parts.append(model.loss_function(nothing, nothing, mu, logvar, z, dataset_size)[2])
        return torch.stack(parts)

    def mmd(x: Tensor, y: Tensor) -> Tensor:
        config = SimpleNamespace(latent_dim=x.shape[1], kernel_bandwidth=1.0, reg_weight=1.0)
        model = SimpleNamespace(model_config=config, kernel_choice="imq", scales=[1.0], reconstruction_loss_scale=0.0)
        model.imq_kernel = lambda a, b: models.WAE_MMD.imq_kernel(model, a, b)
        return models.WAE_MMD.loss_function(model, x, x, x, y)[2]

    return {"kl": kl, "iwae": iwae, "decomposition": decomposition, "mmd": mmd}


def pyro_answers() -> Answers:
    return torch_answers(importlib.import_module("pyro.distributions"))


def scvi_answers() -> Answers:
    base = importlib.import_module("scvi.module.base")
    normal = torch.distributions.Normal

    def kl_of_std(mu: Tensor, std: Tensor) -> Any:
        return NotImplemented if mu.dim() > 2 else base.GaussianPrior().kl(normal(mu, std))  # its latents are vectors

    def mixture(z: Tensor, weights: Tensor, means: Tensor, stds: Tensor) -> Any:
        if stds.min() < 1e-3:
            return NotImplemented  # its smallest standard deviation is 1e-4
        prior = base.MogPrior(len(weights), means.shape[1])
        with torch.no_grad():
            prior.prior_logits.copy_(weights.log())
            prior.prior_means.copy_(means)
            prior.prior_log_scales.copy_((stds - 1e-4).log())  # the library adds 1e-4 back
        return prior.get_prior(z).log_prob(z)

    return {"kl": by_std(kl_of_std), "kl of std": kl_of_std, "mixture": mixture}


def zuko_answers() -> Answers:
    distributions = importlib.import_module("zuko.distributions")

    def of(mu: Tensor, std: Tensor) -> Any:
        return distributions.DiagNormal(mu, std, ndims=mu.dim() - 1)

    def kl_of_std(mu: Tensor, std: Tensor) -> Tensor:
        return torch.distributions.kl_divergence(of(mu, std), of(torch.zeros_like(mu), torch.ones_like(std)))

    def kl_of_two(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
        first, second = of(mu, (0.5 * logvar).exp()), of(prior_mu, (0.5 * prior_logvar).exp())
        return torch.distributions.kl_divergence(first, second)

    def mixture(z: Tensor, weights: Tensor, means: Tensor, stds: Tensor) -> Tensor:
        return distributions.Mixture(of(means, stds), weights.log()).log_prob(z)

    kl = by_std(kl_of_std)
    return {
        "kl": kl, "mean kl": mean_of(kl), "kl of std": kl_of_std, "kl of two": kl_of_two, "mixture": mixture,
    }  # fmt: skip


def geomloss_answers() -> Answers:
    loss = importlib.import_module("geomloss").SamplesLoss
    return {"transport": lambda x, y, blur: loss("sinkhorn", p=2, blur=blur, scaling=0.9)(x, y)}


def pot_answers() -> Answers:
    ot = importlib.import_module("ot")
    return {
        "one dimension": lambda x, y: ot.sliced_wasserstein_distance(x, y, n_projections=10) ** 2,
        "transport": lambda x, y, blur: 0.5 * ot.emd2_1d(x[:, 0], y[:, 0]),
    }


# Name -> (the package it needs, its answers).
LIBRARIES: dict[str, tuple[str, Callable[[], Answers]]] = {
    "fastkl": ("fastkl", fastkl_answers),
    "torch.distributions": ("torch", torch_answers),
    "diffusers": ("diffusers", diffusers_answers),
    "pythae": ("pythae", pythae_answers),
    "pyro": ("pyro-ppl", pyro_answers),
    "scvi": ("scvi-tools", scvi_answers),
    "zuko": ("zuko", zuko_answers),
    "geomloss": ("geomloss", geomloss_answers),
    "pot": ("POT", pot_answers),
}
