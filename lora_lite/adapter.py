"""Adapter: the tensors of one target, and the primitive that they make. It knows no hook."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, cast, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.functional import linear
from torch.nn.utils.parametrize import is_parametrized

from . import reference
from .backend import select
from .calls import called_by
from .config import OF_THE_MODEL, AdapterConfig
from .embeddings import looked_up, on_ids
from .errors import AttachError, first_of
from .operators import autocast_anywhere, memory, transformed, version
from .params import SITE, Init, Params, ParamSpec
from .placement import brought, execution_device, is_managed, is_sharded, running, whole
from .primitives import Primitive, enter, leave, require_stacks, same
from .quantized import bias_of, dense_weight, evaluation_mode, stored_tensor, token_dtype, weight_of
from .segments import Segments
from .shapes import copies, is_embedding, shape
from .stacks import Stack, grouped_linear
from .targets import Target
from .variant import Variant


class Adapter(Params):
    """One layer's adapter of one name. `to_fill`: its values will come from a file, and no random numbers are drawn."""

    def __init__(
        self, target: Target, variant: type[Variant], cfg: AdapterConfig, backend: str, to_fill: bool = False
    ) -> None:
        layer: Any = target.layer
        specs = variant.param_specs(*shape(layer), cfg)
        _require_specs(variant.__name__, specs)
        if to_fill:
            specs = {name: dataclasses.replace(spec, init="zeros") for name, spec in specs.items()}
        if (experts := copies(layer)) is not None:
            specs = {name: dataclasses.replace(spec, copies=experts) for name, spec in specs.items()}
        weight = weight_of(layer)
        assert weight is not None  # it is a target
        if hasattr(weight, "full_tensor") and target.mesh is None:
            raise AttachError(
                "its weight is sharded over processes (DTensor), and not by fully_shard of a block that holds it; "
                "tensor-parallel layers can't be adapted, nor linears that are sharded one by one: attach before that"
            )
        super().__init__(specs, cfg.dtype, execution_device(layer) or weight.device)
        self.variant, self.cfg, self.backend, self.shape = variant, cfg, backend, shape(layer)
        self.derives = any(spec.derived for spec in specs.values())
        self._cfg_at_rest = dataclasses.replace(cfg, dropout=0.0)  # in evaluation
        if cfg.dropout:
            self.dropout = nn.Dropout(cfg.dropout)  # never called: for those who look for dropout to switch it

    def primitive(self, layer: nn.Module) -> Primitive:
        """What the adapter computes around the layer, with dropout in training."""
        p = self.dropout_now if self._modules else 0.0
        return self._primitive(layer, self._cfg_at_rest if p == 0 else self._with_dropout(p))

    @property
    def dropout_now(self) -> float:
        """The probability by which an element of the input is left out: 0 in evaluation, and where something has
        switched its nn.Dropout off."""
        dropout = cast("nn.Dropout | None", self._modules.get("dropout"))
        return dropout.p if dropout is not None and dropout.training else 0.0

    def _with_dropout(self, p: float) -> AdapterConfig:
        return self.cfg if p == self.cfg.dropout else dataclasses.replace(self.cfg, dropout=p)

    def uses_dropout(self, layer: nn.Module) -> bool:
        """Whether the method's primitive asks its config for the dropout."""
        asked: list[bool] = []
        values = {"dropout": self.cfg.dropout}
        dropout = property(
            lambda cfg: asked.append(True) or values["dropout"],
            lambda cfg, value: values.update(dropout=value),  # of a config that is made of it
        )
        own, kind = copy.copy(self.cfg), type(self.cfg)
        object.__setattr__(own, "__class__", type(kind.__name__, (kind,), {"dropout": dropout}))
        primitive = self._primitive(layer, own)
        return bool(asked) or getattr(primitive, "dropout", 0.0) == self.cfg.dropout  # by `dropout_now`

    def computed_otherwise(self, layer: nn.Module, cfg: AdapterConfig, tensors: Mapping[str, Tensor]) -> list[str]:
        """The fields of another config of its method with which it would make something else of these tensors of its,
        or have others; empty: it would not."""
        pairs = ((f.name, getattr(cfg, f.name), getattr(self.cfg, f.name)) for f in dataclasses.fields(cfg))
        others = [name for name, its, own in pairs if name not in OF_THE_MODEL and its != own]
        weight = weight_of(layer)
        if not others or self.sharded or self.valueless or weight is None or is_sharded(weight):
            return others
        shapes = {name: spec.shape for name, spec in self.variant.param_specs(*self.shape, cfg).items()}
        if shapes != {name: spec.shape for name, spec in self.specs.items()}:
            return others
        primitives = (self._with(tensors, each, layer) for each in (self.cfg, cfg))
        return [] if same(*primitives) else others

    def _with(self, tensors: Mapping[str, Tensor], cfg: AdapterConfig, layer: nn.Module) -> Primitive:
        """What it would compute in evaluation with these tensors and that config."""
        twin = copy.copy(self)
        twin.cfg = dataclasses.replace(cfg, dropout=0.0)
        given = {name: t.to(getattr(self, name)) for name, t in tensors.items()}
        twin._parameters = {name: nn.Parameter(given.get(name, p), False) for name, p in self._parameters.items()}  # type: ignore[arg-type]
        twin._buffers = {**self._buffers, **{name: given[name] for name in self._buffers.keys() & given.keys()}}
        twin = _StandIn.made(twin, layer) if self.derives else twin
        with evaluation_mode(twin):
            return twin._outside_autocast(layer, twin.cfg)

    def at_rest(self, layer: nn.Module) -> Primitive:
        """What it computes in evaluation."""
        with evaluation_mode(self):
            return self._primitive(layer, self._cfg_at_rest)

    def each(self, layer: nn.Module) -> Iterator[tuple[Params, nn.Module]]:
        """Tensors and layer as a variant sees them: a stack's are those of one expert after the other."""
        if not isinstance(layer, Stack):
            yield self, layer
            return
        for i in range(layer.num_experts):
            yield self.of(i), layer.expert(i)

    def derive(self, layer: nn.Module) -> None:
        """What the variant derives from the base weight."""
        for name, spec in self.specs.items():  # left behind where others were assigned: load_state_dict(assign=True)
            if spec.derived and (t := getattr(self, name)).device != self.device:
                self._buffers[name] = torch.empty_like(t, device=self.device)
        self._fill_derived(layer)
        if self.derives:
            _derived_from[self] = _mark(_stored(layer))

    def _fill_derived(self, layer: nn.Module) -> None:
        with reference.without_autocast(self.device):
            for p, each in self.each(layer):
                self.variant.derive(p, each, self.cfg)

    def follow(self, layer: nn.Module) -> "Adapter":
        """Itself, derived anew where the layer has another weight by now, or PyTorch has seen a write to it: a
        checkpoint that was loaded, an embedding to which it was tied, a parametrisation. Not of a weight that comes and
        goes. A weight that stands in for a while (torch.func) gets an adapter for a while."""
        if not self.derives or torch.compiler.is_compiling():
            return self
        weight = _stored(layer)
        if self.valueless or weight.is_meta or is_managed(layer) or is_sharded(weight):
            return self
        known = _derived_from.get(self)  # of a copy, or a replica, nothing: it may have got another weight since
        if is_functorch_wrapped_tensor(weight):
            return _StandIn.made(self, layer)
        if known != _mark(weight) or is_parametrized(layer):
            require_size(self, layer)
            if transformed() or called_by("_functional_call", "torch.nn.utils.stateless"):
                return _StandIn.made(self, layer)
            if is_parametrized(layer):  # at each call, and a backward may hold what was derived at the one before
                made: Any = _StandIn.made(self, layer)._buffers
                with torch.inference_mode(False), torch.no_grad():  # what inference derives, a graph may train with
                    fresh = {name: made[name].clone() for name, spec in self.specs.items() if spec.derived}
                self._buffers.update(fresh)
                _derived_from[self] = _mark(weight)
            else:
                self.derive(layer)
        return self

    def _primitive(self, layer: nn.Module, cfg: AdapterConfig) -> Primitive:
        if is_embedding(layer):
            require_size(self, layer)
        if self.derives and (own := self.follow(layer)) is not self:
            return own._outside_autocast(layer, cfg)
        if is_managed(self):
            if self.training and torch.is_grad_enabled() and self._a_tensor.is_meta:
                raise AttachError(
                    "accelerate offloads this adapter with the model: it runs, but can't be trained; attach, or load "
                    "its file, after the model is offloaded"
                )
            with running(self):
                return self._outside_autocast(layer, cfg)
        return self._outside_autocast(layer, cfg)

    def _outside_autocast(self, layer: nn.Module, cfg: AdapterConfig) -> Primitive:
        if autocast_anywhere():
            with reference.without_autocast(self.device):
                primitive = self.variant.primitive(self, layer, cfg)
        else:
            primitive = self.variant.primitive(self, layer, cfg)
        if not isinstance(primitive, Primitive):
            raise AttachError(
                f"{self.variant.__name__}.primitive must return a Primitive; got a {type(primitive).__name__}"
            )
        if isinstance(layer, Stack):
            require_stacks(primitive, layer.num_experts)
        return primitive

    @property
    def valueless(self) -> bool:
        """Whether its tensors hold no values: on the meta device without accelerate, or from there without any."""
        return self.hollow or (self._a_tensor.is_meta and not is_managed(self))

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self._a_tensor.device

    @property
    def _a_tensor(self) -> Tensor:
        for t in self._parameters.values():
            if t is not None:
                return t
        return getattr(self, next(iter(self.specs)))  # a DataParallel replica's parameters are attributes

    def by_reference(self, layer: Any, x: Tensor, dense: bool = True, segments: Segments | None = None) -> Tensor:
        """The layer's output for x with this adapter alone and without dropout, by the PyTorch reference in x's dtype
        (for ids in the next wider one than the layer's): around the dense weight or, with dense=False, around the
        layer as it computes by itself. Rows of a stack come with their segments."""
        primitive = self.at_rest(layer).on(segments)
        if is_embedding(layer):
            primitive = on_ids(primitive, layer)
            y = looked_up(layer, x, wider(token_dtype(layer), x.device)) if dense else layer.forward(x)
            return leave(primitive, y, enter(primitive, x, reference)[1], reference)
        if dense:
            return around(primitive, layer, x)
        x, carry = enter(primitive, x, reference)
        y = layer.forward(x) if segments is None else layer.forward(x, segments)  # without the hooks
        return leave(primitive, y, carry, reference)

    def in_force(self, device: torch.device, dtype: torch.dtype) -> str:
        """The backend that runs for tokens of this dtype there."""
        return select(self.backend, device, dtype)[1]

    def alone(self) -> "Adapter":
        """A twin apart from the model's, in which each tensor that a file holds is whole and has its values. Every
        process that has a part of a sharded one must call it.

        Raises:
            AttachError: one has no values, or not the shape of its spec, or is parametrised.
        """
        if is_parametrized(self):
            raise AttachError(
                "its tensors are parametrised; put what they act with in their place: "
                "torch.nn.utils.parametrize.remove_parametrizations(adapter, name)"
            )
        twin = copy.copy(self)
        twin._parameters, twin._buffers = dict(self._parameters), dict(self._buffers)
        for name in self.state_dict():
            brought_here = brought(self, name)
            assert brought_here is not None
            t, wanted = whole(brought_here).detach(), tuple(self.specs[name].full_shape)
            if t.is_meta or self.hollow:
                raise AttachError(
                    f"{name} holds no values (it was on the meta device); load or train the adapter first"
                )
            if tuple(t.shape) != wanted:
                raise AttachError(
                    f"{name} has shape {tuple(t.shape)}, not {wanted}; if it is sharded, gather it first "
                    "(ZeRO-3: save on every process, with DeepSpeed imported)"
                )
            if name in twin._parameters:
                twin._parameters[name] = nn.Parameter(t, requires_grad=False)
            else:
                twin._buffers[name] = t
        vars(twin).pop("_hf_hook", None)
        return twin

    @property
    def sharded(self) -> bool:
        """Whether this process holds only parts of its tensors."""
        return any(is_sharded(t) for t in self.state_dict(keep_vars=True).values())

    def extra_repr(self) -> str:
        return f"{self.variant.name}, r={self.cfg.r}"


class _StandIn(Adapter):
    """An adapter whose derived tensors are of a weight that is not its layer's own."""

    @classmethod
    def made(cls, adapter: Adapter, layer: nn.Module) -> "_StandIn":
        own, names = copy.copy(adapter), [name for name, spec in adapter.specs.items() if spec.derived]
        own.__class__ = cls
        own._buffers = adapter._buffers | {name: torch.empty_like(getattr(adapter, name)) for name in names}
        own._fill_derived(layer)
        return cast(_StandIn, own)

    def fill(self, name: str, value: Tensor) -> None:
        """Put another in the tensor's place."""
        self._buffers[name] = value.detach().to(getattr(self, name))


def _require_specs(method: str, specs: Any) -> None:
    """Raise an AttachError where a method's `param_specs` are none, or their names could not be a module's tensors."""
    if not isinstance(specs, dict) or not specs or not all(isinstance(each, ParamSpec) for each in specs.values()):
        raise AttachError(f"{method}.param_specs must give a ParamSpec for each name, at least one; got {specs!r}")
    names = list(map(str, specs))
    if strange := [name for name in names if not (name.startswith("lora_") and name.isidentifier())]:
        raise AttachError(f"{method}.param_specs: names start with `lora_` and have no dots; got {first_of(strange)}")
    for name, spec in specs.items():
        if not (callable(spec.init) or spec.init in get_args(Init)):
            raise AttachError(
                f"{method}.param_specs: init of {name} must be a callable or one of {get_args(Init)}; got {spec.init!r}"
            )
        whole_numbers = spec.dtype is not None and not (spec.dtype.is_floating_point or spec.dtype.is_complex)
        if whole_numbers and not (spec.as_buffer or spec.derived):
            raise AttachError(f"{method}.param_specs: {name} of {spec.dtype} can't train; make it as_buffer=True")


def named_tensors(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Layers' tensors by the names that a file has for them, "<layer>.<tensor>"."""
    return {f"{layer}.{key}": t for layer, adapter in adapters.items() for key, t in adapter.state_dict().items()}


def require_size(adapter: Adapter, layer: nn.Module) -> None:
    """Raise an AttachError where the layer was resized since the adapter was made for it."""
    if adapter.shape != shape(layer):
        name = getattr(layer._modules.get(SITE), "name", type(layer).__name__)
        (K, N), (of_K, of_N) = shape(layer), adapter.shape
        it, its = (f"has {K} embeddings", of_K) if is_embedding(layer) else (f"is {K} → {N}", f"{of_K} → {of_N}")
        raise AttachError(
            f"{name}: it {it}, and its adapter is for {its}: it was resized after attach. Detach, resize, and "
            "attach anew"
        )


# Of each adapter that derives something, the mark of the weight that it did so from.
_derived_from: WeakKeyDictionary[Adapter, tuple[Any, ...]] = WeakKeyDictionary()


def _mark(weight: Tensor) -> tuple[Any, ...]:
    """Its memory, and how often that had been written to."""
    return *memory(weight), version(weight)


def _stored(layer: Any) -> Tensor:
    if (weight := stored_tensor(layer)) is None:
        raise AttachError(
            f"the weight of its {type(layer).__name__} can't be read, and this method needs it; detach before"
        )
    return weight


def wider(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which to look for the rounding errors of `dtype`."""
    return torch.float32 if dtype.itemsize < 4 or device.type == "mps" else torch.float64  # which MPS does not have


def around(primitive: Primitive, layer: Any, x: Tensor) -> Tensor:
    """What a primitive makes of a layer, by the PyTorch reference in x's dtype around the dense weight."""
    x, carry = enter(primitive, x, reference)
    W, bias = dense_weight(layer, x.dtype), bias_of(layer)
    bias = None if bias is None else bias.to(x.dtype)
    y = linear(x, W, bias) if primitive.segments is None else grouped_linear(x, W, bias, primitive.segments)
    return leave(primitive, y, carry, reference)
