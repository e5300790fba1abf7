"""Run by torchrun, two processes on gloo: trains two steps on halves of a batch and writes what one process can check.

Argument: a folder with cases.json, a list of [how the model is spread and adapted, variant, model, folder]. Rank 0
writes losses and gradients; the adapter is saved by `ll.save`. All cases in one run: starting takes longest.
"""

import json
import sys
from pathlib import Path
from typing import Any, cast

import environment  # noqa: F401  (before models, which imports transformers)
import pytest
import torch
import torch.distributed as dist
from models import assert_close, attach, llama, qwen3_moe, randomize, token_ids
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lora_lite as ll

MODELS = {"llama": (llama, {}), "qwen3_moe": (qwen3_moe, {"target_names": ("q_proj$", r"\.experts\.")})}


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def main(kind: str, variant: str, name: str, folder: Path) -> None:
    rank = dist.get_rank()
    torch.manual_seed(0)  # as the tests do
    make, fields = MODELS[name]
    model: Any = make()
    if alone := {"refused": refusals, "wrapped": wrapped_blocks}.get(kind):
        alone(model)
        return
    wrapped = model
    match kind:
        case "ddp":
            attached(model, variant, **fields)
            wrapped = DistributedDataParallel(model)
        case "attached, then sharded":
            attached(model, variant, **fields)
            shard(model)
        case "loaded, then sharded":
            ll.load(model, folder / "start.safetensors")
            shard(model)
        case "sharded, then loaded":
            shard(model)
            ll.load(model, folder / "start.safetensors")
        case "sharded over a 2-D mesh, then loaded":
            shard(model, init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards")))
            ll.load(model, folder / "start.safetensors")
        case "sharded and used, then attached":
            shard(model)
            model(input_ids=token_ids(), labels=token_ids()).loss.backward()
            model.zero_grad()
            torch.manual_seed(rank)  # what is drawn on the first process counts
            attached(model, variant, **fields)
    before = {name: whole(p.detach()).clone() for name, p in model.named_parameters() if not p.requires_grad}
    late = kind.startswith("sharded")
    assert all(isinstance(p, DTensor) != late for p in ll.parameters(model)) or kind == "ddp"
    assert any(isinstance(p, DTensor) for p in model.parameters()) or kind == "ddp"
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
    assert_unchanged_changes_nothing(wrapped, ids)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    for name, p in model.named_parameters():
        assert p.requires_grad or torch.equal(whole(p), before[name]), name
    torch.nn.utils.clip_grad_norm_(ll.parameters(model), 1.0)
    ll.save(model, folder / "adapter.safetensors")
    assert (folder / "adapter.safetensors").exists()  # on every process, once save returns
    merged = ll.merged_state_dict(model)
    if kind != "ddp" and name == "llama":
        with pytest.raises(ll.AttachError, match=r"verify: .* is sharded over processes; verify before fully_shard"):
            ll.verify(model, {"input_ids": ids})
    if rank == 0:
        torch.save({"losses": torch.stack(losses), "grads": grads, "merged": merged}, folder / "seen.pt")


def assert_unchanged_changes_nothing(model: Any, ids: torch.Tensor) -> None:
    """Whether what it keeps is there, gathered or sharded."""

    def outcome() -> list[torch.Tensor]:
        model.zero_grad()
        with torch.no_grad():
            outputs = [model(input_ids=ids).logits for _ in range(2)]
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
        return [*outputs, *(whole(p.grad) for p in ll.parameters(model) if p.grad is not None)]

    want = outcome()
    with ll.unchanged(model):
        assert all(torch.equal(a, b) for a, b in zip(outcome(), want, strict=True))


def attached(model: Any, variant: str, **fields: Any) -> None:
    attach(model, variant, **fields)
    randomize(model, by=0.2)


def shard(model: Any, mesh: Any = None) -> None:
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def refusals(model: Any) -> None:
    """Tensor parallel, or sharded linear by linear, and adapted then: refused by name, with the model as it was."""
    tensor_parallel: Any = llama()
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(tensor_parallel, mesh, {"model.layers.*.mlp.up_proj": ColwiseParallel()})
    for block in model.model.layers:
        fully_shard(block.self_attn.q_proj)
    for sharded, layer in ((model, "q_proj"), (tensor_parallel, "up_proj")):
        modules = list(dict(sharded.named_modules()))
        with pytest.raises(ll.AttachError, match=f"{layer}.*sharded over processes.*attach before"):
            ll.attach(sharded, ll.LoRAConfig(r=4, target_roles=(), target_names=(f"layers.1.*{layer}",)))
        assert list(dict(sharded.named_modules())) == modules


def wrapped_blocks(model: Any) -> None:
    """Blocks that are sharded and then wrapped by checkpointing, in a model that is not: adapted as without a wrapper.
    Refused, as without one, where their linears are sharded one by one; and whole tensors for sharded ones."""

    def sharded(by_linear: bool) -> Any:
        made: Any = llama()
        for i, block in enumerate(made.model.layers):
            if by_linear:
                fully_shard(block.self_attn.q_proj)
            made.model.layers[i] = checkpoint_wrapper(fully_shard(block))
        return made

    both, ids = (model, sharded(by_linear=False)), token_ids()
    for each in both:
        torch.manual_seed(0)
        attached(each, "lora")
        each(input_ids=ids, labels=ids).loss.backward()
    for p, alone in zip(ll.parameters(both[1]), ll.parameters(model), strict=True):
        assert p.grad is not None
        assert_close(p.grad, alone.grad, 1e-4)
    late: Any = llama()
    attached(late, "lora")
    fully_shard(late)
    with pytest.raises(ll.CheckpointError, match=r"lora_A; .* is sharded here or there, and not in both"):
        ll.load_state_dict(late, {name: cast(Any, t).full_tensor() for name, t in ll.state_dict(late).items()})
    other = fully_shard(sharded(by_linear=True))
    with pytest.raises(ll.AttachError, match=r"q_proj.*sharded over processes.*attach before"):
        attach(other, "lora", target_names=("q_proj",))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for kind, variant, name, folder in json.loads((Path(sys.argv[1]) / "cases.json").read_text()):
        print("case:", kind, variant, file=sys.stderr)
        main(kind, variant, name, Path(folder))
    dist.destroy_process_group()
