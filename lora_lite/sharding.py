"""Models whose weights several processes share: FSDP2's (`fully_shard`), and what is refused.

An adapter that is attached before `fully_shard` is sharded with its layer. One that is attached or loaded after it is
whole in every process, started alike and its gradients averaged, as DistributedDataParallel would.
"""

from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(t: Tensor) -> bool:
    """Whether this process holds only a part of t: FSDP2's and tensor parallelism's DTensor."""
    return hasattr(t, "full_tensor")


def whole(t: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process that has a part must call it."""
    return t.full_tensor() if is_sharded(t) else t  # type: ignore[operator]


def mesh_of(model: nn.Module, name: str, weight: Any) -> Any:
    """The mesh over which FSDP2 shares out the weight of the layer of that name.

    None where it is whole, where tensor parallelism shares it, or where FSDP2 takes the layer by itself: it would be
    gathered and freed inside of the adapter's hooks.
    """
    if not is_sharded(weight):
        return None
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Shard

    shards = [placement for placement in weight.placements if isinstance(placement, Shard)]
    holders = [path for path, module in model.named_modules() if isinstance(module, FSDPModule)]
    inside = any(path == "" or name.startswith(f"{path}.") for path in holders)
    return weight.device_mesh if inside and name not in holders and len(shards) <= 1 else None


def replicate(module: nn.Module, mesh: Any) -> None:
    """Give every process of the mesh the first one's tensors, and average gradients over them from now on."""
    groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
    with torch.no_grad():
        for t in (*module.parameters(), *module.buffers()):
            for group in groups:
                torch.distributed.broadcast(t.data, group=group, group_src=0)

    def average(grad: Tensor) -> Tensor:
        grad = grad.clone()
        for group in groups:
            torch.distributed.all_reduce(grad, group=group)
            grad /= group.size()
        return grad

    for p in module.parameters():
        if p.requires_grad:
            p.register_hook(average)
