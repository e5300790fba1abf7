"""Can an adapter act around this layer? Asked at attach, so that none is put where it would do nothing or harm."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from .embeddings import unfit_embedding
from .errors import AttachError
from .operators import is_plain
from .placement import is_managed, is_sharded
from .quantized import token_dtype, weight_of
from .shapes import is_embedding, shape
from .stacks import Stack, unfit_stack
from .targets import Target, parent_of

# Of a layer's input, before its last dimension: one row, and for a layer that takes groups of rows as many as most
# numbers of groups divide.
_SOME_ROWS = ((1,), (1, 48))


def unfit(model: nn.Module, target: Target, to_train: bool = False) -> str:
    """Why an adapter could not act around the layer; empty: nothing is known against it.

    Raises:
        AttachError: the layer could only be adapted before the model was offloaded; or the adapter is to be trained,
            and the layer passes no gradient to its input.
    """
    parent = parent_of(model, target.name)
    if isinstance(parent, nn.MultiheadAttention) and type(parent).forward is nn.MultiheadAttention.forward:
        return "nn.MultiheadAttention reads its weight without calling it"
    layer: Any = target.layer
    if 0 in shape(layer):
        return "it has no inputs or no outputs"
    if isinstance(layer, Stack):
        return unfit_stack(layer)
    weight: Any = weight_of(layer)
    if weight.is_complex():
        return f"its weight is complex ({weight.dtype}), and the methods are of real numbers"
    if weight.is_meta and not is_managed(layer) and (above := _offloaded_above(model, target.name)):
        raise AttachError(
            f"accelerate offloads its weight with the whole of {above}, whose list of tensors would lack the "
            "adapter's; attach before the model is offloaded"
        )
    if is_embedding(layer):
        return unfit_embedding(layer)
    x, y = run_one_row(layer)
    if y is not None and not isinstance(y, Tensor):
        return f"its forward returns a {type(y).__name__}, and an adapter acts on a tensor"
    if isinstance(y, Tensor) and y.shape[-1:] != shape(layer)[1:]:
        rows = "one row" if x is None or x.ndim == 2 else f"rows {tuple(x.shape)}"
        return f"its forward returns {tuple(y.shape)} for {rows}, not out_features={shape(layer)[1]}"
    packed = getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)
    if to_train and (packed or not _reached(x, y)):
        raise AttachError(
            f"its {type(layer).__name__} passes no gradient to its input, so that adapters before it could not train; "
            "use a kind of quantisation that does, such as bitsandbytes' in training mode (to run a trained adapter, "
            "load its file)"
        )
    return ""


def passes_gradient(layer: Any) -> bool:
    """Whether nothing is known against it: a layer that can't be tried does."""
    return _reached(*run_one_row(layer))


def _reached(x: Tensor | None, y: Any) -> bool:
    """Whether y's gradient comes to x; True where either is none."""
    if x is None or not isinstance(y, Tensor):
        return True
    try:
        (grad,) = torch.autograd.grad(y.float().sum(), x)
    except (RuntimeError, NotImplementedError):
        return False
    return grad is not None


def run_one_row(layer: Any) -> tuple[Tensor | None, Any]:
    """A row of numbers, or some, and what the layer makes of them: not asked of nn.Linear, whose forward is known, nor
    of layers of bitsandbytes, which pack their weights anew at their first forward, nor where the weight is not whole.
    None: the layer can't run it."""
    weight: Any = weight_of(layer)
    plain = type(layer).forward is nn.Linear.forward and is_plain(weight)
    if plain or type(weight).__name__ in ("Params4bit", "Int8Params") or is_sharded(weight) or weight.is_meta:
        return None, None
    cuda = [weight.device] if weight.is_cuda else []
    notes = {name: t.clone() for name, t in (*layer.named_buffers(), *layer.named_parameters()) if t is not weight}
    try:
        return _tried(layer, weight, cuda)
    finally:
        with torch.no_grad():
            for name, t in (*layer.named_buffers(), *layer.named_parameters()):
                if name in notes and not torch.equal(t, notes[name]):  # an observer's range, a power iteration's vector
                    t.copy_(notes[name])


def _tried(layer: Any, weight: Tensor, cuda: list[torch.device]) -> tuple[Tensor | None, Any]:
    for rows, dtype in itertools.product(_SOME_ROWS, dict.fromkeys((token_dtype(layer), torch.float32))):
        with torch.enable_grad(), torch.random.fork_rng(devices=cuda):
            row = torch.linspace(-1, 1, shape(layer)[0], dtype=dtype, device=weight.device)
            x = row.repeat(*rows, 1).requires_grad_()
            try:
                return x, layer.forward(x * 1)
            except Exception:  # whatever it is: the layer's own forward will raise it again
                continue
    return None, None


def _offloaded_above(model: nn.Module, name: str) -> str:
    """The module around the layer that accelerate offloads as a whole; empty: there is none."""
    parts = name.split(".")
    for i in range(len(parts) - 1, -1, -1):
        path = ".".join(parts[:i])
        hook = vars(model.get_submodule(path)).get("_hf_hook")
        if any(getattr(each, "place_submodules", False) for each in getattr(hook, "hooks", (hook,))):
            return path or type(model).__name__
    return ""
