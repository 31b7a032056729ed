"""Importance weights: the bound on ln p(x), and the evenness of the weights, in torch ops on one small tensor."""

from __future__ import annotations

from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._sharding import by_parts


def _check(log_w: Tensor, dim: int) -> int:
    arguments.check_tensors(log_w=log_w)
    own = arguments.check_dim(dim, "log_w", log_w)
    if log_w.shape[own] == 0:
        raise ValueError(f"log_w must hold at least one sample along dim={dim}, got {tuple(log_w.shape)}")
    return own


@by_parts
def iwae(log_w: Tensor, dim: int = 0) -> Tensor:
    """The importance-weighted bound on ln p(x), in nats, one value per datum.

    ln 1/L sum_l w_l, ln w_l = ln p(x | z_l) + ln p(z_l) - ln q(z_l | x), z_l ~ q

    Its expectation is below ln p(x), and approaches it with more samples; with one sample it is the ELBO. Its gradient
    in ln w_l is w_l / sum_l w_l. `fastkl.objectives.iwae` has other gradient estimators.

    Args:
        log_w: ln w in nats, [L, *batch]. -inf is a weight of 0. If all weights are 0: bound -inf, gradient 0.
        dim: the dimension of the samples.

    Returns:
        [*batch], float32 for float16, bfloat16 and float32 input, float64 for float64. The gradient has log_w's dtype.

    Raises:
        TypeError: log_w is not a floating-point tensor, or dim is not an int.
        ValueError: dim is out of range, or has no samples.

    Source: Burda, Grosse and Salakhutdinov 2016, "Importance Weighted Autoencoders", arXiv:1509.00519, section 3.

    >>> import torch, fastkl
    >>> log_w = torch.tensor([[0.0, -1000.0, -torch.inf], [0.0, -1001.0, -torch.inf]])
    >>> fastkl.iwae(log_w)
    tensor([    0.0000, -1000.3799,       -inf])
    """
    return reference.iwae(log_w, _check(log_w, dim))


@by_parts
def effective_sample_size(log_w: Tensor, dim: int = 0) -> Tensor:
    """The effective number of samples: 1 if one sample has all the weight, L if all weights are equal.

    (sum_l w_l)^2 / sum_l w_l^2

    Args:
        log_w, dim: as for `fastkl.iwae`.

    Returns:
        [*batch], from 1 to L; 0 if every weight is 0. Dtypes as `fastkl.iwae`.

    Raises:
        TypeError, ValueError: as `fastkl.iwae`.

    Source: Kong 1992, "A note on importance sampling using standardized weights"; Owen 2013, "Monte Carlo theory,
    methods and examples", equation 9.13.

    >>> import torch, fastkl
    >>> fastkl.effective_sample_size(torch.tensor([[0.0, 0.0], [0.0, -100.0], [0.0, -100.0]]))
    tensor([3., 1.])
    """
    return reference.effective_sample_size(log_w, _check(log_w, dim))


@by_parts
def weight_entropy(log_w: Tensor, dim: int = 0) -> Tensor:
    """The entropy of the normalised weights in nats: 0 if one sample has all the weight, ln L if all are equal.

    -sum_l v_l ln v_l, v = w / sum_l w_l

    Its exponential is the perplexity of the weights, another effective number of samples.

    Args:
        log_w, dim: as for `fastkl.iwae`.

    Returns:
        [*batch], from 0 to ln L; 0 if every weight is 0. Dtypes as `fastkl.iwae`.

    Raises:
        TypeError, ValueError: as `fastkl.iwae`.

    Source: Cappe, Douc, Guillin, Marin and Robert 2008, "Adaptive importance sampling in general mixture classes",
    arXiv:0710.4242 (its exponential over L is their normalised perplexity).

    >>> import torch, fastkl
    >>> fastkl.weight_entropy(torch.tensor([[0.0, 0.0], [0.0, -torch.inf], [0.0, -torch.inf]]))
    tensor([1.0986, 0.0000])
    """
    return reference.weight_entropy(log_w, _check(log_w, dim))
