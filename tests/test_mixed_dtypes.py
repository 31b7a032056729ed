"""Mixed dtypes: the result has float64's accuracy if any argument is float64."""

import pytest
import torch

import fastkl
from fastkl import reference

from helpers import DEVICE, implementation

N, D, K = 6, 3, 4


def numbers(*shape, seed):
    """Numbers that bfloat16 holds, so that it matters only in what they are computed."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.bfloat16().double().to(DEVICE)


MU, LOGVAR, PRIOR_MU, PRIOR_LOGVAR, Z = (numbers(N, D, seed=seed) for seed in range(5))
LOGITS, MEANS, LOGVARS = numbers(K, seed=5), numbers(K, D, seed=6), numbers(K, D, seed=7)
TRIL = torch.eye(D, dtype=torch.float64, device=DEVICE) + numbers(K, D, D, seed=8).tril(-1)
WEIGHTS = torch.tensor([0.25, 0.25, 0.125, 0.125, 0.125, 0.125], dtype=torch.float64, device=DEVICE)
MIXTURE = {"logits": LOGITS, "means": MEANS, "logvars": LOGVARS}
FULL = {"logits": LOGITS, "means": MEANS, "scale_tril": TRIL}
Q = {"mu": MU, "logvar": LOGVAR}
PRIOR = {"prior_mu": PRIOR_MU, "prior_logvar": PRIOR_LOGVAR}

CASES = {  # name -> (op, its tensors, its settings)
    "kl_normal": ("kl_normal", Q | PRIOR, {}),
    "kl_normal_per_dim": ("kl_normal_per_dim", Q | PRIOR, {}),
    "wasserstein2_normal": ("wasserstein2_normal", Q | PRIOR, {}),
    "rsample_kl": ("rsample_kl", Q | PRIOR, {"seed": 1}),
    "normal_log_prob": ("normal_log_prob", {"x": Z, "mean": MU, "logvar": LOGVAR}, {}),
    "bernoulli_log_prob": ("bernoulli_log_prob", {"logits": MU, "x": Z.sigmoid().bfloat16().double()}, {}),
    "gmm_log_prob": ("gmm_log_prob", {"z": Z} | MIXTURE, {}),
    "gmm_log_prob, full": ("gmm_log_prob", {"z": Z} | FULL, {}),
    "gmm_responsibilities": ("gmm_responsibilities", {"z": Z} | MIXTURE, {}),
    "gmm_moments": ("gmm_moments", {"z": Z} | MIXTURE, {}),
    "kl_gmm": ("kl_gmm", Q | MIXTURE, {"seed": 1, "num_samples": 2}),
    "kl_gmm, sampled": ("kl_gmm", Q | MIXTURE, {"seed": 1, "num_samples": 2, "entropy": "sampled"}),
    "kl_gmm, upper": ("kl_gmm", Q | MIXTURE, {"method": "upper"}),
    "kl_gmm, lower": ("kl_gmm", Q | MIXTURE, {"method": "lower"}),
    "kl_gmm_bounds": ("kl_gmm_bounds", Q | MIXTURE, {}),
    "kl_gmm_bounds, full": ("kl_gmm_bounds", Q | FULL, {}),
    "mmd": ("mmd", {"x": Z, "y": MU}, {}),
    "mmd_normal": ("mmd_normal", Q, {}),
    "total_correlation": ("total_correlation", {"z": Z} | Q, {"dataset_size": 20}),
    "sinkhorn": ("sinkhorn_divergence", {"x": Z, "y": MU}, {}),
    "sinkhorn, weights": ("sinkhorn_divergence", {"x": Z, "y": MU, "weights_x": WEIGHTS, "weights_y": WEIGHTS}, {}),
    "sliced_wasserstein": ("sliced_wasserstein", {"x": Z, "y": MU}, {"num_projections": 5, "seed": 1}),
    "kl_multivariate_normal": (
        "kl_multivariate_normal",
        {"mu": Z, "scale_tril": LOGVAR.exp().bfloat16().double(), "prior_mu": MU, "prior_scale_tril": TRIL[:1]},
        {},
    ),
    "wasserstein2_multivariate_normal": (
        "wasserstein2_multivariate_normal",
        {"mu": Z, "scale_tril": LOGVAR.exp().bfloat16().double(), "prior_mu": MU, "prior_scale_tril": TRIL[:1]},
        {},
    ),
}


def run(function, tensors, settings):
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    found = function(**tensors, **settings)
    found = list(found) if isinstance(found, tuple) else [found]
    outputs = [output for output in found if output.requires_grad]
    gradients = torch.autograd.grad([output.sum() for output in outputs], list(tensors.values())) if outputs else []
    return [output.detach() for output in found], dict(zip(tensors, gradients))


@pytest.mark.parametrize("way", ["torch", "native", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_one_float64_argument_makes_the_result_as_exact(case, way):
    name, tensors, settings = CASES[case]
    # Noise is float32's, and that of two ways may differ in the last place: compared with the same way's own.
    with implementation(way if "seed" in settings else "torch"):
        exact, exact_gradients = run(getattr(fastkl, name), tensors, settings)
    for wide in list(tensors)[:: len(tensors) - 1 if way == "triton" else 1]:  # interpreted, the first and the last one
        mixed = {key: tensor if key == wide else tensor.float() for key, tensor in tensors.items()}
        with implementation(way):
            found, gradients = run(getattr(fastkl, name), mixed, settings)
        for actual, expected in zip(found, exact):
            if name == "rsample_kl" and actual.dim() == 2:  # samples have the dtype of their parameters
                continue
            assert actual.dtype == torch.float64
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
        for key, gradient in gradients.items():
            assert gradient.dtype == mixed[key].dtype
            tolerance = 1e-11 if gradient.dtype == torch.float64 else 1e-6
            close = {"rtol": tolerance, "atol": tolerance * exact_gradients[key].abs().max().item()}
            torch.testing.assert_close(gradient.double(), exact_gradients[key], **close)
        if way == "torch" and hasattr(reference, name) and "seed" not in settings:
            defined = run(getattr(reference, name), mixed, settings)[0]
            for actual, expected in zip(defined, exact):
                torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
