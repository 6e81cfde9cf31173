"""Start and end of every script: flags are parsed, main() runs, errors become one line and an exit code.

Exit codes: 0 done · 1 failure (a loss that is not finite, a full disk) · 2 a mistake of the user · 75 training was
stopped by SIGTERM or SIGUSR1 after saving: start it again · 130 interrupted (training has saved).
Of several ranks the first that fails prints its line and torchrun stops the others; torchrun's exit code is always 1.
"""

import contextlib
import logging
import os
import re
import shlex
import sys

import torch
from absl import app, flags

from utils import distributed
from utils.errors import UserError
from utils.shutdown import INTERRUPTED, Stopped

LESS_MEMORY = ("to train, raise train.accumulation_steps, set train.checkpoint_activations=True or, last, lower "
               "train.batch_size; to sample, lower train.sample_size, --max_points or --sample_img_size")


def run(main, shared=False, several=()):
    """Parse the command line and call main().

    several  names of flags whose value may be several words, as in --window 0 0 0.5 1
    shared   True if the script divides its work among torchrun's processes, False if it needs to be the only one
    """
    app.define_help_flags()
    for module, defined in flags.FLAGS.flags_by_module_dict().items():  # for --help, which lists the script's own flags
        for flag in defined if not module.startswith("absl.") else ():
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    sys.stdout, sys.stderr = _Output(sys.stdout, 1), _Output(sys.stderr, 2)
    try:
        distributed.start()
        if not shared and distributed.world_size() > 1:
            raise UserError(f"{sys.argv[0]} works in one process; start it with python, not with torchrun")
        _parse(sys.argv, several)
        level = logging.INFO if distributed.is_main() else logging.ERROR
        logging.basicConfig(format="%(message)s", level=level, stream=sys.stderr)
        main()
        distributed.leave()
    except (flags.Error, UserError) as error:
        _fail(str(error))
    except torch.OutOfMemoryError as error:
        _fail(f"out of GPU memory ({str(error).split('.')[0]}); {LESS_MEMORY}", code=1)
    except (OSError, FloatingPointError) as error:
        _fail(str(error), code=1)
    except Stopped as stopped:
        if distributed.is_main() and distributed.first_to_fail(str(stopped)):
            print(stopped, file=sys.stderr)
        _end(stopped.code)
    except KeyboardInterrupt:
        _fail("interrupted; the same command continues from the last checkpoint or image", code=INTERRUPTED)
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):  # PyTorch's message when the host is out of memory
            _fail(f"out of memory; {LESS_MEMORY}", code=1)
        if re.search(r"DataLoader worker \(pid|open files|ancdata", str(error)):  # in messages of PyTorch
            _fail("a worker that reads data is lost, perhaps because memory, shared memory (/dev/shm) or open files "
                  f"(ulimit -n) ran out ({str(error).splitlines()[-1]}); lower data.num_workers, or raise the limit", 1)
        reason = distributed.lost_connection(error)
        if reason is None:
            raise
        _fail(reason, code=1)


class _Output:
    """A standard stream that never fails: what cannot be written, because the stream is closed, is dropped, and
    characters that its encoding lacks are replaced."""

    def __init__(self, stream, number):
        if stream is None:  # closed before Python started; another file must not get its number
            stream = open(os.devnull, "w")  # noqa: SIM115  # for the life of the process
            try:
                os.fstat(number)
            except OSError:
                os.dup2(stream.fileno(), number)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        self._stream = stream

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)


def point_to_report():
    """Print the command that makes a report of a training run: its flags, without those that only affect training."""
    if distributed.is_main():
        kept = [word for word in sys.argv[1:] if not re.match(r"--\w+\.(train|optimizer)\.\w+=", word)]
        print(f"for a page about this run: {shlex.join(['python', 'experiments/report.py', *kept])}")


def _parse(argv, several):
    try:
        extra = flags.FLAGS(_one_word_each([_with_home(word) for word in argv], several))[1:]
    except SystemExit:  # absl ends --help with 1
        sys.exit(0)
    except (AttributeError, KeyError) as error:  # from ml_collections, with the name and perhaps a similar one
        while isinstance(error, BaseException):
            error = error.args[0]
        raise UserError(f"unknown config field {error}") from None
    if extra:
        raise UserError(f"unexpected argument {extra[0]!r}; flags start with -- (see --help)")


def _with_home(word):
    """The word with ~ expanded at the start of every path; a shell does not expand it within --flag=~/path."""
    return re.sub(r"(^|(?<=[=,]))~(?=/|$)", lambda _: os.path.expanduser("~"), word)


def _one_word_each(words, several):
    """The command line as absl needs it: the value of each flag in `several` as one word, and of repeated config
    fields only the last, because ml_collections would concatenate tuples."""
    groups = []  # [flag, word, ...]
    for word in words:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    last = {group[0].split("=")[0]: group for group in groups}
    result = []
    for group in groups:
        name = group[0].split("=")[0]
        if group[0].removeprefix("--") in several:
            group[1:] = [" ".join(group[1:])]
        if "." not in name or last[name] is group:
            result += group
    return result


def _fail(message, code=2):
    line = f"error: {' '.join(message.split())}"
    if distributed.world_size() > 1:
        line += f" (process {distributed.rank()} of {distributed.world_size()})"
    if distributed.first_to_fail(line):
        print(line, file=sys.stderr)
    _end(code)


def _end(code):
    distributed.leave(code)
    sys.exit(code)
