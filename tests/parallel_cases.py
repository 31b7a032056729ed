"""Models whose forward returns one of fastkl's objects, under what shares a model's training among processes.

    python tests/parallel_cases.py FOLDER

trains every case in two processes, each on its rows, and leaves values and gradients in FOLDER; `test_parallel.py`
compares them with those of one process. A case makes a model, and says what its output loses on average.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastkl
from fastkl.priors.mixture import Mixture

from forked import fork

ROWS, INPUTS, LATENT, STEPS = 8, 5, 3, 2


class Encoder(nn.Module):
    """Its output is what `make` makes of 2 D numbers; the layer `spare` is in no loss."""

    def __init__(self, make):
        super().__init__()
        self.first, self.head, self.spare = nn.Linear(INPUTS, 7), nn.Linear(7, 2 * LATENT), nn.Linear(INPUTS, 2)
        self.make = make

    def forward(self, x):
        return self.make(self.head(self.first(x).tanh()))


class Moved(nn.Module):
    """A posterior goes in, another one comes out."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.linspace(-1, 1, LATENT))

    def forward(self, q):
        return fastkl.DiagonalNormal(q.mean + self.shift, q.logvar)


def halves(head):
    return fastkl.DiagonalNormal(head[:, :LATENT], head[:, LATENT:])


def deviations(head):
    settings = {"scale": "softplus", "bounds": fastkl.SoftBounds(-3.0, 3.0)}
    return fastkl.DiagonalNormal(*head.chunk(2, 1), **settings)


def loss_of(head):
    return fastkl.objectives.elbo(halves(head), None, lambda z: 0 * z.sum(-1))


def mixture_of(head):
    return Mixture(head[:, 0], head[:, :LATENT], head[:, LATENT:])


def lost(q):
    return (q.kl() + 0.1 * q.entropy()).mean()


def mixed(mixture):
    return sum(tensor.square().mean() for tensor in mixture if tensor is not None)


CASES = {
    "pair": (lambda: Encoder(halves), lost),
    "packed": (lambda: Encoder(fastkl.DiagonalNormal.from_packed), lost),
    "broadcast": (lambda: Encoder(lambda head: fastkl.DiagonalNormal(head, head[:, -1:])), lost),
    "scale and bounds": (lambda: Encoder(deviations), lost),
    "nested": (lambda: Encoder(lambda head: {"q": [halves(head), None]}), lambda out: lost(out["q"][0])),
    "between modules": (lambda: nn.Sequential(Encoder(fastkl.DiagonalNormal.from_packed), Moved()), lost),
    "loss": (lambda: Encoder(loss_of), lambda loss: loss.loss),
    "mixture": (lambda: Encoder(mixture_of), mixed),
}


def shard_parts(model):
    for part in model.children():
        fully_shard(part)
    return fully_shard(model)


WRAPPERS = {
    "unused parameters": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "static graph": lambda model: DistributedDataParallel(model, static_graph=True),
    "sharded": fully_shard,
    "sharded parts": shard_parts,
    "sharded and cast": lambda model: fully_shard(model, mp_policy=MixedPrecisionPolicy(output_dtype=torch.float64)),
}


def train(name, rows=slice(None), wrapper=None):
    """Value and gradients, step by step."""
    make, loss_of_output = CASES[name]
    torch.manual_seed(0)
    model = make()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("spare" not in key or wrapper == "unused parameters")
    wrapped = model if wrapper is None else WRAPPERS[wrapper](model)
    trained = [parameter for key, parameter in model.named_parameters() if "spare" not in key]
    x, found = torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(1)), []
    for _ in range(STEPS):
        wrapped.zero_grad()
        loss = loss_of_output(wrapped(x[rows]))
        loss.backward()
        gradients = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone() for p in trained]
        found.append([loss.detach().float(), *gradients])
    return found


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = torch.arange(ROWS).tensor_split(ranks)[rank]
    found = {}
    for wrapper in WRAPPERS:
        for name in CASES:
            try:
                found[wrapper, name] = train(name, rows, wrapper)
            except (RuntimeError, AttributeError) as error:  # the others go on
                found[wrapper, name] = f"{type(error).__name__}: {error}"
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    fork(2, lambda: main(Path(sys.argv[1])))
