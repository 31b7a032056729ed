"""Every option of a run: its default, its help text, and whether it changes the numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LIKELIHOODS = ("bernoulli", "logistic", "categorical", "normal", "laplace", "huber", "poisson", "negative_binomial")
LEARNED = ("gmm", "vamp", "flow")
AUTOENCODER = "autoencoder-kl"
CONVOLUTIONAL = ("conv", AUTOENCODER)
OBJECTIVES = (
    "elbo", "beta_vae", "iwae", "miwae", "piwae", "ciwae", "wae_mmd", "info_vae", "swae", "sinkhorn_ae", "aae",
    "beta_tc_vae", "vade",
)  # fmt: skip


def option(
    default: Any, text: str, maths: bool = True, choices: tuple = (), by_default: str = "", many: bool = False,
    metavar: str = "",
) -> Any:  # fmt: skip
    """A field of Settings.

    `maths`: the option changes the numbers, so a resumed run may not change it. `by_default`: help text for a default
    that depends on the data or the model (pace.py). `many`: the command line takes several values, kept as lines.
    `metavar`: the help's word for a value, if the type does not tell enough.
    """
    meta = {
        "help": text, "maths": maths, "choices": choices or None, "kind": type(default), "by_default": by_default,
        "many": many, "metavar": metavar,
    }  # fmt: skip
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Settings:
    """The options of a run. `fastkl train` has an option of the same name for each, with its help text."""

    preset: str = option(
        "digits", "a set of defaults; other options override it", choices=("digits", "large-latent", "large-mixture")
    )
    # A moved file is the same data, so resuming compares the fingerprint of the data instead of this name.
    data: str = option(
        "digits",
        "digits, mnist5k, pbmc or photos; a .npy, .npz, .pt or .tar file; a folder of images, of .npy files or of .tar "
        "files; or the folder of a Hugging Face data set",
        maths=False,
    )
    test_data: str = option(
        "", "a file or folder of test data (default: the test part of --data, or else a fifth of it)", maths=False
    )
    validation: float = option(
        0.0, "share of the training data held out for the curves; the test data are then used only once, at the end"
    )
    image_size: int = option(
        0, "resize images to this many pixels a side; with --crop, only their shorter side (0: keep their size)"
    )
    crop: int = option(
        0, "train on random squares of this many pixels a side, and test on the central ones (0: whole images)",
        by_default="0; photos: --image-size, or 64",
    )  # fmt: skip
    flip: bool = option(False, "mirror training images at random")
    stream: bool = option(
        False, "leave the training data on the disk and read them step by step; folders of .npy files, .tar files and "
        "Hugging Face data sets are always read in this way",
    )  # fmt: skip
    workers: int = option(
        0, "processes that read, decode and crop the data of the next steps (0: the training process)",
        maths=False,
        by_default="0; on a GPU up to 8 if the data are not in memory",
    )  # fmt: skip
    likelihood: str = option(
        "auto",
        "distribution of a value given the latent. auto: bernoulli or normal, by the range of the data. logistic, "
        "categorical: for pixels with whole numbers. poisson, negative_binomial: for counts. normal is the L2 loss, "
        "laplace the L1 loss",
        choices=("auto", *LIKELIHOODS), by_default="auto; autoencoder-kl: laplace; photos: logistic",
    )  # fmt: skip
    scale: float = option(
        0.0, "scale of a normal, laplace or huber likelihood, in deviations of the training data (0: learned)"
    )
    model: str = option(
        "mlp",
        "encoder and decoder. The autoregressive decoder also reads the earlier pixels, and may ignore the latent. "
        "autoencoder-kl is the AutoencoderKL of diffusers; the run also writes its weights in the format of diffusers",
        choices=("mlp", *CONVOLUTIONAL, "autoregressive"), by_default="mlp; photos: conv",
    )  # fmt: skip
    model_config: str = option(
        "", "fields of AutoencoderKL: key=value, a .json file, or a folder written by save_pretrained, with whose "
        "weights the training starts (default: a small model by --latent, --hidden and --layers)", many=True,
        metavar="FIELD",
    )  # fmt: skip
    latent: int = option(
        16, "latent dimensions (mlp) or channels of the spatial latent (conv, autoencoder-kl)",
        by_default="16; conv: 8; autoencoder-kl: 4",
    )  # fmt: skip
    hidden: int = option(
        256, "width of the hidden layers (mlp), or channels of the first level (each level of conv has twice as many "
        "as the one before; all others of autoencoder-kl have twice as many as the first)",
        by_default="256; conv, autoencoder-kl: 16",
    )  # fmt: skip
    layers: int = option(2, "hidden layers (mlp), or levels that each halve the image (conv, autoencoder-kl)")
    batch_size: int = option(64, "data of a batch in each process", by_default="64; fewer for few data or large images")
    global_batch_size: int = option(
        0, "data of a step, over all processes and --accumulate batches, instead of --batch-size; with --noise datum "
        "the run may be resumed on another number of processes (0: use --batch-size)",
    )  # fmt: skip
    epochs: int = option(150, "passes over the training data", by_default="150; fewer for many data or large images")
    steps: int = option(0, "stop after this many steps instead of --epochs (0: use --epochs)")
    learning_rate: float = option(
        3e-3,
        "learning rate of AdamW after at most 100 steps of warm-up",
        by_default="0.003; conv, autoencoder-kl: 0.001",
    )
    learning_rate_warm_up: int = option(
        0, "steps over which the learning rate rises from 0 (0: 100, and with cosine at most a tenth of the run)"
    )
    schedule: str = option("cosine", "schedule of the learning rate", choices=("cosine", "constant"))
    weight_decay: float = option(0.0, "weight decay of AdamW")
    precision: str = option(
        "fp32",
        "dtype of the networks: bf16 and fp16 use autocast, fp16 also scales the loss; KL and likelihood are float32",
        choices=("fp32", "bf16", "fp16"),
    )
    accumulate: int = option(
        1, "batches whose gradients are added in a step; terms that compare data compare those of one batch"
    )
    parallel: str = option(
        "ddp",
        "under torchrun each process keeps the whole model (ddp), or a part of each layer, and a layer is gathered "
        "while it is used (fsdp)",
        maths=False, choices=("ddp", "fsdp"),
    )  # fmt: skip
    clip: float = option(0.0, "upper bound of the norm of the gradient of all weights together (0: off)")
    ema: float = option(
        0.0,
        "decay of an exponential moving average of the weights, which the held-out curve and the report use (0: off)",
    )
    patience: int = option(
        0,
        "stop after this many points of the held-out curve without a better ELBO, and report the best weights (0: off)",
    )
    compile: bool = option(False, "compile the model and its loss with torch.compile")
    activation_checkpointing: bool = option(
        False, "keep only the inputs of the layers, and compute the rest again in the backward pass"
    )
    objective: str = option("elbo", "the loss, one of fastkl.objectives", choices=OBJECTIVES)
    beta: float = option(
        1.0, "weight of the KL term (beta_tc_vae: of the total correlation)",
        by_default="1; beta_vae: 2; beta_tc_vae: 6",
    )  # fmt: skip
    warm_up: int = option(
        0, "steps over which --beta rises from 0; a learned prior starts after them",
        by_default="0; 500 with a learned prior, fewer in a short run",
    )  # fmt: skip
    beta_schedule: str = option(
        "linear", "curve by which --beta rises over --warm-up", choices=("linear", "cosine", "sigmoid", "cyclical")
    )
    cycles: int = option(4, "number of cycles of --beta-schedule cyclical within --warm-up")
    free_bits: float = option(0.0, "KL in nats below which the loss has no KL gradient (0: off)")
    free_bits_per: str = option(
        "batch",
        "unit of --free-bits: the KL of a sample, each dimension of a sample, or a dimension's mean over the batch",
        choices=("sample", "dimension", "batch"),
    )
    capacity: float = option(-1.0, "target of the KL in nats, for beta_vae (below 0: off)")
    capacity_steps: int = option(0, "steps over which --capacity rises from 0")
    balance: int = option(
        0, "number of groups of latent dimensions whose KLs are balanced during --warm-up, as in NVAE (0: off)"
    )
    prior: str = option(
        "standard", "prior of the latent: N(0, I) (standard), or a learned one", choices=("standard", *LEARNED)
    )
    components: int = option(20, "components of the mixture (gmm), or pseudo-inputs (vamp)")
    covariance: str = option(
        "diag", "covariance of the components of gmm", choices=("diag", "spherical", "tied", "full")
    )
    kl: str = option(
        "mc",
        "KL to a learned prior: its mean over samples (mc), an upper bound (upper), or the mean over samples of which "
        "Gumbel-Softmax chooses the component (relaxed)",
        choices=("mc", "upper", "relaxed"),
    )
    samples: int = option(
        1, "samples of the latent per datum and step, for the KL to a learned prior and the importance weights",
        by_default="1; iwae, ciwae: 5; miwae, piwae: 4",
    )  # fmt: skip
    groups: int = option(4, "groups of --samples each, for miwae and piwae")
    gradient: str = option(
        "plain", "gradient estimator of the importance-weighted objectives", choices=("plain", "stl", "dreg")
    )
    elbo_share: float = option(0.5, "share of the ELBO in ciwae; the rest is IWAE")
    penalty: float = option(
        10.0, "weight of the distance between latents and prior (wae_mmd, info_vae, swae, sinkhorn_ae, aae)",
        by_default="10; wae_mmd: 50; swae: 100; sinkhorn_ae: 30; aae: 0.5",
    )  # fmt: skip
    alpha: float = option(0.0, "share of the KL that info_vae leaves out")
    kernel: str = option("imq", "kernel of the maximum mean discrepancy (wae_mmd, info_vae)", choices=("imq", "rbf"))
    projections: int = option(50, "number of random projections of swae")
    blur: float = option(0.5, "blur of sinkhorn_ae, in units of the latent")
    weights: str = option(
        "mss", "estimates of beta_tc_vae: stratified (mss) or weighted (mws) minibatch sampling", choices=("mss", "mws")
    )
    discriminator_learning_rate: float = option(
        0.0, "learning rate of the discriminator of aae or --adversarial (0: --learning-rate)"
    )
    perceptual: str = option(
        "", "a function (x_hat, x) -> [N] of your own, such as LPIPS: a distance between images in [-1, 1] that is "
        "added to the loss (default: none)",
        metavar="MODULE:FUNCTION",
    )  # fmt: skip
    perceptual_weight: float = option(1.0, "weight of --perceptual, in nats")
    adversarial: bool = option(False, "train the decoder against a discriminator of image patches, as in VQGAN")
    adversarial_weight: float = option(
        0.5, "norm of the gradient of --adversarial over that of the reconstruction, in the decoder's last layer"
    )
    adversarial_start: int = option(0, "number of steps before the discriminator of --adversarial takes part")
    bad_steps: int = option(10, "stop after this many non-finite steps in a row", maths=False)
    tau: float = option(1.0, "temperature of --kl relaxed at the first step of the learned prior")
    final_tau: float = option(0.1, "temperature of --kl relaxed at the end of the run")
    tau_schedule: str = option(
        "exponential", "curve from --tau to --final-tau", choices=("exponential", "linear", "cosine")
    )
    prior_learning_rate: float = option(0.0, "learning rate of a learned prior (0: --learning-rate)")
    noise: str = option(
        "fused",
        "fused: the op draws the noise and stores none; datum: the noise is stored, and does not depend on "
        "the number of processes",
        choices=("fused", "datum"),
    )
    seed: int = option(0, "seed of the weights, the order of the data and the noise")
    split_seed: int = option(0, "seed of the split into training and held-out data")
    test_count: int = option(0, "number of test data to evaluate (0: all)")
    importance_samples: int = option(
        1000, "samples per test datum for the estimate of log p(x)", maths=False,
        by_default="1000; fewer for a slow model",
    )  # fmt: skip
    log_every: int = option(20, "steps between two points of the training curves", maths=False)
    checkpoint_every: int = option(500, "steps between two checkpoints", maths=False)
    # One, because a matrix product of a small MLP ends before a second thread wakes up.
    threads: int = option(
        1, "CPU threads (0: torch's default)", maths=False, by_default="1; 0 with conv, autoencoder-kl and large data"
    )
    device: str = option("auto", "device to train on", maths=False, choices=("auto", "cpu", "cuda"))

    def data_per_step(self, processes: int) -> int:
        """The number of data in a step, over all batches and processes."""
        return self.global_batch_size or self.batch_size * self.accumulate * processes

    @property
    def description(self) -> str:
        """A short description of the model."""
        model = {"mlp": "MLP", "conv": "convolutional", AUTOENCODER: "AutoencoderKL"}.get(self.model, self.model)
        prior = "" if self.prior == "standard" else f", prior {self.prior}"
        return f"{model} VAE{prior}" + ("" if self.objective == "elbo" else f", objective {self.objective}")

    @property
    def name(self) -> str:
        """The default name of the run folder."""
        plain = self.preset if self.data in ("digits", "") or self.preset != "digits" else self.data
        plain = plain.replace("\\", "/").rstrip("/").split("/")[-1].split(".")[0] or "run"
        objective = () if self.objective == "elbo" else (self.objective.replace("_", "-"),)
        return "-".join([plain, *(() if self.prior == "standard" else (self.prior,)), *objective])


# The groups of the help; each option is in exactly one.
GROUPS = {
    "the run": ("preset", "seed", "device", "threads", "log_every", "checkpoint_every"),
    "data": (
        "data", "test_data", "validation", "image_size", "crop", "flip", "stream", "workers", "likelihood", "scale",
        "split_seed", "test_count", "importance_samples",
    ),
    "model": ("model", "model_config", "latent", "hidden", "layers"),
    "training": (
        "batch_size", "global_batch_size", "accumulate", "epochs", "steps", "learning_rate", "learning_rate_warm_up",
        "schedule", "weight_decay", "parallel", "clip", "ema", "patience", "precision", "compile",
        "activation_checkpointing", "noise", "bad_steps",
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
    "losses of images": (
        "perceptual", "perceptual_weight", "adversarial", "adversarial_weight", "adversarial_start",
    ),
}  # fmt: skip

# Defaults of a data set; options given by hand take precedence.
FOR_DATA: dict[str, dict[str, Any]] = {
    "mnist5k": {"hidden": 512, "latent": 20, "epochs": 40, "learning_rate": 1e-3, "threads": 0},
    "pbmc": {"hidden": 128, "latent": 10, "epochs": 60, "learning_rate": 1e-3},
    "photos": {"model": "conv", "crop": 64, "flip": True, "likelihood": "logistic"},
}
# Defaults of a small convolutional model; pace.py adds those that depend on the size of the data.
SMALL: dict[str, Any] = {"hidden": 16, "layers": 2, "learning_rate": 1e-3, "threads": 0}
# Latent channels as in Stable Diffusion, and the L1 loss with a learned scale, as there.
FOR_MODEL = {"conv": {"latent": 8, **SMALL}, AUTOENCODER: {"latent": 4, "likelihood": "laplace", **SMALL}}
FOR_PRESET = {
    "digits": {},
    # The first stage of latent diffusion: a spatial latent of a third of the datum's size, a small weight of the KL.
    "large-latent": {
        "data": "photos", "model": "conv", "latent": 16, "hidden": 16, "layers": 2, "batch_size": 8, "steps": 3000,
        "likelihood": "normal", "beta": 0.01, "learning_rate": 2e-3, "importance_samples": 10, "threads": 0,
    },
    # Here the loss takes most of a step: the latent is as large as the datum, and each sample meets each component.
    "large-mixture": {
        "latent": 64, "prior": "gmm", "components": 100, "objective": "iwae", "samples": 5, "steps": 600,
        "importance_samples": 100,
    },
}  # fmt: skip

# Values of the papers, or tuned on digits (bench/compare_objectives.py).
FOR_OBJECTIVE: dict[str, dict[str, Any]] = {
    "beta_vae": {"beta": 2.0},  # at the paper's 4, the posterior of 64-pixel digits collapses
    "beta_tc_vae": {"beta": 6.0},
    "iwae": {"samples": 5},
    "miwae": {"samples": 4},
    "piwae": {"samples": 4},
    "ciwae": {"samples": 5},
    # Ten times this penalty collapses the latents to the prior; with a tenth of it they are far from the prior.
    "wae_mmd": {"penalty": 50.0},
    "swae": {"penalty": 100.0},
    "sinkhorn_ae": {"penalty": 30.0},
    "aae": {"penalty": 0.5},
}

# A learned prior starts once the posteriors have separated; a short run has few steps for that.
WARM_UP = {"digits": 500, "pbmc": 100, "large-latent": 300, "large-mixture": 100}
