"""Every option of a run in one place: its default, its help text, and whether it changes the numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LEARNED = ("gmm", "vamp", "flow")
OBJECTIVES = (
    "elbo", "beta_vae", "iwae", "miwae", "piwae", "ciwae", "wae_mmd", "info_vae", "swae", "sinkhorn_ae", "aae",
    "beta_tc_vae", "vade",
)  # fmt: skip


def option(default: Any, text: str, maths: bool = True, choices: tuple = (), by_default: str = "") -> Any:
    """`maths`: a run that is resumed with another value would be another run, so that is refused. `by_default`: what
    the help says of a default that follows the data or the model (pace.py)."""
    meta = {"help": text, "maths": maths, "choices": choices or None, "kind": type(default), "by_default": by_default}
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Settings:
    preset: str = option(
        "digits", "a set of defaults, which other options override", choices=("digits", "large-latent")
    )
    # A moved file is the same data, so resuming compares the fingerprint of the data instead of this name.
    data: str = option("digits", "digits, mnist5k, pbmc, or a .npy, .npz, .pt file or a folder of images", maths=False)
    test_data: str = option("", "a file or folder to test with (default: a fifth of --data, or its own)", maths=False)
    validation: float = option(
        0.0, "share of the training data that the curves are of, so that the test data are seen once, at the end"
    )
    image_size: int = option(0, "resize images to this many pixels a side (0: as they are)")
    likelihood: str = option("auto", "distribution of a pixel", choices=("auto", "bernoulli", "normal"))
    model: str = option(
        "mlp",
        "encoder and decoder; that of autoregressive also reads the earlier pixels, and may not need the latent",
        choices=("mlp", "conv", "autoregressive"),
    )
    latent: int = option(
        16, "latent dimensions (mlp) or channels of the spatial latent (conv)", by_default="16; conv: 8"
    )
    hidden: int = option(
        256, "width of the hidden layers (mlp) or of the first level (conv)", by_default="256; conv: 16"
    )
    layers: int = option(2, "hidden layers (mlp) or levels, each halving the image (conv)")
    batch_size: int = option(
        64, "data per step and process", by_default="64; fewer where data are few or images are large"
    )
    epochs: int = option(
        150, "passes over the training data", by_default="150; fewer where data are many or images are large"
    )
    steps: int = option(0, "stop after this many steps instead of --epochs (0: use --epochs)")
    learning_rate: float = option(3e-3, "of AdamW, after at most 100 steps of warm-up", by_default="0.003; conv: 0.001")
    schedule: str = option("cosine", "learning rate over the run", choices=("cosine", "constant"))
    weight_decay: float = option(0.0, "of AdamW")
    objective: str = option("elbo", "what a step minimises, of fastkl.objectives", choices=OBJECTIVES)
    beta: float = option(1.0, "weight of the KL term, of the total correlation for beta_tc_vae")
    warm_up: int = option(
        0, "steps over which that weight rises from 0; a learned prior begins after them",
        by_default="0; 500 with a learned prior, fewer in a short run",
    )  # fmt: skip
    beta_schedule: str = option(
        "linear", "how it rises over --warm-up", choices=("linear", "cosine", "sigmoid", "cyclical")
    )
    cycles: int = option(4, "of --beta-schedule cyclical, over --warm-up")
    free_bits: float = option(0.0, "KL in nats below which nothing pulls (0: none)")
    free_bits_per: str = option(
        "batch",
        "where it counts: the KL of a sample, of each of its dimensions, or of a dimension on average over the batch",
        choices=("sample", "dimension", "batch"),
    )
    capacity: float = option(-1.0, "KL in nats that beta_vae holds instead of lowering it (below 0: none)")
    capacity_steps: int = option(0, "steps over which it rises from 0")
    balance: int = option(0, "balance so many groups of latent dimensions during --warm-up, as NVAE does (0: not)")
    prior: str = option("standard", "of the latent; all but N(0, I) are learned", choices=("standard", *LEARNED))
    components: int = option(20, "of the mixture (gmm), or pseudo-inputs (vamp)")
    covariance: str = option("diag", "of the components of gmm", choices=("diag", "spherical", "tied", "full"))
    kl: str = option(
        "mc",
        "to a learned prior: by samples, a bound from above, or to a component chosen by Gumbel-Softmax (relaxed)",
        choices=("mc", "upper", "relaxed"),
    )
    samples: int = option(1, "of the latent per datum and step: of a learned prior's KL, of importance weighting")
    groups: int = option(4, "of --samples each, for miwae and piwae")
    gradient: str = option(
        "plain", "of the importance-weighted objectives and the encoder", choices=("plain", "stl", "dreg")
    )
    elbo_share: float = option(0.5, "of the ELBO in ciwae; the rest is IWAE")
    penalty: float = option(10.0, "weight of the distance between latents and prior (wae_mmd, info_vae, swae, ...)")
    alpha: float = option(0.0, "share of the KL that info_vae gives up")
    kernel: str = option("imq", "of the maximum mean discrepancy", choices=("imq", "rbf"))
    projections: int = option(50, "of swae")
    blur: float = option(0.5, "of sinkhorn_ae, in units of the latent")
    weights: str = option("mss", "of the data in beta_tc_vae's estimates", choices=("mss", "mws"))
    discriminator_learning_rate: float = option(0.0, "of aae's discriminator (0: as --learning-rate)")
    bad_steps: int = option(10, "steps in a row that may be skipped for a loss that is not finite", maths=False)
    tau: float = option(1.0, "temperature of --kl relaxed where the prior begins")
    final_tau: float = option(0.1, "temperature at the end of the run")
    tau_schedule: str = option(
        "exponential", "how the temperature falls between them", choices=("exponential", "linear", "cosine")
    )
    prior_learning_rate: float = option(0.0, "of a learned prior (0: as --learning-rate)")
    noise: str = option(
        "fused",
        "fused: drawn inside the op, nothing stored; datum: the same for a datum, however many processes share a batch",
        choices=("fused", "datum"),
    )
    seed: int = option(0, "of the weights, the order of the data and the noise")
    split_seed: int = option(0, "of the held-out data")
    test_count: int = option(0, "how many of the test data are evaluated (0: all)")
    importance_samples: int = option(
        1000, "per test datum, for the estimate of log p(x)", maths=False,
        by_default="1000; fewer where that would take long",
    )  # fmt: skip
    log_every: int = option(20, "steps between two points of the curves", maths=False)
    checkpoint_every: int = option(500, "steps between two checkpoints", maths=False)
    # One, because the matrices of a small MLP are done before a second thread has woken up.
    threads: int = option(
        1, "CPU threads (0: as torch chooses)", maths=False, by_default="1; 0 with conv and large data"
    )
    device: str = option("auto", "where to train", maths=False, choices=("auto", "cpu", "cuda"))

    @property
    def what(self) -> str:
        """The kind of model, in a few words."""
        model = {"mlp": "MLP", "conv": "convolutional"}.get(self.model, self.model)
        prior = "" if self.prior == "standard" else f", prior {self.prior}"
        return f"{model} VAE{prior}" + ("" if self.objective == "elbo" else f", objective {self.objective}")

    @property
    def name(self) -> str:
        """What a run folder is called when --out does not say."""
        plain = self.preset if self.data in ("digits", "") or self.preset != "digits" else self.data
        plain = plain.replace("\\", "/").rstrip("/").split("/")[-1].split(".")[0] or "run"
        objective = () if self.objective == "elbo" else (self.objective.replace("_", "-"),)
        return "-".join([plain, *(() if self.prior == "standard" else (self.prior,)), *objective])


# How the help lists them; each is in one group.
GROUPS = {
    "the run": ("preset", "seed", "device", "threads", "log_every", "checkpoint_every"),
    "data": (
        "data", "test_data", "validation", "image_size", "likelihood", "split_seed", "test_count", "importance_samples",
    ),
    "model": ("model", "latent", "hidden", "layers"),
    "training": (
        "batch_size", "epochs", "steps", "learning_rate", "schedule", "weight_decay", "noise", "bad_steps",
    ),
    "prior": (
        "prior", "components", "covariance", "kl", "samples", "prior_learning_rate", "tau", "final_tau", "tau_schedule",
    ),
    "weight of the KL, and remedies": (
        "beta", "warm_up", "beta_schedule", "cycles", "free_bits", "free_bits_per", "capacity", "capacity_steps",
        "balance",
    ),
    "objective": (
        "objective", "groups", "gradient", "elbo_share", "penalty", "alpha", "kernel", "projections", "blur", "weights",
        "discriminator_learning_rate",
    ),
}  # fmt: skip

# A data set may want other defaults than digits; options given by hand win over these.
FOR_DATA = {
    "mnist5k": {"hidden": 512, "latent": 20, "epochs": 40, "learning_rate": 1e-3, "threads": 0},
    "pbmc": {"hidden": 128, "latent": 10, "epochs": 60, "learning_rate": 1e-3},
}
# What suits a small convolutional model; more in pace.py, by the size of the data.
FOR_MODEL = {"conv": {"latent": 8, "hidden": 16, "layers": 2, "learning_rate": 1e-3, "threads": 0}}
FOR_PRESET = {
    "digits": {},
    "large-latent": {
        "model": "conv", "image_size": 128, "latent": 16, "hidden": 16, "layers": 1, "batch_size": 4, "steps": 10,
        "epochs": 1, "learning_rate": 2e-3, "log_every": 1, "checkpoint_every": 5, "importance_samples": 10,
        "test_count": 16, "threads": 0,
    },
}  # fmt: skip

# What the papers take, or what was found on digits (bench/compare_objectives.py).
FOR_OBJECTIVE: dict[str, dict[str, Any]] = {
    "beta_vae": {"beta": 2.0},  # at the 4 of the paper, digits of 64 pixels keep nothing
    "beta_tc_vae": {"beta": 6.0},
    "iwae": {"samples": 5},
    "miwae": {"samples": 4},
    "piwae": {"samples": 4},
    "ciwae": {"samples": 5},
    # Ten times as much and nothing but the prior is left; a tenth, and the latents are nowhere near it.
    "wae_mmd": {"penalty": 50.0},
    "swae": {"penalty": 100.0},
    "sinkhorn_ae": {"penalty": 30.0},
    "aae": {"penalty": 0.5},
}

# A learned prior begins when the posteriors have taken their places; a short run has few steps for that.
WARM_UP = {"digits": 500, "pbmc": 100, "large-latent": 3}
