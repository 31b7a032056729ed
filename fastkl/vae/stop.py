"""Stop requests of a run: Ctrl-C, SIGTERM, or the end of its terminal."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from fastkl.vae.progress import mute


class Stop:
    """A handler that defers signals to the end of a step, because inside a step the weights are half updated."""

    def __enter__(self) -> Stop:
        self.asked = False
        self.previous = {}
        numbers = [signal.SIGINT, signal.SIGTERM]
        hangup = getattr(signal, "SIGHUP", None)
        if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:  # nohup sets SIG_IGN
            numbers.append(hangup)
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.ask) for number in numbers}
        return self

    def ask(self, number: int, frame: Any) -> None:
        self.asked = True
        if number == getattr(signal, "SIGHUP", None):
            for stream in (sys.stdout, sys.stderr):
                # The terminal is gone: an error of a write would end the run before its checkpoint.
                if stream is not None and stream.isatty():
                    mute(stream)
        signal.signal(number, self.previous[signal.Signals(number)])  # a second signal takes effect at once

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
