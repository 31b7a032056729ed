"""Ops and priors on DTensors, and priors that fully_shard shards, on four processes.

    python tests/sharding_cases.py FOLDER

runs every case with tensors sharded in each of LAYOUTS and leaves whole values, gradients and placements in FOLDER;
`test_sharding.py` compares them with those of one process. A case takes the leaves; those of the shape of the first are
sharded as it is, the others not at all.
"""

import multiprocessing
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

import fastkl
from fastkl import monitors, objectives, priors

SEED, N, D, K = 5, 7, 6, 3  # two processes do not divide N, and four leave one of them with a single row


def draw(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def triangle(a):
    return a.tril(-1) + torch.diag_embed(a.diagonal(dim1=-2, dim2=-1).exp())


def drawn_and_kl(*tensors):
    z, kl = fastkl.rsample_kl(*tensors, seed=SEED)
    return z.sin().sum(-1) + kl


def moments(*tensors):
    found = fastkl.gmm_moments(*(tensor.detach() for tensor in tensors))
    return sum(each.sin().sum() for each in found) + 0 * sum(tensor.sum() for tensor in tensors)


def mixture_prior(mu, logvar):
    """A prior whose parameters are DTensors too: buffers of a module that distribute_module would replicate."""
    prior = priors.GaussianMixture(K, D).double()
    for parameter, value in zip(prior.parameters(), draw((K,), (K, D), (K, D))):
        parameter.data = value
    if isinstance(mu, DTensor):
        torch.distributed.tensor.distribute_module(prior, mu.device_mesh)
    q = fastkl.DiagonalNormal(mu, logvar)
    kl = prior.kl(q, seed=SEED, num_samples=2) + prior.kl(q, method="relaxed", seed=SEED, tau=0.7)
    return kl + prior.log_prob(mu) + prior.rsample(4, seed=SEED).square().mean()


_GMM = [(K,), (K, D), (K, D)]
# name -> (case, leaves)
CASES = {
    "kl_normal": (fastkl.kl_normal, draw((N, D), (N, D))),
    "kl_normal, numbers": (lambda mu: fastkl.kl_normal(mu, 0.3, 0.1, -0.2), draw((N, D))),
    "kl_normal, shared prior": (
        lambda *t: fastkl.kl_normal(*t[:2], t[2], t[3].exp(), prior_scale="std"),
        draw((N, D), (N, D), (D,), (1, D)),
    ),
    "kl_normal, a prior sharded where it has one row": (fastkl.kl_normal, draw((N, D), (N, D), (1, D), (1, D))),
    "normal_log_prob, a variance sharded where it has one row": (
        fastkl.normal_log_prob,
        draw((N, D), (N, D), (1, D)),
    ),
    "kl_normal, full prior": (fastkl.kl_normal, draw(*[(N, D)] * 4)),
    "kl_normal, packed": (lambda head: fastkl.DiagonalNormal.from_packed(head).kl(), draw((N, D, 4))),
    "kl_normal, elements": (lambda *t: fastkl.kl_normal(*t, event_ndim=0), draw((N, D), (N, D))),
    "kl_normal_per_dim": (fastkl.kl_normal_per_dim, draw((N, D), (N, D))),
    "wasserstein2_normal": (fastkl.wasserstein2_normal, draw(*[(N, D)] * 4)),
    "rsample_normal": (
        lambda *t: fastkl.rsample_normal(*t, seed=SEED, num_samples=2).sin(),
        draw((N, D), (N, D)),
    ),
    "rsample_normal, packed": (
        lambda head: fastkl.DiagonalNormal.from_packed(head).rsample(seed=SEED).sin(),
        draw((N, D, 5)),
    ),
    "rsample_kl": (drawn_and_kl, draw((N, D), (N, D))),
    "rsample_kl, own noise": (
        lambda mu, logvar, eps: fastkl.rsample_kl(mu, logvar, eps=eps)[0].sin(),
        draw(*[(N, D)] * 3),
    ),
    "bernoulli_log_prob": (fastkl.bernoulli_log_prob, draw((N, D), (N, D))),
    "normal_log_prob": (fastkl.normal_log_prob, draw((N, D), (N, D), (N, 1))),
    "normal_log_prob, samples": (
        lambda *t: fastkl.normal_log_prob(*t, event_ndim=1),
        draw((2, N, D), (N, D), (D,)),
    ),
    "gmm_log_prob": (fastkl.gmm_log_prob, draw((N, D), *_GMM)),
    "gmm_log_prob, samples": (
        lambda z, logits, means, a: fastkl.gmm_log_prob(z, logits, means, scale_tril=triangle(a)),
        draw((2, N, D), (K,), (K, D), (K, D, D)),
    ),
    "gmm_log_prob, a mixture for each": (fastkl.gmm_log_prob, draw((N, D), (N, K), (N, K, D), (1, D))),
    "gmm_responsibilities": (fastkl.gmm_responsibilities, draw((N, D), *_GMM)),
    "gmm_moments": (moments, draw((N, D), *_GMM)),
    "kl_gmm": (lambda *t: fastkl.kl_gmm(*t, seed=SEED, num_samples=2), draw((N, D), (N, D), *_GMM)),
    "kl_gmm, upper": (lambda *t: fastkl.kl_gmm(*t, method="upper"), draw((N, D), (N, D), *_GMM)),
    "kl_gmm_bounds": (lambda *t: sum(fastkl.kl_gmm_bounds(*t)), draw((N, D), (N, D), *_GMM)),
    "gumbel_softmax": (
        lambda logits, tau: fastkl.gumbel_softmax(logits, tau.exp(), seed=SEED),
        draw((N, K), ()),
    ),
    "rsample_gmm": (
        lambda *t: fastkl.rsample_gmm(*t, tau=0.7, seed=SEED).sin(),
        draw((N, K), (K, D), (K, D)),
    ),
    "sample_gmm": (
        lambda *t: fastkl.sample_gmm(*t, num_samples=4, seed=SEED)[0] + 0 * sum(each.sum() for each in t),
        draw((N, K), (K, D), (K, D)),
    ),
    "iwae": (fastkl.iwae, draw((3, N))),
    "kl_multivariate_normal": (
        lambda mu, a, prior_mu, std: fastkl.kl_multivariate_normal(mu, triangle(a), prior_mu, std.exp()),
        draw((N, 3), (N, 3, 3), (N, 3), (3,)),
    ),
    "wasserstein2_multivariate_normal": (
        lambda mu, a, prior_mu, std: fastkl.wasserstein2_multivariate_normal(mu, triangle(a), prior_mu, std.exp()),
        draw((N, 3), (N, 3, 3), (N, 3), (3,)),
    ),
    "mmd": (fastkl.mmd, draw((N, D), (N, D))),
    "total_correlation": (lambda *t: sum(fastkl.total_correlation(*t, 50)), draw(*[(N, D)] * 3)),
    "sinkhorn_divergence": (fastkl.sinkhorn_divergence, draw((N, D), (N, D))),
    "sliced_wasserstein": (lambda *t: fastkl.sliced_wasserstein(*t, 5, seed=SEED), draw((N, D), (N, D))),
    "mixture prior": (mixture_prior, draw((N, D), (N, D))),
}
# Of the first leaf, on a mesh of two times two processes.
LAYOUTS = {
    "rows and columns": [Shard(0), Shard(1)],
    "rows": [Shard(0), Shard(0)],
    "columns and addends": [Shard(1), Partial()],
}
# All cases have the first layout; one of each kind has the others.
KINDS = ("kl_normal, shared prior", "kl_normal, packed", "kl_normal_per_dim", "rsample_kl", "gmm_log_prob, samples",
         "kl_gmm", "gumbel_softmax", "iwae", "mmd")  # fmt: skip
RUNS = [(layout, name) for layout in LAYOUTS for name in CASES if layout == "rows and columns" or name in KINDS]


def place(leaf, first, layout, mesh):
    if leaf.dim() == first.dim() and leaf.shape == (1, *first.shape[1:]) and layout[0] == Shard(0):
        return distribute_tensor(leaf, mesh, [Shard(0), Replicate()])  # one process has it
    if leaf.shape != first.shape:
        return distribute_tensor(leaf, mesh, [Replicate()] * 2)
    if layout[1] != Partial():
        return distribute_tensor(leaf, mesh, layout)
    part = leaf.chunk(2, 1)[mesh.get_local_rank(0)].clone()
    return DTensor.from_local(part / 2, mesh, layout, shape=leaf.shape, stride=leaf.stride())


def run(case, leaves):
    """Value and gradients, whole, of a weighted sum of the results; and the results' placements."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    out = case(*leaves)
    weights = torch.linspace(1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    if isinstance(out, DTensor):
        weights = distribute_tensor(weights, out.device_mesh, [Replicate()] * 2)
    found = [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]
    return [each.full_tensor() if isinstance(each, DTensor) else each for each in found], str(
        getattr(out, "placements", None)
    )


PRIORS = {
    "learned": lambda: priors.LearnedNormal(D),
    "mixture": lambda: priors.GaussianMixture(K, D),
    "full covariances": lambda: priors.GaussianMixture(K, D, covariance="full"),
    "per position": lambda: priors.PerPosition(priors.GaussianMixture(K, D // 2), 2),
}


def train_prior(name, rows=slice(None), shard=lambda prior: None):
    """A step of a prior on its own, whose methods are called and not its forward: value and gradients."""
    torch.manual_seed(0)
    prior = PRIORS[name]().double()
    prior.requires_grad_()
    shard(prior)
    mu, logvar = (leaf[rows] for leaf in draw((8, D), (8, D)))
    q, settings = fastkl.DiagonalNormal(mu, logvar), {} if name == "learned" else {"method": "upper"}
    for _ in range(2):
        prior.zero_grad()
        loss = (
            prior.kl(q, **settings).mean()
            - prior.log_prob(mu).mean()
            + prior.rsample(3, seed=(SEED, 0)).square().mean()
        )
        loss.backward()
    gradients = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in prior.parameters()]
    return [loss.detach(), prior.sample(4, seed=(SEED, 0)), *gradients]


def refusals(mesh):
    """Messages of errors."""
    mu = distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0), Replicate()])
    prior = fully_shard(priors.GaussianMixture(K, D))
    calls = {"mixed": lambda: fastkl.kl_normal(mu, torch.zeros(4, 2)), "fit": lambda: prior.fit(torch.randn(9, D))}
    found = {}
    for name, call in calls.items():
        try:
            call()
        except (TypeError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def own_seeds(mesh):
    """Noise without `seed=` of a DTensor that is sharded over processes whose generators differ, and of its copies."""
    torch.manual_seed(torch.distributed.get_rank())
    zero = distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0), Replicate()], src_data_rank=None)
    return fastkl.rsample_normal(zero, zero).full_tensor()


def drawn(seed):
    """What every function that draws noise draws from a seed, of plain tensors."""
    torch.manual_seed(0)
    zero, (x, y) = torch.zeros(4, 3), draw((4, 3), (4, 3))
    q, mixture, normal = fastkl.DiagonalNormal(zero, zero), priors.GaussianMixture(K, 3), priors.LearnedNormal(3)
    flow = priors.FlowPrior(StandardFlow())
    information = monitors.MutualInformation()
    information.update(fastkl.DiagonalNormal(x, zero), seed=seed)
    found = {
        "rsample_normal": fastkl.rsample_normal(zero, zero, seed=seed),
        "rsample_kl": fastkl.rsample_kl(zero, zero, num_samples=2, seed=seed)[0],
        "DiagonalNormal": q.sample(seed=seed),
        "gumbel_softmax": fastkl.gumbel_softmax(zero, seed=seed),
        "rsample_gmm": fastkl.rsample_gmm(zero, mixture.means, num_samples=3, seed=seed),
        "sample_gmm": fastkl.sample_gmm(zero, mixture.means, num_samples=9, seed=seed)[0],
        "kl_gmm": fastkl.kl_gmm(x, x, *mixture.mixture()[:2], seed=seed),
        "sliced_wasserstein": fastkl.sliced_wasserstein(x, y, 5, seed=seed),
        "monitors": information.compute(),
        "objectives": objectives.swae(fastkl.DiagonalNormal(x, y), None, lambda z: z.sum(-1), seed=seed).loss,
        "mixture.kl": mixture.kl(fastkl.DiagonalNormal(x, y), seed=seed),
        "mixture.kl, relaxed": mixture.kl(fastkl.DiagonalNormal(x, y), method="relaxed", seed=seed),
        "mixture.sample": mixture.sample(5, seed=seed),
        "mixture.rsample": mixture.rsample(5, seed=seed),
        "mixture.sample of a component": mixture.sample(5, component=1, seed=seed),
        "normal.sample": normal.sample(5, seed=seed),
        "flow.sample": flow.sample(5, seed=seed),
        "flow.kl": flow.kl(fastkl.DiagonalNormal(x, y), entropy="sampled", seed=seed),
        "per position": priors.PerPosition(mixture, 2).sample(3, seed=seed),
    }
    return {name: value.detach() for name, value in found.items()}


class StandardFlow(torch.nn.Module):
    """A flow's interface."""

    def forward(self):
        return torch.distributions.Independent(torch.distributions.Normal(torch.zeros(3), torch.ones(3)), 1)


def fitted(seed):
    """A mixture fitted to posteriors, with the same seed on every rank."""
    prior = priors.GaussianMixture(K, 3)
    mu, logvar = draw((50, 3), (50, 3))
    prior.fit(fastkl.DiagonalNormal(mu, logvar), seed=seed, iterations=3)
    return prior.means.detach()


def noises():
    """From each kind of seed; and without one, from generators in one state."""
    torch.manual_seed(0)
    alike = fastkl.rsample_normal(torch.zeros(4, 3), torch.zeros(4, 3))
    compiled = torch.compile(lambda mu, seed: fastkl.rsample_normal(mu, mu, seed=seed), fullgraph=True)
    return {
        "number": drawn(7), "tensor": drawn(torch.tensor(7)), "shared": drawn((7, 0)), "of rank 2": drawn((7, 2)),
        "shared tensor": drawn((torch.tensor(7), 0)), "alike": alike, "fit": fitted(7),
        "compiled": [compiled(torch.zeros(4, 3), seed) for seed in (7, torch.tensor(7), (7, 0), 8)],
    }  # fmt: skip


def work(rank: int, folder: Path) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2))
    found = {}
    for layout, name in RUNS:
        case, leaves = CASES[name]
        found[layout, name] = run(case, [place(leaf, leaves[0], LAYOUTS[layout], mesh) for leaf in leaves])
    for name in PRIORS:
        found["prior", name] = train_prior(name, torch.arange(8).tensor_split(4)[rank], fully_shard)
    found["noise"] = noises()
    found["refusals"], found["own seeds"] = refusals(mesh), own_seeds(mesh)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def main(folder: Path) -> None:
    """Forked, the four import torch once, which is most of their time."""
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=work, args=(rank, folder)) for rank in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(max(abs(worker.exitcode) for worker in workers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
