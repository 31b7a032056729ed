"""A distance between images of your own, such as LPIPS: `--perceptual module:function`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastkl.vae.data.arrays import first_line
from fastkl.vae.errors import UserError


class Perceptual:
    """(x_hat, x) -> a distance for each image [N], in float32. Images are [N, C, H, W] in [-1, 1], as LPIPS has them.

    It is not an nn.Module: the weights of a network inside are constants, and not a part of a checkpoint.
    """

    def __init__(self, name: str, shape: tuple[int, ...], device: torch.device):
        """Import the function, also from the current folder, and check it on two images.

        Raises:
            UserError: it cannot be imported or called, does not return a value for each image, or has no gradient in
                x_hat, for instance because it runs under torch.no_grad().
        """
        if len(shape) != 3:
            raise UserError(f"--perceptual needs images, but a datum has shape {list(shape)}")
        self.name, self.function = name, imported(name)
        if isinstance(self.function, nn.Module):
            self.function.to(device).eval().requires_grad_(False)
        with torch.random.fork_rng(), torch.enable_grad():
            x, x_hat = (torch.rand(2, *shape, dtype=torch.float32, device=device) for _ in range(2))
            distance = self(x_hat.requires_grad_(), x)
            given = distance.requires_grad and torch.autograd.grad(distance.sum(), x_hat, allow_unused=True)
        if not distance.isfinite().all():
            raise UserError(f"--perceptual {name} is not finite for two random images: {distance.tolist()}")
        if not given or given[0] is None:
            why = "does it run under torch.no_grad, or detach?"
            raise UserError(f"--perceptual {name} has no gradient in the reconstruction, its first argument: {why}")

    def __call__(self, x_hat: Tensor, x: Tensor) -> Tensor:
        try:
            distance: Any = self.function(x_hat, x)
        except Exception as error:  # the function may raise any
            raise UserError(f"--perceptual {self.name} failed: {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(distance, Tensor) or distance.numel() != len(x) or distance.shape[:1] != x.shape[:1]:
            got = list(distance.shape) if isinstance(distance, Tensor) else type(distance).__name__
            raise UserError(f"--perceptual {self.name} must return a value for each image, [{len(x)}], got {got}")
        return distance.reshape(-1).float()


def imported(name: str) -> Callable[..., Any]:
    """The function that module:function names."""
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise UserError(f"--perceptual {name}: expected module:function, such as my_lpips:distance")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module may raise any
        raise UserError(
            f"--perceptual {name} cannot be imported: {type(error).__name__}: {first_line(error)}"
        ) from None
    if not callable(function):
        raise UserError(f"--perceptual {name} must be a function, got {type(function).__name__}")
    return function
