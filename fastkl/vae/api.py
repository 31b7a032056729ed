"""Training from Python: the loop of `fastkl train` with your own data, model or objective."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from fastkl.vae import checkpoint, cli, parallel, rules, trained
from fastkl.vae.model import OWN, VAE
from fastkl.vae.run import Own
from fastkl.vae.trained import Trained


def train(
    data: Any = None, *, out: str | PathLike, model: str | VAE | None = None, objective: str | Callable[..., Any] = "",
    resume: bool = False, resume_if_begun: bool = False, report: bool = False, tensorboard: bool = False,
    wandb: str = "",
    **options: Any,
) -> Trained:  # fmt: skip
    """Train a VAE, keep the run in a folder, and return its model. Under torchrun all processes train together.

    Args:
        data: an array or tensor [N, features], [N, H, W], [N, C, H, W] or [N, C, T, H, W]; a pair (data, labels), whose
            labels serve the report only; a dictionary with names such as x, y, x_test and y_test; or a name or path as
            for `fastkl train --data`, which scales numbers alike. None: the digits, or with `resume` the data of the
            run.
        out: the folder of the run.
        model: a `fastkl.vae.VAE` of your own encoder [N, *shape] -> [N, 2 * latent, ...] and decoder, trained in place;
            or the name of a model as for `--model`, such as "conv".
        objective: the name of one of `fastkl.objectives`, or a function of (posterior, prior, log_likelihood) that
            returns a `fastkl.objectives.Loss`, whose terms include "kl" and "reconstruction".
        resume: continue the run in `out`, with the same data and model.
        resume_if_begun: continue the run in `out`, or start it: for a launcher that calls the function again.
        report, tensorboard: whether to write the report at the end, and TensorBoard events during the run.
        wandb: a project of Weights & Biases that gets the curves and the pictures, too.
        **options: every option of `fastkl train`, with underscores: steps=1000, prior="gmm", precision="bf16".
            `model_config` may also be a dictionary.

    Returns:
        The model after the last step. Ctrl-C ends training early, and the model of the steps until then is returned.

    Raises:
        TypeError: an option is unknown or of a wrong type.
        UserError: the data, the folder or the options are not usable; the message is one line.
    """
    began = time.perf_counter()
    if isinstance(data, (str, PathLike)):
        options, data = {**options, "data": fspath(data)}, None
    if isinstance(model, str):
        options, model = {**options, "model": model}, None
    own = None
    if callable(objective):
        own = objective
    elif objective:
        options = {**options, "objective": objective}
    if isinstance(config := options.get("model_config"), dict):
        options = {**options, "model_config": json.dumps(config)}
    rules.check_names(options)
    if model is not None:
        options = {**options, "model": OWN}
    flags: dict[str, Any] = {"out": fspath(out), "typed": []}
    switches = {
        "resume": resume, "resume_if_begun": resume_if_begun, "no_report": not report,
        "no_tensorboard": not tensorboard,
    }  # fmt: skip
    flags.update({name: True for name, asked in switches.items() if asked})
    if wandb:
        flags["wandb"] = wandb
    ranks = parallel.start()
    try:
        cli.train_on(ranks, argparse.Namespace(**flags), options, began, Own(data, model, own))
        ranks.broadcast(None)  # the main process has written the checkpoint
        found = trained.load(out, model=model)
        if model is not None and found.settings.parallel == "fsdp":  # it trains a sharded copy
            model.load_state_dict(checkpoint.load(Path(out))["model"])
        return found
    finally:
        parallel.stop(ranks)
