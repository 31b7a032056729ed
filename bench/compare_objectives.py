"""A comparison of objectives: the same network, data and split, 3 seeds, prior N(0, I) except for VaDE.

study.py has the usage and the place of the results. ELBO and log p(x) are computed for the models of all objectives.
They say little about the Wasserstein autoencoders, whose posteriors may become arbitrarily narrow.
"""

from study import Study

STUDY = Study(
    "objectives",
    {
        "elbo": "",
        "beta_vae": "--objective beta_vae",
        "iwae": "--objective iwae",
        "iwae, DReG": "--objective iwae --gradient dreg",
        "miwae": "--objective miwae",
        "piwae": "--objective piwae",
        "ciwae": "--objective ciwae",
        "wae_mmd": "--objective wae_mmd",
        "info_vae": "--objective info_vae",
        "swae": "--objective swae",
        "sinkhorn_ae": "--objective sinkhorn_ae",
        "aae": "--objective aae",
        "beta_tc_vae": "--objective beta_tc_vae",
        "vade": "--objective vade --prior gmm",
    },
    (
        ("log p(x), nats", "log_prob", "{:.2f}"), ("ELBO, nats", "elbo", "{:.2f}"),
        ("reconstruction, nats", "reconstruction", "{:.2f}"), ("KL, nats", "kl", "{:.2f}"),
        ("mutual information, nats", "mutual_information", "{:.2f}"), ("active units", "active_units", "{:.1f}"),
    ),
)  # fmt: skip

if __name__ == "__main__":
    STUDY.main(__doc__)
