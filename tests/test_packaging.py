"""The built wheel: what is in it, that it works where it alone is installed, and that `kernels` is nobody's but the
Hub's: transformers and bitsandbytes both import a package of that name."""

import ast
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "lora_lite", "kernels")
SITE_PACKAGES = Path(torch.__file__).parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command away from this process's own paths; its output."""
    env = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", **environment}
    result = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, so that this is complete too, from copies, since setuptools writes beside its sources."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in SOURCES:
        origin = ROOT / name
        if origin.is_dir():
            shutil.copytree(origin, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, source)
    for name in ("tests", "bench", "docs"):  # bystanders that no build may pick up
        (source / name).mkdir()
        (source / name / "__init__.py").touch()
    # Without isolation no build back end is fetched: torch brings setuptools along.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", built, cwd=source)
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel, and sees the dependencies through a path file: the path
    file of this project's own editable install is not read from there."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        wheel,
        cwd=folder,
    )
    (installed,) = folder.glob("lib/python*/site-packages")
    (installed / "dependencies.pth").write_text(f"{SITE_PACKAGES}\n")
    return python


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def sources(folder: str, target: str) -> set[str]:
    return {f"{target}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}


def top_level(names: Iterable[str]) -> set[str]:
    return {name.partition("/")[0] for name in names}


def test_contents(wheel: Path) -> None:
    names = contents(wheel)
    assert sources("lora_lite", "lora_lite") | sources("kernels", "lora_lite/kernels") | {"lora_lite/py.typed"} <= names
    assert {"lora_lite/__init__.py", "lora_lite/variants/hra.py", "lora_lite/kernels/__init__.py"} <= names
    assert top_level(names) == {"lora_lite", f"lora_lite-{version('lora-lite')}.dist-info"}
    assert not [name for name in names if name.endswith(".pyc")]


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        metadata = archive.read(name).decode()
        assert [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    needed = set(re.findall(r"^Requires-Dist: ([\w.-]+)(?!.*extra ==)", metadata, flags=re.MULTILINE))
    assert needed == {"torch", "safetensors", "jaxtyping", "numpy", "rich"}


def test_wheel_where_it_alone_is_installed(python: Path, tmp_path: Path) -> None:
    program = """
import importlib.util, pathlib, sys
import lora_lite as ll, lora_lite.kernels, torch

home = pathlib.Path(sys.prefix)
for module in (ll, lora_lite.kernels):
    assert home in pathlib.Path(module.__file__).parents, module.__file__
assert importlib.util.find_spec("kernels") is None
try:
    import kernels
except ModuleNotFoundError as error:
    assert error.name == "kernels"
else:
    raise AssertionError(kernels)
assert {"transformers", "peft", "bitsandbytes"}.isdisjoint(sys.modules), "the library alone needs none of these"
model = torch.nn.Sequential(torch.nn.Linear(16, 16))
ll.attach(model, ll.LoRAConfig(r=4))
model(torch.randn(2, 16)).sum().backward()
ll.save(model, "a")
ll.detach(model)
ll.load(model, "a")
print(ll.__version__)
"""
    output = run(python, "-I", "-c", program, cwd=tmp_path)
    assert output.strip() == version("lora-lite")


@pytest.mark.parametrize("room", ["kernels", "report", "training"])
def test_a_room_of_the_benchmarks_needs_no_other(room: str) -> None:
    """A script finds its own room and what all share; where tests run, the others are on the path too."""
    bench = ROOT / "bench"
    modules = {path.stem: path.parent.name for path in bench.glob("*/*.py")}
    for path in (bench / room).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            elsewhere = [name for name in names if modules.get(name, room) not in (room, "shared")]
            assert not elsewhere, f"{path} imports {elsewhere}"


def test_python_in_the_repository_root_loads_transformers() -> None:
    """`python -c` and `python -m` put the root first on sys.path, and with it a folder named kernels."""
    program = """
import sys
assert sys.path[0] == ""
import transformers, bitsandbytes
from transformers import LlamaConfig, LlamaForCausalLM  # these look for the Hub's package
from transformers.utils import is_kernels_available
assert not is_kernels_available()
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
LlamaForCausalLM(LlamaConfig(**sizes))
import lora_lite.kernels
try:
    from kernels import get_kernel
except ImportError:
    print("fine")
"""
    assert run(sys.executable, "-c", program, cwd=ROOT).endswith("fine\n")


def test_the_hubs_package_wins_in_the_repository_root(tmp_path: Path) -> None:
    """Where it is installed, this folder must not stand in its way."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from .inner import get_kernel\n")
    (tmp_path / "kernels" / "inner.py").write_text("def get_kernel(): return 'from the Hub'\n")
    program = "from kernels import get_kernel; print(get_kernel()); import kernels.inner"
    assert run(sys.executable, "-c", program, cwd=ROOT, PYTHONPATH=str(tmp_path)) == "from the Hub\n"
