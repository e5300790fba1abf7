"""The code in the documents is the code that runs, and what they name exists."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite as ll

ROOT = Path(__file__).parents[1]
RUN = ("docs/developer_guide.md", "docs/mixtures.md", "README.md")
DOCUMENTS = (*RUN, "docs/tour.md", "docs/many_gpus.md", "docs/integrations.md", "docs/measurements.md")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def python_blocks(document: str) -> str:
    """The document's Python blocks as one program, each line at its own number, so that a traceback points at it."""
    lines, inside = [], False
    for line in (ROOT / document).read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            line = ""
        lines.append(line if inside else "")
    return "\n".join(lines)


@pytest.mark.parametrize("document", RUN)
def test_code_runs(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the examples save files
    program = python_blocks(document)
    if document == "docs/developer_guide.md":
        assert program.count("@ll.register") >= 2
    registered, namespace = dict(ll.REGISTRY), {"__name__": "__main__"}
    try:
        exec(compile(program, ROOT / document, "exec"), namespace)
    finally:
        ll.REGISTRY.clear()
        ll.REGISTRY.update(registered)


def test_the_tour_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Word for word; numbers to a tenth, since another processor rounds otherwise on each of hundreds of steps."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(python|text)\n(.*?)```", text, re.DOTALL)
    assert [kind for kind, _ in blocks].count("text") > 4
    registered, namespace, printed = dict(ll.REGISTRY), {"__name__": "__main__"}, ""
    try:
        for kind, block in blocks:
            if kind == "python":
                exec(compile(block, "docs/tour.md", "exec"), namespace)
                printed = capsys.readouterr().out
                continue
            assert NUMBER.sub("#", printed) == NUMBER.sub("#", block)
            got, want = (list(map(float, NUMBER.findall(each))) for each in (printed, block))
            assert got == pytest.approx(want, rel=0.1, abs=0.02)
    finally:
        ll.REGISTRY.clear()
        ll.REGISTRY.update(registered)
    assert (tmp_path / "diagnosis.png").stat().st_size > 1000
    assert (tmp_path / "for_peft" / "adapter_config.json").exists()


# The processes of each command, as torchrun would start them, but forked from one that has imported all, which takes
# longer than to train. They leave without the interpreter's end, at which PyTorch's threads now and then abort.
FORKED = """
import os, runpy, shlex, socket, sys, torch.distributed.fsdp, lora_lite
from transformers import LlamaForCausalLM

def start(rank, world, port, arguments):
    os.environ |= {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
    sys.stdout.flush()
    os._exit(0)

for command in sys.argv[1:]:
    arguments = shlex.split(command)
    arguments = arguments[arguments.index("train.py"):]
    world = 2 if command.startswith("torchrun --standalone --nproc-per-node 2 ") else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    print("command", flush=True)
    processes = [os.fork() or start(str(rank), str(world), port, arguments) for rank in range(world)]
    if any([os.waitpid(process, 0)[1] for process in processes]):
        sys.exit(f"failed: {command}")
"""


def test_one_and_many_processes_learn_alike(tmp_path: Path) -> None:
    """The commands of docs/many_gpus.md, in its order, on the script that it has."""
    text = (ROOT / "docs/many_gpus.md").read_text(encoding="utf-8")
    (script,), (commands,) = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("python", "sh"))
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    run = [sys.executable, "-c", FORKED, *commands.strip().splitlines()]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    _, *of_each = done.stdout.split("command\n")
    alone, ddp, fsdp, resumed = ([float(loss) for loss in re.findall(r"step \d: loss (\S+)", each)] for each in of_each)
    assert len(alone) == 8
    assert alone[-1] < alone[0] - 0.3
    assert ddp == pytest.approx(alone, abs=2e-4)
    assert fsdp == pytest.approx(alone, abs=2e-4)
    assert resumed[0] < ddp[-1] + 0.1 < ddp[0]
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {
        f"{n}.safetensors" for n in ("adapter", "ddp", "fsdp")
    }


def test_the_guides_example_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first block, saved as a file and imported, is a working method: also on a real architecture."""
    from models import llama, token_ids

    text = (ROOT / "docs/developer_guide.md").read_text(encoding="utf-8")
    (tmp_path / "vera.py").write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    registered = dict(ll.REGISTRY)
    try:
        import vera  # type: ignore[import-not-found]

        model: Any = llama()
        ids = token_ids()
        base = model(ids).logits
        attachment = ll.attach(model, vera.VeRAConfig(r=8, target_names=("q_proj", "v_proj")))
        assert attachment.trainable == 2 * (8 + 32) + 2 * (8 + 16)
        assert torch.equal(model(ids).logits, base)
        optimizer = torch.optim.AdamW(ll.parameters(model), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
        assert all(p.grad is not None and p.grad.any() for p in ll.parameters(model))
        trained = model(ids).logits
        ll.save(model, tmp_path / "a")
        ll.detach(model)
        ll.load(model, tmp_path / "a")
        assert torch.equal(model(ids).logits, trained)
        assert not torch.allclose(trained, base, atol=1e-3)
        with pytest.raises(ll.ConfigError, match=r"VeRAConfig\.d_initial must be other than 0"):
            vera.VeRAConfig(d_initial=0)
    finally:
        ll.REGISTRY.clear()
        ll.REGISTRY.update(registered)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    assert links
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing


def test_the_guide_names_every_primitive_and_operation() -> None:
    """Its tables are complete."""
    text = (ROOT / "docs/developer_guide.md").read_text(encoding="utf-8")
    for primitive in vars(ll.primitives).values():
        if "__dataclass_fields__" in vars(primitive if isinstance(primitive, type) else object) and (
            issubclass(primitive, ll.Primitive) and primitive is not ll.Primitive
        ):
            own = [each.name for each in dataclasses.fields(primitive) if not each.kw_only]  # the runtime sets those
            fields = ", ".join(own)
            assert f"`{primitive.__name__}({fields})`" in text
    operations = {
        name
        for name, value in vars(ll.reference).items()
        if callable(value) and value.__module__ == ll.reference.__name__
    }
    assert operations >= {"shrink", "expand_add"}
    for name in operations:
        assert name.startswith("_") or f"`{name}`" in text
    for file in (ROOT / "lora_lite").glob("[!_]*.py"):
        assert file.name in text or file.name == "errors.py"


def test_the_tests_that_silent_failures_names_exist() -> None:
    """Each in the file that is named before it, in its row or at its section's head."""
    text, missing, named = (ROOT / "docs/silent_failures.md").read_text(encoding="utf-8"), [], 0
    for section in text.split("\n## ")[1:]:
        heads = re.findall(r"^Tests without a file are in \[(test_\w+\.py)\]", section, re.MULTILINE)
        before = None
        for row in re.findall(r"^\| (?!kind of fault).*\|$", section, re.MULTILINE):
            cell, file = re.split(r"(?<!\\)\|", row)[-2], heads[0]
            for linked, same, test, some in re.findall(
                r"\[((?:kernels/)?test_\w+\.py)\]|(the same file)|`(test_\w+)(…?)`", cell
            ):
                if linked or same:
                    file = before = linked or before
                    continue
                named += 1
                if not re.search(rf"^def {test}{'' if some else '[(]'}", _source(file), re.MULTILINE):
                    missing.append(f"{test} in {file}")
    assert named > 100
    assert not missing


def _source(test: str) -> str:
    return (ROOT / "tests" / test).read_text(encoding="utf-8")
