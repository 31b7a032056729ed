"""The training loop, written to be read: `train` is the loop, objective.py has its loss, the rest is what they need."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkl import monitors, reference
from fastkl.vae import checkpoint, prior, streams
from fastkl.vae.data import Data
from fastkl.vae.errors import UserError
from fastkl.vae.evaluate import quick_elbo, quick_mixture
from fastkl.vae.guard import Guard
from fastkl.vae.model import VAE, build
from fastkl.vae.objective import Noise, Objective, Weights, draws_of
from fastkl.vae.parallel import Ranks
from fastkl.vae.plan import TEST_POINTS, capacity, kl_weight, learning_rate, temperature
from fastkl.vae.progress import Display
from fastkl.vae.rules import MATCHING
from fastkl.vae.settings import Settings
from fastkl.vae.stop import Stop
from fastkl.vae.watch import Watch

KEPT = 256  # latent dimensions whose KL is kept for each epoch


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
    optimizers = {"autoencoder": torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=True)}
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


def train(run: Run, display: Display) -> bool:
    """Train to the end (True) or until someone asks to stop (False); either way the last step is in the checkpoint."""
    began = time.perf_counter() - run.seconds
    settings = run.settings
    # Filled anew each step, so that a compiled objective stays compiled.
    weights = Weights(*(torch.ones((), device=run.device) for _ in Weights._fields))
    with Stop() as stop:
        while run.step < run.total_steps:
            for optimizer in run.optimizers.values():
                for group in optimizer.param_groups:
                    rate = group.get("rate", settings.learning_rate)
                    group["lr"] = learning_rate(settings, run.step, run.total_steps, rate)
            weights.beta.fill_(kl_weight(settings, run.step))
            weights.tau.fill_(temperature(settings, run.step, run.total_steps))
            weights.capacity.fill_(capacity(settings, run.step))
            x, noise = batch(run)
            learned = run.prior
            loss, terms, posterior = run.objective(x, noise, weights, learned is not None)
            for optimizer in run.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            run.step += 1
            good = run.guard.admit(loss, run.objective.parameters(), run.step)
            if good:
                for optimizer in run.optimizers.values():
                    optimizer.step()
                run.watch.saw(run.step, posterior, learned)
            if run.step == settings.warm_up and run.prior is not None:
                begin(run)
            run.seconds = time.perf_counter() - began
            if after_step(run, display, terms if good else {}, stop.asked):
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
    eps = gumbel = drawn = uniform = None
    if settings.noise == "datum":
        shape = (run.batch_size, draws_of(settings, run.prior is not None))
        generator = streams.generator(settings.seed, "noise", run.step)
        eps = ranks.share(torch.randn((*shape, *run.vae.latent_shape), generator=generator)).to(run.device)
        if settings.kl == "relaxed":
            seed = torch.tensor(streams.seed_for(settings.seed, "choice", run.step))
            gumbel = ranks.share(reference.gumbel_noise(seed, (*shape, settings.components))).to(run.device)
        if settings.objective in MATCHING:
            drawn = prior.rsample(run.prior, run.vae, run.batch_size, settings.seed, run.step)
            drawn = ranks.share(drawn).to(run.device)
        if run.vae.draws_data:
            uniform = torch.rand((run.batch_size, *run.vae.shape), generator=generator)
            uniform = ranks.share(uniform).to(run.device)
    torch.manual_seed(streams.seed_for(settings.seed, "step", run.step, ranks.rank))
    return x, Noise(eps, gumbel, drawn, uniform)


def after_step(run: Run, display: Display, terms: dict[str, Tensor], asked: bool) -> bool:
    """Curves, test and checkpoint when they are due; says whether to stop, which all processes must do together.

    Of a step that was skipped there are no terms.
    """
    told = torch.stack([*terms.values(), torch.full((), float(asked), device=run.device)]).double()
    *values, stopping = run.ranks.mean(told).tolist()
    if terms and run.window.get("steps") and run.window.keys() - {"steps"} != terms.keys():
        run.window.clear()  # a learned prior has begun, and with it an objective of other terms
    for name, value in zip((*terms, "steps"), (*values, 1.0)):
        run.window[name] = run.window.get(name, 0.0) + (value if terms else 0.0)
    last = run.step == run.total_steps
    if (run.step % run.settings.log_every == 0 or last) and run.window["steps"]:
        steps = run.window.pop("steps")
        means = {name: total / steps for name, total in run.window.items()}
        run.window.clear()
        kl, reconstruction = means.pop("kl"), means.pop("reconstruction")
        row = [run.step, reconstruction - kl, kl, reconstruction]
        run.history["train"].append(row)
        means.pop("elbo", None)
        for name, value in means.items():
            run.history.setdefault(f"terms/{name}", []).append([run.step, value])
        display.trained(*row, {**means, **(gradients(run) if terms else {})})
    if run.step % run.steps_per_epoch == 0 or last:
        watched(run, display)
    if run.ranks.main and (last or run.step % max(1, run.total_steps // TEST_POINTS) == 0):
        about = (run.vae, run.data.watched, run.settings.seed, run.device, run.prior)
        row = [run.step, *quick_elbo(*about)]
        run.history[run.data.watched_name].append(row)
        if prior.is_mixture(run.prior):
            bracket = [run.step, *quick_mixture(*about)]
            if run.settings.kl == "relaxed":
                bracket.append(temperature(run.settings, run.step - 1, run.total_steps))
            run.history.setdefault("mixture", []).append(bracket)
        display.tested(run, *row)
    display.stepped(run.step)
    if stopping or last or run.step % run.settings.checkpoint_every == 0:
        seen = run.watch.state_dict()  # of all processes
        if run.ranks.main:
            display.flush()  # or events before this checkpoint may be lost when the process is killed after it
            save(run, seen)
    return stopping > 0


def gradients(run: Run) -> dict[str, float]:
    """The norms of the gradients of encoder, decoder and whatever else learns, at this step."""
    parts = {name: list(part.parameters()) for name, part in run.vae.named_children()}
    parts["logvar"] = list(run.vae.parameters(recurse=False))  # of a normal likelihood
    if (discriminator := discriminator_of(run)) is not None:
        parts["discriminator"] = list(discriminator.parameters())
    norms = monitors.gradient_norms({name: part for name, part in parts.items() if part})
    found = {f"gradient_norm_{name}": value.item() for name, value in norms.items()}
    for name, value in found.items():
        run.history.setdefault(f"monitors/{name}", []).append([run.step, value])
    return found


def watched(run: Run, display: Display) -> None:
    """What the monitors saw since the last epoch, and what is to be said of it."""
    figures = run.watch.figures()
    if "active_units" not in figures:  # nothing but skipped steps
        return
    figures["skipped_steps"] = run.guard.skipped
    *_, (_, sample_size) = run.history.get("terms/effective_sample_size", [(0, None)])
    lines = run.watch.warnings(run.step, run.total_steps, figures, sample_size)
    kl = figures.pop("kl_per_dimension")
    if len(kl) <= KEPT:
        run.history.setdefault("monitors/kl_per_dimension", []).append([run.step, *kl])
    for name, value in figures.items():
        run.history.setdefault(f"monitors/{name}", []).append([run.step, value])
    display.watched(run.step, figures, lines)


def save(run: Run, seen: dict[str, Any]) -> None:
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
            "optimizers": {name: optimizer.state_dict() for name, optimizer in run.optimizers.items()},
            "discriminator": discriminator_of(run).state_dict() if discriminator_of(run) is not None else {},
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


def discriminator_of(run: Run) -> nn.Module | None:
    return getattr(run.objective, "module", run.objective).discriminator


def where_to_go(run: Run) -> str:
    written = (run.folder / checkpoint.NAME).exists()
    return (
        f"try a smaller --learning-rate ({'the checkpoint is of an earlier step' if written else 'no checkpoint yet'})"
    )
