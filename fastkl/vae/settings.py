"""Every option of a run in one place: its default, its help text, and whether it changes the numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from fastkl.vae.errors import UserError

LEARNED = ("gmm", "vamp", "flow")
# Which priors an option says something to.
BELONGS = {
    "components": ("gmm", "vamp"), "covariance": ("gmm",), "kl": LEARNED, "samples": LEARNED,
    "prior_learning_rate": LEARNED,
}  # fmt: skip
RELAXED = ("tau", "final_tau", "tau_schedule")  # what belongs to --kl relaxed


def option(default: Any, text: str, maths: bool = True, choices: tuple = (), kind: type | None = None) -> Any:
    """`maths`: a run that is resumed with another value would be another run, so that is refused."""
    meta = {"help": text, "maths": maths, "choices": choices or None, "kind": kind or type(default)}
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Settings:
    preset: str = option(
        "digits", "a set of defaults, which other options override", choices=("digits", "large-latent")
    )
    # A moved file is the same data, so resuming compares the fingerprint of the data instead of this name.
    data: str = option("digits", "digits, mnist5k, pbmc, or a .npy, .npz, .pt file or a folder of images", maths=False)
    image_size: int = option(0, "resize images to this many pixels a side (0: as they are)")
    likelihood: str = option("auto", "distribution of a pixel", choices=("auto", "bernoulli", "normal"))
    model: str = option("mlp", "encoder and decoder", choices=("mlp", "conv"))
    latent: int = option(16, "latent dimensions (mlp) or channels of the spatial latent (conv)")
    hidden: int = option(256, "width of the hidden layers (mlp) or of the first level (conv)")
    layers: int = option(2, "hidden layers (mlp) or levels, each halving the image (conv)")
    batch_size: int = option(64, "data per step and process")
    epochs: int = option(150, "passes over the training data")
    steps: int = option(0, "stop after this many steps instead of --epochs (0: use --epochs)")
    learning_rate: float = option(3e-3, "of AdamW, after at most 100 steps of warm-up")
    schedule: str = option("cosine", "learning rate over the run", choices=("cosine", "constant"))
    weight_decay: float = option(0.0, "of AdamW")
    beta: float = option(1.0, "weight of the KL term")
    warm_up: int = option(0, "steps over which that weight rises from 0; a learned prior begins after them")
    beta_schedule: str = option("linear", "how it rises over --warm-up", choices=("linear", "cosine"))
    prior: str = option("standard", "of the latent; all but N(0, I) are learned", choices=("standard", *LEARNED))
    components: int = option(20, "of the mixture (gmm), or pseudo-inputs (vamp)")
    covariance: str = option("diag", "of the components of gmm", choices=("diag", "spherical", "tied", "full"))
    kl: str = option(
        "mc",
        "to a learned prior: by samples, a bound from above, or to a component chosen by Gumbel-Softmax (relaxed)",
        choices=("mc", "upper", "relaxed"),
    )
    samples: int = option(1, "of the latent per datum and step, for --kl mc and relaxed")
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
    split_seed: int = option(0, "of the held-out test split")
    test_data: int = option(0, "how many of the held-out data are evaluated (0: all)")
    importance_samples: int = option(1000, "per test datum, for the estimate of log p(x)", maths=False)
    log_every: int = option(20, "steps between two points of the curves", maths=False)
    checkpoint_every: int = option(500, "steps between two checkpoints", maths=False)
    # One, because the matrices of a small MLP are done before a second thread has woken up.
    threads: int = option(1, "CPU threads (0: as torch chooses)", maths=False)
    device: str = option("auto", "where to train", maths=False, choices=("auto", "cpu", "cuda"))

    @property
    def name(self) -> str:
        """What a run folder is called when --out does not say."""
        plain = self.preset if self.data in ("digits", "") or self.preset != "digits" else self.data
        plain = plain.replace("\\", "/").rstrip("/").split("/")[-1].split(".")[0] or "run"
        return plain if self.prior == "standard" else f"{plain}-{self.prior}"


# A data set may want other defaults than digits; options given by hand win over these.
FOR_DATA = {
    "mnist5k": {"hidden": 512, "latent": 20, "epochs": 40, "learning_rate": 1e-3, "threads": 0},
    "pbmc": {"hidden": 128, "latent": 10, "epochs": 60, "learning_rate": 1e-3},
}
FOR_PRESET = {
    "digits": {},
    "large-latent": {
        "model": "conv", "image_size": 128, "latent": 16, "hidden": 16, "layers": 1, "batch_size": 4, "steps": 10,
        "epochs": 1, "learning_rate": 2e-3, "log_every": 1, "checkpoint_every": 5, "importance_samples": 10,
        "test_data": 16, "threads": 0,
    },
}  # fmt: skip


# A learned prior begins when the posteriors have taken their places; a short run has few steps for that.
WARM_UP = {"digits": 500, "pbmc": 100, "large-latent": 3}


def resolve(given: dict[str, Any]) -> Settings:
    """The settings of a new run; options that contradict one another are refused."""
    settings = defaults(given)
    check(settings)
    for name in given:
        if settings.prior not in (known := BELONGS.get(name, (settings.prior,))):
            wanted = " or ".join(known)
            raise UserError(f"{flag(name)} belongs to --prior {wanted}; this run has --prior {settings.prior}")
    if settings.kl == "upper" and settings.prior == "flow":
        raise UserError("--kl upper is a bound for mixtures, --prior gmm or vamp; a flow has only --kl mc")
    if settings.kl == "relaxed" and settings.prior == "flow":
        raise UserError("--kl relaxed chooses a component of a mixture, --prior gmm or vamp; a flow has only --kl mc")
    if settings.kl == "relaxed" and settings.covariance == "full":
        raise UserError("--kl relaxed interpolates deviations: --covariance diag, spherical or tied, not full")
    for name in RELAXED:
        if name in given and settings.kl != "relaxed":
            raise UserError(f"{flag(name)} belongs to --kl relaxed; this run has --kl {settings.kl}")
    if "tau_schedule" in given and settings.tau == settings.final_tau:
        raise UserError(f"--tau-schedule has nothing to do where --tau and --final-tau are both {settings.tau}")
    if "beta_schedule" in given and settings.warm_up == 0:
        raise UserError("--beta-schedule says how the weight of the KL rises over --warm-up; this run has --warm-up 0")
    if settings.kl == "upper" and "samples" in given:
        raise UserError("--samples belongs to --kl mc or relaxed; --kl upper takes one sample, for the decoder")
    return settings


def defaults(given: dict[str, Any]) -> Settings:
    """Defaults, then what suits the data, then the preset, then the prior, then what was typed."""
    preset, data, prior = (given.get(name, getattr(Settings, name)) for name in ("preset", "data", "prior"))
    learned = {} if prior == "standard" else {"warm_up": WARM_UP.get(preset if data == "digits" else data, 500)}
    return Settings(**{**FOR_DATA.get(data, {}), **FOR_PRESET[preset], **learned, **given})


def check(settings: Settings) -> None:
    ones = ("latent", "hidden", "layers", "batch_size", "epochs", "importance_samples", "log_every", "checkpoint_every")
    zeros = ("image_size", "steps", "seed", "split_seed", "test_data", "threads", "warm_up")
    for name, minimum in {**dict.fromkeys((*ones, "components", "samples"), 1), **dict.fromkeys(zeros, 0)}.items():
        if getattr(settings, name) < minimum:
            raise UserError(f"{flag(name)} must be at least {minimum}, got {getattr(settings, name)}")
    for name in ("learning_rate", "weight_decay", "beta", "prior_learning_rate"):
        value = getattr(settings, name)
        if not 0 <= value < float("inf"):
            raise UserError(f"{flag(name)} must be a finite number, 0 or more, got {value}")
    for name in ("tau", "final_tau"):
        value = getattr(settings, name)
        if not 0 < value < float("inf"):
            raise UserError(f"{flag(name)} must be a finite number above 0, got {value}")
    if settings.final_tau > settings.tau:
        raise UserError(f"--final-tau {settings.final_tau} is above --tau {settings.tau}: the temperature falls")


def resume(saved: dict[str, Any], given: dict[str, Any]) -> Settings:
    """The saved settings, with what was typed where that leaves the numbers as they are; anything else is refused."""
    fields = {item.name: item for item in dataclasses.fields(Settings)}
    if unknown := sorted(set(saved) - set(fields)):
        raise UserError(f"the checkpoint has settings unknown here ({', '.join(unknown)}); it is from another version")
    before = Settings(**saved)
    for name, value in given.items():
        old = getattr(before, name)
        # How long to train changes nothing before the end, unless learning rate or temperature are planned over it all.
        planned = before.schedule != "constant" or (before.kl == "relaxed" and before.tau != before.final_tau)
        free = name in ("epochs", "steps") and not planned
        if fields[name].metadata["maths"] and value != old and not free:
            raise UserError(f"{flag(name)} {value} differs from the run's {old}; resume without it, or start a new run")
    settings = dataclasses.replace(before, **given)
    check(settings)
    return settings


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
