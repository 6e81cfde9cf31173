"""Running the project's scripts in several processes, as torchrun does."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.scripts import Result

ROOT = Path(__file__).resolve().parents[1]


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
