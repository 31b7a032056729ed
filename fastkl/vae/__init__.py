"""The reference VAE: `fastkl train` and its loop, written to be read. `import fastkl` does not import it.

Read `loop.py` first: the loss is a few lines of `fastkl`. The other files serve a real run:

    settings.py     every option and the presets; rules.py, valid combinations, and options a resumed run may change
    data/           the data of a run: readers of files and folders, scaling, split, and crops that are read when used
    model.py        encoder and decoder, MLP or convolutional; autoregressive.py, a decoder; likelihood.py, the
                    distributions of a datum; autoencoder.py, diffusers' AutoencoderKL, and pretrained.py, its folders
    run.py          the run; state.py, its state in a checkpoint
    loop.py         the loop
    objective.py    the loss of a step, from fastkl.objectives; perceptual.py and adversarial.py, terms for images
    guard.py        non-finite steps are skipped; watch.py, the monitors and their warnings
    pace.py         defaults that follow data and model, and the forecast of the run's time
    folders.py      run folders and their locks; facts.py, the provenance of a run
    stop.py         signals; a run ends between two steps
    plan.py         learning rate, weight of the KL and temperature as functions of the step
    prior.py        learned priors, and their start after the warm-up
    streams.py      every random number as a function of the step
    parallel.py     several processes: ranks, group, exchange of values; sharded.py and sharded_parts.py, FSDP's
                    checkpoints
    checkpoint.py   checkpoints and atomic writes
    progress.py     the bar in the terminal; events.py for TensorBoard and W&B
    evaluate.py     the test figures; pictures.py draws them, report.py puts them in one page
    clusters.py     used components of a mixture, and their agreement with the labels
    memory.py       memory and time of the loss as shares of a step, beside the eager formula
    trained.py      the model of a run, for use elsewhere; commands.py, the same on the command line;
                    export.py, programs that run without fastkl
    api.py          training from Python, with data, a model or an objective of your own
    errors.py       one-line errors; cli.py, the command line; config.py, options in a file
"""

from fastkl.vae.api import train
from fastkl.vae.model import VAE
from fastkl.vae.trained import Trained, load

__all__ = ["VAE", "Trained", "load", "train"]
