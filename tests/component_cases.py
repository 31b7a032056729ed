"""Mixtures whose components are sharded over 2, 3 and 4 processes.

    python tests/component_cases.py FOLDER

runs every case on each mesh of MESHES with the mixture's tensors sharded along their components, and leaves whole
values and gradients, placements and the bytes of collectives in FOLDER; `test_components.py` compares them with those
of one process. A case takes the rows' tensors, `rows` of them, and the mixture's.
"""

import functools
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, Shard, distribute_tensor

import fastkl
from fastkl import priors

from forked import fork
from helpers import peak_bytes
from sharding_cases import triangle
from traffic import Traffic

SEED, N, D = 5, 9, 4
K = 5  # on 4 processes, one has a single component and one has none; on 3, one has a single one


def draw(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def unused(z, logits, *others):
    """Two components of weight 0, which are all of a process on 3 or 4 processes."""
    return [z, logits.index_fill(0, torch.tensor([0, 1]), -torch.inf), *others]


class Sharded:
    """A prior with these parameters, which may be DTensors."""

    def __init__(self, covariance, *values):
        self.prior = priors.GaussianMixture(K, D, covariance)
        for name, value in zip([name for name, _ in self.prior.named_parameters()], values):
            delattr(self.prior, name)
            setattr(self.prior, name, value)


def of_prior(covariance):
    def case(mu, logvar, *values):
        prior, q = Sharded(covariance, *values).prior, fastkl.DiagonalNormal(mu, logvar)
        kl = sum(prior.kl(q, method=method, seed=SEED) for method in ("mc", "upper"))
        return kl + sum(prior.kl_bounds(q)) + prior.log_prob(mu) + prior.responsibilities(mu).square().sum(-1)

    return case


_GMM = [(K,), (K, D), (K, D)]
kl_gmm = functools.partial(functools.partial, fastkl.kl_gmm)
# name -> (case, number of the rows' tensors, leaves)
CASES = {
    "gmm_log_prob": (fastkl.gmm_log_prob, 1, draw((N, D), *_GMM)),
    "gmm_log_prob, far apart": (
        lambda z, logits, means, a: fastkl.gmm_log_prob(z, logits, 30 * means, a),
        1,
        draw((N, D), *_GMM),
    ),
    "gmm_log_prob, tied": (fastkl.gmm_log_prob, 1, draw((N, D), (K,), (K, D), (1, D))),
    "gmm_log_prob, a number": (lambda *t: fastkl.gmm_log_prob(*t, 0.3), 1, draw((N, D), (K,), (K, D))),
    "gmm_log_prob, full": (
        lambda z, logits, means, a: fastkl.gmm_log_prob(z, logits, means, scale_tril=triangle(a)),
        1,
        draw((2, N, D), (K,), (K, D), (K, D, D)),
    ),
    "gmm_log_prob, weights 0": (fastkl.gmm_log_prob, 1, unused(*draw((N, D), *_GMM))),
    "gmm_log_prob, a mixture for each": (fastkl.gmm_log_prob, 1, draw((N, D), (N, K), (N, K, D), (K, 1))),
    "gmm_log_prob, no rows": (fastkl.gmm_log_prob, 1, draw((0, D), *_GMM)),
    "gmm_responsibilities": (fastkl.gmm_responsibilities, 1, draw((N, D), *_GMM)),
    "kl_gmm": (kl_gmm(seed=SEED, num_samples=2), 2, draw((N, D), (N, D), *_GMM)),
    "kl_gmm, stl": (kl_gmm(seed=SEED, gradient="stl", entropy="sampled"), 2, draw((N, D), (N, D), *_GMM)),
    "kl_gmm, upper": (kl_gmm(method="upper"), 2, draw((N, D), (N, D), *_GMM)),
    "kl_gmm, lower": (kl_gmm(method="lower"), 2, draw((N, D), (N, D), *_GMM)),
    "kl_gmm_bounds": (lambda *t: sum(fastkl.kl_gmm_bounds(*t)), 2, draw((N, D), (N, D), *_GMM)),
    "prior": (of_prior("diag"), 2, draw((N, D), (N, D), *_GMM)),
    "prior, full": (of_prior("full"), 2, draw((N, D), (N, D), (K,), (K, D), (K, D), (K, D * (D - 1) // 2))),
    "prior, tied": (of_prior("tied"), 2, draw((N, D), (N, D), (K,), (K, D), (1, D))),
}
# name -> (the processes, the rows' placements, the mixture's)
MESHES = {
    "2": ([0, 1], [Replicate()], [Shard]),
    "3": ([0, 1, 2], [Replicate()], [Shard]),
    "4": ([0, 1, 2, 3], [Replicate()], [Shard]),
    "rows and components": ([[0, 1], [2, 3]], [Shard(0), Replicate()], [Replicate, Shard]),
    "components twice": ([[0, 1], [2, 3]], [Replicate(), Replicate()], [Shard, Shard]),
    "rows as components": ([0, 1, 2], [Shard(0)], [Shard]),  # which are then gathered
}
SIZES = ("2", "3", "4")
LARGE = (4096, 1024, 4)  # rows, components, dimensions
# All cases on four processes; one of each kind, also in float32, on every mesh.
KINDS = ("gmm_log_prob", "gmm_responsibilities", "kl_gmm")
RUNS = [("4", name, torch.float64) for name in CASES if name not in KINDS]
RUNS += [(at, name, dtype) for at in MESHES for name in KINDS for dtype in (torch.float32, torch.float64)]


def place(name, index, leaf, mesh, at):
    """A leaf as a DTensor: one of the rows, or one of the mixture, sharded along its components."""
    _, rows, mixture = MESHES[at]
    _, count, leaves = CASES[name]
    if index < count:
        dim = leaves[0].dim() - 2  # the last of the batch
        return distribute_tensor(leaf, mesh, [Shard(dim) if p == Shard(0) else p for p in rows])
    dim = next((dim for dim in range(leaf.dim()) if leaf.shape[dim] == K), None)
    kinds = [Replicate() if dim is None or kind is Replicate else Shard(dim) for kind in mixture]
    return distribute_tensor(leaf, mesh, kinds)


def run(name, dtype, at=None, mesh=None):
    """(value and gradients, whole, of a weighted sum; the value's placements; the bytes given to collectives)."""
    case, _, leaves = CASES[name]
    leaves = [leaf.to(dtype) for leaf in leaves]
    if mesh is not None:
        leaves = [place(name, index, leaf, mesh, at) for index, leaf in enumerate(leaves)]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    with Traffic() as traffic:
        out = case(*leaves)
    weights = torch.linspace(1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    if mesh is not None:
        weights = distribute_tensor(weights, mesh, [Replicate()] * mesh.ndim)
    with traffic:
        found = [out.detach(), *torch.autograd.grad(out, leaves, weights)]
    whole = [each.full_tensor() if isinstance(each, DTensor) else each for each in found]
    return whole, str(getattr(out, "placements", None)), traffic.bytes


def large(at, mesh):
    """Peak bytes of forward and of backward, for a mixture of which a process has half."""
    rows, components, dimensions = LARGE
    leaves = [torch.randn(shape) for shape in ((rows, dimensions), (components,), (components, dimensions))]
    places = [Replicate(), Shard(0), Shard(0)]
    leaves = [distribute_tensor(leaf, mesh, [p]).requires_grad_() for leaf, p in zip(leaves, places)]
    results = []
    forward = peak_bytes(lambda: results.append(fastkl.gmm_log_prob(*leaves)))
    return forward, peak_bytes(lambda: torch.autograd.grad(results[0].sum(), leaves))


def refusal(mesh):
    """The error of a second derivative."""
    z, *mixture = (place("gmm_log_prob", *leaf, mesh, "2") for leaf in enumerate(CASES["gmm_log_prob"][2]))
    z.requires_grad_()
    try:
        torch.autograd.grad(fastkl.gmm_log_prob(z, *mixture).sum(), z, create_graph=True)
    except RuntimeError as error:
        return f"RuntimeError: {error}"


def work(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found = {}
    for at, (processes, *_) in MESHES.items():
        mesh = DeviceMesh("cpu", processes)
        if rank not in mesh.mesh:
            continue
        for on, name, dtype in RUNS:
            if on == at:
                found[at, name, dtype] = run(name, dtype, at, mesh)
        if at == "2":
            found["memory"], found["refusal"] = large(at, mesh), refusal(mesh)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    fork(4, lambda: work(Path(sys.argv[1])))
