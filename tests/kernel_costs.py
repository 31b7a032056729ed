"""Writes the table of docs/kernels.md: what each elementwise kernel moves, executes and holds in registers.

    TRITON_INTERPRET=0 python tests/kernel_costs.py MODULE

Every kernel is compiled and disassembled for sm_90, then launched through Triton's launcher to an emulator: MODULE's
`execute` (see emulated.py) returns (bytes that the programs load and store, PTX instructions of their threads).
"""

import importlib
import sys
from pathlib import Path

from fastkl.native import _build

import fake_driver

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- costs -->\n", "<!-- end of costs -->"
SHAPE = (256, 512)
HEAD = """\
| op | dtype | traffic / budget | PTX | SASS | registers | in flight, KiB | bound by memory up to |
|---|---|---|---|---|---|---|---|
"""
INSTRUCTIONS_PER_BYTE = 8.8  # that an H100 issues while its memory moves a byte
OPS = ("kl_normal", "kl_normal_per_dim", "wasserstein2_normal", "rsample_normal", "rsample_kl", "normal_log_prob",
       "bernoulli_log_prob", "gumbel_softmax")  # fmt: skip


def rows(execute):
    sys.path.insert(0, str(ROOT))
    from bench import tune
    from bench.estimate import compiled
    from fastkl.kernels._launch import forget

    for name, dtype in tune.DTYPES.items():
        for op in OPS:
            for direction, (tensors, call) in tune.calls(op, dtype, "cpu", SHAPE).items():
                code = compiled(call, "sm_90")
                forget()
                counts = []
                fake_driver.EXECUTE = lambda *launch, counts=counts: counts.append(execute(*launch))
                call()
                forget()
                moved, instructions = map(sum, zip(*counts, strict=True))
                elements = SHAPE[0] * SHAPE[1]
                traffic = moved / elements / dtype.itemsize
                limit = INSTRUCTIONS_PER_BYTE * tensors * dtype.itemsize
                yield (
                    f"| {op} {'forward' if direction == 'fwd' else 'backward'} | {name} | {traffic:.2f} / {tensors} "
                    f"| {instructions / elements:.1f} | {code.instructions:.1f} | {code.registers} "
                    f"| {code.in_flight / 1024:.0f} | {limit:.0f} |\n"
                )


def main(module: str) -> None:
    fake_driver.install(_build._compiler())
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    table = "".join(rows(importlib.import_module(module).execute))
    PAGE.write_text(before + BEGIN + HEAD + table + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
