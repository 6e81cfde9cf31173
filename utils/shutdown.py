"""Graceful shutdown on SIGTERM, SIGUSR1, SIGHUP and SIGINT."""

import contextlib
import os
import signal

from utils import distributed

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT") if hasattr(signal, name)]
REQUEUE = 75  # exit code after SIGTERM, SIGUSR1 or SIGHUP: EX_TEMPFAIL of sysexits.h, try again
INTERRUPTED = 130  # exit code after Ctrl-C


class Stopped(Exception):
    """A signal stopped the run after it saved its state; `code` is the exit code."""

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


class StopRequest:
    """`with StopRequest() as request:` keeps the first signal in request.signal (None until then), so that the current
    step can be finished and saved. A further Ctrl-C ends the process at once. A SIGHUP that is ignored, as under nohup,
    stays ignored."""

    signal = None

    def __enter__(self):
        self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS
                        if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self):
        """The signal that any rank has received, the same on all ranks; None if there is none. Collective."""
        number = distributed.largest(self.signal or 0)
        return signal.Signals(number) if number else None

    def _handle(self, number, _):
        if self.signal is None:
            self.signal = signal.Signals(number)
            _say(f"{self.signal.name}: finishing the step and saving; Ctrl-C ends the run at once")
        elif number == signal.SIGINT:
            _say("interrupted; the steps since the last checkpoint are lost")
            os._exit(INTERRUPTED)


def exit_code(stop):
    """Exit code of a process that a signal stopped."""
    return INTERRUPTED if stop == signal.SIGINT else REQUEUE


def _say(text):
    """Print a line from a signal handler, which must not use Python's buffered streams."""
    with contextlib.suppress(OSError):  # the terminal is gone
        os.write(2, f"\n{text}\n".encode())
