"""Running the project's scripts as a user does, but within the test process: importing torch anew takes seconds."""

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

from absl import flags

ROOT = Path(__file__).resolve().parents[1]


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run_script(script, *arguments, out=None):
    """Result of `python <script> <arguments>` from the project's root; an exception it does not handle is raised.

    out   a text stream for stdout, by default an io.StringIO
    """
    known, path, argv = set(flags.FLAGS), list(sys.path), sys.argv
    out, err = out or io.StringIO(), io.StringIO()
    sys.argv = [script, *map(str, arguments)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv, sys.path[:] = argv, path
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        # config files, which ml_collections would load into the existing module, and a script whose flags are gone
        for name in [name for name in sys.modules if name.endswith("_config") or name == "train_inf_ae_diffusion"]:
            del sys.modules[name]
    return Result(code, out.getvalue(), err.getvalue())


def only_line(result):
    """The one line that a user's mistake prints; AssertionError if the script did anything else."""
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert result.code == 2, (result.code, result.err)
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    return lines[0]


def refused(folder, *command, may_write=()):
    """The one line with which a script refuses a user's mistake; AssertionError if it did anything else.

    All files below `folder` have to be as they were, but for new ones called as in may_write, which are those of a run
    that had begun when the mistake was found; its bar of progress and a warning may then stand before the line.
    """
    before = contents(folder)
    result = run_script(*command)
    after = contents(folder)
    assert {path: after.get(path) for path in before} == before
    assert {path.name for path in after.keys() - before.keys()} <= set(may_write)
    if may_write:
        result = result._replace(err="\n".join(re.findall("^error: .*|.*Traceback.*", result.err, re.M)))
    return only_line(result)


def contents(folder):
    """{path: bytes} of all files below a folder, with None for folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}
