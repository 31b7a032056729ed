"""A slice of a mixture's components as matrix products: the squared differences are expanded."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops.mixture._differences import LN_2_PI
from fastkl.ops.mixture._mixture import Mixture, part_of

# Bytes of a block's temporaries. Matrix products are fast only with many rows.
PRODUCT_BYTES = 10 << 20
# The largest sum_d (m s)^2 for which expanding (z - m)^2 s^2 in float64 is as accurate as differences in the compute
# dtype, and the largest (m s)^2 for which the gradients' sums may be expanded in float32.
EXPANSION_LIMIT = {torch.float32: 1e8, torch.float64: 1e3}
GRADIENT_LIMIT = 64.0
ROWS_IN_FLOAT32 = 512


class Expansion:
    """Diagonal components that all rows share; the interface is that of _differences. Sums over dimensions are products
    of features [x^2, x, 1], x = z - centre, with coefficients [-1/2 s^2, (m - centre) s^2, the rest]."""

    def __init__(self, mixture: Mixture, components: slice, precision: str, centre: Tensor):
        exact, self.mixture, self.components = precision == "exact", mixture, components
        self.dtype = torch.float64 if exact else centre.dtype
        self.centre = centre
        means = self._means()
        count, dimensions = means.shape
        logvars = means.new_zeros(())
        if mixture.logvars is not None:
            logvars = part_of(mixture.logvars, slice(None), components)[0].to(self.dtype)
        logvars = logvars.expand(means.shape)
        self.coefficients = means.new_empty(count, 2 * dimensions + 1)
        half_precision = torch.exp(-logvars, out=self.coefficients[:, :dimensions]).mul_(-0.5)
        linear = torch.mul(means, half_precision, out=self.coefficients[:, dimensions:-1]).mul_(-2)
        squares = means.mul_(linear)
        norms = squares.sum(-1)
        self.constant = -0.5 * (norms + logvars.sum(-1) + LN_2_PI * dimensions)
        self.is_allowed = not (exact and not norms.amax() <= EXPANSION_LIMIT[centre.dtype])  # NaN is not allowed
        narrow = exact and squares.amax() > GRADIENT_LIMIT
        self.gradient_dtype = self.dtype if narrow else centre.dtype
        self.rows = max(1, PRODUCT_BYTES // (12 * count + 48 * dimensions))
        self.infinite_rows = False  # whether z may contain infinities
        self.buffers: dict = {}

    def _means(self) -> Tensor:
        return self.mixture.means[0, self.components].to(self.dtype) - self.centre

    def _buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Memory that all blocks share: fresh memory costs a page fault every 4 KB."""
        key = (name, rows, columns, dtype)
        if key not in self.buffers:
            self.buffers[key] = torch.empty(rows, columns, dtype=dtype, device=self.centre.device)
        return self.buffers[key]

    def prepare(self, z: Tensor, logvar: Tensor | None, data: slice, for_gradient: bool = False):
        """(features, shape, variance), valid until the next block."""
        dtype = self.gradient_dtype if for_gradient else self.dtype
        (rows, size), shape = z.flatten(0, 1).shape, z.shape[:2]
        features = self._buffer("features", rows, 2 * size + 1, dtype)
        x = torch.sub(z.flatten(0, 1).to(dtype), self.centre, out=features[:, size:-1])
        square = torch.mul(x, x, out=features[:, :size])
        if self.infinite_rows:  # keep only the square, which gives -inf; 2 x m - x^2 would be NaN
            x.masked_fill_(x.isinf(), 0.0)
        variance = None if logvar is None else logvar.flatten(0, 1).to(dtype).exp()
        if variance is not None:
            square += variance
        features[:, -1] = 1
        return features, shape, variance

    def for_gradient(self, prepared):
        """Turn the result of `prepare` into its result with for_gradient=True."""
        features, *others = prepared
        if features.dtype == self.gradient_dtype:
            return prepared
        return self._buffer("features", *features.shape, self.gradient_dtype).copy_(features), *others

    def joint(self, prepared, log_weights: Tensor) -> Tensor:
        features, shape, _ = prepared
        shared = len(log_weights) == 1
        self.coefficients[:, -1] = self.constant + log_weights[0] if shared else self.constant
        joint = self._buffer("joint", len(features), len(self.coefficients), self.dtype)
        joint = torch.mm(features, self.coefficients.T, out=joint).view(*shape, -1)
        return joint if shared else joint.add_(log_weights)

    def start(self, dlogits=None, first=None, second=None) -> None:
        self.dlogits, self.first, self.second = dlogits, first, second
        if any(total is not None for total in (dlogits, first, second)):
            self.moments = self.coefficients.new_zeros(self.coefficients.shape, dtype=torch.float64)
        self.gradient_coefficients = self.coefficients[:, :-1].to(self.gradient_dtype)

    def data_gradient(self, prepared, weights: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(dz, dlogvar), valid until the next block."""
        features, shape, variance = prepared
        size = features.shape[1] // 2
        gradient = self._buffer("gradient", len(features), 2 * size, self.gradient_dtype)
        torch.mm(weights.flatten(0, 1), self.gradient_coefficients, out=gradient).mul_(scale.reshape(-1, 1))
        dsquare, dx = gradient.chunk(2, 1)
        dx.addcmul_(dsquare, features[:, size:-1], value=2)
        if variance is not None:
            dsquare.copy_(reference.weighted(dsquare, variance.to(dsquare.dtype)))
        return dx.view(*shape, -1), dsquare.view(*shape, -1)

    def add(self, prepared, weights: Tensor, scale: Tensor) -> None:
        """Add the sums over rows of weights * scale * [(z - centre)^2, z - centre, 1]."""
        scale = scale.reshape(-1, 1)
        features = prepared[0].mul_(scale).masked_fill_(scale == 0, 0.0)  # a row at infinity has NaN
        # The product of narrow matrices adds rows one after the other: limit their number in float32.
        for some, of_them in zip(weights.flatten(0, 1).split(ROWS_IN_FLOAT32), features.split(ROWS_IN_FLOAT32)):
            self.moments += some.T @ of_them

    def central_moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """sum w [k], sum w (z - m) [k, D], sum w (z - m)^2 [k, D]; the square includes the variance of q."""
        size = self.centre.numel()
        self.buffers.clear()
        second, first, count = self.moments[:, :size], self.moments[:, size:-1], self.moments[:, -1:]
        means = self._means().double()
        central = first - means * count
        return count[:, 0], central, second - means * (first + central)

    add_moments = add

    def finish_moments(self) -> None:
        count, self.first[0, self.components], self.second[0, self.components] = self.central_moments()
        self.dlogits[0, self.components] += count.to(self.dlogits.dtype)

    def finish(self) -> None:
        count, first, second = self.central_moments()
        if self.dlogits is not None:
            self.dlogits[0, self.components] += count.to(self.dlogits.dtype)
        precision = self.coefficients[:, : self.centre.numel()].mul(-2).to(first.dtype)
        if self.first is not None:
            self.first[0, self.components] += (first * precision).to(self.first.dtype)
        if self.second is not None:
            dlogvars = second.mul_(precision).sub_(count.unsqueeze(-1)).mul_(0.5)
            target = part_of(self.second, slice(None), self.components)
            target += dlogvars.sum_to_size(target.shape[1:]).to(target.dtype)
