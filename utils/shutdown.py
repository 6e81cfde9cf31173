"""Being asked to stop while training: SIGTERM and SIGUSR1 (a scheduler), SIGINT (Ctrl-C)."""

import os
import signal

from utils import distributed

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
REQUEUE = 75  # exit code after SIGTERM or SIGUSR1: EX_TEMPFAIL of sysexits.h, try again
INTERRUPTED = 130  # exit code after Ctrl-C


class Stopped(Exception):
    """A run was asked to stop and has saved its state; `code` is the exit code."""

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


class StopRequest:
    """`with StopRequest() as request:` keeps the first signal that arrives in request.signal (None until then), so
    that a step can be finished and saved. A Ctrl-C after that ends the process at once."""

    signal = None

    def __enter__(self):
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self):
        """The signal that has arrived in any of the processes, in all of them alike; None where none has."""
        number = distributed.largest(self.signal or 0)
        return signal.Signals(number) if number else None

    def _note(self, number, _):
        if self.signal is None:
            self.signal = signal.Signals(number)
            _say(f"{self.signal.name}: finishing the step and saving; Ctrl-C now would end it at once")
        elif number == signal.SIGINT:
            _say("interrupted; the steps since the last checkpoint are lost")
            os._exit(INTERRUPTED)


def exit_code(stop):
    """Exit code of a process that stops because of a signal."""
    return INTERRUPTED if stop == signal.SIGINT else REQUEUE


def _say(text):
    """Print a line from within a signal handler, where the streams of Python may not be used."""
    os.write(2, f"\n{text}\n".encode())
