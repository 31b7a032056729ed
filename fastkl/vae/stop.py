"""How a run is asked to stop: by Ctrl-C, by the system, or by the end of its terminal."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from fastkl.vae.progress import mute


class Stop:
    """A signal as a wish, granted between two steps: within one the weights would be half updated."""

    def __enter__(self) -> Stop:
        self.asked = False
        self.previous = {}
        numbers = [signal.SIGINT, signal.SIGTERM]
        hangup = getattr(signal, "SIGHUP", None)
        if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:  # which nohup has asked for
            numbers.append(hangup)
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.ask) for number in numbers}
        return self

    def ask(self, number: int, frame: Any) -> None:
        self.asked = True
        if number == getattr(signal, "SIGHUP", None):
            for stream in (sys.stdout, sys.stderr):
                if (
                    stream is not None and stream.isatty()
                ):  # gone: writing there would end the run before its checkpoint
                    mute(stream)
        signal.signal(number, self.previous[signal.Signals(number)])  # the second one is not a wish any more

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
