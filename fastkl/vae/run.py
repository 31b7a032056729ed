"""A run: everything that training needs and a checkpoint holds, how it starts, and how it is saved and restored."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkl.priors import Prior
from fastkl.vae import checkpoint, prior, streams
from fastkl.vae.data import Data
from fastkl.vae.errors import UserError
from fastkl.vae.guard import Guard
from fastkl.vae.model import VAE, build
from fastkl.vae.objective import Objective
from fastkl.vae.parallel import Ranks
from fastkl.vae.settings import Settings
from fastkl.vae.watch import Watch


@dataclass
class Run:
    """Everything that a checkpoint holds, and what can be made again from it."""

    settings: Settings
    data: Data
    ranks: Ranks
    device: torch.device
    folder: Path
    vae: VAE
    objective: nn.Module  # an Objective, wrapped where there are several processes
    optimizers: dict[str, torch.optim.Optimizer]  # of the autoencoder and, for aae, of the discriminator
    step: int = 0
    seconds: float = 0.0  # of training, over all the processes that went on with this run
    # Sums since the last point of the curves: of the objective's terms, and of the steps.
    window: dict[str, float] = field(default_factory=dict)
    watch: Watch = field(init=False)
    guard: Guard = field(init=False)
    # "train", and "test" or "validation": rows of step, ELBO, KL, reconstruction; "terms/NAME" of step and each other
    # term of the objective; of a mixture step, lower bound, KL, upper bound, used components, and with --kl relaxed the
    # temperature.
    history: dict[str, list[list[float]]] = field(default_factory=lambda: {"train": []})

    def __post_init__(self) -> None:
        self.history.setdefault(self.data.watched_name, [])
        self.watch = Watch(self.settings, self.ranks)
        self.guard = Guard(self.settings.bad_steps, self.ranks, self.folder / checkpoint.NAME)

    @property
    def batch_size(self) -> int:
        """Of all processes together."""
        return self.settings.batch_size * self.ranks.size

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data.train) // self.batch_size

    @property
    def total_steps(self) -> int:
        return self.settings.steps or self.settings.epochs * self.steps_per_epoch

    @property
    def ended(self) -> bool:
        return self.step == self.total_steps

    @property
    def prior(self) -> Prior | None:
        """The learned prior once it has begun; before, and in a run without one, None, which is N(0, I)."""
        return self.vae.prior if self.step >= self.settings.warm_up else None


def start(settings: Settings, data: Data, ranks: Ranks, folder: Path) -> Run:
    """A run at step 0."""
    if settings.batch_size * ranks.size > len(data.train):
        wanted = f"--batch-size {settings.batch_size} on {ranks.size} processes"
        raise UserError(f"{wanted} is more than the {len(data.train)} training data")
    device = choose_device(settings.device, ranks)
    torch.manual_seed(streams.seed_for(settings.seed, "weights"))
    vae = build(settings, data.shape, data.likelihood)
    vae.prior = prior.build(settings, vae, data)
    vae = vae.to(device)
    learned = vae.prior is not None
    objective = Objective(vae, settings, len(data.train), ranks.group).to(device)
    optimizers = make_optimizers(settings, vae, objective.discriminator)
    # During the warm-up the learned prior has no part in the loss.
    run = Run(settings, data, ranks, device, folder, vae, ranks.wrap(objective, partly=learned), optimizers)
    if learned and 0 < run.total_steps <= settings.warm_up:
        wanted = f"--warm-up {settings.warm_up} leaves none of the {run.total_steps} steps to --prior {settings.prior}"
        raise UserError(f"{wanted}: choose fewer, or train for longer")
    return run


def make_optimizers(
    settings: Settings, vae: VAE, discriminator: nn.Module | None = None
) -> dict[str, torch.optim.Optimizer]:
    rate, decay = settings.learning_rate, settings.weight_decay
    groups: list[dict[str, Any]] = [{"params": list(vae.parameters())}]
    if vae.prior is not None:
        own = list(vae.prior.parameters())
        known = set(own)
        groups[0]["params"] = [parameter for parameter in groups[0]["params"] if parameter not in known]
        # No decay: it would pull means and log-variances to 0, which is not less of anything.
        groups.append({"params": own, "weight_decay": 0.0, "rate": settings.prior_learning_rate or rate})
    optimizers: dict[str, torch.optim.Optimizer] = {
        "autoencoder": torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=True)
    }
    if discriminator is not None:
        group = {"params": list(discriminator.parameters()), "rate": settings.discriminator_learning_rate or rate}
        # The first moment's memory is short, as for the adversarial networks of Radford et al. 2016.
        optimizers["discriminator"] = torch.optim.AdamW([group], lr=rate, betas=(0.5, 0.999), weight_decay=0.0)
    return optimizers


def choose_device(name: str, ranks: Ranks) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine, or this build of torch, has no CUDA device")
    if name != "cuda":
        return torch.device(name)
    if ranks.local >= (count := torch.cuda.device_count()):
        raise UserError(f"process {ranks.local + 1} of this machine has no CUDA device of its own: there are {count}")
    return torch.device("cuda", ranks.local)


def discriminator_of(run: Run) -> nn.Module | None:
    objective: Any = getattr(run.objective, "module", run.objective)  # DistributedDataParallel's own
    return objective.discriminator


def save(run: Run, seen: dict[str, Any]) -> None:
    """The generators' states are missing on purpose: they are functions of the step (streams.py)."""
    for parameter in run.vae.parameters():
        if not parameter.isfinite().all():
            raise UserError(f"the weights are no longer finite at step {run.step}; {where_to_go(run)}")
    discriminator = discriminator_of(run)
    checkpoint.save(
        run.folder,
        {
            "settings": asdict(run.settings),
            "fingerprint": run.data.fingerprint,
            "ranks": run.ranks.size,
            "threads": torch.get_num_threads(),
            "step": run.step,
            "model": run.vae.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in run.optimizers.items()},
            "discriminator": {} if discriminator is None else discriminator.state_dict(),
            "seconds": run.seconds,
            "window": run.window,
            "watch": seen,
            "guard": run.guard.state_dict(),
            "history": run.history,
        },
    )


def restore(run: Run, state: dict[str, Any]) -> None:
    """Put a checkpoint's state into a run that was started with its settings."""
    if state["fingerprint"] != run.data.fingerprint:
        raise UserError(f"--data {run.settings.data} is not the data that this run began with")
    if state["ranks"] != run.ranks.size:
        raise UserError(
            f"this run began with {state['ranks']} processes, now there are {run.ranks.size}: start as many"
        )
    try:
        run.vae.load_state_dict(state["model"])
        for name, optimizer in run.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if (discriminator := discriminator_of(run)) is not None:
            discriminator.load_state_dict(state["discriminator"])
        run.window = dict(state["window"])
        run.watch.load_state_dict(state["watch"], run.ranks.main, run.device)
        run.guard.load_state_dict(state["guard"])
        run.step, run.seconds, run.history = int(state["step"]), float(state["seconds"]), state["history"]
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the checkpoint does not fit its own settings ({str(error).splitlines()[0]})") from None


def where_to_go(run: Run) -> str:
    written = (run.folder / checkpoint.NAME).exists()
    return (
        f"try a smaller --learning-rate ({'the checkpoint is of an earlier step' if written else 'no checkpoint yet'})"
    )
