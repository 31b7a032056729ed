"""The memory and time of the loss as shares of a training step: with fastkl, and by the eager formula."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributions

import fastkl
from fastkl.priors import Prior
from fastkl.priors.mixture import Mixture, MixturePrior
from fastkl.vae.errors import UserError
from fastkl.vae.likelihood import Bernoulli, Likelihood, Normal
from fastkl.vae.model import VAE
from fastkl.vae.objective import Noise, Weights
from fastkl.vae.prior import is_mixture
from fastkl.vae.rules import BOUNDS
from fastkl.vae.run import Run
from fastkl.vae.settings import Settings

MIB = 2**20
ENOUGH, MOST = 0.1, 5  # seconds, and steps, that are timed
LogLikelihood = Callable[[Tensor], Tensor]


class Cost(NamedTuple):
    """MiB kept for the backward pass, the most MiB at once, and ms of forward and backward."""

    kept: float
    peak: float
    time: float


def shares(run: Run) -> dict[str, Any]:
    """A step of the run, and its loss alone with fastkl and eager, at the shapes and on the device of the run."""
    objective: Any = getattr(run.objective, "module", run.objective)  # DistributedDataParallel's own
    settings, vae, device = run.settings, run.vae, run.device
    x = run.data.train[: settings.batch_size].to(device)
    values = (settings.beta, settings.tau, max(0.0, settings.capacity))
    weights = Weights(*(torch.full((), value, dtype=torch.float32, device=device) for value in values))

    def step() -> Tensor:
        return objective.forward(x, Noise(), weights, run.prior is not None)[0]

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        owned = [*objective.parameters(), *objective.buffers(), *weights, x]
        costs = {"step": cost(step, owned, run)}
        with torch.no_grad(), run.autocast():
            q, observed = vae.posterior(x), vae.observed(x)
            head = torch.cat([q.mean, q.logvar], dim=1).requires_grad_()
        prior = Fixed(run.prior) if is_mixture(run.prior) else run.prior
        given = Given(vae, observed)

        def fused() -> Tensor:
            posterior = fastkl.DiagonalNormal.from_packed(head, dim=1)
            return objective.of(posterior, prior, given.by(vae.observation.log_prob), Noise(), weights).loss

        def by_formula() -> Tensor:
            return formula(head, prior, given.by(eager_likelihood(vae.observation)), settings)

        alone = {"eager loss": by_formula} if has_formula(settings, run.prior) else {}
        for name, loss in {**alone, "fastkl loss": fused}.items():
            with run.autocast():
                loss()  # makes the decoder's output
            own = [*weights, *vae.observation.parameters(), *(() if prior is None else prior.parameters())]
            costs[name] = cost(loss, [head, observed, *given.outputs.values(), *own], run)
    where = "the GPU" if device.type == "cuda" else "the CPU"
    what = (
        f"Forward and backward of a batch of {len(x)}, {settings.precision}, on {where}: the whole step, and its loss "
        "alone, which is sample, objective and likelihood for given outputs of the networks. Kept: tensors saved for "
        "the backward pass, without weights and data. Peak: memory allocated at once. Percentages are of the step."
    )
    return {"what": what, "rows": {name: row(one, costs["step"]) for name, one in costs.items()}}


def row(one: Cost, step: Cost) -> dict[str, float]:
    """The figures of a cost, and their shares of those of a step."""
    parts = {f"{name}_share": part / max(whole, 1e-9) for name, part, whole in zip(Cost._fields, one, step)}
    return {**dict(zip(Cost._fields, one)), **parts}


def table(costs: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(name, [kept, peak, time]) of each row, with units and shares, for print and page."""

    def cell(found: dict[str, float], name: str) -> str:
        unit = "ms" if name == "time" else "MiB"
        part = "" if found is costs["rows"]["step"] else f" ({100 * found[f'{name}_share']:.3g} %)"
        return f"{found[name]:.3g} {unit}{part}"

    return [(name, [cell(found, part) for part in Cost._fields]) for name, found in costs["rows"].items()]


class Given:
    """A decoder without costs: its output, computed once, gets the gradient of the likelihood."""

    def __init__(self, vae: VAE, x: Tensor):
        self.vae, self.x = vae, x
        self.outputs: dict[torch.Size, Tensor] = {}

    def by(self, log_prob: Callable[[Tensor, Tensor], Tensor]) -> LogLikelihood:
        """The log-likelihood of z, with log_prob(x, output) for the density."""

        def log_likelihood(z: Tensor) -> Tensor:
            if z.shape not in self.outputs:
                with torch.no_grad():
                    self.outputs[z.shape] = self.vae.decode(z.detach(), self.x).requires_grad_()
            samples = z.shape[: z.dim() - len(self.vae.latent_shape)]
            return log_prob(self.x.expand(*samples, *self.vae.shape), Passed.apply(z, self.outputs[z.shape]))

        return log_likelihood


class Passed(torch.autograd.Function):
    """The output, and for z a gradient that occupies no memory."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, output: Tensor) -> Tensor:
        ctx.of = z.shape, z.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        shape, dtype = ctx.of
        return gradient.new_zeros((), dtype=dtype).expand(shape), gradient


class Fixed(MixturePrior):
    """A mixture with the present components as its parameters. (The encoder computes those of a VampPrior.)"""

    def __init__(self, prior: MixturePrior):
        super().__init__()
        self.precision = prior.precision
        with torch.no_grad():
            parts = prior.mixture()
        self.parts = torch.nn.ParameterList(torch.nn.Parameter(part) for part in parts if part is not None)
        self.places = [name for name, part in zip(Mixture._fields, parts) if part is not None]

    def mixture(self) -> Mixture:
        return Mixture(**dict(zip(self.places, self.parts)))


def eager(head: Tensor) -> tuple[Tensor, Tensor]:
    """Sample and KL as in most training loops."""
    mu, logvar = head.chunk(2, dim=1)
    std = torch.exp(0.5 * logvar)
    z = mu + std * torch.randn_like(std)
    kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).flatten(1).sum(1)
    return z, kl


def has_formula(settings: Settings, prior: Prior | None) -> bool:
    """Whether `formula` below is the loss of the run."""
    known = settings.objective in (*BOUNDS, "iwae") and settings.gradient == "plain" and settings.kl == "mc"
    plain = not settings.free_bits and settings.capacity < 0
    return known and plain and (prior is None or is_mixture(prior))


def formula(head: Tensor, prior: Prior | None, log_likelihood: LogLikelihood, settings: Settings) -> Tensor:
    """The loss in the usual PyTorch: torch.distributions for a mixture, and for the weights of IWAE."""
    weighted = settings.objective == "iwae"
    if prior is None and not weighted:
        z, kl = eager(head)
        return (settings.beta * kl - log_likelihood(z)).mean()
    mu, logvar = head.chunk(2, dim=1)
    q = distributions.Normal(mu, torch.exp(0.5 * logvar), validate_args=False)
    z = q.rsample((settings.samples,))
    if prior is None:
        log_p = distributions.Normal(0.0, 1.0, validate_args=False).log_prob(z).flatten(2).sum(2)
    else:
        assert isinstance(prior, MixturePrior), "see has_formula"
        log_p = density(prior.mixture()).log_prob(z.flatten(2))
    if weighted:
        log_w = log_likelihood(z) + log_p - q.log_prob(z).flatten(2).sum(2)
        return -(log_w.logsumexp(0) - math.log(settings.samples)).mean()
    kl = -q.entropy().flatten(1).sum(1) - log_p.mean(0)
    return (settings.beta * kl - log_likelihood(z[0])).mean()


def density(mixture: Mixture) -> distributions.Distribution:
    """The mixture in torch.distributions."""
    weights = distributions.Categorical(logits=mixture.logits, validate_args=False)
    components: distributions.Distribution
    if mixture.logvars is None:
        components = distributions.MultivariateNormal(mixture.means, scale_tril=mixture.scale_tril, validate_args=False)
    else:
        std = torch.exp(0.5 * mixture.logvars).expand_as(mixture.means)
        components = distributions.Independent(
            distributions.Normal(mixture.means, std, validate_args=False), 1, validate_args=False
        )
    return distributions.MixtureSameFamily(weights, components, validate_args=False)


def eager_likelihood(observation: Likelihood) -> Callable[[Tensor, Tensor], Tensor]:
    """log p(x | output) in the usual PyTorch. Likelihoods of likelihood.py that use no op of fastkl already are."""

    def log_prob(x: Tensor, output: Tensor) -> Tensor:
        if isinstance(observation, Bernoulli):
            terms = -F.binary_cross_entropy_with_logits(output, x, reduction="none")
        elif isinstance(observation, Normal):
            std = torch.exp(0.5 * observation.logvar)
            terms = distributions.Normal(output, std, validate_args=False).log_prob(x)
        else:
            return observation.log_prob(x, output)
        return terms.flatten(-observation.ndim).sum(-1)

    return log_prob


def cost(loss: Callable[[], Tensor], owned: list[Tensor], run: Run) -> Cost:
    """The cost of a loss and of its gradients. `owned`: the tensors that exist before it, such as weights and data;
    their memory is not counted, and gradients are computed for those that require one."""
    leaves = [tensor for tensor in owned if tensor.requires_grad]

    def forward() -> Tensor:
        with run.autocast():
            return loss()

    def step() -> None:
        torch.autograd.grad(forward(), leaves, allow_unused=True)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)

    kept = kept_bytes(forward, owned)
    peak = peak_bytes(step, run.device)
    times: list[float] = []
    while not times or (sum(times) < ENOUGH and len(times) < MOST):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return Cost(kept / MIB, peak / MIB, 1e3 * min(times))


def kept_bytes(loss: Callable[[], Tensor], owned: list[Tensor]) -> int:
    """Bytes of the storages that autograd saves, each counted once."""
    known, kept = {tensor.untyped_storage().data_ptr() for tensor in owned}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    del value
    return sum(kept.values())


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Peak of the allocated bytes above those before the step."""
    if device.type == "cuda":
        step()  # a first call allocates workspaces, which stay
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # mutes the profiler's messages in the terminal
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        try:
            profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        except (OSError, ValueError):  # torch says nothing about a full disk: the file is missing or cut
            where = tempfile.gettempdir()
            raise UserError(
                f"{where}: the profile of a step cannot be written, perhaps because the disk is full; "
                "TMPDIR names another folder"
            ) from None
    now = peak = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak
