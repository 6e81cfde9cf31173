"""How every script starts and ends: flags are parsed, main() runs, what went wrong is told in one line.

Exit codes: 0 done · 1 a fault (a loss that is not finite, a full disk) · 2 a mistake of the user · 75 training was
stopped by SIGTERM or SIGUSR1 and has saved its state: start it again · 130 interrupted (training has saved its state).
Of several processes the first that fails prints its line and torchrun stops the others; its own exit code is always 1.
"""

import logging
import re
import shlex
import sys
import traceback

import torch
from absl import app, flags

from utils import distributed
from utils.device import keep_freed_memory
from utils.errors import UserError
from utils.shutdown import INTERRUPTED, Stopped


def run(main, shared=False, several=()):
    """Parse the command line and call main().

    several  names of flags whose value may be several words, as in --window 0 0 0.5 1
    shared   whether the script divides its work among the processes that torchrun starts, or has to be the only one
    """
    _list_all_flags()
    try:
        distributed.start()
        if not shared and distributed.world_size() > 1:
            raise UserError(f"{sys.argv[0]} works in one process; start it with python, not with torchrun")
        extra = _parse(_joined(sys.argv, several))
        if extra:
            raise UserError(f"unexpected argument {extra[0]!r}; flags start with -- (see --help)")
        level = logging.INFO if distributed.is_main() else logging.ERROR  # what all have to say, one says
        logging.basicConfig(format="%(message)s", level=level, stream=sys.stderr)
        keep_freed_memory()
        main()
        distributed.leave()
    except (flags.Error, UserError) as error:
        _fail(_say_what_is_allowed(str(error)))
    except (AttributeError, KeyError) as error:  # ml_collections' word for --config.<field> that there is not
        if "ml_collections" not in _raised_in(error):
            raise
        if "get_config" in str(error):
            _fail("a config file could not be loaded: it has no function get_config()")
        _fail(_unknown_field(error))
    except OSError as error:  # a full disk; or how ml_collections reports a --config file that does not load
        if "ml_collections" in _raised_in(error):
            tried = re.search(r"Attempted \[.*?\]:\s+(\S.*)", str(error))
            _fail(f"{_flag_with(tried[1])} could not be loaded: there is no such file" if tried else
                  f"a config file could not be loaded: {error}")
        _fail(str(error), code=1)
    except torch.OutOfMemoryError as error:
        _fail(f"out of GPU memory ({str(error).split('.')[0]}); lower train.batch_size, or --max_points and "
              "train.sample_size when sampling", code=1)
    except FloatingPointError as error:
        _fail(str(error), code=1)
    except Stopped as stopped:
        if distributed.is_main() and distributed.first_to_fail(str(stopped)):
            print(stopped, file=sys.stderr)
        _end(stopped.code)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on from the last checkpoint or image", code=INTERRUPTED)
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):  # torch's word for no memory on the host
            _fail("out of memory; lower train.batch_size, or --sample_img_size, --max_points and train.sample_size "
                  "when sampling", code=1)
        reason = distributed.lost_connection(error)
        if reason is None:
            raise
        _fail(reason, code=1)


def point_to_report():
    """The last line of a training script: the command that makes a page about its run, with its own flags but for those
    that only say how to train."""
    if distributed.is_main():
        kept = [word for word in sys.argv[1:] if not re.match(r"--\w+\.(train|optimizer)\.\w+=", word)]
        print(f"for a page about this run: {shlex.join(['python', 'experiments/report.py', *kept])}")


def _list_all_flags():
    """Have --help name every flag of the project, and not only those that the script's own file defines."""
    app.define_help_flags()
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        for flag in defined if not module.startswith("absl.") else ():
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _parse(arguments):
    """Those arguments that are no flags. UserError for what a config file raises: it is Python, written by the user."""
    try:
        return flags.FLAGS(arguments)[1:]
    except SystemExit as ending:  # absl ends --help with 1; a config file has no business to end anything
        if "absl" in _raised_in(ending):
            sys.exit(0)
        raise _config_file_error(ending) from ending
    except (AttributeError, KeyError, OSError) as error:  # see run()
        if "ml_collections" in _raised_in(error):
            raise
        raise _config_file_error(error) from error
    except flags.Error as error:
        if "Traceback" not in str(error):
            raise
        raise _config_file_error(error) from error  # a TypeError or ValueError, of which ml_collections made a text
    except Exception as error:
        raise _config_file_error(error) from error


def _say_what_is_allowed(message):
    """A message of absl in which the words of Python's int(), float() or of its own boolean flags are made plain."""
    for words, kind in (("Non-boolean", "True or False"), ("invalid literal for int", "a whole number"),
                        ("could not convert string to float", "a number")):
        if message.startswith("flag --") and words in message:
            return f"{message.removeprefix('flag ').split(': ')[0]} must be {kind}"
    return message


def _unknown_field(error):
    """What to say where ml_collections does not find the field of --config.<section>.<field>=<value>."""
    reason = error
    while isinstance(reason, BaseException):
        reason = reason.args[0]
    name, _, hint = (part.strip(" '\"?\n") for part in f"{reason}\n".partition("\n"))
    name = name.split("Attempting to lookup: ")[-1].split(".")[-1]  # what it says of a field of a number
    flags_given = {word.split("=")[0]: word for word in sys.argv[1:] if word.startswith("--")}
    given = [word for flag, word in flags_given.items() if name in flag.split(".")[1:]]
    hint = re.search(r'mean "(\w+)"', hint)
    return (f"unknown config field {given[0] if len(given) == 1 else name}"
            + (f"; did you mean {hint.group(1)}?" if hint else ""))


def _flag_with(path):
    """The flag that names this config file, as --config=<path>."""
    words = sys.argv[1:]
    for word, following in zip(words, [*words[1:], ""], strict=True):
        flag, _, value = word.partition("=")
        if flag.startswith("-") and path in (value, following):
            return f"{flag}={path}"
    return path


def _config_file_error(error):
    lines = [line.strip() for line in "".join(traceback.format_exception(error)).splitlines() if line.strip()]
    places = [line for line in lines if line.startswith("File ") and not any(
        package in line for package in ("ml_collections", "absl", "importlib", __file__))]
    return UserError(f"a config file could not be loaded: {lines[-1]}" + (f", {places[-1]}" if places else ""))


def _joined(argv, several):
    """The words after each of these flags, up to the next flag, as one: absl takes one word."""
    argv = list(argv)
    for name in several:
        if f"--{name}" in argv:
            first = end = argv.index(f"--{name}") + 1
            while end < len(argv) and not argv[end].startswith("--"):
                end += 1
            argv[first:end] = [" ".join(argv[first:end])]
    return argv


def _raised_in(error):
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename


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
