"""What tests of the launchers for one shared mixture share: inputs, and the contract of a call."""

import torch

from fastkl import reference

from gmm_helpers import outputs
from helpers import DEVICE, assert_as_good_as_eager, launcher, poisoned_memory

FORMS = ("point", "expected", "convolved")
SHARED = {"diagonal": lambda k, d: (1, k, d), "spherical": lambda k, d: (1, k, 1), "tied": lambda k, d: (1, 1, d)}


def draw(rows, components, columns, *, form="point", logit_rows=1, spread="diagonal", dtype=torch.float32, offset=0.0):
    """(z, logvar, logits, means, logvars) on the device, in the launchers' canonical shapes."""
    generator = torch.Generator().manual_seed(rows + components + columns)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    z, means = normal(rows, columns) + offset, normal(1, components, columns) + offset
    logvar = None if form == "point" else 0.5 * normal(rows, columns) - 1
    logvars = None if spread is None else 0.5 * normal(*SHARED[spread](components, columns))
    tensors = (z, logvar, normal(logit_rows, components), means, logvars)
    return [None if t is None else t.to(DEVICE, dtype) for t in tensors]


def joint(tensors, form, dtype=torch.float64):
    """The definition in `dtype` (as eager PyTorch would evaluate it), on leaves: (leaves, [R, K])."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    z, logvar, logits, means, logvars = leaves
    own = logits.repeat(z.shape[0] // logits.shape[0], 1) if logits.shape[0] > 1 else logits[0]
    logvars = None if logvars is None else logvars[0]
    return leaves, reference.gmm_joint_log_prob(z, own, means[0], logvars, logvar=logvar, form=form)


def gradients(value, cotangent, leaves):
    leaves = [leaf for leaf in leaves if leaf is not None]
    return [value.detach(), *torch.autograd.grad((value * cotangent.to(value.dtype)).sum(), leaves)]


def compare(actual, tensors, function, cotangent, form, units):
    """The error against the float64 definition is at most that of the definition in the compute dtype, plus rounding.

    A last place of the log-density, which is what forward saves, is a relative error of every weight.
    """
    dtype = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    exact, eager = [], []
    for results, precision in ((exact, torch.float64), (eager, dtype)):
        leaves, values = joint(tensors, form, precision)
        results += gradients(function(values), cotangent, leaves)
    size = torch.finfo(dtype).eps * (2 + exact[0].abs().amax().item() if exact[0].numel() else 0)
    for got, naive, truth in zip(actual, eager, exact, strict=True):
        # Terms of a sum cancel: rounding is relative to the largest term, not to the result.
        scale = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0  # 1: terms of the weights' size
        allowed = units + size / torch.finfo(got.dtype).eps
        assert_as_good_as_eager(got, naive, truth, units=allowed, scale=scale)


def check_log_prob(tensors, form="point", dlp=None, units=8.0, separately=False):
    fwd, bwd = launcher("gmm_log_prob.fwd"), launcher("gmm_log_prob.bwd")
    z, logvar, logits, means, logvars = tensors
    inputs = (z, logvar, logits, means, logvars, None)
    with poisoned_memory():
        lp, kept = fwd(*inputs, form, "exact", 1)
        assert torch.equal(kept.to(lp.dtype), lp)
        dlp = torch.linspace(-1, 2, z.shape[0], dtype=lp.dtype, device=lp.device) if dlp is None else dlp

        def gradients(*wanted):
            found = outputs(inputs, wanted)
            assert bwd(dlp, kept, None, *inputs, *found, form, "exact") is None
            return [t for t in found if t is not None]

        everything = gradients(*range(6))
        if separately:
            parts = [*gradients(0, 1), *gradients(2, 3, 4)]
            alone = [gradient for place in range(5) for gradient in gradients(place)]
            # Logits of their own make the kernel by rows another one, which rounds otherwise.
            close = 0.0 if logits.shape[0] == 1 else 1e-6
            for found in (parts, alone):
                torch.testing.assert_close(everything, found, rtol=close, atol=close)
    assert [g.dtype for g in everything] == [t.dtype for t in tensors if t is not None]
    compare([lp, *everything], tensors, lambda values: values.logsumexp(-1), dlp, form, units)
    return lp, everything
