"""A comparison of priors: the same network, data and split, 5 seeds; test log p(x) and the quality of clusters.

study.py has the usage and the place of the results.
"""

from study import Study

# The learned priors start after a KL warm-up, so the effect of the warm-up alone is measured too.
STUDY = Study(
    "priors",
    {
        "standard": "--prior standard",
        "standard, warm-up": "--prior standard --warm-up 500",
        "gmm": "--prior gmm",
        "gmm, relaxed": "--prior gmm --kl relaxed",
        "vamp": "--prior vamp",
        "flow": "--prior flow",
    },
    (
        ("log p(x), nats", "log_prob", "{:.2f}"), ("ELBO, nats", "elbo", "{:.2f}"), ("KL, nats", "kl", "{:.2f}"),
        ("active units", "active_units", "{:.1f}"), ("used components", "used_components", "{:.1f}"),
        ("clustering accuracy", "clustering_accuracy", "{:.3f}"), ("cluster purity", "cluster_purity", "{:.3f}"),
        ("information on labels", "normalised_mutual_information", "{:.3f}"),
    ),
    seeds=5,
)  # fmt: skip

if __name__ == "__main__":
    STUDY.main(__doc__)
