"""The reference VAE: `fastkl train`, and the loop it runs, written to be read. `import fastkl` does not import it.

Read `loop.py` first: the loss is a few lines of `fastkl`. The other files serve a real run:

    settings.py     every option and the presets; rules.py, valid combinations and the options a resumed run may change
    data.py         the data of a run and their split; builtin.py, the built-in sets; labels.py
    files.py        readers of untrusted files, into the types of arrays.py; folder_data.py, of folders: images.py,
                    shards.py (.npy files), archives.py (.tar files), huggingface.py
    scaling.py      layout, scale and likelihood of the numbers
    stored.py       data that are read when they are used; image_sets.py, pictures decoded then, and crops; reader.py,
                    the data of each step, read ahead by workers
    model.py        encoder and decoder, MLP or convolutional; likelihood.py, the distributions of a datum
    loop.py         the loop
    objective.py    the loss of a step, from fastkl.objectives
    guard.py        non-finite steps are skipped; watch.py, the monitors and their warnings
    pace.py         defaults that follow data and model, and the forecast of the run's time
    folders.py      run folders and their locks; facts.py, the provenance of a run
    stop.py         signals; a run ends between two steps
    plan.py         learning rate, weight of the KL and temperature as functions of the step
    prior.py        learned priors, and their start after the warm-up
    streams.py      every random number as a function of the step
    parallel.py     torchrun: rank, group and exchange of values
    checkpoint.py   atomic writes
    progress.py     the bar in the terminal; events.py for TensorBoard and W&B
    evaluate.py     the test figures; pictures.py draws them, report.py puts them in one page
    clusters.py     used components of a mixture, and their agreement with the labels
    memory.py       the memory of the loss, beside the eager formula
    trained.py      the model of a run, for use elsewhere; commands.py, the same on the command line;
                    export.py, programs that run without fastkl
    api.py          training from Python, with data, a model or an objective of your own
    errors.py       one-line errors; cli.py, the command line; config.py, options in a file
"""

from fastkl.vae.api import train
from fastkl.vae.model import VAE
from fastkl.vae.trained import Trained, load

__all__ = ["VAE", "Trained", "load", "train"]
