"""Processes whose kernels can be compiled, as the interpreter's, in which these tests run, cannot."""

import json
import os
import subprocess
import sys
from typing import Any

from environment import BENCH


def compiling(*arguments: Any) -> "subprocess.CompletedProcess[str]":
    """Python with these arguments, among the scripts of bench/kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=BENCH / "kernels", env=environment, capture_output=True, text=True)


def compiled_value(code: str) -> Any:
    """What `code` prints last, as JSON."""
    done = compiling("-c", code)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
