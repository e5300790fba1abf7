"""Where a tensor really is, when a module does not simply hold it: sharded by FSDP2 or ZeRO-3, or offloaded.

- FSDP2 (`fully_shard`): a DTensor. An adapter that is attached before `fully_shard` is sharded with its layer. One that
  is attached or loaded after it is whole in every process, started alike and its gradients averaged, as
  DistributedDataParallel would.
- ZeRO-3 (DeepSpeed): a parameter with a `ds_id`, empty until it is gathered.
- accelerate's offloading: on the meta device, with the values in the map of the module's `_hf_hook`, which puts them on
  its execution device while the module's forward runs. The hooks of adapters run before and after that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import AttachError
from .renaming import named_modules

# ---- sharded ---------------------------------------------------------------------------------------------------------


def is_sharded(t: Tensor) -> bool:
    """Whether this process holds only a part of t: FSDP2's and tensor parallelism's DTensor, ZeRO-3's parameters."""
    return hasattr(t, "full_tensor") or hasattr(t, "ds_id")


def whole(t: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process that has a part must call it.

    Raises:
        AttachError: it is ZeRO-3's, is not gathered, and DeepSpeed is not there to do it.
    """
    if hasattr(t, "full_tensor"):
        return t.full_tensor()  # type: ignore[operator]
    if hasattr(t, "ds_id") and t.numel() == 0:
        try:
            import deepspeed  # type: ignore[import-not-found]
        except ImportError:
            raise AttachError(
                "it is an empty shard of ZeRO-3 (it has a ds_id), and DeepSpeed can't be imported to gather it"
            ) from None
        with deepspeed.zero.GatheredParameters([t]):  # an attribute, and no module to import from
            return t.detach().clone()
    return t


def mesh_of(model: nn.Module, name: str, weight: Any) -> Any:
    """The mesh over which FSDP2 shares out the weight of the layer of that name.

    None where it is whole, where tensor parallelism shares it, or where FSDP2 takes the layer by itself: it would be
    gathered and freed inside of the adapter's hooks.
    """
    if not hasattr(weight, "full_tensor"):
        return None
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Shard

    shards = [placement for placement in weight.placements if isinstance(placement, Shard)]
    holders = [path for path, module in named_modules(model) if isinstance(module, FSDPModule)]
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


# ---- offloaded -------------------------------------------------------------------------------------------------------


def is_managed(module: nn.Module) -> bool:
    """Whether accelerate moves the module's tensors, or its inputs."""
    return "_hf_hook" in vars(module)


def _aligned(module: nn.Module) -> Any:
    """accelerate's AlignDevicesHook of a module, alone or in a sequence; None: it has none."""
    hook = vars(module).get("_hf_hook")
    return next((each for each in getattr(hook, "hooks", (hook,)) if hasattr(each, "execution_device")), None)


def execution_device(module: nn.Module) -> torch.device | None:
    """On which device accelerate runs the module; None: it leaves the module where it is."""
    device = getattr(_aligned(module), "execution_device", None)
    return None if device is None else torch.device(device)


def brought(module: nn.Module, key: str) -> Tensor | None:
    """A tensor of the module with its values: from accelerate's map where it is offloaded, onto the device on which the
    module runs."""
    t = getattr(module, key, None)
    if isinstance(t, Tensor) and t.is_meta:
        hook = _aligned(module)
        if hook is not None and hook.weights_map is not None:
            return hook.weights_map[key].to(execution_device(module))
    return t


@contextmanager
def running(module: nn.Module) -> Iterator[None]:
    """Within this context the module has its tensors as while its forward runs."""
    hook = vars(module).get("_hf_hook")
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)
