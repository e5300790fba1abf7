"""Which test files a change concerns: those that changed, and those that import, or are named after, a module that did.

Run as a program: the files of the working tree beside a commit (HEAD, if none is named), one a line; with --kernels
those in tests/kernels, otherwise the others. What `just test-quick` runs.
"""

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def changed(since: str) -> set[Path]:
    """Files that differ from a commit, and new ones; where nothing differs, those of the last commit."""
    calls = (["diff", "--name-only", since], ["ls-files", "--others", "--exclude-standard"])
    names = [name for call in calls for name in _git(*call)] or _git("diff", "--name-only", "HEAD~1")
    return {ROOT / name for name in names}


def _git(*arguments: str) -> list[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


def concerned(files: Iterable[Path]) -> list[Path]:
    """The test files that these concern."""
    tests = sorted(ROOT.glob("tests/**/test_*.py"))
    files = {path for path in files if path.suffix == ".py"}
    modules = {path.stem for path in files if path.stem != "__init__"}
    return [test for test in tests if test in files or _imported(test) & modules or test.stem[5:] in modules]


def _imported(test: Path) -> set[str]:
    """Last parts of the modules that it imports, and the names that it takes from modules."""
    found = set()
    for node in ast.walk(ast.parse(test.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.rpartition(".")[2] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").rpartition(".")[2], *(alias.name for alias in node.names)}
    return found


if __name__ == "__main__":
    kernels = "--kernels" in sys.argv
    since = next((each for each in sys.argv[1:] if each != "--kernels"), "HEAD")
    for test in concerned(changed(since)):
        if (test.parent.name == "kernels") == kernels:
            print(test.relative_to(ROOT))
