"""Bad input raises an error, before any launch, that names the argument and what was expected."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch

import fastkl
from fastkl.ops import _arguments as arguments

from helpers import DEVICE

M = torch.zeros(3, 4, device=DEVICE)
INTS = torch.zeros(3, 4, dtype=torch.int64, device=DEVICE)
META = torch.zeros(3, 4, device="meta")

# call -> (error, what its message must say)
KL = {
    "shapes": (lambda f: f(M, M[:2]), ValueError, r"mu \(3, 4\).*logvar \(2, 4\)"),
    "prior shape": (lambda f: f(M, M, M[:, :3], M), ValueError, r"prior_mu \(3, 3\)"),
    "integer mu": (lambda f: f(INTS, M), TypeError, "mu must be a floating-point tensor.*int64"),
    "integer logvar": (lambda f: f(M, INTS), TypeError, "logvar must be a floating-point tensor"),
    "integer prior": (lambda f: f(M, M, M, INTS), TypeError, "prior_logvar must be a floating-point tensor"),
    "float8": (
        lambda f: f(M, M.to(torch.float8_e4m3fn)),
        TypeError,
        "logvar must be.*float8_e4m3fn; float16, bfloat16",
    ),
    "not a tensor": (lambda f: f(M, [0.0]), TypeError, "logvar must be a torch.Tensor, got list"),
    "devices": (lambda f: f(M, META), ValueError, "logvar is on meta, but mu is on"),
    "event below 0": (lambda f: f(M, M, event_ndim=-1), ValueError, "event_ndim must be at least 0, got -1"),
    "event a bool": (lambda f: f(M, M, event_ndim=False), TypeError, "event_ndim must be an int, got bool"),
    "event too large": (lambda f: f(M, M, event_ndim=3), ValueError, r"event_ndim=3.*\(3, 4\) has 2"),
    "event type": (lambda f: f(M, M, event_ndim=1.0), TypeError, "event_ndim must be an int, got float"),
    "scalars": (lambda f: f(M[0, 0], M[0, 0]), ValueError, "event_ndim=1 needs at least 1 dim"),
    "scale": (lambda f: f(M, M, scale="sigma"), ValueError, "scale must be one of 'logvar'.*got 'sigma'"),
    "bounds order": (lambda f: f(M, M, bounds=(20, -30)), ValueError, r"bounds must be \(low, high\).*20.0, -30.0"),
    "bounds equal": (lambda f: f(M, M, bounds=fastkl.SoftBounds(1, 1)), ValueError, "bounds must be"),
    "bounds nan": (lambda f: f(M, M, bounds=(math.nan, 1.0)), ValueError, "bounds must be"),
    "bounds type": (lambda f: f(M, M, bounds=3.0), TypeError, "bounds must be a pair"),
}
SAMPLING = {
    "samples": (lambda f: f(M, M, num_samples=0), ValueError, "num_samples must be at least 1, got 0"),
    "samples type": (lambda f: f(M, M, num_samples=2.0), TypeError, "num_samples must be an int"),
    "seed and eps": (lambda f: f(M, M, seed=1, eps=M), ValueError, "seed and eps exclude each other"),
    "eps shape": (lambda f: f(M, M, num_samples=2, eps=torch.zeros(3, 3, 4, device=DEVICE)), ValueError, "eps"),
    "eps larger": (lambda f: f(M, M, eps=torch.zeros(2, 3, 4, device=DEVICE)), ValueError, "eps must have the shape"),
    "eps dtype": (lambda f: f(M, M, eps=INTS), TypeError, "eps must be a floating-point tensor"),
    "seed type": (lambda f: f(M, M, seed=1.5), TypeError, "seed must be an int"),
    "seed tensor": (
        lambda f: f(M, M, seed=torch.zeros(2, dtype=torch.int64)),
        TypeError,
        "seed must be an int64 tensor",
    ),
    "NumPy's ints are ints": (lambda f: f(M, M, num_samples=np.int64(0)), ValueError, "num_samples must be at least 1"),
    "seed size": (lambda f: f(M, M, seed=2**63), ValueError, "seed must be below"),
}
PACKED = {
    "odd": (lambda: fastkl.DiagonalNormal.from_packed(M[:, :3]), ValueError, "head packs.*dim=1.*even, got 3"),
    "dim": (lambda: fastkl.DiagonalNormal.from_packed(M, dim=2), ValueError, "dim=2 is out of range for head"),
    "dim type": (lambda: fastkl.DiagonalNormal.from_packed(M, dim=1.0), TypeError, "dim must be an int"),
    "integer": (lambda: fastkl.DiagonalNormal.from_packed(INTS), TypeError, "head must be a floating-point tensor"),
    "no head": (lambda: fastkl.DiagonalNormal.from_packed(None), TypeError, "head must be a torch.Tensor, got None"),
    "no mu": (lambda: fastkl.DiagonalNormal(logvar=M), TypeError, "mu must be a torch.Tensor, got NoneType"),
    "no logvar": (lambda: fastkl.DiagonalNormal(M), TypeError, "logvar must be a torch.Tensor, got NoneType"),
    "event": (lambda: fastkl.DiagonalNormal.from_packed(M, event_ndim=3), ValueError, "event_ndim=3"),
    "scale": (lambda: fastkl.DiagonalNormal(M, M, scale="variance"), ValueError, "scale must be one of"),
    "bounds": (lambda: fastkl.DiagonalNormal(M, M, bounds=(1, 0)), ValueError, "bounds must be"),
    "prior type": (lambda: fastkl.DiagonalNormal(M, M).kl((M, M)), TypeError, "prior must be a fastkl.DiagonalNormal"),
    "prior larger": (
        lambda: fastkl.DiagonalNormal.from_packed(M).kl(fastkl.DiagonalNormal(M, M)), ValueError, r"prior_mu \(3, 4\)",
    ),
}  # fmt: skip

K = torch.zeros(5, device=DEVICE)  # logits of five components
MEANS = torch.zeros(5, 4, device=DEVICE)
TRIL = torch.eye(4, device=DEVICE).expand(5, 4, 4)
GMM = {
    "logits count": (lambda f: f(M, K[:4], MEANS), ValueError, r"logits must be \(\*batch, 5\).*got \(4,\)"),
    "z size": (lambda f: f(M[:, :3], K, MEANS), ValueError, r"z must be \(\*batch, 4\).*got \(3, 3\)"),
    "z scalar": (lambda f: f(M[0, 0], K, MEANS), ValueError, r"z must be"),
    "means one-dimensional": (lambda f: f(M, K, MEANS[0]), ValueError, r"means must be \(\*batch, K, D\)"),
    "no components": (lambda f: f(M, K[:0], MEANS[:0]), ValueError, r"means must be .* K and D > 0"),
    "logvars components": (lambda f: f(M, K, MEANS, MEANS[:2]), ValueError, r"logvars must be .*got \(2, 4\)"),
    "logvars for each component, one-dimensional": (lambda f: f(M, K, MEANS, K), ValueError, r"logvars must be"),
    "both covariances": (
        lambda f: f(M, K, MEANS, MEANS, scale_tril=TRIL), ValueError, "logvars and scale_tril exclude each other"
    ),
    "triangles shape": (lambda f: f(M, K, MEANS, scale_tril=TRIL[:4]), ValueError, r"scale_tril must be .*\(4, 4, 4\)"),
    "singular": (
        lambda f: f(M, K, MEANS, scale_tril=TRIL * torch.tensor([1, 1, 0, 1.0])),
        ValueError, r"component \(0,\) has not: its covariance is singular",
    ),
    "batches": (lambda f: f(M, K.expand(2, 5), MEANS), ValueError, r"do not broadcast: z \(3,\), logits \(2,\)"),
    "batch of means": (lambda f: f(M, K, MEANS.expand(2, 5, 4)), ValueError, r"do not broadcast.*means \(2,\)"),
    "integer logits": (lambda f: f(M, K.long(), MEANS), TypeError, "logits must be a floating-point tensor"),
    "integer means": (lambda f: f(M, K, MEANS.long()), TypeError, "means must be a floating-point tensor"),
    "devices": (lambda f: f(M, K, MEANS.to("meta")), ValueError, "means is on meta, but z is on"),
}  # fmt: skip
KL_GMM = {
    "method": (lambda f: f(M, M, K, MEANS, method="exact"), ValueError, "method must be one of 'mc', 'upper', 'lower'"),
    "entropy": (lambda f: f(M, M, K, MEANS, entropy="open"), ValueError, "entropy must be one of 'closed', 'sampled'"),
    "gradient": (lambda f: f(M, M, K, MEANS, gradient="dreg"), ValueError, "gradient must be one of 'plain', 'stl'"),
    "precision": (
        lambda f: f(M, M, K, MEANS, precision="bf16"),
        ValueError,
        "precision must be one of 'exact', 'tf32x3'",
    ),
    "samples": (lambda f: f(M, M, K, MEANS, num_samples=0), ValueError, "num_samples must be at least 1"),
    "samples type": (lambda f: f(M, M, K, MEANS, num_samples=1.5), TypeError, "num_samples must be an int"),
    "seed": (lambda f: f(M, M, K, MEANS, seed=0.5), TypeError, "seed must be an int"),
    "logvar": (lambda f: f(M, M[:, :2], K, MEANS), ValueError, r"logvar must be \(\*batch, 4\)"),
    "posterior": (lambda f: f(M, M[:2], K, MEANS), ValueError, r"do not broadcast: mu \(3,\), logvar \(2,\)"),
    "mu type": (lambda f: f(INTS, M, K, MEANS), TypeError, "mu must be a floating-point tensor"),
}


def parameters(cases):
    return pytest.mark.parametrize(("call", "error", "message"), cases.values(), ids=cases)


@pytest.mark.parametrize("op", [fastkl.kl_normal, fastkl.kl_normal_per_dim, fastkl.rsample_kl])
@parameters(KL)
def test_kl(op, call, error, message):
    with pytest.raises(error, match=message):
        call(op)


@pytest.mark.parametrize("op", [fastkl.rsample_normal, fastkl.rsample_kl])
@parameters(SAMPLING)
def test_sampling(op, call, error, message):
    with pytest.raises(error, match=message):
        call(op)


@parameters(PACKED)
def test_packed(call, error, message):
    with pytest.raises(error, match=message):
        call()


@parameters({k: KL[k] for k in ("shapes", "integer mu", "integer logvar", "not a tensor", "devices", "scale")})
def test_rsample_normal_shares_the_checks(call, error, message):
    with pytest.raises(error, match=message):
        call(fastkl.rsample_normal)


@pytest.mark.parametrize("op", [fastkl.gmm_log_prob, fastkl.gmm_responsibilities, fastkl.gmm_moments])
@parameters(GMM)
def test_gmm(op, call, error, message):
    with pytest.raises(error, match=message):
        call(op)


@parameters(KL_GMM)
def test_kl_gmm(call, error, message):
    with pytest.raises(error, match=message):
        call(fastkl.kl_gmm)


def test_an_unknown_precision_is_refused():
    for op in (fastkl.gmm_log_prob, fastkl.gmm_responsibilities):
        with pytest.raises(ValueError, match="precision must be one of 'exact', 'tf32x3', 'tf32', got 'bf16'"):
            op(M, K, MEANS, precision="bf16")


SEED = torch.tensor(1, device=DEVICE)
Q = {"mu": M, "logvar": M}
PRIOR = {"prior_mu": M, "prior_logvar": M}
MIXTURE = {"logits": K, "means": MEANS, "logvars": MEANS}
FULL = {"logits": K, "means": MEANS, "scale_tril": TRIL}
GAUSSIANS = {"mu": M, "scale_tril": M + 1, "prior_mu": M, "prior_scale_tril": M + 1}
# (op, all of its tensors), without and with those that it may do without.
DENSE = [
    (fastkl.kl_normal, Q),
    (fastkl.kl_normal, Q | PRIOR),
    (fastkl.kl_normal_per_dim, Q | PRIOR),
    (fastkl.rsample_kl, Q | {"seed": SEED}),
    (fastkl.rsample_kl, Q | PRIOR | {"eps": M}),
    (fastkl.rsample_normal, Q | {"seed": SEED}),
    (fastkl.rsample_normal, Q | {"eps": M}),
    (fastkl.wasserstein2_normal, Q),
    (fastkl.wasserstein2_normal, Q | PRIOR),
    (fastkl.bernoulli_log_prob, {"logits": M, "x": M}),
    (fastkl.normal_log_prob, {"x": M, "mean": M, "logvar": M}),
    (fastkl.gmm_log_prob, {"z": M, **MIXTURE}),
    (fastkl.gmm_log_prob, {"z": M, **FULL}),
    (fastkl.gmm_responsibilities, {"z": M, **MIXTURE}),
    (fastkl.gmm_moments, {"z": M, **MIXTURE}),
    (fastkl.kl_gmm, Q | MIXTURE | {"seed": SEED}),
    (fastkl.kl_gmm_bounds, Q | FULL),
    (fastkl.rsample_gmm, MIXTURE | {"seed": SEED, "tau": K[0]}),
    (functools.partial(fastkl.sample_gmm, num_samples=2), MIXTURE | {"seed": SEED}),
    (fastkl.gumbel_softmax, {"logits": M, "tau": K[0], "seed": SEED}),
    (fastkl.iwae, {"log_w": M}),
    (fastkl.effective_sample_size, {"log_w": M}),
    (fastkl.weight_entropy, {"log_w": M}),
    (fastkl.kl_multivariate_normal, GAUSSIANS),
    (fastkl.wasserstein2_multivariate_normal, GAUSSIANS),
    (fastkl.mmd, {"x": M, "y": M}),
    (fastkl.mmd_normal, Q),
    (functools.partial(fastkl.total_correlation, dataset_size=9), {"z": M, **Q}),
    (fastkl.sinkhorn_divergence, {"x": M, "y": M, "weights_x": K[:3] + 1, "weights_y": K[:3] + 1}),
    (functools.partial(fastkl.sliced_wasserstein, num_projections=2), {"x": M, "y": M, "seed": SEED}),
    (fastkl.DiagonalNormal, Q),
    (fastkl.DiagonalNormal.from_packed, {"head": M}),
    (fastkl.remedies.free_bits, {"kl": M, "threshold": K[0]}),
    (fastkl.remedies.balance, {"kl": M, "beta": K[0]}),
]
LAYOUTS = {
    "sparse": lambda t: t.to_sparse(),
    "CSR": lambda t: t.reshape(-1, 1).to_sparse_csr(),
    "MKL-DNN": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t: torch.nested.nested_tensor([t.reshape(-1), t.reshape(-1)[:1]], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize(("op", "tensors"), DENSE)
def test_sparse_and_nested_tensors(op, tensors):
    op(**tensors)
    for name, make in LAYOUTS.items():
        for argument, tensor in tensors.items():
            if name == "MKL-DNN" and (DEVICE == "cuda" or not tensor.is_floating_point() or tensor.dim() == 0):
                continue
            with pytest.raises(TypeError, match=f"^{argument} must be a dense tensor, got "):
                op(**tensors | {argument: make(tensor)})
        if len(tensors) > 1 and name == "sparse":  # all alike
            with pytest.raises(TypeError, match=r" must be a dense tensor, got one of layout torch\.sparse_coo"):
                op(**{argument: make(tensor) for argument, tensor in tensors.items()})


def test_shapes_broadcast_as_torch_has_it():
    shapes = [(), (1,), (3,), (2, 3), (1, 3), (2, 1), (0, 3), (4, 2, 3), (0,), (2, 0)]
    for three in itertools.product(shapes, repeat=3):
        tensors = dict(zip("abc", map(torch.empty, three)))
        try:
            expected = torch.broadcast_shapes(*three)
        except RuntimeError:
            with pytest.raises(ValueError, match="do not broadcast"):
                arguments.broadcast_shape(**tensors)
        else:
            assert arguments.broadcast_shape(**tensors) == expected


REQUIRED = {  # the tensors that an op cannot do without
    "kl_normal": "mu logvar", "kl_normal_per_dim": "mu logvar", "wasserstein2_normal": "mu logvar",
    "rsample_normal": "mu logvar", "rsample_kl": "mu logvar", "DiagonalNormal": "mu logvar",
    "normal_log_prob": "x mean logvar", "bernoulli_log_prob": "x logits", "gumbel_softmax": "logits",
    "gmm_log_prob": "z logits means", "gmm_responsibilities": "z logits means", "gmm_moments": "z logits means",
    "kl_gmm": "mu logvar logits means", "kl_gmm_bounds": "mu logvar logits means", "rsample_gmm": "logits means",
    "mmd": "x y", "mmd_normal": "mu", "sinkhorn_divergence": "x y", "iwae": "log_w", "weight_entropy": "log_w",
    "kl_multivariate_normal": "mu scale_tril prior_mu prior_scale_tril",
    "wasserstein2_multivariate_normal": "mu scale_tril prior_mu prior_scale_tril",
}  # fmt: skip


@pytest.mark.parametrize("op", REQUIRED)
def test_none_is_no_tensor(op):
    names = REQUIRED[op].split()
    given = {name: torch.ones(3) if name == "logits" and "means" in names else torch.ones(3, 3) for name in names}
    for name in names:
        with pytest.raises(TypeError, match=f"^{name} must be a torch.Tensor, got NoneType"):
            getattr(fastkl, op)(**{**given, name: None})
