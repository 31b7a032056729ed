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
from traffic import Traffic


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


def uniformly_decomposed(z, mu, logvar, group):
    return sum(fastkl.total_correlation(z, mu, logvar, 50, weights="mws", group=group)[::2])


def unevenly_decomposed(z, mu, logvar, late, group):
    """Of the rows that are late, as `uneven`."""
    chosen = [each[late[:, 0] > 0] for each in (z, mu, logvar)]
    return _group.total(group, decomposed(*chosen, group).sum()) + 0 * late.sum()


def uneven(x, y, late, group):
    """Of the rows that are late: on several processes, the first has one of x, or none."""
    chosen = x[late[:, 0] > 0]
    return (
        fastkl.mmd(chosen, y, kernel="rbf", estimator="biased", group=group)
        + 0 * late.sum()
        + (fastkl.sinkhorn_divergence(chosen, y, 0.5, group=group))
    )


def transported(x, y, weights, group):
    weights = weights[:, 0].square()
    weights = weights / _group.total(group, weights.sum())
    plain = fastkl.sinkhorn_divergence(x, y, 0.3, debias=False, diameter=5.0, group=group)
    return plain + fastkl.sinkhorn_divergence(x, 2 * y, 0.5, weights_x=weights, group=group)


ROWS = 7  # which neither 2 nor 3 divide
LATE = torch.arange(ROWS, dtype=torch.float64)[:, None] - 2.5
FAR = draw((ROWS, 3))[0] + 900 * (LATE == 1.5)  # of one process
# name -> (case, leaves)
CASES = {
    "mmd": (lambda x, y, group: fastkl.mmd(x, y, group=group), draw((ROWS, 3), (ROWS, 3))),
    "mmd, uneven rows": (uneven, [*draw((ROWS, 3), (ROWS, 3)), LATE]),
    "mmd_normal, points": (lambda mu, group: fastkl.mmd_normal(mu, group=group), draw((ROWS, 3))),
    "mmd_normal": (lambda mu, logvar, group: fastkl.mmd_normal(mu, logvar, group=group), draw((ROWS, 3), (ROWS, 3))),
    "gather": (gathered, draw((ROWS, 3))),
    "total": (summed, draw((ROWS, 3))),
    "free bits and capacity": (remedied, draw((ROWS, 3), (ROWS, 3))),
    "balance": (balanced, draw((ROWS, 3))),
    "active units": (monitored, draw((ROWS, 3))),
    "sinkhorn_divergence": (transported, draw((ROWS, 3), (ROWS, 3), (ROWS, 1))),
    "total_correlation": (decomposed, draw((ROWS, 3), (ROWS, 3), (ROWS, 3))),
    "total_correlation, uniform weights": (uniformly_decomposed, draw((ROWS, 3), (ROWS, 3), (ROWS, 3))),
    "total_correlation, uneven rows": (unevenly_decomposed, [*draw((ROWS, 3), (ROWS, 3), (ROWS, 3)), LATE]),
    "total_correlation, a row far from its own": (decomposed, [FAR, *draw((ROWS, 3), (ROWS, 3), (ROWS, 3))[1:]]),
}


def transported_once(x, y, group):
    return fastkl.sinkhorn_divergence(x, y, 1.0, diameter=5.0, group=group)


# Of these the bytes of collectives are counted, forward and backward together.
COUNTED = {
    "mmd": CASES["mmd"],
    "sinkhorn_divergence": (transported_once, CASES["mmd"][1]),
    "total_correlation": CASES["total_correlation"],
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
    for name, (case, leaves) in COUNTED.items():
        with Traffic() as traffic:
            run(case, [leaf[rows] for leaf in leaves], torch.distributed.group.WORLD, int(rows[0]), ranks)
        found["traffic", name] = traffic.bytes
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    fork(int(sys.argv[1]), lambda: main(Path(sys.argv[2])))
