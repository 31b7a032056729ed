"""A decoder that knows the data before z says anything: p(x | z) = prod_i p(x_i | x_1 .. x_{i-1}, z).

It may explain x without z, and then the best posterior is the prior: the model on which remedies against collapse are
compared. One masked network gives all conditionals at once (MADE: Germain, Gregor, Murray and Larochelle 2015,
arXiv:1502.03509); only drawing x takes a step for each of its values.
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

LARGEST = 4096  # values of a datum: as many steps a picture takes, and the weights grow with them


class Masked(nn.Linear):
    """A linear map that leaves out whatever leads from a greater degree to a smaller; `before` and `after` are those of
    its inputs and outputs, in ascending order."""

    mask: Tensor

    def __init__(self, before: Tensor, after: Tensor, bias: bool = True):
        super().__init__(len(before), len(after), bias)
        # Made again from the sizes, so a checkpoint need not hold it.
        self.register_buffer("mask", (before <= after[:, None]).float(), persistent=False)
        self.degrees = after.tolist()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)

    def of_degree(self, degree: int) -> slice:
        """The outputs of this degree, side by side because degrees ascend."""
        return slice(bisect_left(self.degrees, degree), bisect_right(self.degrees, degree))


class MaskedDecoder(nn.Module):
    """(z [..., latent], x [..., *shape]) -> parameters of the conditionals [..., *shape]; batch dimensions broadcast.

    Value i (from 0, in the order in which x is stored) has degree i + 1 where it is read and i where it is predicted; a
    hidden unit of degree m is a function of z and the first m values. z enters every layer.
    """

    def __init__(self, shape: tuple[int, ...], latent: int, hidden: int, layers: int):
        super().__init__()
        features = math.prod(shape)
        if features > LARGEST:
            raise UserError(
                f"--model autoregressive draws a datum value by value, {LARGEST:,} at most; this one has {features:,}"
            )
        self.shape = tuple(shape)
        predicted = torch.arange(features, dtype=torch.int64, device="cpu")
        unit = (
            torch.arange(hidden, dtype=torch.int64, device="cpu") * features // hidden
        )  # spread evenly over 0 .. features - 1
        degrees = [predicted + 1, *[unit] * layers, predicted]
        self.layers = nn.ModuleList(Masked(before, after) for before, after in pairwise(degrees))
        self.from_latent = nn.ModuleList(nn.Linear(latent, len(after), bias=False) for after in degrees[1:])
        # What has fewer hidden units than values still reads all that came before.
        self.direct = Masked(predicted + 1, predicted, bias=False)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        x = x.flatten(x.dim() - len(self.shape))
        hidden = x
        for layer, from_latent in zip(self.layers, self.from_latent):
            if layer is not self.layers[0]:
                hidden = F.silu(hidden)
            # Samples of one datum share what x gives: its batch dimensions are broadcast only here.
            hidden = layer(hidden) + from_latent(z)
        return (hidden + self.direct(x)).unflatten(-1, self.shape)

    @torch.no_grad()
    def sample(self, z: Tensor, draw: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
        """(x, the parameters of the conditionals it was drawn from), one for each z; draw(parameter, i) is value i.

        Once the first m values are drawn, the units of degree m are what they will be, and each is computed only then:
        all steps together cost what one pass does.
        """
        layers = [layer for layer in self.layers if isinstance(layer, Masked)]
        weights = [layer.weight * layer.mask for layer in layers]
        direct = self.direct.weight * self.direct.mask
        # What z and the biases give; the rest is added degree by degree. What is not known yet has no weight.
        sums = [from_latent(z) + layer.bias for layer, from_latent in zip(layers, self.from_latent)]
        known = [torch.zeros_like(each) for each in (sums[-1], *sums[:-1])]  # x, and the hidden units' activations
        for degree in range(sums[-1].shape[-1]):
            for index, (layer, weight) in enumerate(zip(layers, weights)):
                units = layer.of_degree(degree)
                sums[index][..., units] += F.linear(known[index], weight[units])
                if index + 1 < len(weights):
                    known[index + 1][..., units] = F.silu(sums[index][..., units])
            sums[-1][..., units] += F.linear(known[0], direct[units])
            known[0][..., degree] = draw(sums[-1][..., degree], degree)
        return known[0].unflatten(-1, self.shape), sums[-1].unflatten(-1, self.shape)
