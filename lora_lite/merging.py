"""merged_state_dict and save_merged: the adapted model as a plain one, in new tensors. The base in memory stays.

Every method is a linear map around its layer, x ↦ W'x + b', so W' and b' follow from what its primitive makes of the
identity's rows: no method has a merge of its own.
"""

import copy
import inspect
import os
import re
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.parametrize import is_parametrized

from . import reference
from .adapter import named_tensors, require_size
from .attachment import chosen, unwrap
from .beside import require_no_peft
from .checkpoint import not_finite
from .errors import AttachError, first_of, naming
from .files import apart, replace_folder, write_weights, writing_folder
from .fitness import run_one_row
from .idle import describe
from .linalg import departure
from .params import SITE, Params
from .placement import brought, is_managed, whole
from .primitives import Primitive, enter, leave
from .quantized import bias_of, dense_weight, is_dense, token_dtype, weight_of
from .renaming import dotted, named_modules, named_parameters
from .shapes import is_conv1d, is_conv1d_in_files, is_embedding
from .site import Site
from .stacks import STACKS, Stack, stacks_of
from .targets import is_linear

_ROWS = 1024  # of the identity at a time
_EXTRA = "_extra_state"  # PyTorch's key for what `get_extra_state` gives


def merged_state_dict(model: nn.Module, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state dict of a plain model that computes what this one does now, with the adapters that act, in evaluation.

    Weights of adapted layers are new tensors, made one layer at a time in float64 and rounded once; so are those of
    quantised layers, made dense. The rest are the base's own, in whose memory nothing changes, and what modules that
    have a `get_extra_state` give.

    Where a model also reads an adapted layer's weight by itself, as Perceiver's output does its embedding, it computes
    something else with the merged one: only a batch could tell.

    Warns by name about adapters that do nothing in the adapted model, about numbers beyond float16's range, and about
    weights that are tied there and not in the merged one: a model that ties them would take one for the other.

    Args:
        model: with adapters attached.
        dtype: of all floating-point tensors. By default each has the base's; what is quantised there has the dtype in
            which it computes.

    Raises:
        AttachError: nothing is attached, `use` has given each entry of a batch an adapter of its own, a method adds a
            bias to a layer that has none, an adapter has NaN or infinity, or PEFT was put on the model after attach.
        TypeError: the dtype is none for weights.
    """
    model = unwrap(model)
    _check(model, "merged_state_dict", dtype)
    _warn_of_parted(model, "merged_state_dict")
    return _state_dict(model, dtype, "merged_state_dict")


@torch.no_grad()
def _state_dict(model: nn.Module, dtype: torch.dtype | None, what: str) -> dict[str, Tensor]:
    """Warns where a number is too large for float16, the narrowest range."""
    found: dict[str, Tensor] = {}
    of_module: dict[int, dict[str, Tensor]] = {}  # a module may have several names
    for path, module in _base_modules(model, remove_duplicate=False):
        if id(module) not in of_module:
            with naming(path or type(model).__name__):
                of_module[id(module)] = _merged(module, dtype)
        found |= {dotted(path, key): t for key, t in of_module[id(module)].items()}
    weights = {name for name, _ in named_parameters(model, remove_duplicate=False)}
    narrow = {name: t for name, t in found.items() if name in weights and t.dtype == torch.float16}
    if beyond := not_finite(narrow):
        warnings.warn(f"{what}: {first_of(beyond)} has numbers beyond float16's range", stacklevel=4)
    return found


def merged_parameters(model: nn.Module, *, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the plain model that `merged_state_dict` describes, one layer at a time: no second model comes
    to be. As in `nn.Module.named_parameters`, one that has several names comes once, under the first.

    Raises:
        AttachError: as `merged_state_dict` does, or an adapter acts on one of several tied weights, such as an output
            head's and an embedding's.
    """
    model = unwrap(model)
    _check(model, "merged_parameters", dtype)
    if parted := _parted(model):
        raise AttachError(
            f"{' and '.join(parted)} are tied, and an adapter acts on one of them, so that the merged model has "
            "weights for which a tied one has no place; leave them out by exclude_names"
        )
    return _parameters(model, dtype)


def _parameters(model: nn.Module, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for path, module in _base_modules(model):
        tied = {key for key, p in module._parameters.items() if id(p) in seen}
        seen |= {id(p) for p in module._parameters.values() if p is not None}
        with torch.no_grad(), naming(path or type(model).__name__):
            found = _merged(module, dtype)
        no_parameters = {*tied, *module._buffers, *_written(module), _EXTRA}
        for key, t in found.items():
            if key not in no_parameters:
                yield dotted(path, key), t


def save_merged(
    model: nn.Module, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **options: Any
) -> None:
    """Write the merged model as a plain checkpoint: of a transformers model what its `save_pretrained` writes, config
    and tied weights and shards included, without the quantisation; of any other module, such as diffusers' and
    sentence-transformers', a `model.safetensors` of its state dict. Where an adapter acts on one of several tied
    weights, none are tied in the checkpoint. Files that were there are replaced once all of the new ones are written.

    Args:
        model, dtype: as in `merged_state_dict`.
        folder: made where it is missing.
        options: for `save_pretrained`, such as max_shard_size.

    Raises:
        AttachError: as `merged_state_dict` does, or the model computes something else where its config ties nothing, or
            its class can't be made from its config alone.
        CheckpointError: the folder can't be written.
        TypeError: the dtype is none for weights, or options are given for a model that is not transformers'.
    """
    model, folder = unwrap(model), Path(folder)
    if own := sorted(options.keys() & {"save_directory", "state_dict"}):
        raise TypeError(f"save_merged: it gives save_pretrained {' and '.join(own)} itself; leave that out")
    _check(model, "save_merged", dtype)
    if not _is_transformers(model):
        if options:
            raise TypeError(
                f"save_merged: {', '.join(options)} are for transformers' save_pretrained, and a "
                f"{type(model).__name__} is written as one model.safetensors; leave them out"
            )
        _require_unfused(model)
        _warn_of_parted(model, "save_merged")
        write_weights("save_merged", folder, _for_a_file(_state_dict(model, dtype, "save_merged")))
        return
    if parted := _parted(model):
        _require_untied(model, parted)
    tensors = _for_a_file(_state_dict(model, dtype, "save_merged"))
    plain = _skeleton(model, tensors, tied=not parted)
    if parted:  # under all their names, also those that stay equal: nothing ties them when they are loaded
        tensors = apart(tensors)
    if options.get("push_to_hub"):
        options = {"repo_id": folder.absolute().name, **options}  # and not that of the folder for the time being
    with writing_folder("save_merged", folder):
        save = partial(type(model).save_pretrained, plain, state_dict=tensors, **options)  # type: ignore[operator]
        replace_folder(folder, save, _is_obsolete)


def _is_transformers(model: nn.Module) -> bool:
    """Whether it is a PreTrainedModel; others have a `save_pretrained` and a `config` too, which are something else."""
    bases = ((each.__module__.partition(".")[0], each.__name__) for each in type(model).__mro__)
    return ("transformers", "PreTrainedModel") in bases


def _is_obsolete(name: str, written: set[str]) -> bool:
    """Whether a file of an earlier checkpoint, beside a new one, would be taken for a part of it: other shards, their
    index, or the one file that there is without shards."""
    kind = re.compile(r"(model(?:\.[^.]+)?)(-\d{5}-of-\d{5}\.safetensors|\.safetensors(\.index\.json)?)")
    found = kind.fullmatch(name)
    return found is not None and found[1] in {each[1] for other in written if (each := kind.fullmatch(other))}


def _for_a_file(found: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors, with a warning where there is something else: a module's own extra state."""
    if others := [name for name, t in found.items() if not isinstance(t, Tensor)]:
        warnings.warn(
            f"save_merged: {first_of(others)} is left out, since a safetensors file holds tensors alone; "
            "merged_state_dict has it",
            stacklevel=3,
        )
    return {name: t for name, t in found.items() if name not in others}


def _check(model: nn.Module, what: str, dtype: torch.dtype | None) -> None:
    """A TypeError where the dtype is none for weights. An AttachError where there is nothing to merge, or PEFT is on
    the model, or an adapter is not finite; one warning of adapters that do nothing, for which the merged model is not
    the adapted one."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise TypeError(f"{what}: dtype must be None or a floating-point torch.dtype of 16 bits or more; got {dtype!r}")
    attached = chosen(model, None)
    require_no_peft(model, "merging")
    acting = [each for each in attached if each.acts]
    texts = [describe(each.watch.idle(model)) for each in acting]
    if found := ". ".join(text for text in texts if text):
        warnings.warn(
            f"{what}: {found}. Merged weights have what adapters make of layers that do not run, and nothing of those "
            "on layers that are no longer part of the model",
            stacklevel=3,
        )
    of_each = ({name: whole(t) for name, t in named_tensors(each.adapters).items()} for each in acting)
    if broken := [name for tensors in of_each for name in not_finite(tensors)]:
        raise AttachError(
            f"{what}: there is NaN or infinity in {first_of(broken)}, which would leave no weight of such a layer as "
            "it is; load an earlier file"
        )


def _base_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """The base's, without what adapters have put there, and without what the weights that they change are made of."""
    made_of: tuple[str, ...] = ()  # the beginnings of names
    for path, module in named_modules(model, remove_duplicate):
        if SITE in module._modules:
            made = [key for key in ("weight", "bias") if is_parametrized(module, key)]
            made_of += tuple(f"{path}.parametrizations.{key}.".removeprefix(".") for key in made)
        if not isinstance(module, Params | Site | Stack) and not f"{path}.".startswith(made_of):
            yield path, module


def _parted(model: Any) -> list[str]:
    """The names of a weight that is tied in the base and not in the merged model, since an adapter acts on one of the
    layers that hold it; empty: there is none."""
    sources = getattr(model, "all_tied_weights_keys", None) or {}  # transformers': offloading makes several of one
    first_name: dict[int, str] = {}
    tied: dict[str, list[str]] = {}
    adapted: set[str] = set()
    for path, module in _base_modules(model):
        site = module._modules.get(SITE)
        for key, p in module._parameters.items():
            if p is not None:
                name = dotted(path, key)
                source = first_name.setdefault(id(p), sources.get(name, name))
                tied.setdefault(source, []).append(name)
                adapted |= {source} if isinstance(site, Site) and site.acting() else set()
    return next((names for source, names in tied.items() if len(names) > 1 and source in adapted), [])


def _require_unfused(model: nn.Module) -> None:
    """Raise where an adapter acts on what diffusers has fused: a model that loads the file has the parts alone."""
    for path, module in model.named_modules():
        for key, child in module._modules.items() if getattr(module, "fused_projections", False) else ():
            site = getattr(child, SITE, None)
            if key in ("to_qkv", "to_kv", "to_added_qkv") and isinstance(site, Site) and site.acting():
                raise AttachError(
                    f"save_merged: {path}.{key} is fused, and a model that loads the file has to_q, to_k and to_v, on "
                    "which no adapter acts; adapt those, without fusing, or load merged_state_dict(model) into a fused "
                    "model"
                )


def _warn_of_parted(model: nn.Module, what: str) -> None:
    """A warning where a model that ties its weights would take one of the merged ones for another."""
    if parted := _parted(model):
        warnings.warn(
            f"{what}: {' and '.join(parted)} are tied in this model, and have values of their own in the merged one, "
            "since an adapter acts on one of them: load them into a model that does not tie them, in transformers by "
            "config.tie_word_embeddings=False, as save_merged writes it",
            stacklevel=3,
        )


def _require_untied(model: Any, parted: list[str]) -> None:
    """Raise where the model's forward asks its config whether weights are tied, and a config would say that they are
    not: Switch scales what its head gets by that."""
    config = copy.deepcopy(model.config)
    if not getattr(config, "tie_word_embeddings", False):
        return
    config.tie_word_embeddings = False
    says_so = not type(config).from_dict(config.to_dict()).tie_word_embeddings  # T5's never does
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    if says_so and code is not None and "tie_word_embeddings" in code.co_names:
        raise AttachError(
            f"{' and '.join(parted)} are tied, and an adapter acts on one of them, so that the merged model's can't "
            f"be; and {type(model).__name__} computes something else where they are not. Leave them out by "
            "exclude_names, or keep the adapter: save(model, path)"
        )


def _skeleton(model: Any, tensors: dict[str, Tensor], tied: bool) -> Any:
    """A model of the same class and config without values and without quantisation, for its `save_pretrained`."""
    config = copy.deepcopy(model.config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    if not tied:
        config.tie_word_embeddings = False
    try:
        with torch.device("meta"):
            plain = type(model)(config)
    except Exception as error:  # it is the class's own code
        raise AttachError(
            f"save_merged: no {type(model).__name__} can be made from its config alone ({error}); write "
            "merged_state_dict(model) to a file of your own"
        ) from error
    if getattr(model, "generation_config", None) is not None:
        plain.generation_config = model.generation_config
    return plain.to(next(t.dtype for t in tensors.values() if t.is_floating_point()))


def _merged(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """What a plain module holds itself that computes what this one does."""
    if is_embedding(module):
        return _embedding(module, dtype)
    return _linear(module, dtype) if is_linear(module) else _other(module, dtype)


def _own(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """What a state dict has of the module itself."""
    names = [name for name, _ in module.named_parameters(recurse=False, remove_duplicate=False)]
    names += [
        name
        for name, _ in module.named_buffers(recurse=False, remove_duplicate=False)
        if name not in module._non_persistent_buffers_set
    ]
    found = {}
    for name in names:
        t = brought(module, name)
        assert t is not None
        t = whole(t).detach()
        found[name] = t.to(dtype) if dtype is not None and t.is_floating_point() else t
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        found[_EXTRA] = module.get_extra_state()
    return found


def _other(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of a module that is no linear layer; of a mixture's experts with what their sites make of them."""
    found = _own(module, dtype) | _written(module)
    if STACKS in module._modules:
        for key, stack in stacks_of(module).items():
            if (site := stack._modules.get(SITE)) is not None:
                found |= _stack(cast(Site, site), stack, found[key], dtype)
    return found


def _written(module: nn.Module) -> dict[str, Any]:
    """What a module that is no linear layer writes into a state dict by its own hand, beside parameters and buffers."""
    if is_linear(module) or type(module)._save_to_state_dict is nn.Module._save_to_state_dict:
        return {}
    found: dict[str, Any] = {}
    module._save_to_state_dict(found, "", False)
    return {name: t for name, t in found.items() if name not in module._parameters and name not in module._buffers}


def _stack(site: Site, stack: Stack, base: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A stack's parameters, one expert merged after the other."""
    stack = _gathered(stack)
    primitives = _acting(site, stack)
    key, W, bias = stack.key, torch.empty_like(base), stack.bias
    merged = W.mT if stack.experts.is_transposed else W
    b = None if bias is None else torch.empty_like(bias, dtype=dtype)
    for i in range(stack.num_experts):
        linear = stack.expert(i)
        merged[i], new_bias = _through([each.of(i) for each in primitives], site.name, linear.weight, linear.bias)
        if b is not None and new_bias is not None:
            b[i] = new_bias
    return {key: W} if b is None else {key: W, f"{key}_bias": b}


def _linear(layer: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A linear layer's weight and bias, dense, with what its site makes of them."""
    layer = _gathered(layer)
    weight: Any = weight_of(layer)
    site = layer._modules.get(SITE)
    dense = is_dense(weight)
    if site is None and (dense or hasattr(weight, "full_tensor")):
        return _own(layer, dtype)
    dtype = dtype or token_dtype(layer)
    W, bias = dense_weight(layer), bias_of(layer)
    if site is not None:
        _require_linear_map(layer, site.name, W, bias)
        W, bias = _through(_acting(site, layer), site.name, W, bias)
    # Of a weight that is made of others (pruning, weight_norm) there remains the weight.
    sources = {f"{t}_{of}" for t in ("weight", "bias") for of in ("orig", "mask", "g", "v", "u")}
    others = {name: t for name, t in _own(layer, dtype).items() if name not in sources} if dense else {}
    found = {**others, "weight": (W.t().contiguous() if is_conv1d_in_files(layer) else W).to(dtype)}
    return found if bias is None else {**found, "bias": bias.detach().to(dtype)}


def _gathered(layer: Any) -> Any:
    """The layer with whole tensors, where it has an adapter and FSDP2 has sharded it."""
    holder = layer.experts if isinstance(layer, Stack) else layer
    if SITE not in layer._modules or not any(hasattr(p, "full_tensor") for p in holder._parameters.values()):
        return layer
    twin, parts = copy.copy(holder), holder._parameters.items()
    twin._parameters = {key: None if p is None else nn.Parameter(whole(p).detach(), False) for key, p in parts}
    if not isinstance(layer, Stack):
        return twin
    stack = copy.copy(layer)
    stack.rebind(twin)
    return stack


def _require_linear_map(layer: Any, name: str, W: Float[Tensor, "N K"], bias: Tensor | None) -> None:
    """Raise where a class of the user's computes something else than W x + b, tried on one row."""
    weight: Any = weight_of(layer)
    known = type(layer).forward is nn.Linear.forward or is_conv1d(layer) or not is_dense(weight)
    if known or is_managed(layer) or W.is_meta:
        return
    x, y = run_one_row(layer)
    if x is None or not isinstance(y, Tensor):
        raise AttachError(
            f"{name}: its {type(layer).__name__} can't be tried on one row, and merging is for layers that compute "
            "W x + b"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    want = linear(x.to(wide), W.to(wide), None if bias is None else bias.to(wide))
    if not (y.to(wide) - want).norm() <= 0.02 * want.norm():
        raise AttachError(
            f"{name}: its {type(layer).__name__} computes something else than W x + b, so that no weight is the "
            "merged one; leave it out by exclude_names"
        )


def _embedding(layer: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """An embedding's weight, of which its site is asked for each id."""
    layer = _gathered(layer)
    found, site = _own(layer, dtype), layer._modules.get(SITE)
    if site is None:
        return found
    E = dense_weight(layer).mT
    primitives, merged = _acting(cast(Site, site), layer), torch.empty_like(E, dtype=dtype or E.dtype)
    for ids in torch.arange(len(E), device=E.device).split(_ROWS):
        rows = E[ids].to(torch.float64)
        for primitive in primitives:
            rows = leave(primitive, rows, enter(primitive, ids, reference)[1], reference)
        merged[ids] = rows.to(merged.dtype)
    return {**found, "weight": merged}


def _acting(site: Site, layer: nn.Module) -> list[Primitive]:
    """What a layer's adapters that act compute in evaluation. Every process that has a part of a sharded one must call
    it."""
    if site.rows is not None:
        raise AttachError(
            f"{site.name}: each entry of a batch has an adapter of its own, and a merged model has one set of weights; "
            "call use(model, name) first"
        )
    found = []
    for name, adapter in site.acting():
        require_size(adapter, layer)
        whole = adapter.alone() if adapter.sharded else adapter
        found.append(site.in_part(name, whole.at_rest(layer)))
    return found


def _through(
    primitives: list[Primitive], name: str, W: Float[Tensor, "N K"], bias: Tensor | None
) -> tuple[Float[Tensor, "N K"], Tensor | None]:
    """W' and b' of a linear map with these around it, in float64."""
    wide, N, K = torch.float64, *W.shape
    b = W.new_zeros(N, dtype=wide) if bias is None else bias.to(wide)

    def run(x: Tensor, of_identity: slice | None) -> Tensor:
        carries, given = [], x
        for primitive in primitives:
            x, carry = enter(primitive, x, reference)
            carries.append(carry)
        untouched = x is given and of_identity is not None
        y = (W[:, of_identity].t().to(wide) if untouched else x @ W.t().to(wide)) + b
        for primitive, carry in zip(primitives, carries, strict=True):
            y = leave(primitive, y, carry, reference)
        return y

    new_bias = run(W.new_zeros(1, K, dtype=wide), None)[0]
    merged = W.new_empty(N, K, dtype=wide)
    for first in range(0, K, _ROWS):
        part = slice(first, min(first + _ROWS, K))
        rows = W.new_zeros(part.stop - first, K, dtype=wide)
        rows[:, part].fill_diagonal_(1)
        merged[:, part] = (run(rows, part) - new_bias).t()
    if any(each.of_a_user for each in primitives):
        x, want, off = departure(lambda x: run(x, None), merged, new_bias)
        if not off <= 1e-3 * (want - x @ W.t().to(wide) - b).norm() + 1e-6 * want.norm():
            raise AttachError(
                f"{name}: its adapter computes something else than W x + b, so that no weight is the merged one; "
                "detach it, or save the adapter"
            )
    if bias is None and new_bias.any():
        raise AttachError(
            f"{name}: its adapter adds a bias, and the layer has none to hold it, so that it can't be merged; give the "
            "layer a bias of zeros before attach, or save the adapter"
        )
    return merged, None if bias is None else new_bias
