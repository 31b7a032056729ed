"""The state of a run: functions that save it to a checkpoint and restore it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from fastkl.vae import checkpoint, parallel
from fastkl.vae.errors import UserError
from fastkl.vae.rules import fixed_processes
from fastkl.vae.run import Run, discriminator_of
from fastkl.vae.sharded_parts import take, whole


def save(run: Run, monitored: dict[str, Any]) -> None:
    """Write the checkpoint, a collective call. Generator states are left out: they are functions of the step
    (streams.py)."""
    finite = torch.stack([parallel.local(parameter).isfinite().all() for parameter in run.vae.parameters()])
    if run.ranks.mean((~finite).any().float()) > 0:
        raise UserError(f"the weights are not finite at step {run.step}; {advice(run)}")
    state = {
        "settings": asdict(run.settings),
        "fingerprint": run.data.fingerprint,
        "shape": list(run.data.shape),
        "scaling": run.data.scaling.state_dict(),
        "ranks": run.ranks.size,
        "threads": torch.get_num_threads(),
        "step": run.step,
        **parts(run),
        "best": run.best,
        "scaler": run.scaler.state_dict(),
        "seconds": run.seconds,
        "window": run.window,
        "watch": monitored,
        "guard": run.guard.state_dict(),
        "history": run.history,
    }
    if run.shards is not None:
        run.shards.save(state)
    elif run.ranks.main:
        checkpoint.save(run.folder, state)


def parts(run: Run) -> dict[str, Any]:
    """The parts of the state with tensors that may be sharded."""
    discriminator = discriminator_of(run)
    return {
        "model": run.vae.state_dict(),
        "optimizers": {name: optimizer.state_dict() for name, optimizer in run.optimizers.items()},
        "discriminator": {} if discriminator is None else discriminator.state_dict(),
        "average": {} if run.average is None else run.average.state_dict(),
    }


def live(run: Run) -> dict[str, torch.Tensor]:
    """Tensors of a sharded run by the names of its checkpoint, with those that an optimizer has after a step."""
    tensors: dict[str, torch.Tensor] = {}
    for part, value in parts(run).items():
        take(value, part, tensors)
    for name, optimizer in run.optimizers.items():
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(parameters):
            of_moments = (f"optimizers/{name}/state/{index}/{moment}" for moment in ("exp_avg", "exp_avg_sq"))
            tensors.update(dict.fromkeys(of_moments, parameter.detach()))
    return tensors


def restore(run: Run, state: dict[str, Any]) -> None:
    """Load a checkpoint's state into a run that was started with the checkpoint's settings."""
    if state["fingerprint"] != run.data.fingerprint:
        raise UserError(
            f"--data: {run.data.source} holds other values than at the start of this run: give the same data"
        )
    if state["ranks"] != run.ranks.size and (why := fixed_processes(run.settings)):
        counts = f"{state['ranks']} processes and now has {run.ranks.size}"
        raise UserError(f"this run began with {counts}: start as many as at first, because {why}")
    if run.shards is not None:
        state = run.shards.load(state, live(run))
    elif "sharded" in state:
        state = whole(run.folder, state)
    try:
        run.vae.load_state_dict(state["model"])
        for name, optimizer in run.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if (discriminator := discriminator_of(run)) is not None:
            discriminator.load_state_dict(state["discriminator"])
        if run.average is not None:
            run.average.load_state_dict(state["average"])
        run.best = state["best"]
        run.scaler.load_state_dict(state["scaler"])
        run.window = dict(state["window"])
        run.watch.load_state_dict(state["watch"], run.device)
        run.guard.load_state_dict(state["guard"])
        run.step, run.seconds, run.history = int(state["step"]), float(state["seconds"]), state["history"]
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the checkpoint does not fit its own settings ({str(error).splitlines()[0]})") from None


def advice(run: Run) -> str:
    """The advice for a run with weights that are not finite."""
    written = (run.folder / checkpoint.NAME).exists()
    return (
        f"try a smaller --learning-rate ({'the checkpoint is of an earlier step' if written else 'no checkpoint yet'})"
    )
