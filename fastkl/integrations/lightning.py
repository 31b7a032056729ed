"""fastkl inside Lightning: a module that trains a VAE, and a callback that watches for collapse.

    vae = fastkl.vae.model.build(...)  # or any module with posterior(x) and log_likelihood(z, x)
    module = fastkl.integrations.lightning.VAEModule(vae, prior=fastkl.priors.GaussianMixture(20, 16))
    lightning.Trainer(callbacks=[fastkl.integrations.lightning.CollapseMonitor()]).fit(module, loader)

There is nothing to enable, because Lightning itself has no losses.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from fastkl import monitors, objectives
from fastkl.distributions import DiagonalNormal

TESTED = "2.6.6"


class VAEModule(pl.LightningModule):
    """Minimise one of `fastkl.objectives` with AdamW.

    Args:
        vae: a module with `posterior(x)`, a `fastkl.DiagonalNormal`, and `log_likelihood(z, x)`, one value per datum.
        prior: one of `fastkl.priors`; None is N(0, I).
        objective: a function of (posterior, prior, log_likelihood, **options) that returns a `fastkl.objectives.Loss`.
        beta: the weight of the KL at a step, as a number or one of `fastkl.schedules`; None leaves it to the objective.
        learning_rate: the learning rate of AdamW.
        options: passed to the objective, such as `remedy=` or `num_samples=`.

    Logs every term of the objective, and the loss on validation data as "val_loss".
    """

    vae: Any
    beta: float | Callable[[int], float] | None

    def __init__(
        self, vae: nn.Module, prior: nn.Module | None = None, *,
        objective: Callable[..., objectives.Loss] = objectives.elbo,
        beta: float | Callable[[int], float] | None = None, learning_rate: float = 1e-3, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.vae, self.prior, self.objective = vae, prior, objective
        self.beta, self.learning_rate, self.options = beta, learning_rate, options

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], DiagonalNormal]:
        """(loss, its terms, the posteriors) of a batch: a tensor, or a tuple that begins with one."""
        x = batch[0] if isinstance(batch, (list, tuple)) else batch
        posterior, options = self.vae.posterior(x), dict(self.options)
        if self.beta is not None:
            options["beta"] = self.beta(self.global_step) if callable(self.beta) else self.beta
        loss, terms = self.objective(posterior, self.prior, lambda z: self.vae.log_likelihood(z, x), **options)
        return loss, terms, posterior

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        loss, terms, posterior = self.loss(batch)
        self.log_dict({"loss": loss, **terms})
        return {"loss": loss, "posterior": posterior.detach()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch)[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.0)


class CollapseMonitor(pl.Callback):
    """Log active units, KL and mutual information per epoch, and warn of posterior collapse, naming remedies.

    The module's `training_step` must return a dict with "posterior", a `fastkl.DiagonalNormal`.

    Args:
        grace: epochs without warnings, because at first every posterior equals the prior.

    Source: Burda et al. 2016, arXiv:1509.00519, appendix C (active units); see `fastkl.monitors`.
    """

    def __init__(self, *, grace: int = 5) -> None:
        self.grace = grace
        self.warned: set[str] = set()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        group = torch.distributed.group.WORLD if trainer.world_size > 1 else None
        self.units, self.kl = monitors.ActiveUnits(group=group), monitors.KLPerDimension(group=group)
        self.information, self.batches = monitors.MutualInformation(group=group), 0  # seen in this epoch

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        posterior = outputs.get("posterior") if isinstance(outputs, dict) else None
        if not isinstance(posterior, DiagonalNormal):
            found = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
            raise TypeError(f'training_step must return a dict with "posterior", a fastkl.DiagonalNormal, got {found}')
        for monitor in (self.units, self.kl):
            monitor.update(posterior)
        if self.batches % (trainer.log_every_n_steps or 50) == 0:  # expensive: compares all pairs of a batch
            self.information.update(posterior)
        self.batches += 1

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.batches == 0:  # resumed behind the epoch's last batch
            return
        self.batches = 0
        active, kl = self.units.count(), self.kl.compute().flatten().tolist()
        figures = {"active_units": float(active), "kl": math.fsum(kl)}
        figures["mutual_information"] = self.information.compute().item()
        module.log_dict(figures)
        for monitor in (self.units, self.kl, self.information):
            monitor.reset()
        if trainer.current_epoch < self.grace:
            return
        for line in monitors.diagnose(kl=figures["kl"], active_units=active, latent_units=len(kl)):
            kind = line.partition(" (")[0]
            if kind not in self.warned and trainer.is_global_zero:
                warnings.warn(line, stacklevel=2)
            self.warned.add(kind)
