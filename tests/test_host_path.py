"""The host's part of a launch: that it is replayed rightly, and that nothing waits for the GPU."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_replays():
    """replay_cases.py, in a process in which Triton compiles and has a driver that takes notes."""
    environment = dict(os.environ, TRITON_INTERPRET="0", PYTHONPATH=str(HERE))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "replay_cases.py"]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
