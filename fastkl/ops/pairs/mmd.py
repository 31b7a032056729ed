"""Maximum mean discrepancy between two samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops import _group
from fastkl.ops.pairs import _mmd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup


def mmd(
    x: Tensor, y: Tensor, *,
    kernel: str = "imq", scales: Sequence[float] = reference.MMD_SCALES, estimator: str = "unbiased",
    group: ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """Squared maximum mean discrepancy (MMD) between two samples, for a sum of kernels of several widths: one number.

    MMD^2 = mean k(x_i, x_j) + mean k(y_i, y_j) - 2 mean k(x_i, y_j), with d^2 summed over the D dimensions and
    imq: k = sum_s C / (C + d^2), C = 2 D s;    rbf: k = sum_s exp(-d^2 / (2 D s))

    For a Wasserstein autoencoder x are samples of the aggregate posterior and y as many samples of the prior. The width
    of s = 1 suits a prior N(0, I), for which the mean of d^2 is 2 D. One sweep over blocks of pairs gives value,
    gradient and all scales, without an N x M tensor.

    Args:
        x: one sample, [N, D], or [N, *event] with D elements.
        y: the other, [M, D]; N and M may differ.
        kernel: "imq" (inverse multiquadric: its heavy tails give outliers a gradient) or "rbf" (Gaussian).
        scales: the s, each above 0.
        estimator: "unbiased" leaves out the pairs of a point with itself, and can be below 0; "biased" is the squared
            MMD of the two empirical distributions, never below 0.
        group: a torch.distributed process group; the samples are then the x and y of all its processes, and every
            process gets the same value. None: this process's samples. Each of R processes sums the pairs of its own
            rows with those of the blocks that come around a ring; it sends R - 1 times the bytes of a block, its x and
            y, and backward 8 bytes. No process has the whole batch. A second derivative then raises an error.

    Returns:
        [], float32 for float16, bfloat16 and float32 input, float64 if any input is. Gradients have each input's dtype;
        they are computed with the value and saved for the backward pass.

    Raises:
        TypeError: x or y is not a floating-point tensor, scales is not a sequence of numbers, group is not a process
            group.
        ValueError: x and y have different dimensions or devices, fewer than two rows (biased: one), an unknown kernel
            or estimator, no scales, or one that is not above 0.
        RuntimeError: the gradient of a group's value is differentiated.

    Source: Gretton et al. 2012, "A Kernel Two-Sample Test", JMLR 13, equation 3 and lemma 6; the kernels as in
    Tolstikhin et al. 2018, "Wasserstein Auto-Encoders", arXiv:1711.01558.

    >>> import torch, fastkl
    >>> x, y = torch.zeros(4, 2), torch.ones(4, 2)
    >>> fastkl.mmd(x, y, scales=[1.0])  # k = 1 within a sample, 4 / (4 + 2) between them
    tensor(0.6667)
    """
    arguments.check_tensors(x=x, y=y)
    arguments.check_choice("kernel", kernel, reference.MMD_KERNELS)
    x, y, scales = _mmd.check_points("x", x), _mmd.check_points("y", y), _mmd.check_scales(scales)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have the same dimensions, got {x.shape[1]} and {y.shape[1]}")
    arguments.check_choice("estimator", estimator, reference.MMD_ESTIMATORS)
    sizes = [_group.row_counts(group, z.shape[0], z.device) for z in (x, y)]
    unbiased = _mmd.check_estimator(estimator, x=sum(sizes[0]), y=sum(sizes[1]))
    value = _mmd.mmd(x, y, kernel, scales, unbiased, group, sizes)
    return value.to(reference.compute_dtype(x, y))
