"""An image autoencoder for latent diffusion: L1 loss, a small KL, a distance of edges and a discriminator of patches.

python examples/train_image_autoencoder.py [--steps 600] [--out FOLDER]

With diffusers installed it trains an AutoencoderKL, and writes it to FOLDER/autoencoder for the training of a diffusion
model.
"""

import argparse
import importlib.util
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits

from fastkl import vae


def edges(x_hat, x):
    """A distance of edges for each image [N]. LPIPS has the same form, for images in [-1, 1]."""
    down = (x_hat - x).diff(dim=2).square().mean((1, 2, 3))
    return down + (x_hat - x).diff(dim=3).square().mean((1, 2, 3))


def main(steps, out):
    images = torch.from_numpy(load_digits().images).to(torch.uint8)  # [1797, 8, 8], grey levels from 0 to 16
    train, test = images[:1438], images[1438:]
    model = vae.train(
        {"x_train": train, "x_test": test},
        out=out,
        model="autoencoder-kl" if importlib.util.find_spec("diffusers") else "conv",
        latent=4,  # channels, of 4 x 4 positions
        layers=1,
        likelihood="laplace",  # the L1 loss with a learned scale
        beta=0.1,
        perceptual=f"{Path(__file__).stem}:edges",
        perceptual_weight=30.0,  # in nats
        adversarial=True,
        adversarial_start=steps // 2,  # once the images have shapes to sharpen
        adversarial_weight=0.3,
        batch_size=32,
        steps=steps,
        ema=0.99,
        precision="bf16" if torch.cuda.is_available() else "fp32",
    )
    error = (model.reconstruct(test) - test.unsqueeze(1)) / 16
    psnr = -10 * error.square().flatten(1).mean(1).log10()
    print(f"PSNR of {len(test)} test images: {psnr.mean():.2f} dB")

    # A diffusion model is trained on draws from the posteriors, scaled to mean 0 and deviation 1 in each channel.
    q = model.posterior(train)
    z = q.sample()
    mean, deviation = z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), keepdim=True)
    latents = (z - mean) / deviation
    print(f"latents {list(latents.shape)}, deviations before scaling {deviation.min():.2f} to {deviation.max():.2f}")
    images = model.decode(latents[:5] * deviation + mean)  # back to grey levels


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--steps", type=int, default=600)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    main(given.steps, given.out or Path(tempfile.mkdtemp()) / "run")
