"""How the fuzz runs a case and compares it with float64: the tolerance is the effect of rounding each operation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fuzz_inputs import Draw
from helpers import implementation

RUNS = 8  # runs of the formula with random rounding
DEVIATIONS = 10  # mean deviations of these runs that an op may be off; its own roundings are half as large
UNITS = 4  # units in the last place of the result, in addition


@dataclass
class Case:
    call: Callable  # the op, of the tensors by name
    tensors: dict[str, torch.Tensor]
    truth: Callable  # the formula, of the tensors by name in float64 (and the noise)
    noise: Callable | None = None  # () -> (the op's noise in float64, how uncertain that is)
    settings: dict = field(default_factory=dict)  # to be printed
    computed: torch.dtype | None = None  # the compute dtype, if not the usual one
    rounded: torch.dtype | None = None  # the dtype that operations round to, if another one
    together: bool = False  # a result comes of matrix products: one tolerance for all its elements, as the house has it

    def __str__(self) -> str:
        tensors = [f"{n}={t.dtype} {tuple(t.shape)} stride {t.stride()}" for n, t in self.tensors.items()]
        return ", ".join([*tensors, *(f"{name}={value}" for name, value in self.settings.items())])


aten = torch.ops.aten
SUMS = {aten.sum, aten.mean, aten.mm, aten.bmm, aten.cumsum}


class Rounding(TorchDispatchMode):
    """Perturb each operation's result by up to `eps` relative, or by the dtype's smallest number."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        limits = torch.finfo(dtype)
        # float64 moves by much more than it rounds, which is taken back below: by its last place nothing may move.
        self.times = 2.0**12 if dtype == torch.float64 else 1.0
        self.eps, self.least = self.times * limits.eps, limits.tiny * limits.eps
        self.generator, self.alike = torch.Generator(), False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled under it, and torch's guard against that takes a sixth of the time

    def moved(self, value):
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float64:
            return value
        shape = () if self.alike else value.shape  # as equal numbers round alike, or each by itself
        shift = torch.empty(shape, dtype=torch.float64).uniform_(-1, 1, generator=self.generator)
        size = value.abs() * (1 + self.eps * shift) + self.least * shift
        moved = size.clamp_(min=0).copysign_(value)  # a number so small may vanish
        return torch.where(value == 0, value, moved)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in SUMS:  # which round in between
            args = tuple(map(self.moved, args))
        found = function(*args, **(kwargs or {}))
        if any(output.alias_info is not None for output in function._schema.returns):
            return found  # a view, or written in place
        if isinstance(found, (tuple, list)):
            return type(found)(self.moved(value) for value in found)
        return self.moved(found)


def compute_dtype(tensors) -> torch.dtype:
    """The dtype in which an op computes; noise and temperature do not count."""
    wide = any(t.dtype == torch.float64 for name, t in tensors.items() if name not in ("eps", "tau"))
    return torch.float64 if wide else torch.float32


def outputs_of(function, tensors) -> list[torch.Tensor]:
    found = function(**tensors)
    return list(found) if isinstance(found, (tuple, list)) else [found]


def results(function, tensors, cotangents) -> list[torch.Tensor | None]:
    """The outputs, then the gradient of every tensor that requires one. A cotangent of None is an unused output."""
    return differentiated(outputs_of(function, tensors), tensors, cotangents)


def differentiated(outputs, tensors, cotangents) -> list[torch.Tensor | None]:
    wanted = [t for t in tensors.values() if t.requires_grad]
    used = [(o, c) for o, c in zip(outputs, cotangents) if c is not None and o.requires_grad]
    gradients = [None] * len(wanted)
    if used and wanted:
        gradients = torch.autograd.grad([o for o, _ in used], wanted, [c for _, c in used], allow_unused=True)
    return [*(o.detach() for o in outputs), *gradients]


def same_bits(a, b) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def check(case: Case, draw: Draw, way: str) -> None:
    copies = {name: t.detach().clone() for name, t in case.tensors.items()}
    with implementation(way):
        outputs = outputs_of(case.call, case.tensors)
        cotangents = [draw.cotangent(o) if o.is_floating_point() and draw.chance(0.85) else None for o in outputs]
        found = differentiated(outputs, case.tensors, cotangents)
        again = results(case.call, case.tensors, cotangents)
        noise, uncertain = case.noise() if case.noise else (None, 0.0)
    for name, copy in copies.items():
        assert same_bits(case.tensors[name].detach(), copy), f"{name} was written to"
    exact, wide, eager = truths(case, cotangents, noise), case.computed or compute_dtype(case.tensors), None
    names = [f"output {i}" for i in range(len(outputs))]
    names += [f"gradient of {name}" for name, t in case.tensors.items() if t.requires_grad]
    dtypes = [o.dtype for o in outputs] + [t.dtype for t in case.tensors.values() if t.requires_grad]
    rounded = None
    for index, (name, dtype, actual, bits, value) in enumerate(zip(names, dtypes, found, again, exact, strict=True)):
        assert same_bits(actual, bits), f"{name} differs from run to run"
        if actual is None or value is None:
            missing = value if actual is None else actual
            assert missing is None or not missing.any(), f"{name}: only one of the two is None"
            continue
        if not compare(name, dtype, actual, value, 0.0, wide)[0].any():
            continue  # equal to the last place: skip the perturbed runs, the slowest part
        if rounded is None:
            mode = Rounding(case.rounded or wide)
            rounded = [truths(case, cotangents, noise, uncertain, mode, run) for run in range(RUNS)]
        apart = torch.stack([other[index] - value for other in rounded]).abs().nan_to_num()
        deviation = torch.maximum(apart[::2].mean(0), apart[1::2].mean(0)) / mode.times
        if name.startswith("gradient") and wide == torch.float64 != dtype:  # summed over what shares it in float32
            deviation = deviation * 2.0**29
        terms = max((t.numel() for t in case.tensors.values()), default=0) / max(1, actual.numel())
        deviation = spread(deviation, value, case.together)
        # Any sum of n terms rounds at least log2 n times in a row.
        deviation = deviation + math.log2(max(1, terms)) * torch.finfo(wide).eps / DEVIATIONS * value.abs().nan_to_num()
        wrong, allowed = compare(name, dtype, actual, value, deviation, wide)
        if not wrong.any():
            continue
        eager = eager or dict(zip(names, truths(case, cotangents, noise, dtype=wide)))
        infinite = actual.isinf() & (actual.sign() == value.sign()) & ~eager[name].isfinite()
        wrong &= ~infinite.cpu()  # the formula overflows in that dtype, too
        if wrong.any():
            raise AssertionError(described(name, wrong, actual.double(), value, allowed))


def spread(deviation, exact, together: bool):
    """The deviation per element. A few runs measure it badly, so use that of all elements together, or at least the
    median relative deviation."""
    if deviation.numel() == 0 or together:
        return deviation if deviation.numel() == 0 else deviation.max().expand(deviation.shape)
    relative = (deviation / exact.abs())[exact != 0]
    return torch.maximum(deviation, relative.median() * exact.abs()) if len(relative) else deviation


def truths(case: Case, cotangents, noise, uncertain=0.0, mode=None, run=0, dtype=torch.float64):
    """`results` of the formula, under `mode`'s arithmetic if given."""
    tensors = {n: t.detach().to(dtype).clone().requires_grad_(t.requires_grad) for n, t in case.tensors.items()}
    wide = [None if c is None else c.to(dtype).contiguous() for c in cotangents]
    extra = {}
    if noise is not None:
        if mode is not None:
            mode.generator.manual_seed(run)
            noise = noise + uncertain * torch.randn(noise.shape, generator=mode.generator, dtype=torch.float64)
        extra = {"noise": noise.to(dtype)}
    if mode is None:
        return results(lambda **t: case.truth(**t, **extra), tensors, wide)
    mode.generator.manual_seed(run)
    mode.alike = run % 2 == 1
    with mode:
        return results(lambda **t: case.truth(**t, **extra), tensors, wide)


def compare(name, dtype, actual, exact, deviation, wide) -> tuple[torch.Tensor, torch.Tensor]:
    """(which elements are wrong, the tolerance of each)."""
    assert actual.dtype == dtype, f"{name} is {actual.dtype}"
    assert actual.shape == exact.shape, f"{name} is {tuple(actual.shape)}, not {tuple(exact.shape)}"
    if not dtype.is_floating_point:
        return actual != exact, torch.zeros_like(exact)
    limits, actual = torch.finfo(dtype), actual.double()
    units = UNITS if limits.eps < 1e-5 else 1.05  # 16 bits are rounded to once; the interpreter truncates
    allowed = DEVIATIONS * deviation + units * limits.eps * exact.abs() + UNITS * limits.tiny * limits.eps
    # bfloat16 has float32's range, and the interpreter is not exact below it.
    allowed = allowed + UNITS * (limits.tiny if dtype == torch.bfloat16 else torch.finfo(wide).tiny)
    overflow = exact.abs() + allowed > limits.max
    wrong = ~((actual - exact).abs() <= allowed) & ~(exact.isnan() & actual.isnan()) & (actual != exact)
    return wrong & ~(overflow & (actual.sign() == exact.sign()) & (actual.abs() >= limits.max / 2)), allowed


def described(name, wrong, actual, exact, allowed) -> str:
    at = tuple(wrong.nonzero()[0].tolist())
    size = ((actual - exact).abs() / allowed).nan_to_num(nan=float("inf"))[wrong].max().item()
    return (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, up to {size:.3g} times what is allowed; "
        f"at {at}: {actual[at].item()!r}, exactly {exact[at].item()!r} +- {allowed[at].item():.2g}"
    )
