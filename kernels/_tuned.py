"""Tiles of the elementwise kernels whose rows are read 16 bytes at a time, and of gmm_dot: `python -m bench.tune`
writes this file."""

# op -> bytes of an element -> (elements of a tile where two tensors are read, warps that share it)
TILES = {
    "bernoulli_log_prob": {2: (2048, 4), 4: (2048, 4), 8: (2048, 4)},
    "kl_normal": {2: (2048, 4), 4: (2048, 4), 8: (256, 4)},
    "kl_normal_per_dim": {2: (4096, 4), 4: (2048, 4), 8: (256, 4)},
    "normal_log_prob": {2: (2048, 4), 4: (2048, 4), 8: (2048, 4)},
    "rsample_kl": {2: (2048, 4), 4: (1024, 4), 8: (512, 4)},
}

# kernel of gmm_dot -> (rows of a tile, most columns, terms that are summed at a time, warps, stages)
GMM_DOT = {
    "forward": (64, 32, 16, 4, 1),
    "by_rows": (64, 64, 16, 4, 1),
    "by_components": (64, 64, 16, 4, 1),
}
