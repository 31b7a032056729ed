"""Every option of a run in one place: its default, its help text, and whether it changes the numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from fastkl.vae.errors import UserError


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
        return plain.replace("\\", "/").rstrip("/").split("/")[-1].split(".")[0] or "run"


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


def resolve(given: dict[str, Any]) -> Settings:
    """Defaults, then what suits the data, then the preset, then what was typed."""
    preset = given.get("preset", Settings.preset)
    data = given.get("data", Settings.data)
    settings = Settings(**{**FOR_DATA.get(data, {}), **FOR_PRESET[preset], **given})
    check(settings)
    return settings


def check(settings: Settings) -> None:
    counts = (
        "latent",
        "hidden",
        "layers",
        "batch_size",
        "epochs",
        "importance_samples",
        "log_every",
        "checkpoint_every",
    )
    least = {
        **dict.fromkeys(counts, 1),
        "image_size": 0,
        "steps": 0,
        "seed": 0,
        "split_seed": 0,
        "test_data": 0,
        "threads": 0,
    }
    for name, minimum in least.items():
        if getattr(settings, name) < minimum:
            raise UserError(f"{flag(name)} must be at least {minimum}, got {getattr(settings, name)}")
    for name in ("learning_rate", "weight_decay", "beta"):
        value = getattr(settings, name)
        if not 0 <= value < float("inf"):
            raise UserError(f"{flag(name)} must be a finite number, 0 or more, got {value}")


def resume(saved: dict[str, Any], given: dict[str, Any]) -> Settings:
    """The saved settings, with what was typed where that leaves the numbers as they are; anything else is refused."""
    fields = {item.name: item for item in dataclasses.fields(Settings)}
    if unknown := sorted(set(saved) - set(fields)):
        raise UserError(f"the checkpoint has settings unknown here ({', '.join(unknown)}); it is from another version")
    before = Settings(**saved)
    for name, value in given.items():
        old = getattr(before, name)
        # How long to train changes nothing before the end, unless the learning rate is planned over the whole run.
        free = name in ("epochs", "steps") and before.schedule == "constant"
        if fields[name].metadata["maths"] and value != old and not free:
            raise UserError(f"{flag(name)} {value} differs from the run's {old}; resume without it, or start a new run")
    settings = dataclasses.replace(before, **given)
    check(settings)
    return settings


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
