"""An autoencoder of diffusers, and the KL of a video: `python with_diffusers.py`. Needs: pip install diffusers."""

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

import fastkl.integrations.diffusers

torch.manual_seed(0)
vae = AutoencoderKL(block_out_channels=(16,), layers_per_block=1, norm_num_groups=4, latent_channels=4)
optimizer = torch.optim.AdamW(vae.parameters(), 1e-3)
images = torch.rand(4, 3, 32, 32)

fastkl.integrations.diffusers.enable()  # the only new line
for _ in range(10):
    posterior = vae.encode(images).latent_dist
    kl = posterior.kl().mean()
    loss = (vae.decode(posterior.sample()).sample - images).square().mean() + 1e-6 * kl
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"after 10 steps: loss {loss.item():.4f}, KL {kl.item():.1f} nats")
fastkl.integrations.diffusers.disable()

video = torch.randn(2, 8, 3, 16, 16)  # [N, 2C, T, H, W]
image = torch.full((1, 8, 16, 16), 0.01, dtype=torch.bfloat16)
stock = DiagonalGaussianDistribution(video).kl(), DiagonalGaussianDistribution(image).kl()
with fastkl.integrations.diffusers.enable():
    fused = DiagonalGaussianDistribution(video).kl(), DiagonalGaussianDistribution(image).kl()
print(f"KL of two videos: diffusers {list(stock[0].shape)}, mean {stock[0].mean():.1f}")
print(f"                  fastkl    {list(fused[0].shape)}, mean {fused[0].mean():.1f}")
print(f"KL of a bfloat16 image: diffusers {stock[1].item():.5f}, fastkl {fused[1].item():.5f}")
assert torch.allclose(fused[0].mean() / stock[0].mean(), torch.tensor(16.0))
