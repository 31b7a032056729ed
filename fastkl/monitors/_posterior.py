"""Monitors of posteriors: active units, the KL of each dimension, mutual information."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl import reference
from fastkl.distributions import DiagonalNormal
from fastkl.monitors._monitor import Monitor, State, check_posterior, posterior_rows
from fastkl.ops import _arguments as arguments
from fastkl.ops._sampling import Seed
from fastkl.ops.likelihood.normal_log_prob import normal_log_prob
from fastkl.ops.mixture.gmm_log_prob import gmm_log_prob
from fastkl.ops.normal.rsample_normal import rsample_normal

ACTIVE = 0.01


class ActiveUnits(Monitor):
    """Latent dimensions whose posterior mean varies over the data: Var_x(E[z_d | x]) > 0.01.

    Mean and squared deviations of batches are merged by the update of Chan, Golub and LeVeque, which avoids
    cancellation for means far from 0.

    Args:
        threshold: the variance above which a unit is active.
        group: a process group; see `fastkl.monitors`.

    Source: Burda, Grosse and Salakhutdinov 2016, "Importance Weighted Autoencoders", arXiv:1509.00519, section 5.2;
    Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".

    >>> import torch, fastkl
    >>> from fastkl import monitors
    >>> units = monitors.ActiveUnits()
    >>> for mu in torch.tensor([[[0.0, 1.0], [2.0, 1.0]], [[4.0, 1.0], [6.0, 1.0]]]):
    ...     units.update(fastkl.DiagonalNormal(mu, torch.zeros_like(mu)))
    >>> units.compute(), units.count()
    (tensor([6.6667, 0.0000], dtype=torch.float64), 1)
    """

    def __init__(self, threshold: float = ACTIVE, *, group=None) -> None:
        self.threshold = arguments.check_number("threshold", threshold)
        super().__init__(group=group)

    @torch.no_grad()
    def update(self, q: DiagonalNormal | Tensor) -> None:
        """Add posteriors, or their means [N, *event]."""
        if isinstance(q, Tensor):
            arguments.check_tensors(q=q)
            if q.dim() < 2:
                raise ValueError(f"q must be a posterior or its means [N, *event], got {tuple(q.shape)}")
            means = q.detach()
        else:
            check_posterior(q)
            means = q.mean.detach().flatten(0, len(q.shape) - q.event_ndim - 1)
        if len(means) == 0:
            return
        mean = means.mean(0, dtype=torch.float64)
        self.add(State(len(means), (mean, (means - mean).square().sum(0))))

    def combine(self, one: State, other: State) -> State:
        count = one.count + other.count
        (mean, squares), (new_mean, new_squares) = one.values, other.values
        apart = new_mean - mean
        mean = mean + apart * (other.count / count)
        return State(count, (mean, squares + new_squares + apart.square() * (one.count * other.count / count)))

    def compute(self) -> Tensor:
        """The variances [*event], with n - 1 degrees of freedom; NaN for a single datum."""
        count, (_, squares) = self.everything()
        return squares / (count - 1)

    def active(self) -> Tensor:
        """A mask [*event] of the active units."""
        return self.compute() > self.threshold

    def count(self) -> int:
        """The number of active units."""
        return int(self.active().sum())


class KLPerDimension(Monitor):
    """The mean KL of every latent dimension over the data, in nats.

    >>> import torch, fastkl
    >>> from fastkl import monitors
    >>> kl = monitors.KLPerDimension()
    >>> kl.update(fastkl.DiagonalNormal(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), torch.zeros(2, 2)))
    >>> kl.compute()
    tensor([0., 1.], dtype=torch.float64)
    """

    @torch.no_grad()
    def update(
        self, q: DiagonalNormal | Tensor, prior: DiagonalNormal | None = None, *, count: int | None = None
    ) -> None:
        """Add posteriors, with the KL to N(0, I) or `prior`; or the loss's KL per dimension, the means [*event] over a
        batch of `count` data (`fastkl.kl_normal_per_dim`)."""
        if isinstance(q, Tensor):
            arguments.check_tensors(q=q)
            if prior is not None or count is None:
                raise ValueError("q given as means needs count, and takes no prior")
            means, count = q.detach(), arguments.check_int("count", count, 0)
        else:
            check_posterior(q)
            if count is not None:
                raise ValueError("count is only for q given as means; posteriors have their own count")
            means, count = q.kl_per_dim(prior), q.shape[: len(q.shape) - q.event_ndim].numel()
        if count:
            self.add(State(count, (means.double() * count,)))

    def compute(self) -> Tensor:
        """The mean KL of each dimension [*event]; its sum is the mean KL of a datum."""
        return self.mean()


class MutualInformation(Monitor):
    """Mutual information of data and latent under q, in nats.

    I(x; z) = E_x E_q(z|x) [ln q(z | x) - ln q(z)] = E_x KL(q(z | x) || p) - KL(q(z) || p), q(z) = mean_m q(z | x_m)

    Both terms use the same draws, so the estimate is exactly 0 if all posteriors are equal. It needs no tensor of size
    draws times posteriors.

    Args:
        group: a process group; see `fastkl.monitors`. Each process compares with its own posteriors.

    Source: Hoffman and Johnson 2016, "ELBO surgery: yet another way to carve up the variational evidence lower bound".

    >>> import torch, fastkl
    >>> from fastkl import monitors
    >>> information = monitors.MutualInformation()
    >>> far = 100.0 * torch.arange(8.0).unsqueeze(1)  # 8 posteriors, each of which tells its datum: ln 8
    >>> information.update(fastkl.DiagonalNormal(far, torch.zeros(8, 1)), seed=0)
    >>> information.compute()
    tensor(2.0794, dtype=torch.float64)
    """

    @torch.no_grad()
    def update(
        self, q: DiagonalNormal, aggregate: DiagonalNormal | None = None, *, num_samples: int = 1,
        seed: Seed | None = None,
    ) -> None:  # fmt: skip
        """Add posteriors q. `aggregate`: the posteriors whose mean is q(z), those of the whole data set for an exact
        figure; None takes the M posteriors of this update, and the figure is then at most ln M."""
        mu, logvar = posterior_rows(q)
        means, logvars = (mu, logvar) if aggregate is None else posterior_rows(aggregate)
        if means.shape[1] != mu.shape[1] or len(means) == 0 < len(mu):
            raise ValueError(f"aggregate must hold posteriors of {mu.shape[1]} dimensions, got {aggregate or q}")
        if len(mu) == 0:
            return
        dtype = reference.compute_dtype(mu, logvar)  # 16-bit draws would be many deviations off in a narrow posterior
        z = rsample_normal(mu.to(dtype), logvar.to(dtype), num_samples=num_samples, seed=seed)
        own = normal_log_prob(z, mu, logvar, event_ndim=1)
        together = gmm_log_prob(z, logvars.new_zeros(len(means)), means, logvars)
        self.add(State(own.numel(), ((own - together).double().sum(),)))

    def compute(self) -> Tensor:
        """The mutual information [], in nats."""
        return self.mean()
