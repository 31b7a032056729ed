"""Cases for `group=`: a function of a batch gives the same on one process as on several with a part each.

    python tests/group_cases.py 3 FOLDER

runs every case in three processes, each on its rows, and writes results and gradients to FOLDER; `test_group.py`
compares them with those of one process. A case takes the leaves [rows, ...] and the group, and returns values [rows] or
a single value.
"""

import sys
from pathlib import Path

import torch

import fastkl
from fastkl import monitors, remedies
from fastkl.ops import _group

from forked import fork


def draw(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def gathered(x, group):
    (everything,), first = _group.gather(group, x)
    return (everything.sin().sum() - everything[first : first + len(x)].cos().sum(1)) * x[:, 0]


def summed(x, group):
    return _group.total(group, x.square().sum(0)).prod().log()


def remedied(mu, logvar, group):
    q = fastkl.DiagonalNormal(mu, logvar)
    bits = [remedies.free_bits(kl, 0.9, per="batch", group=group) for kl in (q, q.kl()[:, None])]
    capacity = remedies.capacity(q.kl(), 1.0, per="batch", group=group)
    return bits[0] + bits[1].square() + capacity


def balanced(kl, group):
    return remedies.balance(kl, [1, 2, 3], group=group)


def monitored(x, group):
    """Of all processes' data, and of two that only the first one saw."""
    units, one = (monitors.ActiveUnits(group=group) for _ in range(2))
    units.update(x)
    if group is None or torch.distributed.get_rank(group) == 0:
        one.update(x[:2])
    return (units.compute() + one.compute()).sum() + 0 * x.sum()  # monitors have no gradient


def decomposed(z, mu, logvar, group):
    parts = fastkl.total_correlation(z, mu, logvar, 50, group=group)
    return parts[0] + 2 * parts[1] - parts[2]


ROWS = 7  # which neither 2 nor 3 divide
# name -> (case, leaves)
CASES = {
    "mmd": (lambda x, y, group: fastkl.mmd(x, y, group=group), draw((ROWS, 3), (ROWS, 3))),
    "mmd_normal": (lambda mu, logvar, group: fastkl.mmd_normal(mu, logvar, group=group), draw((ROWS, 3), (ROWS, 3))),
    "gather": (gathered, draw((ROWS, 3))),
    "total": (summed, draw((ROWS, 3))),
    "free bits and capacity": (remedied, draw((ROWS, 3), (ROWS, 3))),
    "balance": (balanced, draw((ROWS, 3))),
    "active units": (monitored, draw((ROWS, 3))),
    "total_correlation": (decomposed, draw((ROWS, 3), (ROWS, 3), (ROWS, 3))),
}


def run(case, leaves, group, first=0, ranks=1):
    """Value and gradients, of a loss whose sum over the processes is the same however many they are."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    out = case(*leaves, group)
    weights = torch.linspace(1, 2, ROWS, dtype=out.dtype)[first : first + len(leaves[0])]
    loss = out / ranks if out.dim() == 0 else (out * weights).sum()
    return [out.detach(), *torch.autograd.grad(loss, leaves)]


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = torch.arange(ROWS).tensor_split(ranks)[rank]
    found = {
        name: run(case, [leaf[rows] for leaf in leaves], torch.distributed.group.WORLD, int(rows[0]), ranks)
        for name, (case, leaves) in CASES.items()
    }
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    fork(int(sys.argv[1]), lambda: main(Path(sys.argv[2])))
