"""The training loop, written to be read. objective.py has its loss, and run.py its state."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from fastkl import DiagonalNormal, monitors, reference
from fastkl.vae import prior, streams
from fastkl.vae.data.reader import BadData
from fastkl.vae.errors import UserError
from fastkl.vae.evaluate import quick_elbo, quick_mixture
from fastkl.vae.objective import Noise, Weights, draws_of
from fastkl.vae.parallel import load_whole
from fastkl.vae.plan import TEST_POINTS, capacity, kl_weight, learning_rate, temperature
from fastkl.vae.progress import Display
from fastkl.vae.rules import MATCHING
from fastkl.vae.run import Run, discriminator_of
from fastkl.vae.state import save
from fastkl.vae.stop import Stop

KEPT = 256  # up to this many latent dimensions, the history keeps the KL of each


def train(run: Run, display: Display) -> bool:
    """Train to the end (True) or to a stop on request (False). The checkpoint holds the last step in both cases."""
    began = time.perf_counter() - run.seconds
    settings = run.settings
    # Each step refills these tensors, so that new values do not recompile a compiled objective.
    weights = Weights(*(torch.ones((), dtype=torch.float32, device=run.device) for _ in Weights._fields))
    with Stop() as stop, contextlib.closing(run.reader):
        while not run.ended:
            for optimizer in run.optimizers.values():
                for group in optimizer.param_groups:
                    rate = group.get("rate", settings.learning_rate)
                    group["lr"] = learning_rate(settings, run.step, run.total_steps, rate)
            weights.beta.fill_(kl_weight(settings, run.step))
            weights.tau.fill_(temperature(settings, run.step, run.total_steps))
            weights.capacity.fill_(capacity(settings, run.step))
            learned = run.prior
            for optimizer in run.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            try:
                loss, terms, posterior = backward(run, weights)
            except UserError as error:  # raised before anything of this step has changed
                if not isinstance(error, BadData) and run.ranks.size > 1:
                    raise  # --perceptual failed in this process alone, and all are needed to save
                raise UserError(f"{error}{save_whole(run, display)}") from None
            run.step += 1
            good = update(run, loss)
            if good:
                with run.ranks.unsharded(run.objective):  # a mixture's parameters
                    run.watch.record(run.step, posterior, learned)
            if run.step == settings.warm_up and run.prior is not None:
                start_prior(run)
            run.seconds = time.perf_counter() - began
            stopping = log(run, display, terms if good else {}, stop.asked)
            test(run, display)
            display.stepped(run.step)
            save_if_due(run, display, stopping)
            if stopping:
                return False
    return True


def backward(run: Run, weights: Weights) -> tuple[Tensor, dict[str, Tensor], DiagonalNormal]:
    """(loss, its terms, posterior) of the batches of a step. Their gradients are added."""
    parts, losses, terms, posteriors = batches(run), [], [], []  # type: ignore[var-annotated]
    shares = []
    for x, noise in parts:
        # DistributedDataParallel averages over processes, which need not have the same number of data.
        shares.append(len(x) * run.ranks.size / run.batch_size)
        last = len(losses) == len(parts) - 1
        with contextlib.nullcontext() if last else run.ranks.without_exchange(run.objective):
            with run.autocast():
                loss, own, posterior = run.objective(x, noise, weights, run.prior is not None, run.adversarial)
            run.scaler.scale(loss * shares[-1]).backward()
        losses.append(loss.detach())
        terms.append(own)
        posteriors.append(posterior)
    if shares == [1.0]:
        return losses[0], terms[0], posteriors[0]
    means = {name: sum(share * own[name] for share, own in zip(shares, terms)) for name in terms[0]}
    mu, logvar = (torch.cat([getattr(q, name) for q in posteriors]) for name in ("mean", "logvar"))
    return torch.stack(losses).mean(), means, DiagonalNormal(mu, logvar)


def update(run: Run, loss: Tensor) -> bool:
    """Update the weights and return True, or return False if the loss or a gradient is not finite."""
    # Without gradients: the discriminator before --adversarial-start, which the scaler of fp16 would reject.
    optimizers = [each for each in run.optimizers.values() if any(p.grad is not None for p in weights_of(each))]
    for optimizer in optimizers:
        run.scaler.unscale_(optimizer)
    smaller = run.scaler.is_enabled() and run.scaler.get_scale() > 1  # a smaller scale may give finite gradients
    good = run.guard.admit(loss, run.objective.parameters(), run.step, smaller)
    if good:
        if run.settings.clip:
            torch.nn.utils.clip_grad_norm_(run.objective.parameters(), run.settings.clip)
        for optimizer in optimizers:
            run.scaler.step(optimizer)
        if run.average is not None:
            run.average.update_parameters(run.vae)
    run.scaler.update()
    return good


def weights_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def start_prior(run: Run) -> None:
    """Start the learned prior at the end of the warm-up, before the checkpoint of this step is written."""
    learned = run.vae.prior
    assert learned is not None, "the caller checks that the run has a learned prior"
    with run.gathered(run.vae):
        fitted = run.vae.prior
        assert fitted is not None
        if run.ranks.main:
            prior.initialise(fitted, run.vae, run.data, run.settings, run.device)
        state = run.ranks.broadcast({name: value.cpu() for name, value in fitted.state_dict().items()})
    load_whole(learned, state)
    if run.average is not None:
        load_whole(run.average.module.get_submodule("prior"), state)


def batches(run: Run) -> list[tuple[Tensor, Noise]]:
    """The data of this step and process, split into --accumulate batches.

    The step is split into batches first and each of them over processes. Terms that compare the data of a batch then do
    not depend on the number of processes.
    """
    settings, (x, noise) = run.settings, batch(run)
    draws, first, found = settings.noise == "datum" and settings.objective in MATCHING, 0, []
    for index, whole in enumerate(torch.arange(run.batch_size, device="cpu").tensor_split(settings.accumulate)):
        rows = run.ranks.rows(len(whole))
        own = slice(first, first + rows.stop - rows.start)
        eps, gumbel, uniform = (None if value is None else value[own] for value in noise[:3])
        part = Noise(eps, gumbel, uniform)
        if draws:
            number = streams.seed_for(settings.seed, "prior", run.step, index)
            seed = torch.tensor(number, dtype=torch.int64, device=run.device)
            part = part._replace(prior_seed=seed, prior_rows=(len(whole), rows))
        found.append((x[own], part))
        first = own.stop
    return found


def batch(run: Run) -> tuple[Tensor, Noise]:
    """The data of this step and process, and with --noise datum their noise.

    With --noise fused each process seeds torch from (seed, step, rank) and the op draws its noise, which is not stored
    for backward. With --noise datum every process draws the noise of the whole batch and keeps its share. The noise of
    a datum is then independent of the number of processes: two processes with 32 data each do the same as one with 64.
    """
    settings, ranks = run.settings, run.ranks

    def share(whole: Tensor) -> Tensor:
        return ranks.share(whole, settings.accumulate).to(run.device)

    x = run.reader.at(run.step)
    eps = gumbel = uniform = None
    if settings.noise == "datum":
        shape = (run.batch_size, draws_of(settings, run.prior is not None))
        generator = streams.generator(settings.seed, "noise", run.step)
        eps = torch.randn((*shape, *run.vae.latent_shape), generator=generator, dtype=torch.float32, device="cpu")
        eps = share(eps)
        if settings.kl == "relaxed":
            seed = torch.tensor(streams.seed_for(settings.seed, "choice", run.step), dtype=torch.int64, device="cpu")
            gumbel = share(reference.gumbel_noise(seed, (*shape, settings.components)))
        if run.vae.draws_data:
            of_data = (run.batch_size, *run.vae.shape)
            uniform = torch.rand(of_data, generator=generator, dtype=torch.float32, device="cpu")
            uniform = share(uniform)
    torch.manual_seed(streams.seed_for(settings.seed, "step", run.step, ranks.rank))
    return x, Noise(eps, gumbel, uniform)


def log(run: Run, display: Display, terms: dict[str, Tensor], asked: bool) -> bool:
    """Add a step to the curves and return whether any process was asked to stop: all processes stop together.

    A skipped step has no terms.
    """
    request = torch.full((), float(asked), dtype=torch.float32, device=run.device)
    *values, stopping = run.ranks.mean(torch.stack([*terms.values(), request]).double()).tolist()
    if terms and run.window.get("steps") and run.window.keys() - {"steps"} != terms.keys():
        run.window.clear()  # a learned prior has started, and its objective has different terms
    for name, value in zip((*terms, "steps"), (*values, 1.0)):
        run.window[name] = run.window.get(name, 0.0) + (value if terms else 0.0)
    if (run.step % run.settings.log_every == 0 or run.ended) and run.window["steps"]:
        steps = run.window.pop("steps")
        means = {name: total / steps for name, total in run.window.items()}
        run.window.clear()
        kl, reconstruction = means.pop("kl"), means.pop("reconstruction")
        elbo = reconstruction - kl
        run.history["train"].append([run.step, elbo, kl, reconstruction])
        means.pop("elbo", None)
        for name, value in means.items():
            run.history.setdefault(f"terms/{name}", []).append([run.step, value])
        display.trained(run.step, elbo, kl, reconstruction, {**means, **(gradients(run) if terms else {})})
    return stopping > 0


def test(run: Run, display: Display) -> None:
    """Log the monitors at the end of an epoch, and the ELBO of held-out data at TEST_POINTS steps of the run."""
    if run.step % run.steps_per_epoch == 0 or run.ended:
        log_monitors(run, display)
    due = run.ended or run.step % max(1, run.total_steps // TEST_POINTS) == 0
    if not due:
        return
    with run.averaged():
        if run.ranks.main:
            learned, about = run.prior, (run.vae, run.data.watched, run.settings.seed, run.device)
            elbo, kl, reconstruction = quick_elbo(*about, learned)
            run.history[run.data.watched_name].append([run.step, elbo, kl, reconstruction])
            if prior.is_mixture(learned):
                bracket = [run.step, *quick_mixture(*about, learned)]
                if run.settings.kl == "relaxed":
                    bracket.append(temperature(run.settings, run.step - 1, run.total_steps))
                run.history.setdefault("mixture", []).append(bracket)
            keep_best(run, elbo)
            display.tested(run, run.step, elbo, kl, reconstruction)
    if run.settings.patience:
        run.best["points"] = run.ranks.broadcast(run.best.get("points", 0))  # all processes end at the same step


def keep_best(run: Run, elbo: float) -> None:
    """With --patience, keep the weights of the best ELBO of held-out data since the warm-up."""
    if not run.settings.patience or run.step < run.settings.warm_up:
        return
    if elbo > run.best.get("elbo", -math.inf):
        state = {name: value.detach().cpu().clone() for name, value in run.vae.state_dict().items()}
        run.best = {"step": run.step, "elbo": elbo, "model": state, "points": 0}
    else:
        run.best["points"] = run.best.get("points", 0) + 1  # also if every ELBO so far was NaN


def save_if_due(run: Run, display: Display, stopping: bool) -> None:
    """Write a checkpoint every --checkpoint-every steps, at a stop, and at the end of the run."""
    if stopping or run.ended or run.step % run.settings.checkpoint_every == 0:
        monitored = run.watch.state_dict()  # a collective call: every process takes part
        display.flush()  # first: a process killed after the checkpoint would lose the events before it
        save(run, monitored)
    if run.shards is not None:
        run.shards.finish() if stopping or run.ended else run.shards.poll()


def save_whole(run: Run, display: Display) -> str:
    """Save the last whole step before a run ends by an error of its data or of --perceptual; return the rest of the
    error's message."""
    if run.step == 0:
        return " (no step was taken)"
    save_if_due(run, display, True)
    return f"; step {run.step} is saved: mend this, then continue with --resume"


def gradients(run: Run) -> dict[str, float]:
    """Gradient norms of encoder, decoder and every other trained part, at this step."""
    parts = {name: list(part.parameters()) for name, part in run.vae.named_children()}
    if (discriminator := discriminator_of(run)) is not None:
        parts["discriminator"] = list(discriminator.parameters())
    norms = monitors.gradient_norms({name: part for name, part in parts.items() if part})
    named = {f"gradient_norm_{name}": value.item() for name, value in norms.items()}
    for name, value in named.items():
        run.history.setdefault(f"monitors/{name}", []).append([run.step, value])
    return named


def log_monitors(run: Run, display: Display) -> None:
    """Log the monitors' figures of the last epoch, and their warnings."""
    figures = run.watch.figures()
    if "active_units" not in figures:  # every step was skipped
        display.monitored(run.step, {"skipped_steps": run.guard.skipped}, [])
        return
    figures["skipped_steps"] = run.guard.skipped
    *_, (_, sample_size) = run.history.get("terms/effective_sample_size", [(0, None)])
    lines = run.watch.warnings(run.step, run.total_steps, figures, sample_size)
    kl = figures.pop("kl_per_dimension")
    if len(kl) <= KEPT:
        run.history.setdefault("monitors/kl_per_dimension", []).append([run.step, *kl])
    for name, value in figures.items():
        run.history.setdefault(f"monitors/{name}", []).append([run.step, value])
    display.monitored(run.step, figures, lines)
