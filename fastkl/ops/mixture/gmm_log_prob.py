"""Log-density of a Gaussian mixture, one value per sample."""

from __future__ import annotations

from torch import Tensor

from fastkl.ops._sharding import by_parts
from fastkl.ops.mixture import _gmm
from fastkl.ops.mixture import _mixture_arguments as mixtures


@by_parts
def gmm_log_prob(
    z: Tensor, logits: Tensor, means: Tensor, logvars: Tensor | float | None = None, *,
    scale_tril: Tensor | None = None, scale: str = "logvar", precision: str = "exact",
) -> Tensor:  # fmt: skip
    """Log-density of a Gaussian mixture, in nats, one value per sample.

    ln p(z) = logsumexp_k [ln pi_k + ln N(z; m_k, S_k)], pi = softmax(logits)

    Args:
        z: [*batch, D].
        logits: [K], or one row for each datum, [*batch, K]; not normalised. -inf is a component of weight 0.
        means: [K, D], or one mixture for each datum, [*batch, K, D], with size 1 in dimensions that share it. Expanded
            dimensions (stride 0, as in a plate) are treated as one mixture: the gradient reaches the tensor that was
            expanded, and every entry of the expanded tensor's own gradient (retain_grad) is the mean.
        logvars: ln of the components' variances: [*batch, K, D] diagonal, [K, 1] spherical, [1, D] or [D] tied, or a
            number for all; without logvars and scale_tril every variance is 1.
        scale_tril: [*batch, K, D, D], lower triangles L_k with a positive diagonal, S_k = L_k L_k^T; entries above the
            diagonal are not read. Excludes logvars.
        scale: the meaning of logvars: "logvar", "log_std", "std" or "softplus", as for `fastkl.kl_normal`; others than
            "logvar" are converted in float32.
        precision: "exact" uses differences (z - m) / sigma, which are accurate for narrow and distant components (on a
            CPU an expansion in float64, if it is as accurate). "tf32x3" and "tf32" expand the square around the mean
            of the means, on a GPU on tensor cores, on a CPU both in float32. Largest errors in nats of the compiled
            kernels, emulated, at K = 100, D = 40, against float64 (broadcasting in float32: 8e-6 and 1e-5):

            ======================================  ======  =======  ======
            components                              exact   tf32x3   tf32
            ======================================  ======  =======  ======
            unit Gaussians around the origin        8e-6    8e-6     0.01
            sigma = 0.1, means of size 10           6e-5    0.06     400
            ======================================  ======  =======  ======

    Returns:
        [*batch], float32 for float16, bfloat16 and float32 input, float64 if any input is. Every argument has a
        gradient, in its dtype. The backward pass needs ln p, saved in float64, and on a CPU the responsibilities
        [rows, K] if they take at most 10 MiB.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes do not match, devices differ, logvars and scale_tril are both given, scale or precision is
            unknown; on a CPU also for a singular scale_tril.

    Source: Dilokthanakul et al. 2016, "Deep Unsupervised Clustering with Gaussian Mixture Variational Autoencoders",
    arXiv:1611.02648; Bishop 2006, "Pattern Recognition and Machine Learning", equation 9.7.

    >>> import torch, fastkl
    >>> z, means = torch.zeros(2, 3), torch.zeros(4, 3)
    >>> fastkl.gmm_log_prob(z, torch.randn(4), means)  # four equal components: one standard normal
    tensor([-2.7568, -2.7568])
    """
    logvars = mixtures.as_logvars(means, logvars, scale)
    return _gmm.log_prob({"z": z}, logits, means, logvars, scale_tril, "point", precision)
