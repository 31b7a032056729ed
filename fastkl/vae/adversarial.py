"""A discriminator of image patches, which trains a decoder to sharper images, as in VQGAN."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkl.vae.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LARGEST = 1e4  # adaptive weight
LEAST_SIDE = 8


class PatchDiscriminator(nn.Sequential):
    """Images [N, C, H, W] -> a score [N, 1, h, w] for each patch, positive for patches of data.

    Convolutions of 4 x 4: up to `levels` that halve the image, as many as its sides allow, and two that do not. With
    three levels a score has a receptive field of 70 x 70 pixels. Group norms replace the batch norms of the papers,
    because a batch norm makes the score of an image depend on the others in its batch, and on the split of the batch
    over processes.

    Args:
        shape: (C, H, W) of an image, with sides of at least 8. hidden: channels of the first level. levels: at most.

    Source: Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks", arXiv:1611.07004,
    section 3.2.2; Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis", arXiv:2012.09841.

    >>> import torch
    >>> PatchDiscriminator((3, 32, 32))(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 1, 2, 2])
    """

    def __init__(self, shape: tuple[int, ...], hidden: int = 64, levels: int = 3):
        if len(shape) != 3 or min(shape[1:]) < LEAST_SIDE:
            side = f"images with sides of at least {LEAST_SIDE}"
            raise UserError(f"--adversarial needs {side}, but a datum has shape {list(shape)}")
        levels = min(levels, int(math.log2(min(shape[1:]))) - 2)
        layers: list[nn.Module] = [nn.Conv2d(shape[0], hidden, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = hidden
        for level in range(1, levels + 1):
            wide = hidden * min(2**level, 8)
            layers += [
                nn.Conv2d(width, wide, 4, stride=2 if level < levels else 1, padding=1, bias=False),
                nn.GroupNorm(math.gcd(8, wide), wide),
                nn.LeakyReLU(0.2),
            ]
            width = wide
        super().__init__(*layers, nn.Conv2d(width, 1, 4, padding=1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)


def hinge(of_data: Tensor, of_model: Tensor) -> Tensor:
    """The loss of the discriminator for its scores: (E[max(0, 1 - D(x))] + E[max(0, 1 + D(x_hat))]) / 2."""
    return (F.relu(1 - of_data).mean() + F.relu(1 + of_model).mean()) / 2


def frozen(discriminator: nn.Module, x: Tensor) -> Tensor:
    """The scores of x, with gradients in x but none in the discriminator."""
    parameters = {name: tensor.detach() for name, tensor in discriminator.named_parameters()}
    return torch.func.functional_call(discriminator, parameters, (x,))


class LastLayer:
    """The last layer of a decoder: its last module with a matrix of weights, in the order of registration.

    The adaptive weight needs gradients of this layer alone. `watched` keeps input and output of its latest call.
    """

    def __init__(self, decoder: nn.Module):
        having = [module for module in decoder.modules() if getattr(getattr(module, "weight", None), "ndim", 0) > 1]
        if not having:
            raise UserError("--adversarial needs a decoder whose last layer has weights")
        self.module = having[-1]

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """A context with a list, which has [input, output] of the layer after its call."""
        call: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            call[:] = [inputs[0].detach(), output]

        handle = self.module.register_forward_hook(keep)
        try:
            yield call
        finally:
            handle.remove()
            call.clear()

    def gradient_norm(self, loss: Tensor, output: Tensor, call: list[Tensor], group: ProcessGroup | None) -> Tensor:
        """|d loss / d weight| over the whole batch, for the decoder's output in float32.

        The weight's gradient is computed in float32, also under autocast: in float16 the sum over all pixels overflows,
        and gradients of a mean over patches vanish. So the output's gradient is divided by its largest value before the
        backward pass from the output to the layer, and the result is multiplied by it.
        """
        inputs, result = call
        (wanted,) = torch.autograd.grad(loss, output, retain_graph=True)
        largest = wanted.abs().max()
        unit = wanted / torch.where(largest > 0, largest, 1.0)
        (wanted,) = torch.autograd.grad(output, result, unit, retain_graph=True)
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        with torch.autocast(output.device.type, enabled=False):
            again = self.module.forward(inputs.to(weight.dtype))  # without the hook
            (gradient,) = torch.autograd.grad(again, weight, wanted.to(weight.dtype))
        gradient = gradient * largest
        if group is not None:
            torch.distributed.all_reduce(gradient, group=group)
            gradient = gradient / group.size()
        return gradient.norm()


def adaptive_weight(of_reconstruction: Tensor, of_adversary: Tensor) -> Tensor:
    """The quotient of two gradient norms, at most 10,000. With this weight both losses have gradients of one size.

    It is 0 if the quotient is not a number, because both gradients are 0 or one is NaN: this step has no adversarial
    loss. It is 10,000 if only the adversary's gradient is 0.

    Source: Esser et al. 2021, equation 7, without its constant 1e-6.
    """
    return (of_reconstruction / of_adversary).nan_to_num(nan=0.0, posinf=LARGEST).clamp(0.0, LARGEST)
