"""The figures in README.md and docs/ are those of the committed result files."""

import subprocess
import sys
from pathlib import Path

import machine

ROOT = Path(__file__).parent.parent


def test_tables_are_those_of_the_result_files() -> None:
    done = subprocess.run([sys.executable, ROOT / "bench" / "tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_commands_name_no_place_of_one_machine() -> None:
    here = machine.RESULTS.parent.parent
    assert machine.anywhere(str(here / "bench" / "results")) == "bench/results"
    assert machine.anywhere("--out=/elsewhere/found.json") == "--out=found.json"
    assert machine.anywhere("--steps") == "--steps"
    for path in machine.RESULTS.rglob("*.json"):
        command = machine.read(path)["command"]
        assert command.split() == [machine.anywhere(each) for each in command.split()], path
