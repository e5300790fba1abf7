"""Two processes on gloo, by torchrun: the losses and gradients of one process, and one complete file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from models import assert_close, attach, randomize, token_ids
from two_processes import MODELS

import lora_lite as ll

SCRIPT = Path(__file__).parent / "support" / "two_processes.py"
CASES = [
    ("ddp", "lora", "llama"),
    ("attached, then sharded", "dora", "llama"),
    ("attached, then sharded", "hra", "llama"),
    ("loaded, then sharded", "delora", "llama"),
    ("sharded, then loaded", "lora", "llama"),
    ("sharded, then loaded", "dora", "llama"),
    ("sharded, then loaded", "antipasto", "llama"),
    ("sharded over a 2-D mesh, then loaded", "lora", "llama"),
    ("sharded and used, then attached", "pissa", "llama"),
    ("ddp", "lora", "qwen3_moe"),
    ("attached, then sharded", "lora", "qwen3_moe"),
    ("sharded, then loaded", "dora", "qwen3_moe"),
]


def started(variant: str, name: str, folder: Path) -> Any:
    """The model of a case, and its adapter's start in a file."""
    torch.manual_seed(0)
    make, fields = MODELS[name]
    model: Any = make()
    attach(model, variant, **fields)
    randomize(model, by=0.2)
    folder.mkdir()
    ll.save(model, folder / "start.safetensors")
    return model


def test_same_as_one_process(tmp_path: Path) -> None:
    """Each way to spread and adapt a model; and first what is refused, with the model as it was, and wrapped blocks."""
    folders = {case: tmp_path / str(i) for i, case in enumerate(CASES)}
    models = {case: started(*case[1:], folder) for case, folder in folders.items()}
    alone = [(kind, "lora", "llama", str(tmp_path)) for kind in ("refused", "wrapped")]  # they compare by themselves
    cases = [*alone, *((*case, str(folder)) for case, folder in folders.items())]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run([*torchrun, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    for case, folder in folders.items():
        compare(models[case], MODELS[case[2]][0](), folder, " ".join(case))


def compare(model: Any, other: Any, folder: Path, case: str) -> None:
    seen = torch.load(folder / "seen.pt", weights_only=True)
    ids, optimizer = token_ids(4, 12), torch.optim.SGD(ll.parameters(model), lr=0.1)
    for step in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert_close(seen["losses"][step], loss, 1e-5, f"{case}: loss {step}")
        if step == 0:
            for i, (got, p) in enumerate(zip(seen["grads"], ll.parameters(model), strict=True)):
                assert_close(got, p.grad, 1e-4, f"{case}: gradient {i}")
        optimizer.step()
    ll.load(other, folder / "adapter.safetensors")
    with torch.no_grad():
        assert_close(other(ids).logits, model(ids).logits, 1e-5, case)
        ll.detach(other)
        other.load_state_dict(seen["merged"])
        assert_close(other(ids).logits, model(ids).logits, 1e-5, f"{case}: merged")
