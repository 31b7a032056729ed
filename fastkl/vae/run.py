"""A run: its settings, data, model and optimizers, and the function that starts it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastkl.priors import Prior
from fastkl.vae import checkpoint, parallel, prior, streams
from fastkl.vae.data import Data
from fastkl.vae.data.reader import Reader
from fastkl.vae.data.stored import Stored
from fastkl.vae.errors import UserError
from fastkl.vae.guard import Guard
from fastkl.vae.model import VAE, build
from fastkl.vae.objective import Objective
from fastkl.vae.parallel import Ranks
from fastkl.vae.settings import Settings
from fastkl.vae.sharded import Shards
from fastkl.vae.watch import Watch


@dataclass(frozen=True)
class Own:
    """The data, model and objective of a caller in Python, which the settings cannot name."""

    data: Any = None  # arrays, see data.load
    model: VAE | None = None
    objective: Callable[..., Any] | None = None  # (posterior, prior, log_likelihood) -> fastkl.objectives.Loss


NOTHING = Own()


@dataclass
class Run:
    """A run and its state. A checkpoint holds or determines all of it."""

    settings: Settings
    data: Data
    ranks: Ranks
    device: torch.device
    folder: Path
    vae: VAE
    objective: nn.Module  # an Objective, in DistributedDataParallel or sharded if there are several processes
    optimizers: dict[str, torch.optim.Optimizer]  # of the autoencoder and of the discriminator, if any
    average: AveragedModel | None = None  # of the weights over the steps, with --ema
    # In a sharded run: a model for whole weights on the main process, and the writer of checkpoints.
    whole: VAE | None = None
    shards: Shards | None = None
    # With --patience: step, ELBO and weights ("model") of the best point of the curve of held-out data, and the number
    # of points since. Processes other than the main one know only the number.
    best: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0  # training time, summed over all starts of this run
    # Sums since the last point of the curves: the objective's terms, and the number of steps.
    window: dict[str, float] = field(default_factory=dict)
    watch: Watch = field(init=False)
    guard: Guard = field(init=False)
    reader: Reader = field(init=False)
    # Rows by curve. "train", and "test" or "validation": step, ELBO, KL, reconstruction. "terms/NAME": step, another
    # term of the objective. "monitors/NAME": step, figure. "mixture": step, lower bound, KL, upper bound, used
    # components, and with --kl relaxed the temperature.
    history: dict[str, list[list[float]]] = field(default_factory=lambda: {"train": []})

    def __post_init__(self) -> None:
        self.history.setdefault(self.data.watched_name, [])
        self.watch = Watch(self.settings, self.ranks)
        self.guard = Guard(self.settings.bad_steps, self.ranks, self.folder / checkpoint.NAME)
        self.reader = Reader(self)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.settings.precision == "fp16")

    @property
    def batch_size(self) -> int:
        """The number of data in a step, over all batches and processes."""
        return self.settings.data_per_step(self.ranks.size)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data.train) // self.batch_size

    @property
    def total_steps(self) -> int:
        return self.settings.steps or self.settings.epochs * self.steps_per_epoch

    @property
    def ended(self) -> bool:
        return self.step == self.total_steps or self.best.get("points", 0) >= self.settings.patience > 0

    @property
    def prior(self) -> Prior | None:
        """The learned prior, or None for N(0, I): during the warm-up and in a run without a learned prior."""
        return self.vae.prior if self.step >= self.settings.warm_up else None

    @property
    def adversarial(self) -> bool:
        """Whether the discriminator of patches takes part in the next step."""
        return self.settings.adversarial and self.step >= self.settings.adversarial_start

    def autocast(self) -> torch.autocast:
        """The context that sets the networks' dtype. fastkl's ops always compute in float32."""
        dtype = dtype_of(self.settings)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the model has the average of the weights, if the run keeps one.

        In a sharded run it is a collective call, and the model is whole on the main process and not usable elsewhere.
        """
        if self.whole is not None:
            kept = self.average is not None and bool(self.average.n_averaged)
            with self.gathered(self.average.module if kept else self.vae):  # type: ignore[union-attr]
                yield
            return
        self._exchange_weights()
        try:
            yield
        finally:
            self._exchange_weights()

    @contextlib.contextmanager
    def gathered(self, source: nn.Module) -> Iterator[None]:
        """A context in which the model has the whole weights of `source`, which may be sharded."""
        if self.whole is None:
            yield
            return
        state, own = parallel.whole_state(source), self.vae
        if self.ranks.main:
            self.whole.load_state_dict(state)
            self.whole.to(self.device)
        self.vae = self.whole
        try:
            yield
        finally:
            self.vae = own
            self.whole.cpu()

    @contextlib.contextmanager
    def reported(self) -> Iterator[None]:
        """A context in which the model has the weights of the report: the best if the run keeps them, else those of
        `averaged`."""
        if not self.ranks.broadcast("model" in self.best):
            with self.averaged():
                yield
            return
        with self.gathered(self.vae):
            if not self.ranks.main:  # only the main process writes the report
                yield
                return
            last = {name: value.clone() for name, value in self.vae.state_dict().items()}
            self.vae.load_state_dict(self.best["model"])
            try:
                yield
            finally:
                self.vae.load_state_dict(last)

    def _exchange_weights(self) -> None:
        if self.average is not None and self.average.n_averaged:
            for own, mean in zip(self.vae.parameters(), self.average.module.parameters(), strict=True):
                own.data, mean.data = mean.data, own.data


def start(settings: Settings, data: Data, ranks: Ranks, folder: Path, own: Own = NOTHING) -> Run:
    """A run at step 0.

    Raises:
        UserError: the settings do not fit the data, the processes or the device.
    """
    size = settings.data_per_step(ranks.size)
    name = "--global-batch-size" if settings.global_batch_size else "--batch-size"
    several = f" with --accumulate {settings.accumulate}" if settings.accumulate > 1 else ""
    processes = f"{ranks.size} process{'' if ranks.size == 1 else 'es'}"
    requested = f"{name} {settings.global_batch_size or settings.batch_size}{several} on {processes}"
    if size > len(data.train):
        raise UserError(f"{requested} is more than the {len(data.train)} training data: choose a smaller one")
    if settings.workers and not isinstance(data.train, Stored):
        raise UserError(
            "--workers needs data that are read while the model trains, but these are in memory: leave it out, or add "
            "--stream, --crop or --flip"
        )
    if size < ranks.size * settings.accumulate:
        raise UserError(f"{requested} leaves a process without data: choose a larger one")
    device = choose_device(settings.device, ranks)
    torch.manual_seed(streams.seed_for(settings.seed, "weights"))
    vae = build(settings, data.shape, data.likelihood, own.model, data.scaling)
    vae.prior = prior.build(settings, vae, data)
    sharded, learned = settings.parallel == "fsdp" and ranks.size > 1, vae.prior is not None
    whole = vae if sharded else None  # with a model of the caller's: the caller's own, which so remains usable
    vae = copy.deepcopy(vae) if sharded else vae.to(device)  # a sharded model moves layer by layer, below
    objective = Objective(vae, settings, len(data.train), ranks.group, own.objective, device)
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(settings.ema)) if settings.ema else None
    wrapped: nn.Module = objective
    if sharded:
        dtype = dtype_of(settings)
        ranks.shard(objective, [vae.encoder, vae.decoder], device, dtype)
        if average is not None:
            averaged: Any = average.module
            ranks.shard(averaged, [averaged.encoder, averaged.decoder], device, dtype)
            average.to(device)
    else:
        # The loss uses a learned prior's parameters only after the warm-up, and those of the discriminator of patches
        # only from --adversarial-start on.
        wrapped = ranks.wrap(objective.to(device), partly=learned or settings.adversarial_start > 0)
    optimizers = make_optimizers(settings, vae, objective.discriminator)
    if settings.compile:
        wrapped.compile()
    shards = Shards(folder, ranks) if sharded else None
    run = Run(settings, data, ranks, device, folder, vae, wrapped, optimizers, average, whole, shards)
    if learned and 0 < run.total_steps <= settings.warm_up:
        problem = f"--warm-up {settings.warm_up} leaves none of the {run.total_steps} steps to --prior {settings.prior}"
        raise UserError(f"{problem}: make it shorter, or train for longer")
    if settings.adversarial and 0 < run.total_steps <= settings.adversarial_start:
        problem = f"--adversarial-start {settings.adversarial_start} leaves none of the {run.total_steps} steps"
        raise UserError(f"{problem} to --adversarial: start earlier, or train for longer")
    return run


def dtype_of(settings: Settings) -> torch.dtype | None:
    """The dtype of the networks, or None for float32."""
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]


def make_optimizers(
    settings: Settings, vae: VAE, discriminator: nn.Module | None = None
) -> dict[str, torch.optim.Optimizer]:
    """The optimizers of the autoencoder with its prior, and of the discriminator, by name."""
    rate, decay = settings.learning_rate, settings.weight_decay
    groups: list[dict[str, Any]] = [{"params": list(vae.parameters())}]
    if vae.prior is not None:
        own = list(vae.prior.parameters())
        known = set(own)
        groups[0]["params"] = [parameter for parameter in groups[0]["params"] if parameter not in known]
        # No weight decay: 0 is an arbitrary value for means and log-variances, not a simpler model.
        groups.append({"params": own, "weight_decay": 0.0, "rate": settings.prior_learning_rate or rate})
    optimizers: dict[str, torch.optim.Optimizer] = {
        "autoencoder": torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=True)
    }
    if discriminator is not None:
        group = {"params": list(discriminator.parameters()), "rate": settings.discriminator_learning_rate or rate}
        # A smaller beta1, as for the adversarial networks of Radford et al. 2016.
        optimizers["discriminator"] = torch.optim.AdamW([group], lr=rate, betas=(0.5, 0.999), weight_decay=0.0)
    return optimizers


def choose_device(name: str, ranks: Ranks) -> torch.device:
    """The device of this process. On CUDA it has an index, because the processes of a machine have one device each."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine, or this build of torch, has no CUDA device")
    if name != "cuda":
        return torch.device(name)
    if ranks.local >= (count := torch.cuda.device_count()):
        raise UserError(
            f"process {ranks.local + 1} of this machine has no CUDA device: there are {count}, and each process needs "
            "one; start fewer processes, or use --device cpu"
        )
    return torch.device("cuda", ranks.local)


def discriminator_of(run: Run) -> nn.Module | None:
    """The discriminator of aae or of image patches, if the run has one."""
    objective: Any = getattr(run.objective, "module", run.objective)  # DistributedDataParallel's own
    return objective.discriminator
