"""Mutual information, total correlation and dimension-wise KL of a batch of posteriors, streamed over its pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops import _group
from fastkl.ops._call import apply, needs_closed_form
from fastkl.ops._register import differentiable, register, same, without_autocast
from fastkl.ops._scales import as_logvar
from fastkl.ops.pairs import _few_pairs_normal as few_pairs
from fastkl.ops.pairs import _pairwise_normal as pairwise
from fastkl.ops.pairs import _total_correlation_ring as ring
from fastkl.reference import Decomposition

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# z is [n, D], mu and logvar [B, D] are the whole batch's; row i of z was drawn from posterior first + i. The sums over
# posteriors, [n] and [n, D], are those that the forward op returns for the backward op.
INPUTS, SETTINGS = "Tensor z, Tensor mu, Tensor logvar", "SymInt first, SymInt dataset_size, bool stratified"
WEIGHTS = ("mss", "mws")


@without_autocast
def _forward(z, mu, logvar, first, dataset_size, stratified) -> list[Tensor]:
    if z.shape[0] == 0:
        return _fake_forward(z, mu, logvar, first, dataset_size, stratified)
    found = None
    if z.numel() * mu.shape[0] <= few_pairs.MOST:
        found = few_pairs.forward(few_pairs.Pairs(z, mu, logvar, first, dataset_size, stratified))
    if found is None:
        found = pairwise.forward(pairwise.Sweep(z, mu, logvar, first, dataset_size, stratified))
    return found


def _fake_forward(z, mu, logvar, first, dataset_size, stratified) -> list[Tensor]:
    dtype = reference.compute_dtype(z, mu, logvar)
    return [z.new_empty(shape, dtype=dtype) for shape in (*[z.shape[:1]] * 4, z.shape)]


@without_autocast
def _backward(
    dmutual, dtotal, ddimension, z, mu, logvar, joint_sum, marginal_sum, dz, dmu, dlogvar, first, dataset_size,
    stratified,
) -> None:  # fmt: skip
    outputs = (dz, dmu, dlogvar)
    if z.shape[0] == 0:
        for output in outputs:
            output.zero_()
        return
    coefficients = [tensor.to(joint_sum.dtype) for tensor in pairwise.coefficients_of(dmutual, dtotal, ddimension)]
    # A negative sum marks a row far from its own posterior, which needs the sweep, and so does a sum that is NaN.
    few = z.numel() * mu.shape[0] <= few_pairs.MOST and (joint_sum > 0).all()
    way, pairs = (few_pairs, few_pairs.Pairs) if few else (pairwise, pairwise.Sweep)
    prepared = pairs(z, mu, logvar, first, dataset_size, stratified)
    for output, gradient in zip(outputs, way.gradients(prepared, coefficients, joint_sum, marginal_sum)):
        output.copy_(gradient)


def _gradients(z, mu, logvar, first, dataset_size, stratified, dmutual, dtotal, ddimension) -> list[Tensor]:
    """The gradients in differentiable torch ops, with all pairs in memory."""
    dtype = reference.compute_dtype(z, mu, logvar)
    inputs = (z, mu, logvar)
    z, mu, logvar = (tensor.to(dtype) for tensor in inputs)
    own, joint, marginal, prior = pairwise.coefficients_of(dmutual, dtotal, ddimension)
    like = {"dtype": dtype, "device": z.device}
    sizes = (z.shape[0], mu.shape[0], dataset_size, WEIGHTS[not stratified])
    log_weights = reference.sample_weights(*sizes, first=first, **like).log()
    each = (tensor.unsqueeze(-1) for tensor in (z.unsqueeze(1), mu, logvar))
    terms = reference.normal_log_prob(*each, event_ndim=1)
    share = torch.softmax(log_weights + terms.sum(-1), 1) * joint.unsqueeze(1)
    is_own = torch.arange(mu.shape[0], device=z.device) == torch.arange(z.shape[0], device=z.device)[:, None] + first
    share = (share + is_own * own.unsqueeze(1)).unsqueeze(-1)
    share = share + torch.softmax(log_weights.unsqueeze(-1) + terms, 1) * marginal[:, None, None]
    dmean, dlogvar = reference.normal_terms_gradient(share, z.unsqueeze(1), mu, logvar)
    dz = prior.unsqueeze(1) * z - dmean.sum(1)
    return [g.to(tensor.dtype) for g, tensor in zip((dz, dmean.sum(0), dlogvar.sum(0)), inputs)]


def _kernels():
    from fastkl.kernels.pairs import total_correlation

    return total_correlation


def _loops():
    from fastkl.native import total_correlation

    return total_correlation


total_correlation_fwd = register(
    f"total_correlation_fwd({INPUTS}, {SETTINGS}) -> Tensor[]",
    closed_form=_forward,
    fake=_fake_forward,
    kernel=lambda: _kernels().fwd,
    native=lambda: _loops().total_correlation_fwd,
)
total_correlation_bwd = register(
    f"total_correlation_bwd(Tensor dmutual, Tensor dtotal, Tensor ddimension, {INPUTS}, Tensor joint_sum, "
    f"Tensor marginal_sum, Tensor(a!) dz, Tensor(b!) dmu, Tensor(c!) dlogvar, {SETTINGS}) -> ()",
    closed_form=_backward,
    kernel=lambda: _kernels().bwd,
    native=lambda: _loops().total_correlation_bwd,
)


class _TotalCorrelation(torch.autograd.Function):
    @staticmethod
    def forward(z, mu, logvar, first, dataset_size, stratified):
        return tuple(total_correlation_fwd(z, mu, logvar, first, dataset_size, stratified))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:3], *output[3:])
        ctx.settings = inputs[3:]

    @staticmethod
    def backward(ctx, dmutual, dtotal, ddimension, *_):
        z, mu, logvar, joint_sum, marginal_sum = ctx.saved_tensors
        given = [torch.zeros_like(joint_sum) if d is None else d for d in (dmutual, dtotal, ddimension)]
        if needs_closed_form(*given):
            gradients = _gradients(z, mu, logvar, *ctx.settings, *given)
        else:
            gradients = [torch.empty_like(tensor) for tensor in (z, mu, logvar)]
            total_correlation_bwd(*given, z, mu, logvar, joint_sum, marginal_sum, *gradients, *ctx.settings)
        return (*gradients, *[None] * len(ctx.settings))

    @staticmethod
    def vmap(info, in_dims, *inputs):
        """One call per example, because each example is a separate batch."""
        examples = arguments.examples(info.batch_size, in_dims, inputs)
        return arguments.stacked([apply(_TotalCorrelation, *example) for example in examples])


differentiable("total_correlation_fwd", _TotalCorrelation, same)


def total_correlation(
    z: Tensor, mu: Tensor | float, logvar: Tensor | float, dataset_size: int, *, weights: str = "mss",
    group: ProcessGroup | None = None, scale: str = "logvar",
) -> Decomposition:  # fmt: skip
    """Estimates of the three parts of the KL to N(0, I): mutual information, total correlation, dimension-wise KL.

    KL = E[ln q(z|x) - ln q(z)] + E[ln q(z) - sum_d ln q(z_d)] + E[sum_d (ln q(z_d) - ln p(z_d))], with the aggregate
    posterior q(z) = sum_j w_ij N(z; mu_j, diag exp(logvar_j)), and its marginals q(z_d), estimated from the batch

    It needs no tensor of the size of all pairs, and the weight counts once, not once for each dimension.

    Args:
        z: [N, D], row i drawn from posterior i; differentiable, as from `fastkl.rsample_normal`.
        mu, logvar: mean and ln sigma^2 of the batch's posteriors; broadcast to z's shape, or numbers.
        dataset_size: size of the data set from which the batch was drawn.
        weights: "mss", minibatch stratified sampling: with M = N - 1 the own posterior weighs 1 / dataset_size, the
            next one (dataset_size - M) / (dataset_size M), the others 1 / M. "mws", minibatch weighted sampling:
            all weigh 1 / (dataset_size N), which is not normalised, as published.
        group: a torch.distributed process group; the batch is then that of all its processes (posteriors in order of
            rank). None means this process's batch. Blocks of mu and logvar go around a ring, so a process has two
            blocks of them. With B posteriors each of R processes sends 8 (R - 1) D B / R bytes in float32 forward, and
            8 (2 R - 1) D B / R backward. Only if a z lies so far from its own posterior that another one is above e^88
            times (in float64 e^709) as dense there, all are gathered. Not twice differentiable.
        scale: the meaning of logvar: "logvar", "log_std", "std" or "softplus" (sigma = softplus of it).

    Returns:
        (mutual_information, total_correlation, dimension_wise_kl), [N] each, in nats, whose means are the
        decomposition; they add up to ln q(z_i|x_i) - ln p(z_i). float32 for float16, bfloat16 and float32 input,
        float64 if any input is. The backward pass needs the inputs and the sums over j, [N, D] and [N].

    Raises:
        TypeError: an argument is not a floating-point tensor, dataset_size is not an int, group is not a process group.
        ValueError: z is not [N, D], mu or logvar does not broadcast to it, devices differ, the batch has size 1,
            dataset_size is smaller than the batch, or weights or scale is unknown.

    Source: Chen et al. 2018, "Isolating Sources of Disentanglement in Variational Autoencoders", arXiv:1802.04942,
    equation 2 and appendix C.

    >>> import torch, fastkl
    >>> mu, logvar = torch.tensor([[-9.0], [9.0]]), torch.zeros(2, 1)
    >>> fastkl.total_correlation(mu, mu, logvar, 2).mutual_information  # ln 2: z tells which of two it belongs to
    tensor([0.6931, 0.6931])
    """
    means, logvars = arguments.as_tensors(z, mu, logvar)
    arguments.check_tensors(z=z, mu=means, logvar=logvars)
    if z.dim() != 2:
        raise ValueError(f"z must be [N, D], got shape {tuple(z.shape)}")
    for name, tensor in (("mu", means), ("logvar", logvars)):
        if not arguments.fits(tensor, z.shape):
            raise ValueError(f"{name} {tuple(tensor.shape)} does not broadcast to z's shape {tuple(z.shape)}")
    dataset_size = arguments.check_int("dataset_size", dataset_size, 1)
    stratified = arguments.check_choice("weights", weights, WEIGHTS) == "mss"
    logvars = as_logvar("scale", logvars, scale, z, means)
    posteriors, first = [arguments.expand(tensor, z.shape) for tensor in (means, logvars)], 0
    sizes = _group.row_counts(group, z.shape[0], z.device)
    batch = sum(sizes)
    if batch == 1:
        raise ValueError("z must have 2 rows or more, got 1: one posterior is no estimate of the aggregate posterior")
    if dataset_size < batch:
        raise ValueError(f"dataset_size must be at least the batch's {batch}, got {dataset_size}")
    if group is not None and len(sizes) > 1:
        spread = ring.Spread(group, sizes, dataset_size, stratified)
        found = ring.over_ranks(spread, z, *posteriors)
        if found is not None:
            return Decomposition(*found)
        posteriors, first = [_group.gathered(group, tensor, sizes) for tensor in posteriors], spread.first
    return Decomposition(*apply(_TotalCorrelation, z, *posteriors, first, dataset_size, stratified)[:3])
