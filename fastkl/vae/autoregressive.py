"""An autoregressive decoder: p(x | z) = prod_i p(x_i | x_1 .. x_{i-1}, z).

It can model x without z; the best posterior is then the prior. Remedies against collapse are therefore compared on this
model. One masked network gives all conditionals at once (MADE: Germain, Gregor, Murray and Larochelle 2015,
arXiv:1502.03509). Sampling x takes one step per value.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkl.vae.errors import UserError

LARGEST = 4096  # values of a datum: sampling takes as many steps, and the number of weights grows with them


class Masked(nn.Linear):
    """A linear map without weights from a greater degree to a smaller one; `before` and `after` are the degrees of its
    inputs and outputs, in ascending order."""

    mask: Tensor

    def __init__(self, before: Tensor, after: Tensor, bias: bool = True):
        super().__init__(len(before), len(after), bias)
        # Not persistent: the sizes determine it.
        self.register_buffer("mask", (before <= after[:, None]).float(), persistent=False)
        self.degrees = after.tolist()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)

    def of_degree(self, degree: int) -> slice:
        """The outputs of this degree, contiguous because degrees ascend."""
        return slice(bisect_left(self.degrees, degree), bisect_right(self.degrees, degree))


class MaskedDecoder(nn.Module):
    """(z [..., latent], x [..., *shape]) -> parameters of the conditionals [..., *shape]; batch dimensions broadcast.

    Value i (from 0, in the order in which x is stored) has degree i + 1 as an input and degree i as an output. A hidden
    unit of degree m is a function of z and the first m values. z enters every layer.
    """

    def __init__(self, shape: tuple[int, ...], latent: int, hidden: int, layers: int):
        super().__init__()
        features = math.prod(shape)
        if features > LARGEST:
            raise UserError(
                f"--model autoregressive draws value by value: a datum may have {LARGEST:,} at most, got {features:,}; "
                "use another --model or a smaller --image-size"
            )
        self.shape = tuple(shape)
        predicted = torch.arange(features, dtype=torch.int64, device="cpu")
        unit = (
            torch.arange(hidden, dtype=torch.int64, device="cpu") * features // hidden
        )  # spread evenly over 0 .. features - 1
        degrees = [predicted + 1, *[unit] * layers, predicted]
        self.layers = nn.ModuleList(Masked(before, after) for before, after in pairwise(degrees))
        self.from_latent = nn.ModuleList(nn.Linear(latent, len(after), bias=False) for after in degrees[1:])
        # With fewer hidden units than values, this map still gives each output every earlier value.
        self.direct = Masked(predicted + 1, predicted, bias=False)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        x = x.flatten(x.dim() - len(self.shape))
        hidden = x
        for layer, from_latent in zip(self.layers, self.from_latent):
            if layer is not self.layers[0]:
                hidden = F.silu(hidden)
            # All samples of a datum share the contribution of x, so its batch dimensions are broadcast only here.
            hidden = layer(hidden) + from_latent(z)
        return (hidden + self.direct(x)).unflatten(-1, self.shape)

    @torch.no_grad()
    def sample(self, z: Tensor, draw: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
        """(x, the parameters of its conditionals), one for each z; draw(parameter, i) samples value i.

        The first m values determine the units of degree m, and each unit is computed once. All steps together therefore
        cost as much as one pass.
        """
        layers = [layer for layer in self.layers if isinstance(layer, Masked)]
        weights = [layer.weight * layer.mask for layer in layers]
        direct = self.direct.weight * self.direct.mask
        # The contribution of z and the biases; inputs are added degree by degree. Unknown inputs are 0.
        sums = [from_latent(z) + layer.bias for layer, from_latent in zip(layers, self.from_latent)]
        known = [torch.zeros_like(each) for each in (sums[-1], *sums[:-1])]  # x, then the hidden activations
        for degree in range(sums[-1].shape[-1]):
            for index, (layer, weight) in enumerate(zip(layers, weights)):
                units = layer.of_degree(degree)
                sums[index][..., units] += F.linear(known[index], weight[units])
                if index + 1 < len(weights):
                    known[index + 1][..., units] = F.silu(sums[index][..., units])
            sums[-1][..., units] += F.linear(known[0], direct[units])
            known[0][..., degree] = draw(sums[-1][..., degree], degree)
        return known[0].unflatten(-1, self.shape), sums[-1].unflatten(-1, self.shape)
