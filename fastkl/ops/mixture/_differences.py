"""A slice of a mixture's components in torch ops: their log-densities at a block of rows, and the gradients.

`Differences`, `Full` and `_expansion.Expansion` have one interface:

    start(dlogits, first, second)   the sums that gradients of the parameters are added to, of the parameters' shapes;
                                    None is not wanted. dlogits gets the sum of the weights, and is given only if all
                                    rows share the logits.
    prepare(z, ...)                 a block of rows [S, B, D], prepared for the following
    joint                           ln pi + ln N [S, B, k]
    data_gradient                   (dz, dlogvar), for weights [S, B, k] and a scale per row [S, B, 1]
    add                             add the block to these sums
    finish                          after the last block
    add_moments, finish_moments     instead of add and finish, with one mixture for all rows: add up the weights, and
                                    the weighted z - m and its square (or outer product)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops.mixture._mixture import Mixture, part_of

# Bytes of a block's temporaries: they should fit the CPU cache.
DIFFERENCES_BYTES = 4 << 20
LN_2_PI = math.log(2 * math.pi)


class _ByDifferences:
    """Base of `Differences` and `Full`: pure functions of a prepared block; `add` sums their results directly."""

    dlogits: Any
    first: Any
    second: Any
    data_gradient: Callable[..., tuple[Tensor, Tensor | None]]
    parameter_gradients: Callable[..., tuple[Tensor, Tensor]]
    central_moments: Callable[..., tuple[Tensor, Tensor]]

    def __init__(self, mixture: Mixture, components: slice, form: str, dtype: torch.dtype):
        self.mixture, self.components, self.form, self.dtype = mixture, components, form, dtype
        self.gradient_dtype, self.data = dtype, mixture.data
        count, dimensions = len(range(*components.indices(mixture.means.shape[1]))), mixture.means.shape[2]
        matrices = mixture.scale_tril is not None and form == "convolved"
        size = count * dimensions * (dimensions if matrices else 1)
        self.rows = max(1, DIFFERENCES_BYTES // (4 * dtype.itemsize * size))

    def finite(self, distance: Tensor) -> Tensor:
        """Clamp infinite distances. Their weight is 0, and 0 times infinity would be NaN."""
        most = 0.25 * torch.finfo(self.dtype).max
        return distance.clamp(-most, most)

    def start(self, dlogits=None, first=None, second=None) -> None:
        self.dlogits, self.first, self.second = dlogits, first, second

    def for_gradient(self, prepared):
        return prepared

    def add(self, prepared, weights: Tensor, scale: Tensor) -> None:
        if self.dlogits is not None:
            self.dlogits[0, self.components] += weights.flatten(0, 1).T @ scale.flatten()
        if self.first is None and self.second is None:
            return
        for total, gradient in zip((self.first, self.second), self.parameter_gradients(prepared, weights, scale)):
            if total is not None:
                target = part_of(total, prepared[-1], self.components)
                target += gradient.sum_to_size(target.shape)

    def gradients(self, prepared, weights: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """(dz, dlogvar, dmeans, dlogvars or dscale_tril)."""
        scale = torch.ones_like(weights[..., :1])
        return *self.data_gradient(prepared, weights, scale), *self.parameter_gradients(prepared, weights, scale)

    def finish(self) -> None:
        pass

    def add_moments(self, prepared, weights: Tensor, scale: Tensor) -> None:
        self.dlogits[0, self.components] += weights.flatten(0, 1).T @ scale.flatten()
        for total, moment in zip((self.first, self.second), self.central_moments(prepared, weights * scale)):
            total[0, self.components] += moment

    def moments(self, prepared, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return weights.sum((0, 1)), *self.central_moments(prepared, weights)

    finish_moments = finish


class Differences(_ByDifferences):
    """Diagonal components of any kind, by the differences z - m of every row, component and dimension."""

    def prepare(self, z: Tensor, logvar: Any, data: slice, for_gradient: bool = False) -> tuple:
        """((z - m) / sigma, 1 / sigma, 2 ln sigma, the log-variances of q, those of the components, data). In the
        convolved form sigma^2 is the sum of both variances."""
        z, logvar = z.unsqueeze(-2), None if logvar is None else logvar.unsqueeze(-2)
        logvars = z.new_zeros((1, 1, 1))
        if self.mixture.logvars is not None:
            logvars = part_of(self.mixture.logvars, data, self.components).to(self.dtype)
        spread = torch.logaddexp(logvars, logvar) if self.form == "convolved" else logvars
        # Keep 1 / sigma finite: a difference or a weight of 0 times infinity would be NaN.
        most = 709.0 if self.dtype == torch.float64 else 88.0
        root = (-0.5 * spread).clamp(max=most).exp()
        standard = (z - part_of(self.mixture.means, data, self.components).to(self.dtype)) * root
        return standard, root, spread, logvar, logvars, data

    def joint(self, prepared, log_weights: Tensor) -> Tensor:
        standard, _, spread, logvar, _, _ = prepared
        terms = standard.square() + spread
        if self.form == "expected":
            terms = terms + (logvar - spread).exp()
        return -0.5 * (terms.sum(-1) + LN_2_PI * terms.shape[-1]) + log_weights

    def gradients(self, prepared, weights: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        if self.form != "point":
            return super().gradients(prepared, weights)
        # The formulas below with shared products: for small tensors, the number of torch calls is the cost.
        standard, root = self.finite(prepared[0]), prepared[1]
        weights = weights.unsqueeze(-1)
        weighted = weights * standard
        pull = weighted * root
        dlogvars = 0.5 * ((weighted * standard).sum(0) - weights.sum(0))
        return -pull.sum(-2), None, pull.sum(0), dlogvars

    def data_gradient(self, prepared, weights: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
        standard, (root, spread, logvar) = self.finite(prepared[0]), prepared[1:4]
        weights = (weights * scale).unsqueeze(-1)
        dz = -(weights * standard * root).sum(-2)
        if self.form == "point":
            return dz, None
        of_q = (logvar - spread).exp()
        terms = of_q * (standard.square() - 1) if self.form == "convolved" else -of_q
        return dz, 0.5 * reference.weighted(weights, terms).sum(-2)

    def parameter_gradients(self, prepared, weights: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(dmeans, dlogvars) [B, k, D], still to be summed over dimensions that the parameters share."""
        standard, (root, spread, logvar, logvars) = self.finite(prepared[0]), prepared[1:5]
        weights = (weights * scale).unsqueeze(-1)
        terms = standard.square() - 1
        if self.form == "expected":
            terms = terms + (logvar - spread).exp()
        if self.form == "convolved":
            terms = terms * (logvars - spread).exp()
        return (weights * standard * root).sum(0), (0.5 * reference.weighted(weights, terms)).sum(0)

    def central_moments(self, prepared, weights: Tensor) -> tuple[Tensor, Tensor]:
        """sum w (z - m) and sum w (z - m)^2 [k, D]."""
        difference = self.finite(prepared[0] / prepared[1])
        weighted = weights.unsqueeze(-1) * difference
        return weighted.sum((0, 1)), (weighted * difference).sum((0, 1))


class Full(_ByDifferences):
    """Components with a full covariance L L^T. With P = L^-1: y = P (z - m), v = P^T y.

    Tensors are [M, k, n, D]; n is the number of samples per datum, or of all rows if they share one mixture (M = 1).
    """

    def _inward(self, tensor: Tensor) -> Tensor:
        """[S, B, x] -> [M, n, x]."""
        return tensor.reshape(1, -1, *tensor.shape[2:]) if self.mixture.means.shape[0] == 1 else tensor.transpose(0, 1)

    def _outward(self, tensor: Tensor, shape) -> Tensor:
        """[M, n, x] -> [S, B, x]."""
        return tensor.reshape(*shape, tensor.shape[-1]) if self.mixture.means.shape[0] == 1 else tensor.transpose(0, 1)

    def prepare(self, z: Tensor, logvar: Any, data: slice, for_gradient: bool = False) -> tuple:
        shape = z.shape[:2]
        scale = part_of(self.mixture.scale_tril, data, self.components).to(self.dtype).tril()
        means = part_of(self.mixture.means, data, self.components).to(self.dtype).unsqueeze(-2)
        difference = self._inward(z).unsqueeze(1) - means
        variance: Any = None if logvar is None else self._inward(logvar.exp()).unsqueeze(1)
        eye = torch.eye(z.shape[-1], dtype=self.dtype, device=z.device)
        if self.form == "convolved":
            root = torch.linalg.cholesky((scale @ scale.mT).unsqueeze(2) + torch.diag_embed(variance))
            inverse = torch.linalg.solve_triangular(root, eye, upper=False)  # [M, k, n, D, D]
            whitened = (inverse @ difference.unsqueeze(-1)).squeeze(-1)
            solved = (inverse.mT @ whitened.unsqueeze(-1)).squeeze(-1)
        else:
            root, inverse = scale, torch.linalg.solve_triangular(scale, eye, upper=False)
            whitened = difference @ inverse.mT
            solved = whitened @ inverse
        return whitened, solved, root, inverse, scale, variance, shape, data

    def joint(self, prepared, log_weights: Tensor) -> Tensor:
        whitened, _, root, inverse, _, variance, shape, _ = prepared
        log_determinant = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        if self.form != "convolved":
            log_determinant = log_determinant.unsqueeze(-1)
        quadratic = whitened.square().sum(-1)
        if self.form == "expected":
            quadratic = quadratic + (variance * inverse.square().sum(-2).unsqueeze(-2)).sum(-1)
        joint = -0.5 * (quadratic + log_determinant + LN_2_PI * whitened.shape[-1])
        return self._outward(joint.transpose(1, 2), shape) + log_weights

    def _weights(self, weights: Tensor, scale: Tensor) -> Tensor:
        """[S, B, k] -> [M, k, n, 1]."""
        return self._inward(weights * scale).transpose(1, 2).unsqueeze(-1)

    def data_gradient(self, prepared, weights: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
        _, solved, _, inverse, _, variance, shape, _ = prepared
        weights = self._weights(weights, scale)
        dz = self._outward(-(weights * self.finite(solved)).sum(1), shape)
        if self.form == "point":
            return dz, None
        precision = inverse.square().sum(-2)  # the diagonal of P^T P
        terms = solved.square() - precision if self.form == "convolved" else -precision.unsqueeze(-2)
        return dz, self._outward(0.5 * reference.weighted(weights * variance, terms).sum(1), shape)

    def parameter_gradients(self, prepared, weights: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(dmeans [M, k, D], dscale_tril [M, k, D, D])."""
        whitened, solved, _, inverse, tril, variance, _, _ = prepared
        whitened, solved = self.finite(whitened), self.finite(solved)
        weights = self._weights(weights, scale)
        if self.form == "convolved":
            dcovariance = (weights * solved).mT @ solved - (weights.unsqueeze(-1) * (inverse.mT @ inverse)).sum(2)
            gradient = dcovariance @ tril
        else:
            second = (weights * whitened).mT @ whitened
            if self.form == "expected":
                second = second + (inverse * (weights * variance).sum(-2).unsqueeze(-2)) @ inverse.mT
            count = weights.sum(-2) / tril.diagonal(dim1=-2, dim2=-1)
            gradient = inverse.mT @ second - torch.diag_embed(count)
        return (weights * solved).sum(-2), gradient.tril()

    def central_moments(self, prepared, weights: Tensor) -> tuple[Tensor, Tensor]:
        """sum w (z - m) [k, D] and sum w (z - m) (z - m)^T [k, D, D]."""
        whitened, tril = prepared[0], prepared[4]
        difference = whitened @ tril.mT
        weighted = self._inward(weights).transpose(1, 2).unsqueeze(-1) * difference
        return weighted.sum(-2)[0], (weighted.mT @ difference)[0]
