"""Valid combinations of options, the defaults of a new run, and the options that a resumed run may change."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from fastkl.vae.errors import UserError
from fastkl.vae.settings import AUTOENCODER, FOR_DATA, FOR_MODEL, FOR_OBJECTIVE, FOR_PRESET, LEARNED, WARM_UP, Settings

BOUNDS = ("elbo", "beta_vae")  # objectives that accept every --kl
WEIGHTED = (*BOUNDS, "beta_tc_vae", "vade")  # objectives that use --beta
IMPORTANCE = ("iwae", "miwae", "piwae", "ciwae")
MATCHING = ("wae_mmd", "info_vae", "swae", "sinkhorn_ae", "aae")
# The objectives and the priors that use an option.
OF_OBJECTIVE = {
    "beta": WEIGHTED, "beta_schedule": WEIGHTED, "kl": BOUNDS, "free_bits": ("elbo",), "free_bits_per": ("elbo",),
    "balance": ("elbo",), "capacity": ("beta_vae",), "capacity_steps": ("beta_vae",),
    "groups": ("miwae", "piwae"), "gradient": IMPORTANCE, "elbo_share": ("ciwae",), "penalty": MATCHING,
    "alpha": ("info_vae",), "kernel": ("wae_mmd", "info_vae"), "projections": ("swae",), "blur": ("sinkhorn_ae",),
    "weights": ("beta_tc_vae",), "perceptual": WEIGHTED, "adversarial": WEIGHTED,
}  # fmt: skip
OF_PRIOR = {
    "components": ("gmm", "vamp"), "covariance": ("gmm",), "kl": LEARNED, "prior_learning_rate": LEARNED,
}  # fmt: skip
IMAGE_WEIGHTS = ("perceptual_weight", "adversarial_weight")
RELAXED = ("tau", "final_tau", "tau_schedule")  # options of --kl relaxed
# Invalid combinations, each with its reason; docs/objectives.md has the same table.
REFUSED = {
    "beta_tc_vae": (LEARNED, "its dimension-wise KL needs a prior that factorises over dimensions"),
    "vade": (("standard", "flow"), "it assigns data to the components of a mixture, --prior gmm or vamp"),
}


def resolve(given: dict[str, Any]) -> Settings:
    """The settings of a new run.

    Raises:
        UserError: an option has an invalid value, or two options contradict each other.
    """
    for name in ("data", "test_data"):
        if name in given and not given[name].strip():
            raise UserError(f"{flag(name)} is empty: name a file or a folder (. is the current one)")
    settings = defaults(given)
    check(settings)
    priors, why = REFUSED.get(settings.objective, ((), ""))
    if settings.prior in priors:
        raise UserError(f"--objective {settings.objective} does not go with --prior {settings.prior}: {why}")
    for table, about in ((OF_OBJECTIVE, "objective"), (OF_PRIOR, "prior")):
        for name in given:
            chosen = getattr(settings, about)
            if chosen not in (known := table.get(name, (chosen,))):
                wanted = " or ".join(known)
                raise UserError(f"{flag(name)} belongs to --{about} {wanted}; this run has --{about} {chosen}")
    if "model_config" in given and settings.model != AUTOENCODER:
        raise UserError(f"--model-config belongs to --model {AUTOENCODER}; this run has --model {settings.model}")
    sampled = settings.prior != "standard" and settings.objective in BOUNDS
    if "samples" in given and not sampled and settings.objective not in (*IMPORTANCE, "vade"):
        raise UserError(
            "--samples applies to --objective elbo or beta_vae with a learned --prior, "
            "or to --objective iwae, miwae, piwae, ciwae or vade"
        )
    if settings.warm_up and settings.prior == "standard" and settings.objective not in WEIGHTED:
        raise UserError(
            f"--warm-up raises --beta and delays a learned --prior; --objective {settings.objective} "
            "with --prior standard uses neither: leave it out"
        )
    check_remedies(settings, given)
    check_images(settings, given)
    if settings.global_batch_size and "batch_size" in given:
        raise UserError(
            "--batch-size (of each process) and --global-batch-size (of all processes) exclude each other: give one"
        )
    if settings.kl == "upper" and settings.prior == "flow":
        raise UserError("--kl upper needs a mixture, --prior gmm or vamp; a flow has only --kl mc")
    if settings.kl == "relaxed" and settings.prior == "flow":
        raise UserError("--kl relaxed needs a mixture, --prior gmm or vamp; a flow has only --kl mc")
    if settings.kl == "relaxed" and settings.covariance == "full":
        raise UserError(
            "--kl relaxed needs --covariance diag, spherical or tied, got full: it averages standard deviations"
        )
    for name in RELAXED:
        if name in given and settings.kl != "relaxed":
            raise UserError(f"{flag(name)} belongs to --kl relaxed; this run has --kl {settings.kl}")
    if "tau_schedule" in given and settings.tau == settings.final_tau:
        raise UserError(f"--tau-schedule has no effect: --tau and --final-tau are both {settings.tau}")
    if "beta_schedule" in given and settings.warm_up == 0:
        raise UserError("--beta-schedule needs --warm-up, over which --beta rises; this run has --warm-up 0")
    if settings.kl == "upper" and "samples" in given:
        raise UserError("--samples belongs to --kl mc or relaxed; --kl upper draws one sample, for the decoder")
    return settings


def check_remedies(settings: Settings, given: dict[str, Any]) -> None:
    """Raise a UserError for an option of a remedy that has no effect, or contradicts another one."""
    for name, of in (("free_bits_per", "free_bits"), ("capacity_steps", "capacity"), ("cycles", "beta_schedule")):
        asked = settings.beta_schedule == "cyclical" if name == "cycles" else of in given
        if name in given and not asked:
            raise UserError(f"{flag(name)} belongs to {flag(of)}{' cyclical' if name == 'cycles' else ''}")
    for name, parts in (("free_bits", settings.free_bits_per != "sample"), ("balance", True)):
        if name in given and parts and settings.prior != "standard":
            raise UserError(
                f"{flag(name)} needs the KL of each dimension, which --prior {settings.prior} does not define; "
                "--free-bits with --free-bits-per sample works with every prior"
            )
    if settings.balance and settings.free_bits:
        raise UserError("--balance and --free-bits exclude each other: both reweight the KL")
    if settings.balance and settings.warm_up == 0:
        raise UserError("--balance acts during --warm-up only; this run has --warm-up 0")
    if settings.balance > settings.latent:
        raise UserError(
            f"--balance {settings.balance} is more than --latent {settings.latent}, so groups would be empty"
        )


def check_images(settings: Settings, given: dict[str, Any]) -> None:
    """Raise a UserError for an option of image losses that has no effect, or contradicts another one."""
    for name, of in (
        ("perceptual_weight", "perceptual"), ("adversarial_weight", "adversarial"),
        ("adversarial_start", "adversarial"),
    ):  # fmt: skip
        if name in given and not getattr(settings, of):
            raise UserError(f"{flag(name)} belongs to {flag(of)}")
    if "discriminator_learning_rate" in given and not (settings.adversarial or settings.objective == "aae"):
        raise UserError("--discriminator-learning-rate belongs to --objective aae or --adversarial")
    if settings.compile and settings.adversarial:
        raise UserError("--compile does not go with --adversarial, whose weight needs gradients inside the loss")
    if settings.parallel == "fsdp":
        for name in ("adversarial", "perceptual"):
            if getattr(settings, name):
                raise UserError(
                    f"--parallel fsdp does not go with {flag(name)}, which calls a part of the model: "
                    "use --parallel ddp"
                )


def defaults(given: dict[str, Any]) -> Settings:
    """Settings from, in rising precedence: defaults, data set, model, objective, prior, preset, given options."""
    preset = given.get("preset", Settings.preset)
    chosen = {**FOR_PRESET[preset], **given}
    names = ("data", "objective", "prior")
    data, objective, prior = (chosen.get(name, getattr(Settings, name)) for name in names)
    model = chosen.get("model", FOR_DATA.get(data, {}).get("model", Settings.model))
    learned = {} if prior == "standard" else {"warm_up": WARM_UP.get(preset if data == "digits" else data, 500)}
    suited = {**FOR_DATA.get(data, {}), **FOR_MODEL.get(model, {}), **FOR_OBJECTIVE.get(objective, {}), **learned}
    if data == "photos" and chosen.get("image_size"):
        suited["crop"] = chosen["image_size"]
    return Settings(**{**suited, **chosen})


def check(settings: Settings) -> None:
    """Raise a UserError for a number outside its range."""
    ones: tuple[str, ...] = (
        "latent",
        "hidden",
        "layers",
        "batch_size",
        "accumulate",
        "epochs",
        "importance_samples",
        "log_every",
        "checkpoint_every",
    )
    ones += ("components", "samples", "groups", "cycles", "projections", "bad_steps")
    zeros: tuple[str, ...] = (
        "balance",
        "capacity_steps",
        "image_size",
        "steps",
        "seed",
        "split_seed",
        "test_count",
        "threads",
        "crop",
        "workers",
    )
    zeros += ("warm_up", "patience", "learning_rate_warm_up", "adversarial_start", "global_batch_size")
    for name, minimum in {**dict.fromkeys(ones, 1), **dict.fromkeys(zeros, 0)}.items():
        if getattr(settings, name) < minimum:
            raise UserError(f"{flag(name)} must be at least {minimum}, got {getattr(settings, name)}")
    rates = ("learning_rate", "prior_learning_rate", "discriminator_learning_rate")
    for name in (
        *rates,
        "weight_decay",
        "beta",
        "free_bits",
        "penalty",
        "alpha",
        "elbo_share",
        "clip",
        "scale",
        *IMAGE_WEIGHTS,
    ):
        value = getattr(settings, name)
        if not 0 <= value < float("inf"):
            raise UserError(f"{flag(name)} must be a finite number, 0 or more, got {value}")
    for name in ("tau", "final_tau", "blur"):
        value = getattr(settings, name)
        if not 0 < value < float("inf"):
            raise UserError(f"{flag(name)} must be a finite number above 0, got {value}")
    if 0 < settings.image_size < settings.crop:
        raise UserError(
            f"--crop {settings.crop} is more than --image-size {settings.image_size}, the shorter side after resizing"
        )
    if not 0 <= settings.validation < 1:
        raise UserError(f"--validation must be a share, 0 or more and below 1, got {settings.validation}")
    if not 0 <= settings.ema < 1:
        raise UserError(f"--ema must be a decay, 0 or more and below 1, got {settings.ema}")
    for name in ("alpha", "elbo_share"):
        if getattr(settings, name) > 1:
            raise UserError(f"{flag(name)} must be a share, at most 1, got {getattr(settings, name)}")
    if not settings.capacity < float("inf"):
        raise UserError(f"--capacity must be a finite number, got {settings.capacity}")
    if settings.objective == "info_vae" and settings.alpha + settings.penalty < 1:
        total = settings.alpha + settings.penalty
        raise UserError(f"--alpha plus --penalty of info_vae must be at least 1, got {total}")
    if settings.final_tau > settings.tau:
        raise UserError(f"--final-tau {settings.final_tau} must not be above --tau {settings.tau}")


def resume(saved: dict[str, Any], given: dict[str, Any]) -> Settings:
    """The saved settings, updated by given options that leave the numbers unchanged.

    Raises:
        UserError: a given option would change the numbers, or the saved settings are not of this version.
    """
    fields = {item.name: item for item in dataclasses.fields(Settings)}
    if unknown := sorted(set(saved) - set(fields)):
        raise UserError(f"the run has unknown settings ({', '.join(unknown)}): another version of fastkl wrote it")
    for name, value in saved.items():
        kind = fields[name].metadata["kind"]
        number = isinstance(value, bool) and kind is not bool
        if not isinstance(value, (int, float) if kind is float else kind) or number:
            raise UserError(f"the run's saved {flag(name)} must be of type {kind.__name__}, got {value!r}")
    before = Settings(**saved)
    for name, value in given.items():
        old = getattr(before, name)
        # The length changes no step before the end, unless a schedule of learning rate or temperature depends on it.
        length = name in ("epochs", "steps")
        if fields[name].metadata["maths"] and value != old and not (length and not planned(before)):
            why = f": {planned(before)}" if length else ""
            raise UserError(
                f"{flag(name)} {value} differs from the run's {old}{why}; resume without it, or start a new run"
            )
    if "epochs" in given and given["epochs"] != before.epochs and "steps" not in given:
        given = {**given, "steps": 0}  # a saved --steps would take precedence over --epochs
    settings = dataclasses.replace(before, **given)
    check(settings)
    return settings


def fixed_processes(settings: Settings) -> str:
    """The reason why this run needs the number of processes that it began with, or ""."""
    if not settings.global_batch_size:
        return "the number of data in a step grows with that of processes (only --global-batch-size fixes it)"
    if settings.noise != "datum":
        return "each process draws its own noise (only --noise datum does not depend on the number of processes)"
    if settings.objective in ("swae", "sinkhorn_ae"):
        return f"--objective {settings.objective} compares only data of the same process"
    return ""


def planned(settings: Settings) -> str:
    """The reason why this run cannot be made longer, or ""."""
    if settings.schedule != "constant":
        return "its learning rate falls to 0 at the planned end (only --schedule constant can be extended)"
    if settings.kl == "relaxed" and settings.tau != settings.final_tau:
        return "its temperature reaches --final-tau at the planned end"
    return ""


def prolonging(settings: Settings) -> str:
    """The advice for a run that has reached its end."""
    if why := planned(settings):
        return f"it cannot be made longer: {why}"
    return "larger --steps or --epochs make it longer"


def check_names(given: dict[str, Any]) -> None:
    """Raise a TypeError for the first option that is unknown or has a value of a wrong type."""
    fields = {item.name: item.metadata for item in dataclasses.fields(Settings)}
    for name, value in given.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            raise TypeError(f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        kind, choices = fields[name]["kind"], fields[name]["choices"]
        right = isinstance(value, (int, float) if kind is float else kind)
        if not right or isinstance(value, bool) != (kind is bool):
            raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r}")
        if choices and value not in choices:
            raise UserError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def flag(name: str) -> str:
    """The name of an option on the command line."""
    return "--" + name.replace("_", "-")
