"""Tiles of the elementwise kernels whose rows are read 16 bytes at a time; `python bench/tune.py` writes this table."""

# op -> bytes of an element -> (elements of a tile where two tensors are read, warps that share it)
TILES = {
    "bernoulli_log_prob": {2: (2048, 4), 4: (2048, 4), 8: (2048, 4)},
    "kl_normal": {2: (2048, 4), 4: (2048, 4), 8: (256, 4)},
    "kl_normal_per_dim": {2: (4096, 4), 4: (2048, 4), 8: (256, 4)},
    "normal_log_prob": {2: (2048, 4), 4: (2048, 4), 8: (2048, 4)},
    "rsample_kl": {2: (2048, 4), 4: (1024, 4), 8: (512, 4)},
}
