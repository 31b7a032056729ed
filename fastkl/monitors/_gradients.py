"""Gradient norms, without a synchronisation with the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def gradient_norms(parameters: nn.Module | Mapping[str, Iterable[Tensor]]) -> dict[str, Tensor]:
    """Euclidean norms of the gradients, for each part of a model and in total.

    Args:
        parameters: a module, whose parts are its children with parameters, and "own" for parameters outside all
            children; or a mapping of part names, such as "encoder" and "decoder", to parameters.

    Returns:
        One value [] for each part, on the device of its gradients and without a synchronisation, and "total". A part
        without gradients has 0. A parameter of two parts counts in both, but once in the total.

    Raises:
        TypeError: parameters is neither a module nor a mapping. ValueError: a part is called "total".

    >>> import torch
    >>> from fastkl import monitors
    >>> model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(1, 1), "decoder": torch.nn.Linear(1, 1)})
    >>> (3.0 * model["encoder"].bias + 4.0 * model["decoder"].bias).sum().backward()
    >>> monitors.gradient_norms(model)
    {'encoder': tensor(3.), 'decoder': tensor(4.), 'total': tensor(5.)}
    """
    if isinstance(parameters, nn.Module):
        parts: dict[str, list[Tensor]] = {name: list(child.parameters()) for name, child in parameters.named_children()}
        inside = {parameter for part in parts.values() for parameter in part}
        parts["own"] = [parameter for parameter in parameters.parameters() if parameter not in inside]
        parts = {name: part for name, part in parts.items() if part}
    elif isinstance(parameters, Mapping):
        parts = {name: list(part) for name, part in parameters.items()}
    else:
        raise TypeError(f"parameters must be a module or a mapping of parts, got {type(parameters).__name__}")
    if "total" in parts:
        raise ValueError('parameters must not have a part called "total", the name of the norm of all parts')
    everything = list(dict.fromkeys(parameter for part in parts.values() for parameter in part))
    return {name: _norm(part) for name, part in {**parts, "total": everything}.items()}


def _norm(parameters: list[Tensor]) -> Tensor:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients and parameters:
        return torch.zeros((), dtype=torch.float32, device=parameters[0].device)
    # Each norm has its tensor's dtype, and a float16 norm overflows at 65504.
    norm = nn.utils.get_total_norm([gradient.float() if gradient.itemsize == 2 else gradient for gradient in gradients])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients
