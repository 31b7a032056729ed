"""Run the calls of bench/smoke.py on compiled kernels without a GPU: through Triton's launcher, on an emulator.

    TRITON_INTERPRET=0 python tests/emulated.py MODULE 0 2     # the first half of the calls

MODULE is a Python module that can execute PTX: its `execute(compiled, grid, block, shared, parameters)` is called for
each launch, with Triton's compiled kernel and the parameters as its PTX declares them, pointers as addresses of CPU
tensors. A JSON line for each call says whether values and gradients are those of the closed form in float64.
"""

import importlib
import json
import sys
from pathlib import Path

from fastkl.native import _build

import fake_driver

ROOT = Path(__file__).parent.parent


def main(module: str, part: int, parts: int) -> None:
    sys.path.insert(0, str(ROOT))
    fake_driver.install(_build._compiler())
    fake_driver.EXECUTE = importlib.import_module(module).execute
    import torch

    from bench import smoke
    from bench.smoke_cases import elementwise, pairs
    from fastkl.ops import _call

    # Mixtures and pairs, then rows that are read an element and 16 bytes at a time.
    calls = pairs(12, 3, 4).items(), elementwise(5, 7).items(), elementwise(4, 64).items()
    _call.CPU.update(_call.TRITON)
    for name, call in [item for items in calls for item in items][part::parts]:
        row, _ = smoke.attempt(name, call, [torch.float32, torch.bfloat16])
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
