"""The figures in README.md and docs/ are those of the committed result files."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import plots
import pytest
import tables

ROOT = Path(__file__).parent.parent


def test_tables_are_those_of_the_result_files() -> None:
    command = [sys.executable, ROOT / "bench" / "report" / "tables.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("draw", plots.PICTURES, ids=lambda draw: draw.__name__)
def test_pictures_are_drawn_of_the_result_files(draw: Callable[[], Any]) -> None:
    figure = draw()
    assert (ROOT / "docs" / "img" / f"{draw.__name__}.svg").exists()
    assert any(axes.has_data() for axes in figure.axes)
    plots.plt.close(figure)


def test_commands_are_recipes() -> None:
    """What the documents say of a result's command is what `just` runs."""
    recipes = (ROOT / "justfile").read_text()
    for path in machine.RESULTS.rglob("*.json"):
        _, script, *_ = machine.read(path)["command"].split()
        _, recipe, *_ = tables.command_of(machine.read(path)).split()
        body = re.search(rf"^{recipe}\b.*:.*\n((?: +.*\n)+)", recipes, re.MULTILINE)
        assert body, recipe
        wrapped = re.findall(r"^ +(bench/kernels/gpu-day) ", body[1], re.MULTILINE)  # which names the script
        ran = body[1] + "".join((ROOT / each).read_text() for each in wrapped)
        assert re.search(rf"[/=]{re.escape(Path(script).name)}\b", ran), (path, ran)


def test_commands_name_no_place_of_one_machine() -> None:
    assert machine.anywhere(str(ROOT / "bench" / "results")) == "bench/results"
    assert machine.anywhere("--out=/elsewhere/found.json") == "--out=found.json"
    assert machine.anywhere("--steps") == "--steps"
    for path in machine.RESULTS.rglob("*.json"):
        command = machine.read(path)["command"]
        assert command.split() == [machine.anywhere(each) for each in command.split()], path
