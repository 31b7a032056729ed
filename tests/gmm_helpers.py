"""What the tests of mixtures share: inputs, a function's value with its gradients, and the contract of a launcher."""

from __future__ import annotations

import torch

from fastkl import reference

from helpers import DEVICE, assert_as_good_as_eager, empty_like, leaf

BACKENDS = ("torch", "native", "triton")
MIB = 1 << 20


def draw(*shape, seed=0, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).to(DEVICE)


def triangles(*batch, size, seed=3):
    lower = 0.4 * draw(*batch, size, size, seed=seed).tril(-1)
    return lower + torch.diag_embed(0.5 + draw(*batch, size, seed=seed + 1).abs())


def ordinary():
    """(z, logits, means, logvars)."""
    return draw(40, 16), draw(20, seed=1), draw(20, 16, seed=2), draw(20, 16, seed=3, scale=0.5)


def gradients(function, *inputs):
    leaves = [leaf(tensor) for tensor in inputs]
    value = function(*leaves)
    weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype, device=DEVICE).view(value.shape)
    return value.detach(), torch.autograd.grad(value, leaves, weights)


def definition(z, logvar, logits, means, spread, form):
    """The launchers' canonical form: row r uses mixture r % M and logits r % I; spread is scale_tril if it has four
    dimensions, else logvars."""
    rows = torch.arange(len(z), device=z.device)
    full = spread is not None and spread.dim() == 4
    if spread is not None and not full:
        spread = spread.expand(means.shape)
    logits, means, spread = (t if t is None or len(t) == 1 else t[rows % len(t)] for t in (logits, means, spread))
    settings = {"scale_tril": spread} if full else {"logvars": spread}
    return reference.gmm_joint_log_prob(z, logits, means, **settings, logvar=logvar, form=form).logsumexp(-1)


def differentiate(tensors, weights, form):
    """[log p, *gradients] by the definition, in the tensors' dtype."""
    value = definition(*tensors, form)
    given = [t for t in tensors if t is not None]
    return [value, *torch.autograd.grad(value, given, weights.to(value.dtype))]


def launch_and_differentiate(launch, tensors, form):
    """(actual, exact, weights) of `launch`(tensors, weights, form) -> [log p, *gradients]."""
    weights = torch.linspace(-1, 2, len(tensors[0]), dtype=torch.float64, device=DEVICE)
    exact = differentiate([None if t is None else leaf(t.double()) for t in tensors], weights, form)
    actual = launch(tensors, weights, form)
    assert [g.dtype for g in actual[1:]] == [t.dtype for t in tensors if t is not None]
    return actual, exact, weights


def check_launch(launch, tensors, form):
    actual, exact, weights = launch_and_differentiate(launch, tensors, form)
    eager = differentiate(tensors, weights, form)
    # A joint log-density of size a is rounded to a last places of its exponential, the responsibility.
    scales = [t.detach().abs().max() if t.numel() else 0.0 for t in exact]
    scales[1:] = [scale * (1 + scales[0]) for scale in scales[1:]]
    for got, naive, truth, scale in zip(actual, eager, exact, scales):
        assert_as_good_as_eager(got, naive, truth, scale=scale)
    return actual


def outputs(inputs, wanted=None):
    """Outputs of a backward launcher: for all inputs, or for those in the places `wanted`."""
    return empty_like(*(t if wanted is None or place in wanted else None for place, t in enumerate(inputs)))


def written(bwd, dlp, lp, inputs, form, precision, wanted=None):
    """The outputs of a launcher behind gmm_log_prob's."""
    own = outputs(inputs, wanted)
    assert bwd(dlp, lp, inputs, own, form, precision) is None
    return [t for t in own if t is not None]


def check_parts(launch, tensors):
    """A gradient that is asked for alone has the bits that it has among all five."""
    weights = torch.linspace(-1, 1, len(tensors[0]), device=DEVICE)
    given = [place for place, tensor in enumerate(tensors) if tensor is not None]
    both = launch(tensors, weights, "expected")[1:]
    assert len(both) == len(given) == 5
    for place, expected in zip(given, both):
        (alone,) = launch(tensors, weights, "expected", wanted={place})[1:]
        assert torch.equal(alone, expected), place
