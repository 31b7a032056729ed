"""Cases of the benchmark: one op at one size, its contenders, and the check of each before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Results agree if they differ by at most this many units in the last place of the coarsest dtype involved, relative to
# the largest value. The bound is loose, because the eager formulas are naive and accuracy is not measured here.
UNITS = 64
PART = 1 << 20  # elements per block of an input for the definition, if it works by rows


class Case(NamedTuple):
    """One op at one size. Every function takes the inputs and returns a tensor or a tuple of tensors."""

    name: str
    inputs: list[Tensor]
    eager: Callable
    fastkl: Callable
    # The definition, which all others must match; it is evaluated in float64.
    reference: Callable
    # Further contenders, by name: torch.distributions, geomloss.
    others: dict[str, Callable] = {}  # noqa: RUF012  never written to
    # Its key in the table of budget.py; empty if inputs are read again for every tile.
    budget: str = ""
    # For functions that draw noise: (inputs, outputs) -> the noise drawn, as keyword arguments of the reference. Raises
    # ValueError if the outputs imply implausible noise.
    noise: Callable[[list[Tensor], list[Tensor]], dict[str, Any]] | None = None
    # Contenders whose outputs do not determine the noise -> the same function with the reference's noise.
    same_noise: dict[str, Callable] = {}  # noqa: RUF012
    # Whether this is a size of the first table.
    headline: bool = False
    # Whether it is timed with each number of threads, as the first table is.
    every_count: bool = False
    # Whether the rows of every tensor are independent, and a scalar output is a mean over rows.
    by_rows: bool = False

    @property
    def functions(self) -> dict[str, Callable]:
        """Contender -> function, without torch.compile, which is derived from the eager one."""
        return {"eager": self.eager, **self.others, "fastkl": self.fastkl}


def leaves(device: str, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Standard normal inputs that require a gradient, the same in every run."""
    if device == "meta":  # only the names of the cases are needed
        return [torch.empty(s, dtype=dtype, device=device, requires_grad=True) for s in shapes]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def uniform(device: str, *shape: int) -> Tensor:
    """Data between 0 and 1, without gradient."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2)).to(device)


def empty(inputs: list[Tensor]) -> list[Tensor]:
    """The same inputs with 0 rows, for those with as many rows as the first."""
    rows = len(inputs[0])
    cut = [x.detach()[:0] if x.dim() and len(x) == rows else x.detach() for x in inputs]
    return [y.clone().requires_grad_(x.requires_grad) for x, y in zip(inputs, cut)]


def as_list(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def backward(inputs: list[Tensor], outputs: Tensor | tuple[Tensor, ...], cotangents: list[Tensor]) -> list[Tensor]:
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return list(torch.autograd.grad(as_list(outputs), wanted, cotangents)) if wanted else []


def run(
    function: Callable, inputs: list[Tensor], cotangents: list[Tensor], **settings: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients) of one forward and one backward pass; no gradients if no input requires one."""
    outputs = as_list(function(*inputs, **settings))
    return [tensor.detach() for tensor in outputs], backward(inputs, outputs, cotangents)


def make_cotangents(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Cotangents. A small output is a loss, with the gradient of `.mean()`, of stride 0. A large output is the input of
    a decoder, with a normal gradient."""
    generator, largest = torch.Generator().manual_seed(1), max(tensor.numel() for tensor in inputs)
    small = [out.new_tensor(1 / max(1, out.numel())).expand(out.shape) for out in outputs]
    # A latent is half as large as a packed head.
    large = [x.dim() > 1 and 2 * x.numel() >= largest for x in outputs]
    return [torch.randn(x.shape, generator=generator).to(x) if big else s for x, big, s in zip(outputs, large, small)]


def problem(
    case: Case, name: str, function: Callable, cotangents: list[Tensor], known: dict[str, Any] | None = None
) -> str:
    """The reason why a contender may not be timed, or "" if it matches the definition.

    `known` caches the definition's result between contenders, unless it depends on their noise.
    """
    given = case.same_noise.get(name)
    if given is None and case.same_noise and name == "torch.compile":
        return ""  # its noise is unknown; its eager formula was compared
    try:
        actual = run(given or function, case.inputs, cotangents)
    except Exception as error:  # the other contenders can still be measured
        return f"failed: {type(error).__name__}: {error}".splitlines()[0]
    noisy = case.noise is not None and given is None
    expected = None if noisy or known is None else known.get("expected")
    if expected is None:
        try:
            expected = definition(case, cotangents, actual[0] if noisy else None)
        except ValueError as error:
            return str(error)
        if not noisy and known is not None:
            known["expected"] = expected
    rounding = max(torch.finfo(x.dtype).eps for x in (*case.inputs, *actual[0], *actual[1]))
    return disagreement(actual, expected, rounding, together=noisy)


def definition(case: Case, cotangents: list[Tensor], drawn: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
    """The reference's outputs and gradients in float64, with the noise of the outputs `drawn`.

    Independent rows are computed in blocks that fit the cache, which is five times as fast.

    Raises:
        ValueError: the noise of `drawn` is implausible.
    """
    if not case.by_rows:
        return exactly(case, case.inputs, cotangents, drawn)
    rows, outputs, gradients = len(case.inputs[0]), [], []
    step = max(1, PART * rows // max(1, case.inputs[0].numel()))
    for start in range(0, rows, step):
        share = min(step, rows - start) / rows  # weight of this block in a mean over rows

        def cut(tensors: list[Tensor], at: slice = slice(start, start + step), share: float = share) -> list[Tensor]:
            return [tensor[at] if tensor.dim() else share * tensor.double() for tensor in tensors]

        part = exactly(case, cut(case.inputs), cut(cotangents), cut(drawn) if drawn is not None else None)
        outputs.append([out if out.dim() else share * out for out in part[0]])
        gradients.append(part[1])
    joined = [torch.cat(parts) if parts[0].dim() else sum(parts) for parts in zip(*outputs)]
    return joined, [torch.cat(parts) for parts in zip(*gradients)]


def exactly(case: Case, inputs: list[Tensor], cotangents: list[Tensor], drawn: list[Tensor] | None) -> tuple:
    """`definition` without blocks."""
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    settings = case.noise(exact, [out.double() for out in drawn]) if drawn is not None else {}
    return run(case.reference, exact, [tensor.double() for tensor in cotangents], **settings)


def disagreement(actual: tuple, expected: tuple, rounding: float, together: bool = False) -> str:
    """The difference of two results of `run` in words, or "" if they agree.

    `together` compares gradients relative to the largest value of all of them: noise derived from a rounded sample has
    the sample's absolute error, even if the noise and its gradient are small.
    """
    for kind, got, wanted in zip(("output", "gradient"), actual, expected):
        scales = [largest(b) for b in wanted]
        if together and kind == "gradient":
            scales = [max(scales, default=0.0)] * len(scales)
        for index, (a, b, scale) in enumerate(zip(got, wanted, scales)):
            if a.shape != b.shape:
                return f"{kind} {index} has shape {tuple(a.shape)}, expected {tuple(b.shape)}"
            error = largest(a, b)
            if not error <= UNITS * rounding * scale:  # also true for NaN
                return f"{kind} {index} differs by {error:.2e}, largest value {scale:.2e}"
    return ""


def largest(tensor: Tensor, other: Tensor | None = None) -> float:
    """The largest absolute value of a tensor, or of its difference to another, in blocks; NaN if it has one."""
    parts = tensor.reshape(-1).split(PART)
    others = [None] * len(parts) if other is None else other.reshape(-1).split(PART)
    maxima = [(a if b is None else a.double() - b).abs().amax() for a, b in zip(parts, others) if a.numel()]
    return torch.stack(maxima).amax().item() if maxima else 0.0


def normal_noise(inputs: list[Tensor], outputs: list[Tensor]) -> dict[str, Tensor]:
    """The noise of z = mu + sigma eps; ValueError if it does not look standard normal."""
    mu, logvar = inputs[:2] if len(inputs) > 1 else inputs[0].chunk(2, 1)
    eps = ((outputs[0] - mu) / torch.exp(0.5 * logvar)).detach()
    count = eps.numel()
    # Within six standard errors of mean and variance; the variance of few values is not checked.
    if not abs(eps.mean()) <= 6 / count**0.5 or (count > 99 and not abs(eps.var() - 1) <= 6 * (2 / count) ** 0.5):
        raise ValueError(f"the noise has mean {eps.mean():.3f} and variance {eps.var():.3f}: not standard normal")
    return {"eps": eps}
