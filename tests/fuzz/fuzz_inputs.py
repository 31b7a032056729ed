"""Random inputs of the fuzz: values of many sizes, layouts and dtypes."""

from __future__ import annotations

import random

import torch

from helpers import DEVICE

WIDE = (torch.float64, torch.float32)
DTYPES = (*WIDE, torch.float32, torch.bfloat16, torch.float16)
# Limits of a log-variance for which float32 can hold the variance and its root: exp(80) is 5e34.
SMALLEST, LARGEST = -80.0, 60.0


class Draw:
    """The random choices of one case, all from its seed."""

    def __init__(self, seed: str):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.dtypes = DTYPES
        self.dtype = self.pick(DTYPES)
        self.mixed = self.chance(0.2)
        self.level = self.pick(("ordinary", "ordinary", "tiny", "large", "zero", "every"))

    def pick(self, choices):
        return self.random.choice(list(choices))

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def computed_alike(self) -> None:
        """From now on, do not mix float64 with narrower dtypes."""
        wide = self.dtype == torch.float64
        self.dtypes = [dtype for dtype in DTYPES if (dtype == torch.float64) == wide]

    def seed(self) -> int | torch.Tensor:
        bits = self.random.getrandbits
        seed = self.pick((0, bits(31), bits(62), -bits(40)))
        return torch.tensor(seed, device=DEVICE) if self.chance(0.3) else seed

    def size(self, largest: int) -> int:
        return min(largest, self.pick((1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 33, 64, 130)))

    def batch(self, largest: int, *, empty: bool = True) -> tuple[int, ...]:
        """One to three dimensions of rows."""
        if empty and self.chance(0.03):
            return (0,)
        rows = self.size(largest)
        return self.pick(((rows,), (rows,), (rows,), (2, self.size(3)), (1, rows), (2, 1, 3)))

    # ---- values, in float64 ----

    def normal(self, shape) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, shape, low=0.0, high=1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def location(self, shape) -> torch.Tensor:
        found = self.normal(shape)
        sizes = {"ordinary": 1.0, "tiny": 1e-5, "large": 300.0, "zero": 0.0}
        if self.level == "every":
            return found * torch.tensor([0.0, 1e-6, 1.0, 50.0, 1e3], dtype=torch.float64)[self.index(shape, 5)]
        return found * sizes[self.level]

    def logvar(self, shape, low=SMALLEST, high=LARGEST) -> torch.Tensor:
        if self.level == "zero":
            return torch.zeros(shape, dtype=torch.float64)
        if self.level in ("ordinary", "tiny"):
            return self.normal(shape) * (1.0 if self.level == "ordinary" else 1e-4)
        wide = self.uniform(shape, low, high)
        if self.level == "large":
            return wide
        return torch.stack([wide, self.normal(shape), 0 * wide, 1e-4 * wide])[(self.index(shape, 4), *_grid(shape))]

    def index(self, shape, count: int) -> torch.Tensor:
        return torch.randint(0, count, shape, generator=self.generator)

    # ---- tensors ----

    def tensor(self, values: torch.Tensor, dtype: torch.dtype | None = None, *, expand: bool = True) -> torch.Tensor:
        """A leaf with these values, in some layout, with or without a gradient."""
        dtype = dtype or (self.pick(self.dtypes) if self.mixed else self.dtype)
        if dtype == torch.float16:
            values = values.clamp(-3e4, 3e4)
        laid = self.lay(values.to(dtype), expand=expand)
        return laid.detach().requires_grad_(self.chance(0.8))

    def lay(self, t: torch.Tensor, *, expand: bool = True) -> torch.Tensor:
        """The same tensor in another layout, with NaN in the memory between its elements."""
        kinds = ["dense", "dense", "offset", "every second", "half", "negative"]
        kinds += ["transposed", "permuted", "rows"] if t.dim() > 1 else []
        kinds += ["channels last"] if t.dim() == 4 else []
        kinds += ["expanded"] if t.dim() and expand else []
        kind, nan = self.pick(kinds), float("nan")
        t = t.contiguous().to(DEVICE)
        if t.dim() == 0:
            kind = self.pick(("dense", "negative", "offset"))
        if kind == "offset":
            memory = t.new_full((t.numel() + 3,), nan)
            memory[3:] = t.flatten()
            return memory[3:].view(t.shape)
        if kind == "every second":
            wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), nan)
            wide[..., 1::2] = t
            return wide[..., 1::2]
        if kind == "half":
            dim = self.random.randrange(t.dim())
            wide = torch.cat([torch.full_like(t, nan), t], dim)
            return wide.chunk(2, dim)[1]
        if kind == "rows":
            wide = t.new_full((2 * t.shape[0], *t.shape[1:]), nan)
            wide[::2] = t
            return wide[::2]
        if kind == "transposed":
            return t.mT.contiguous().mT
        if kind == "permuted":
            order = list(range(t.dim()))
            self.random.shuffle(order)
            back = [order.index(dim) for dim in range(t.dim())]
            return t.permute(order).contiguous().permute(back)
        if kind == "channels last":
            return t.contiguous(memory_format=torch.channels_last)
        if kind == "negative":
            return torch._neg_view(-t)
        if kind == "expanded":
            dim = self.random.randrange(t.dim())
            return t.narrow(dim, 0, min(1, t.shape[dim])).expand(t.shape) if t.numel() else t
        return t

    def cotangent(self, like: torch.Tensor) -> torch.Tensor:
        """An output's incoming gradient: any layout, partly 0, or one number for all."""
        kind = self.pick(("normal", "normal", "rows of zero", "zero", "sum"))
        if kind in ("zero", "sum"):
            number = 0.0 if kind == "zero" else self.pick((1.0, 1 / 3, -2.0))
            return torch.full((), number, dtype=like.dtype, device=like.device).expand(like.shape)
        values = self.normal(like.shape)
        if kind == "rows of zero":
            values = values * (self.uniform(like.shape) < 0.6)
        return self.lay(values.to(like.dtype), expand=False)


def _grid(shape):
    return torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij") if shape else ()


def softplus_inverse(logvar: torch.Tensor) -> torch.Tensor:
    """p with softplus(p) = exp(logvar / 2)."""
    sigma = torch.exp(0.5 * logvar)
    return torch.where(sigma > 20, sigma, torch.log(torch.expm1(sigma.clamp(max=20))))


def parameter_of(logvar: torch.Tensor, scale: str) -> torch.Tensor:
    """The parameter of this log-variance, of kind `scale`."""
    return {
        "logvar": lambda: logvar,
        "log_std": lambda: 0.5 * logvar,
        "std": lambda: torch.exp(0.5 * logvar),
        "softplus": lambda: softplus_inverse(logvar),
    }[scale]()
