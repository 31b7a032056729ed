"""CytoVI, a model of scvi-tools with a mixture as its prior: `python with_scvi.py`. Needs: pip install scvi-tools."""

import time
import warnings

import anndata
import numpy as np
import scvi

import fastkl.integrations.scvi

warnings.simplefilter("ignore")
scvi.settings.verbosity = 30
expression = np.random.default_rng(0).random((256, 20)).astype(np.float32)


def train() -> tuple[float, float]:
    """(the loss of the last epoch, CPU seconds)"""
    scvi.settings.seed = 0
    cells = anndata.AnnData(expression.copy())
    cells.obs["batch"] = ["a", "b"] * 128
    scvi.external.CYTOVI.setup_anndata(cells, batch_key="batch")
    model = scvi.external.CYTOVI(cells, n_latent=10, prior_mixture_k=100)
    began = time.process_time()
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "train_size": 1.0, "early_stopping": False}
    model.train(max_epochs=3, **settings)
    return float(model.history["elbo_train"].iloc[-1, 0]), time.process_time() - began


print("scvi-tools: loss {:.3f}, {:.1f} s".format(*train()))
with fastkl.integrations.scvi.enable():
    print("fastkl:     loss {:.3f}, {:.1f} s".format(*train()))
