"""Run by torchrun, two processes on gloo: trains one step on halves of a batch and writes what one process can check.

Arguments: ddp or fsdp, a dtype, and a folder. Rank 0 writes losses and gradients; the adapter is saved by `ll.save`.
"""

import sys
from pathlib import Path
from typing import Any

import environment  # noqa: F401  (before models, which imports transformers)
import pytest
import torch
import torch.distributed as dist
from models import attach, llama, randomize, token_ids
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lora_lite as ll


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def main(kind: str, variant: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)  # as the tests do
    model: Any = llama()
    if kind == "late":
        refusals(model)
        return
    attach(model, variant)
    randomize(model, by=0.2)
    wrapped = model
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
        assert all(isinstance(p, DTensor) for p in ll.parameters(model))
    ids = token_ids(4, 12)[2 * rank : 2 * rank + 2]
    optimizer = torch.optim.SGD(ll.parameters(model), lr=0.1)
    losses = []
    for step in range(2):
        loss = wrapped(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean / 2)
        if step == 0:
            grads = [whole(p.grad) for p in ll.parameters(model) if p.grad is not None]
        optimizer.step()
    ll.save(model, folder / "adapter.safetensors")
    assert (folder / "adapter.safetensors").exists()  # on every process, once save returns
    if rank == 0:
        torch.save({"losses": torch.stack(losses), "grads": grads}, folder / "seen.pt")
    dist.destroy_process_group()


def refusals(model: Any) -> None:
    """Sharded first and adapted then: refused by name, with the model as it was."""
    tensor_parallel: Any = llama()
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(tensor_parallel, mesh, {"model.layers.*.mlp.up_proj": ColwiseParallel()})
    for block in model.model.layers:
        fully_shard(block)
    for sharded, layer in ((model, "q_proj"), (tensor_parallel, "up_proj")):
        modules = list(dict(sharded.named_modules()))
        with pytest.raises(ll.AttachError, match=f"{layer}.*sharded over processes"):
            ll.attach(sharded, ll.LoRAConfig(r=4, target_roles=(), target_names=(f"layers.1.*{layer}",)))
        assert list(dict(sharded.named_modules())) == modules
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
