"""Run the project's scripts as a user does: in the test process, which saves the import of torch, or by torchrun."""

import contextlib
import io
import os
import re
import runpy
import subprocess
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
    """Result of `python <script> <arguments>` from the project's root. Raises what the script does not handle.

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
        for name in list(sys.modules):  # a config would be loaded into the existing module; a script has lost its flags
            if name.endswith("_config") and "." not in name or name == "train_inf_ae_diffusion":
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

    All files below `folder` must be unchanged. New files may have the names in may_write: those of a run that had begun
    when the mistake was found, and whose progress bar and warnings may precede the line.
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


def torchrun(script, *arguments, processes=2):
    """Result of `torchrun --nproc_per_node=<processes> <script> <arguments>` from the project's root."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               script, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True, timeout=120)
    return Result(done.returncode, done.stdout, done.stderr)


def own_lines(result):
    """(what the processes wrote to stderr, line by line; what torchrun said about a failure)."""
    own, report = re.split(r"^[WE]\d{4} .*torch/distributed", result.err, maxsplit=1, flags=re.MULTILINE)
    return own.splitlines(), report
