"""Two processes on gloo, by torchrun: the losses and gradients of one process, and one complete file."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_close, attach, llama, randomize, token_ids

import lora_lite as ll

SCRIPT = Path(__file__).parent / "support" / "two_processes.py"


def in_two_processes(kind: str, variant: str, folder: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [*torchrun, str(SCRIPT), kind, variant, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def test_what_is_refused(tmp_path: Path) -> None:
    in_two_processes("refused", "lora", tmp_path)


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        ("ddp", "lora"),
        ("attached, then sharded", "dora"),
        ("attached, then sharded", "hra"),
        ("loaded, then sharded", "delora"),
        ("sharded, then loaded", "lora"),
        ("sharded, then loaded", "dora"),
        ("sharded, then loaded", "antipasto"),
        ("sharded over a 2-D mesh, then loaded", "lora"),
        ("sharded and used, then attached", "pissa"),
    ],
)
def test_same_as_one_process(kind: str, variant: str, tmp_path: Path) -> None:
    model: Any = llama()
    attach(model, variant)
    randomize(model, by=0.2)
    ll.save(model, tmp_path / "start.safetensors")
    in_two_processes(kind, variant, tmp_path)
    seen = torch.load(tmp_path / "seen.pt", weights_only=True)
    ids, optimizer = token_ids(4, 12), torch.optim.SGD(ll.parameters(model), lr=0.1)
    for step in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert_close(seen["losses"][step], loss, 1e-5, f"loss {step}")
        if step == 0:
            for i, (got, p) in enumerate(zip(seen["grads"], ll.parameters(model), strict=True)):
                assert_close(got, p.grad, 1e-4, f"gradient {i}")
        optimizer.step()
    other: Any = llama()
    ll.load(other, tmp_path / "adapter.safetensors")
    with torch.no_grad():
        assert_close(other(ids).logits, model(ids).logits, 1e-5)
