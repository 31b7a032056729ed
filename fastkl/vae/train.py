"""The training loop, written to be read: `ELBO.forward` is the loss, `train` the loop, the rest is what they need."""

from __future__ import annotations

import math
import signal
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkl import reference
from fastkl.vae import checkpoint, prior, streams
from fastkl.vae.data import Data
from fastkl.vae.errors import UserError
from fastkl.vae.evaluate import quick_elbo, quick_mixture
from fastkl.vae.model import VAE, build
from fastkl.vae.parallel import Ranks
from fastkl.vae.plan import kl_weight, learning_rate, temperature
from fastkl.vae.progress import Display
from fastkl.vae.settings import Settings

TEST_POINTS = 25  # of the test curve, over the run


class Noise(NamedTuple):
    """Of one step, where it is not for the op to draw: of the latents, and of the choice of a component."""

    eps: Tensor | None = None
    gumbel: Tensor | None = None


FUSED = Noise()


class ELBO(nn.Module):
    """The objective: a module, because DistributedDataParallel hooks into forward(). Another one may take its place."""

    def __init__(self, vae: VAE, kl: str = "mc", samples: int = 1):
        super().__init__()
        self.vae, self.kl, self.samples = vae, kl, samples

    def forward(
        self, x: Tensor, noise: Noise = FUSED, beta: Tensor | float = 1.0, tau: Tensor | float = 1.0,
        learned: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(loss, reconstruction, KL), each the mean over the batch, in nats; the KL to the learned prior or N(0, I)."""
        posterior = self.vae.posterior(x)
        learned_prior = self.vae.prior if learned else None
        z, kl = prior.sample_kl(learned_prior, posterior, self.kl, self.samples, *noise, tau)
        reconstruction = self.vae.log_likelihood(z, x)
        loss = (beta * kl - reconstruction).mean()
        return loss, reconstruction.detach().mean(), kl.detach().mean()


@dataclass
class Run:
    """Everything that a checkpoint holds, and what can be made again from it."""

    settings: Settings
    data: Data
    ranks: Ranks
    device: torch.device
    folder: Path
    vae: VAE
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0  # of training, over all the processes that went on with this run
    # Sums since the last point of the curves: reconstruction, KL, steps.
    window: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    # Rows of step, ELBO, KL, reconstruction; of a mixture step, lower bound, KL, upper bound, used components,
    # and with --kl relaxed the temperature.
    history: dict[str, list[list[float]]] = field(default_factory=lambda: {"train": [], "test": []})

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
    def prior(self) -> nn.Module | None:
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
    # During the warm-up the learned prior has no part in the loss.
    objective = ranks.wrap(ELBO(vae, settings.kl, settings.samples), partly=learned)
    run = Run(settings, data, ranks, device, folder, vae, objective, make_optimizer(settings, vae))
    if learned and 0 < run.total_steps <= settings.warm_up:
        wanted = f"--warm-up {settings.warm_up} leaves none of the {run.total_steps} steps to --prior {settings.prior}"
        raise UserError(f"{wanted}: choose fewer, or train for longer")
    return run


def make_optimizer(settings: Settings, vae: VAE) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    groups: list[dict[str, Any]] = [{"params": list(vae.parameters())}]
    if vae.prior is not None:
        own = list(vae.prior.parameters())
        known = set(own)
        groups[0]["params"] = [parameter for parameter in groups[0]["params"] if parameter not in known]
        # No decay: it would pull means and log-variances to 0, which is not less of anything.
        groups.append({"params": own, "weight_decay": 0.0, "rate": settings.prior_learning_rate or rate})
    return torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=True)


def choose_device(name: str, ranks: Ranks) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine, or this build of torch, has no CUDA device")
    return torch.device("cuda", ranks.rank % torch.cuda.device_count()) if name == "cuda" else torch.device(name)


def train(run: Run, display: Display) -> bool:
    """Train to the end (True) or until someone asks to stop (False); either way the last step is in the checkpoint."""
    began = time.perf_counter() - run.seconds
    settings = run.settings
    # Filled anew each step, so that a compiled objective stays compiled.
    beta, tau = (torch.ones((), device=run.device) for _ in range(2))
    with Stop() as stop:
        while run.step < run.total_steps:
            for group in run.optimizer.param_groups:
                rate = group.get("rate", settings.learning_rate)
                group["lr"] = learning_rate(settings, run.step, run.total_steps, rate)
            beta.fill_(kl_weight(settings, run.step))
            tau.fill_(temperature(settings, run.step, run.total_steps))
            x, noise = batch(run)
            loss, reconstruction, kl = run.objective(x, noise, beta, tau, run.prior is not None)
            run.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            run.optimizer.step()
            run.step += 1
            if run.step == settings.warm_up and run.prior is not None:
                begin(run)
            run.seconds = time.perf_counter() - began
            if after_step(run, display, reconstruction, kl, stop.asked):
                return False
    return True


def begin(run: Run) -> None:
    """The end of the warm-up. The checkpoint of this step is written after it, so a resumed run finds it done."""
    if run.ranks.main:
        prior.begin(run.vae.prior, run.vae, run.data, run.settings, run.device)
    state = {name: value.cpu() for name, value in run.vae.prior.state_dict().items()}
    run.vae.prior.load_state_dict(run.ranks.broadcast(state))


def batch(run: Run) -> tuple[Tensor, Noise]:
    """The data of this step and process, and the noise, if it is not for the op to draw.

    With noise="fused" each process seeds torch from (seed, step, rank) and the op draws: nothing is stored for
    backward. With noise="datum" every process draws the same noise for the whole batch and keeps its share, so a datum
    meets the same noise however many processes share a batch: two with 32 data each do what one with 64 does.
    """
    settings, ranks = run.settings, run.ranks
    indices = streams.batch_indices(settings.seed, run.step, len(run.data.train), run.batch_size)
    x = run.data.train[ranks.share(indices)].to(run.device)
    eps = gumbel = None
    if settings.noise == "datum":
        shape = (run.batch_size, settings.samples if run.prior is not None else 1)
        generator = streams.generator(settings.seed, "noise", run.step)
        eps = ranks.share(torch.randn((*shape, *run.vae.latent_shape), generator=generator)).to(run.device)
        if settings.kl == "relaxed":
            seed = torch.tensor(streams.seed_for(settings.seed, "choice", run.step))
            gumbel = ranks.share(reference.gumbel_noise(seed, (*shape, settings.components))).to(run.device)
    torch.manual_seed(streams.seed_for(settings.seed, "step", run.step, ranks.rank))
    return x, Noise(eps, gumbel)


def after_step(run: Run, display: Display, reconstruction: Tensor, kl: Tensor, asked: bool) -> bool:
    """Curves, test and checkpoint when they are due; says whether to stop, which all processes must do together."""
    told = torch.stack([reconstruction, kl, reconstruction.new_tensor(float(asked))]).double()
    told = run.ranks.mean(told).cpu()
    stopping = bool(told[2] > 0)
    run.window += torch.stack([told[0], told[1], torch.ones((), dtype=torch.float64)])
    last = run.step == run.total_steps
    if run.step % run.settings.log_every == 0 or last:
        mean_reconstruction, mean_kl = (run.window[:2] / run.window[2]).tolist()
        if not math.isfinite(mean_reconstruction - mean_kl):
            raise UserError(f"the loss is no longer finite at step {run.step}; {where_to_go(run)}")
        row = [run.step, mean_reconstruction - mean_kl, mean_kl, mean_reconstruction]
        run.history["train"].append(row)
        run.window.zero_()
        display.trained(run.step, *row[1:])
    if run.ranks.main and (last or run.step % max(1, run.total_steps // TEST_POINTS) == 0):
        about = (run.vae, run.data.test, run.settings.seed, run.device, run.prior)
        row = [run.step, *quick_elbo(*about)]
        run.history["test"].append(row)
        if prior.is_mixture(run.prior):
            bracket = [run.step, *quick_mixture(*about)]
            if run.settings.kl == "relaxed":
                bracket.append(temperature(run.settings, run.step - 1, run.total_steps))
            run.history.setdefault("mixture", []).append(bracket)
        display.tested(run, *row)
    display.stepped(run.step)
    if run.ranks.main and (stopping or last or run.step % run.settings.checkpoint_every == 0):
        display.flush()  # or events before this checkpoint may be lost when the process is killed after it
        save(run)
    return stopping


def save(run: Run) -> None:
    """The generators' states are missing on purpose: they are functions of the step (streams.py)."""
    for parameter in run.vae.parameters():
        if not parameter.isfinite().all():
            raise UserError(f"the weights are no longer finite at step {run.step}; {where_to_go(run)}")
    checkpoint.save(
        run.folder,
        {
            "settings": asdict(run.settings),
            "fingerprint": run.data.fingerprint,
            "ranks": run.ranks.size,
            "threads": torch.get_num_threads(),
            "step": run.step,
            "model": run.vae.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "seconds": run.seconds,
            "window": run.window,
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
        run.optimizer.load_state_dict(state["optimizer"])
        run.window.copy_(state["window"])
        run.step, run.seconds, run.history = int(state["step"]), float(state["seconds"]), state["history"]
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the checkpoint does not fit its own settings ({str(error).splitlines()[0]})") from None


def where_to_go(run: Run) -> str:
    written = (run.folder / checkpoint.NAME).exists()
    return (
        f"try a smaller --learning-rate ({'the checkpoint is of an earlier step' if written else 'no checkpoint yet'})"
    )


class Stop:
    """Ctrl-C and SIGTERM as a wish, granted between two steps: within one the weights would be half updated."""

    def __enter__(self) -> Stop:
        self.asked = False
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(number, self.previous[number])  # the second one is not a wish any more

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
