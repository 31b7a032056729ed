"""What a mixture prior makes of the data: which components are used, and whether they are the groups of the labels."""

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
    """From ln p(k | z) [N, K]: the entropy of the mean responsibility, in nats, and how many components are used."""
    part = shares(responsibilities)
    return {
        "components": len(part),
        "used_components": int(used(part).sum()),
        "usage_entropy": torch.special.entr(part).sum().item(),
    }


def agreement(clusters: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How well clusters [N] tell labels [N], neither of which knows of the other; all are 1 at best.

    clustering_accuracy: each label goes with one cluster at most, and they with one label, so that most data agree (the
    assignment problem): with more clusters than labels, some are left over and count as wrong. cluster_purity: every
    cluster stands for its most frequent label. normalised_mutual_information: by the mean of the two entropies.
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
