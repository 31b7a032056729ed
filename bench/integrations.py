"""Time and peak memory of steps of other libraries, with and without fastkl inside: `python -m bench.integrations`.

    .venv-integrations/bin/python -m bench.integrations --rounds 15

Every case is a step as a user of the library writes it, forward and backward, on a CPU with one thread. The two ways
take turns in one process; the ratio is that of their medians, of CPU time. A case whose losses differ where they should
agree is not timed.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import operator
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from bench.counting import peak_bytes


class Case(NamedTuple):
    integration: str
    name: str
    step: Callable[[], Tensor]  # the loss, after its backward pass
    same: bool = True  # whether the losses agree


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def seeded(loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A step of this loss, with the same noise each time."""

    def step() -> Tensor:
        torch.manual_seed(0)
        loss = loss_of()
        loss.backward()
        return loss

    return step


def mlp(*sizes: int) -> torch.nn.Sequential:
    layers = [(torch.nn.Linear(a, b), torch.nn.ReLU()) for a, b in itertools.pairwise(sizes)]
    return torch.nn.Sequential(*[layer for pair in layers for layer in pair][:-1])


def distributions() -> list[Case]:
    cases = []
    for n, d in ((32, 8), (128, 32), (4096, 64)):
        mu, std, zero, one = leaf(n, d), (torch.rand(n, d) + 0.5).requires_grad_(), torch.zeros(n, d), torch.ones(n, d)

        def step(mu=mu, std=std, zero=zero, one=one) -> Tensor:
            q, p = Independent(Normal(mu, std), 1), Independent(Normal(zero, one), 1)
            loss = kl_divergence(q, p).mean()
            loss.backward()
            return loss

        cases.append(Case("distributions", f"KL of Independent(Normal), {n} x {d}", step))
    for n, k, d in ((128, 10, 10), (128, 500, 10), (1024, 200, 64)):
        logits, means, stds, z = leaf(k), leaf(k, d), (torch.rand(k, d) + 0.5).requires_grad_(), leaf(n, d)

        def step(logits=logits, means=means, stds=stds, z=z) -> Tensor:
            p = MixtureSameFamily(Categorical(logits=logits), Independent(Normal(means, stds), 1))
            loss = -p.log_prob(z).mean()
            loss.backward()
            return loss

        cases.append(Case("distributions", f"MixtureSameFamily, N {n}, K {k}, D {d}", step))
    encoder, decoder, x = mlp(784, 400, 32), mlp(16, 400, 784), torch.rand(128, 784)
    means, stds = leaf(500, 16), torch.ones(500, 16).requires_grad_()

    def loss(mixture: bool) -> Tensor:
        mu, logvar = encoder(x).chunk(2, 1)
        q = Independent(Normal(mu, (0.5 * logvar).exp()), 1)
        z = q.rsample()
        if mixture:
            p = MixtureSameFamily(Categorical(logits=torch.zeros(500)), Independent(Normal(means, stds), 1))
            kl = q.log_prob(z) - p.log_prob(z)
        else:
            kl = kl_divergence(q, Independent(Normal(torch.zeros_like(mu), torch.ones_like(mu)), 1))
        return ((decoder(z) - x).square().sum(1) + kl).mean()

    for mixture, name in ((False, "N(0, I)"), (True, "a mixture of 500")):
        step = seeded(functools.partial(loss, mixture))
        cases.append(Case("distributions", f"training step of a VAE, prior {name}, batch 128", step))
    return cases


def diffusers() -> list[Case]:
    library = importlib.import_module("diffusers")
    vae = importlib.import_module("diffusers.models.autoencoders.vae")
    cases = []
    for name, head in (("float32", leaf(4, 8, 64, 64)), ("bfloat16", torch.randn(4, 8, 64, 64).bfloat16())):
        head = head.detach().requires_grad_()

        def step(head=head) -> Tensor:
            posterior = vae.DiagonalGaussianDistribution(head)
            z = posterior.sample(torch.Generator().manual_seed(0))
            loss = z.float().square().mean() + posterior.kl().float().mean()
            loss.backward()
            return loss

        cases.append(Case("diffusers", f"sample + kl of [4, 8, 64, 64], {name}", step, name == "float32"))
    blocks = {kind: [f"{way}Block2D"] * 2 for kind, way in (("down_block_types", "DownEncoder"),
                                                           ("up_block_types", "UpDecoder"))}  # fmt: skip
    model = library.AutoencoderKL(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, **blocks)
    images = torch.rand(4, 3, 64, 64)

    def loss() -> Tensor:
        posterior = model.encode(images).latent_dist
        return (model.decode(posterior.sample()).sample - images).square().mean() + 1e-6 * posterior.kl().mean()

    cases.append(Case("diffusers", "training step of AutoencoderKL (32, 64), 4 x 3 x 64 x 64", seeded(loss)))
    return cases


def pythae() -> list[Case]:
    models = importlib.import_module("pythae.models")
    cases = []
    for name, settings, batch, same in (
        ("VAE", {}, 128, True), ("VAMP", {"number_components": 50}, 128, True),
        ("VAMP", {"number_components": 500}, 128, True), ("WAE_MMD_", {}, 512, True),
        ("BetaTCVAE", {"use_mss": False}, 512, True), ("IWAE", {"number_samples": 10}, 128, False),
    ):  # fmt: skip
        config = getattr(models, f"{name}Config")(input_dim=(1, 28, 28), latent_dim=16, **settings)
        model, x = getattr(models, name.rstrip("_"))(config), torch.rand(batch, 1, 28, 28)

        step = seeded(lambda model=model, x=x: model({"data": x}).loss)
        about = ", ".join(f"{key} {value}" for key, value in settings.items())
        cases.append(
            Case("pythae", f"training step of {name.rstrip('_')}, batch {batch}{about and ', ' + about}", step, same)
        )
    return cases


def scvi() -> list[Case]:
    base = importlib.import_module("scvi.module.base")
    cases = []
    for k in (10, 50, 500):
        prior, mu, std = base.MogPrior(k, 10), leaf(128, 10), (torch.rand(128, 10) + 0.5).requires_grad_()

        step = seeded(lambda prior=prior, mu=mu, std=std: prior.kl(Normal(mu, std)).mean())
        cases.append(Case("scvi", f"MogPrior, 30 samples, N 128, K {k}", step))
    for kind, settings in (
        ("model.SCVI", {}), ("external.SysVI", {"n_prior_components": 50}),
        ("external.CYTOVI", {"prior_mixture_k": 50}),
    ):  # fmt: skip
        module, batch = training_of(kind, settings)
        step = seeded(lambda module=module, batch=batch: module(batch)[2].loss)
        about = "".join(f", {key} {value}" for key, value in settings.items())
        cases.append(Case("scvi", f"training step of {kind.partition('.')[2]}, 128 cells{about}", step))
    return cases


def training_of(kind: str, settings: dict[str, int]) -> tuple[Any, Any]:
    """(the module, a batch) of a model of scvi-tools for drawn counts of 500 genes."""
    library, anndata = importlib.import_module("scvi"), importlib.import_module("anndata")
    counts = torch.poisson(torch.full((128, 500), 2.0)).numpy()
    cells = anndata.AnnData(counts if kind == "model.SCVI" else counts / counts.max())
    cells.obs["batch"] = ["a", "b"] * 64
    model = operator.attrgetter(kind)(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.setup_anndata(cells, batch_key="batch")
        trained = model(cells, **settings)
    return trained.module, next(iter(trained._make_data_loader(adata=cells, batch_size=128)))


def pyro() -> list[Case]:
    dist = importlib.import_module("pyro.distributions")
    library, infer = importlib.import_module("pyro"), importlib.import_module("pyro.infer")
    n, d, k = 1024, 64, 200
    x, means, scale = torch.randn(n, d), leaf(k, d), torch.ones(())
    loc, log_std = leaf(n, d), leaf(n, d)

    def mixture() -> Any:
        components = dist.Normal(means, scale).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(k)), components)

    def standard() -> Any:
        return dist.Normal(torch.zeros(d), torch.ones(d)).to_event(1)

    cases = []
    for name, prior, elbo in (
        ("TraceMeanField_ELBO, Normal prior", standard, infer.TraceMeanField_ELBO()),
        ("Trace_ELBO, mixture of 200", mixture, infer.Trace_ELBO()),
    ):

        def model(prior=prior) -> None:
            with library.plate("data", n):
                z = library.sample("z", prior())
                library.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

        def guide() -> None:
            with library.plate("data", n):
                library.sample("z", dist.Normal(loc, log_std.exp()).to_event(1))

        def step(model=model, elbo=elbo) -> Tensor:
            library.set_rng_seed(0)
            loss = elbo.differentiable_loss(model, guide) / n
            loss.backward()
            return loss

        cases.append(Case("pyro", f"training step, {name}, {n} x {d}", step))
    return cases


def timed(step: Callable[[], Tensor], seconds: float) -> tuple[float, Tensor]:
    """CPU seconds of a step, the mean of as many as take this long together.

    One before them is not counted: it finds the caches and the allocator as the other way has left them."""
    step()
    count, began = 0, time.thread_time()
    while (spent := time.thread_time() - began) < seconds or not count:
        loss = step()
        count += 1
    return spent / count, loss.detach()


def measure(case: Case, rounds: int, seconds: float) -> str:
    switch = importlib.import_module(f"fastkl.integrations.{case.integration}")
    stock, inside, losses, memory = [], [], [], []
    for number in range(rounds + 1):
        spent, loss = timed(case.step, seconds)
        with switch.enable():
            if number == 0:
                with_fastkl = timed(case.step, seconds)
                losses, memory = [loss, with_fastkl[1]], [peak_bytes(case.step, "cpu")]
                continue
            inside.append(timed(case.step, seconds)[0])
        stock.append(spent)
    memory.append(peak_bytes(case.step, "cpu"))
    if case.same and not torch.allclose(*(loss.double() for loss in losses), rtol=1e-3):
        return f"| {case.integration} | {case.name} | losses differ: {losses[0]:.6g}, {losses[1]:.6g} | | |"
    before, after = statistics.median(stock), statistics.median(inside)
    ratio = f"{before * 1e3:.2f} / {after * 1e3:.2f} = {before / after:.2f}"
    mib = [f"{size / 2**20:.1f}" for size in reversed(memory)]
    return f"| {case.integration} | {case.name} | {ratio} | {mib[0]} / {mib[1]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.05, help="seconds of each way and round")
    parser.add_argument("--only", nargs="+", choices=("distributions", "diffusers", "pythae", "scvi", "pyro"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| integration | step | ms: library / with fastkl | peak MiB: library / with fastkl |\n|---|---|---|---|")
    for make in (distributions, diffusers, pythae, scvi, pyro):
        if options.only and make.__name__ not in options.only:
            continue
        for case in make():
            print(measure(case, options.rounds, options.seconds), flush=True)


if __name__ == "__main__":
    main()
