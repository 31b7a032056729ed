"""Used components of a mixture prior, and their agreement with labels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastkl.priors.mixture import used
from fastkl.vae.errors import require


def shares(responsibilities: Tensor) -> Tensor:
    """The mean responsibility of each component [K], from ln p(k | z) [N, K]."""
    return responsibilities.double().exp().mean(dim=0)


def usage(responsibilities: Tensor) -> dict[str, float]:
    """The entropy of the mean responsibility, in nats, and the number of used components, from ln p(k | z) [N, K]."""
    part = shares(responsibilities)
    return {
        "components": len(part),
        "used_components": int(used(part).sum()),
        "usage_entropy": torch.special.entr(part).sum().item(),
    }


def agreement(clusters: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Three measures of agreement between clusters [N] and labels [N]; the best value of each is 1.

    clustering_accuracy: the share of agreeing data under the best one-to-one assignment of clusters to labels; with
    more clusters than labels, the rest counts as wrong. cluster_purity: the same if each cluster is assigned its most
    frequent label. normalised_mutual_information: normalised by the mean of the two entropies.
    """
    metrics = require("sklearn.metrics", "The comparison of clusters with labels")
    optimize = require("scipy.optimize", "The comparison of clusters with labels")
    table = metrics.cluster.contingency_matrix(clusters, labels)
    rows, columns = optimize.linear_sum_assignment(table, maximize=True)
    return {
        "clustering_accuracy": float(table[rows, columns].sum() / len(labels)),
        "cluster_purity": float(table.max(axis=1).sum() / len(labels)),
        "normalised_mutual_information": float(metrics.normalized_mutual_info_score(labels, clusters)),
    }
