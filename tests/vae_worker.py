"""One process of `torchrun`: trains as `python -m fastkl.vae` does, and fails where threads of gloo outlive the group.

Such a thread may let go of a tensor while the interpreter ends, which aborts the process once in many runs.
"""

import sys
from pathlib import Path

from fastkl.vae.cli import main

if __name__ == "__main__":
    code = main()
    threads = [
        path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")
    ]  # none where there is no /proc
    if left := [name for name in threads if "gloo" in name]:
        print(f"threads that outlive the process group: {left}", file=sys.stderr)
        code = code or 3
    sys.exit(code)
