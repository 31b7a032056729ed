"""Calls of the objectives that move latents to the prior: by transport, and by a discriminator."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from fuzz_objectives import _Task, decoded, outputs, record

from fastkl import objectives
from fastkl.ops.normal.rsample_normal import draw_normal
from fastkl.reference import Stream

import fuzz_oracle as oracle
from fuzz_check import Case, compute_dtype
from fuzz_inputs import Draw
from helpers import DEVICE


def task_of(d: Draw) -> _Task:
    """With draws from the prior, which may be learned; and noise without ties, by which points are sorted."""
    task = _Task(d, (None, "normal", "diag", "flow"), 1)
    task.tensors["eps"] = d.tensor(d.normal(task.tensors["eps"].shape), expand=False)
    task.tensors["prior_samples"] = d.tensor(d.normal((max(2, d.size(9)), task.q.shape[-1])), expand=False)
    return task


def schedule(diameter: float, blur: float, scaling: float, final_updates: int) -> list[float]:
    """Temperatures from diameter^2, twice, to blur^2, each scaling^2 of the one before, as geomloss has them."""
    eps = diameter * diameter
    steps = [eps] if eps > 0 else []
    while eps > blur * blur * (1 + 1e-9):
        steps.append(eps)
        eps *= scaling * scaling
    return [*steps, *[blur * blur] * (1 + final_updates)]


def transport_cost(x, y, steps):
    """OT_eps(x, y) of equal weights for |x - y|^2 / 2: potentials averaged with their updates, and updated once more,
    which alone has a gradient."""
    cost = 0.5 * (x.unsqueeze(1) - y.detach()).square().sum(-1), 0.5 * (y.unsqueeze(1) - x.detach()).square().sum(-1)
    weights = math.log(len(y)), math.log(len(x))

    def update(side, potential, eps):
        return -eps * ((potential - cost[side]) / eps - weights[side]).logsumexp(1)

    with torch.no_grad():
        f, g = update(0, 0.0, steps[0]), update(1, 0.0, steps[0])
        for eps in steps:
            f, g = (f + update(0, g, eps)) / 2, (g + update(1, f, eps)) / 2
    return update(0, g, steps[-1]), update(1, f, steps[-1])


def sinkhorn(x, y, blur, scaling, diameter, debias, final_updates):
    if diameter is None:
        both = torch.cat([x, y]).detach()
        diameter = (both.amax(0) - both.amin(0)).norm().item()
    steps = schedule(diameter, blur, scaling, final_updates)
    f, g = transport_cost(x, y, steps)
    if debias:
        f, g = f - transport_cost(x, x, steps)[0], g - transport_cost(y, y, steps)[0]
    return f.mean() + g.mean()


def transport(d: Draw) -> Case:
    """swae and sinkhorn_ae."""
    name, task, seed = d.pick(("swae", "sinkhorn_ae")), task_of(d), d.seed()
    penalty = d.pick((0.5, 10.0))
    if name == "swae":
        settings = {"num_projections": d.pick((1, 7, 50)), "p": d.pick((1, 1.5, 2, 3)), "seed": seed}
    else:
        settings = {"blur": d.pick((0.5, 0.5, 3.0)), "scaling": d.pick((0.5, 0.3)), "diameter": d.pick((None, 5.0))}
        settings |= {"debias": d.chance(0.7), "final_updates": d.pick((0, 3))}
    of = compute_dtype({name: task.tensors[name] for name in ("eps", "prior_samples", *task.q.tensors)})
    size = task.q.shape[-1]

    def call(**t):
        how = settings | {"penalty": penalty, "eps": t["eps"], "prior_samples": t["prior_samples"]}
        return outputs(getattr(objectives, name)(*task.given(t), **how))

    def truth(noise=None, **t):
        z = task.z(t)
        points = z.flatten(0, -2), t["prior_samples"]
        if name == "swae":
            distance = oracle.sliced(*points, noise / noise.norm(dim=1, keepdim=True), settings["p"])
        else:
            distance = sinkhorn(*points, **settings)
        reconstruction = decoded(z[0], t["x"])
        return record(penalty * distance - reconstruction.mean(), reconstruction, task.kl(t), distance)

    def noise():
        zero, tensor = torch.zeros((), dtype=of, device=DEVICE), torch.as_tensor(seed, device=DEVICE)
        return draw_normal(Stream.DIRECTIONS, (settings["num_projections"], size), zero, zero, tensor).double(), 0.0

    shown = settings | {"objective": name, "prior": task.prior and task.prior.kind, **task.q.settings}
    return Case(call, task.tensors, truth, noise if name == "swae" else None, shown, together=True)


def adversarial(d: Draw) -> Case:
    """aae, whose two losses have gradients of their own."""
    task, penalty, hidden = task_of(d), d.pick((0.5, 1.0, 3.0)), d.size(8)
    size = task.q.shape[-1]
    large = d.pick((1.0, 1.0, 30.0))  # odds that saturate
    shapes = {"0.weight": (hidden, size), "0.bias": (hidden,), "2.weight": (1, hidden), "2.bias": (1,)}
    for name, shape in shapes.items():
        values = d.normal(shape) * (large if name[0] == "2" else 1.0)
        task.tensors["d" + name.replace(".", "_")] = d.tensor(values, expand=False)

    def discriminator(t):
        net = torch.nn.Sequential(torch.nn.Linear(size, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 1))
        for name in shapes:
            index, parameter = name.split(".")
            net[int(index)]._parameters[parameter] = t[f"d{index}_{parameter}"]
        return net

    def call(**t):
        how = {"penalty": penalty, "eps": t["eps"], "prior_samples": t["prior_samples"]}
        found, own = objectives.aae(*task.given(t), discriminator(t), **how)
        return [*outputs(found), own]

    def truth(**t):
        z, y = task.z(t), t["prior_samples"]
        rows, reconstruction = z.flatten(0, -2), decoded(z[0], t["x"])

        def odds(points, fixed=False):
            w = [t["d" + name.replace(".", "_")] for name in shapes]
            first, bias, second, last = (p.detach() for p in w) if fixed else w
            return (torch.tanh(points @ first.T + bias) @ second.T + last).squeeze(-1)

        softplus = lambda x: F.softplus(x, threshold=700)  # noqa: E731
        fooled = softplus(-odds(rows, True)).mean()
        fooled = fooled + softplus(odds(y, True)).mean() if task.tensors["prior_samples"].requires_grad else fooled
        real, false = odds(y.detach()), odds(rows.detach())
        own = softplus(-real).mean() + softplus(false).mean()
        right = torch.cat([real > 0, false < 0]).double()
        loss = penalty * fooled - reconstruction.mean()
        return [*record(loss, reconstruction, task.kl(t), fooled, own, right), own]

    shown = {"prior": task.prior and task.prior.kind, "penalty": penalty, "hidden": hidden, **task.q.settings}
    return Case(call, task.tensors, truth, settings=shown, together=True)
