"""The reference VAE: `fastkl train`, and the loop it runs, written to be read. `import fastkl` does not import it.

Read `train.py` first: the loss is a few lines of `fastkl`. The rest is what a real run needs around it:

    settings.py     every option and the presets; rules.py, which go together and what a resumed run may change
    data.py         the built-in data sets and the split; files.py and images.py read what nobody vouches for, as
                    arrays.py says, and scaling.py decides what the numbers are
    model.py        encoder and decoder, MLP or convolutional
    train.py        the loop
    objective.py    what a step minimises, of fastkl.objectives
    guard.py        steps that are not finite are left out; watch.py, what is monitored, and the warnings
    pace.py         defaults that follow data and model, and how long a run will take
    folders.py      which folder a run takes, and that no other takes it; facts.py, how the run was made
    stop.py         signals; a run ends between two steps
    plan.py         learning rate, weight of the KL and temperature as functions of the step
    prior.py        what takes the place of N(0, I), and how it begins
    streams.py      every random number as a function of the step
    parallel.py     torchrun: which process am I, and the few words that processes exchange
    checkpoint.py   files that are either old or new, never half
    progress.py     the bar in the terminal; events.py for TensorBoard
    evaluate.py     the test figures; pictures.py draws them, report.py puts them in one page
    clusters.py     which components of a mixture are used, and whether they are the groups of the labels
    memory.py       what the loss costs in memory, beside the eager formula
    errors.py       what is said in one line; cli.py, the command line
"""
