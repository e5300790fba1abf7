"""attach and detach: put a variant's parameters on the matching layers, hook them, and take all of it off again."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast, overload

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from . import reference
from .backend import check_backend, select
from .calibration import CalibrationData, gather
from .config import AdapterConfig
from .errors import AttachError
from .params import Params
from .primitives import GroupedLowRankAdd, LowRankAdd, OfRows, Primitive
from .quantized import dense_weight, weight_of
from .sharding import is_sharded, replicate
from .targets import Target, find_targets
from .variant import REGISTRY, Variant

_ATTACHMENTS = "_lora_lite"  # attribute of the model: its attachments by name
ADAPTERS = "lora_lite"  # attribute of a layer: its adapters by name
DEFAULT = "default"


class Adapter(Params):
    """One layer's adapter: its tensors, and the two hooks that run its primitive around the layer."""

    def __init__(self, target: Target, variant: type[Variant], cfg: AdapterConfig, backend: str) -> None:
        layer: Any = target.layer
        specs = variant.param_specs(layer.in_features, layer.out_features, cfg)
        weight = weight_of(layer)
        assert weight is not None  # it is a target
        if is_sharded(weight) and target.mesh is None:
            raise AttachError(
                "its weight is sharded over processes (DTensor), and not by fully_shard of a block that holds it; "
                "tensor-parallel layers can't be adapted, nor linears that are sharded one by one: attach before that"
            )
        super().__init__(specs, cfg.dtype, weight.device)
        self.variant, self.cfg, self.backend, self.enabled = variant, cfg, backend, True
        self._cfg_at_rest = dataclasses.replace(cfg, dropout=0.0)  # in evaluation
        self.rows: list[int] | None = None  # which entries of a batch it acts on; None: all. And how many there must be
        self.batch = 0
        # Between the two hooks of one call: the primitive, what on_input kept, and the operations. A list, since
        # nn.Module's own __setattr__ is slow enough to show.
        self._running: list[Any] = []
        self._given: Primitive | None = None  # where adapters share a batch: what the layer's first made for this one

    def primitive(self, layer: nn.Module) -> Primitive:
        """What the adapter computes around the layer, with dropout in training."""
        return self.variant.primitive(self, layer, self.cfg if self.training else self._cfg_at_rest)

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook."""
        self._running.clear()  # a call that raised may have left something
        if not self.enabled:
            return None
        if args:
            x, *rest = args
        else:
            x, rest = kwargs.pop("input"), []
        ops, _, _ = select(self.backend, x.device, x.dtype)
        primitive = self.primitive(layer) if self.rows is None else self._of_rows(layer, x)
        if primitive is None:
            return (x, *rest), kwargs
        x, carry = primitive.on_input(x, ops)
        self._running.append((primitive, carry, ops))
        return (x, *rest), kwargs

    def after(self, layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> Any:
        """Forward hook."""
        if not self._running:
            return None
        primitive, carry, ops = self._running.pop()
        return primitive.on_output(y, carry, ops)

    def _of_rows(self, layer: nn.Module, x: Tensor) -> Primitive | None:
        """The primitive where adapters share a batch: each its own entries' or, if all of a layer's are low-rank sums
        with the same dropout, the first all of them. The first makes the rest's too."""
        if len(x) != self.batch:
            raise ValueError(
                f"use(model, [...]) named the adapters of {self.batch} entries, and a layer got {len(x)}; name one for "
                "each entry of the batch, in layers whose input keeps the batch as its first dimension"
            )
        here = cast(Iterable[Adapter], getattr(layer, ADAPTERS).values())
        sharing = [adapter for adapter in here if adapter.enabled]
        if sharing[0] is not self:
            return self._take()
        parts = [adapter.primitive(layer) for adapter in sharing]
        sums = [part for part in parts if isinstance(part, LowRankAdd)]
        if len(sums) == len(parts) and len({part.dropout for part in sums}) == 1:
            group = [-1] * self.batch
            for i, adapter in enumerate(sharing):
                for row in adapter.rows or ():
                    group[row] = i
            return GroupedLowRankAdd.of(sums, torch.tensor(group, device=x.device))
        for adapter, part in zip(sharing, parts, strict=True):
            adapter._given = OfRows(part, torch.tensor(adapter.rows, device=x.device))
        return self._take()

    def _take(self) -> Primitive | None:
        given, self._given = self._given, None  # kept, it would keep the graph behind it alive
        return given

    def by_reference(self, layer: Any, x: Tensor, dense: bool = True) -> Tensor:
        """The layer's output for x with this adapter alone and without dropout, by the PyTorch reference in x's dtype:
        around the dense weight or, with dense=False, around the layer as it computes by itself."""
        primitive = self.variant.primitive(self, layer, self._cfg_at_rest)
        x, carry = primitive.on_input(x, reference)
        if not dense:
            return primitive.on_output(layer.forward(x), carry, reference)  # forward: without the hooks
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return primitive.on_output(linear(x, dense_weight(layer, x.dtype), bias), carry, reference)

    def in_force(self, x: Tensor) -> str:
        """The backend that runs for this input."""
        return select(self.backend, x.device, x.dtype)[1]

    def __getstate__(self) -> dict[str, Any]:
        # A call that raised may have left what can't be copied.
        return {**self.__dict__, "_running": [], "_given": None}

    def extra_repr(self) -> str:
        return f"{self.variant.name}, r={self.cfg.r}"


@dataclass
class Attachment:
    """What `attach` put on a model, under a name."""

    name: str
    cfg: AdapterConfig
    backend: str
    targets: list[Target]
    adapters: dict[str, Adapter]
    requires_grad: list[tuple[nn.Parameter, bool]] = field(repr=False)
    handles: list[RemovableHandle] = field(repr=False)

    @property
    def trainable(self) -> int:
        """Number of trainable adapter parameters."""
        return sum(p.numel() for adapter in self.adapters.values() for p in adapter.parameters() if p.requires_grad)

    def backends(self) -> dict[str, tuple[str, str]]:
        """For each layer the backend in force, for tokens of its weight's dtype, and why."""
        in_force = {}
        for target in self.targets:
            weight = weight_of(target.layer)
            assert weight is not None
            dtype = weight.dtype if weight.is_floating_point() else torch.bfloat16
            in_force[target.name] = select(self.backend, weight.device, dtype)[1:]
        return in_force

    def summary(self) -> str:
        """A table with a row a layer: shape, role, trainable parameters, backend in force and why."""
        base = sum(p.numel() for p, _ in self.requires_grad)
        table = Table(
            title=f"{self.name}, {self.cfg.variant}: {self.trainable:,} trainable parameters on {len(self.targets)} "
            f"layers ({100 * self.trainable / max(base, 1):.3f} % of the base's {base:,})"
        )
        for heading in ("layer", "in → out", "role", "trainable", "backend"):
            table.add_column(heading, justify="right" if heading == "trainable" else "left")
        backends = self.backends()
        for target in self.targets:
            layer: Any = target.layer
            trainable = sum(p.numel() for p in self.adapters[target.name].parameters() if p.requires_grad)
            table.add_row(
                target.name,
                f"{layer.in_features} → {layer.out_features}",
                target.role,
                f"{trainable:,}",
                "{} ({})".format(*backends[target.name]),
            )
        console = Console(width=160, no_color=True)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


@overload
def attach(
    model: nn.Module, cfg: AdapterConfig, *, name: str = ..., backend: str = ..., calibration_data: Any = ...
) -> Attachment: ...


@overload
def attach(
    model: nn.Module, cfg: Mapping[str, AdapterConfig], *, backend: str = ..., calibration_data: Any = ...
) -> dict[str, Attachment]: ...


def attach(
    model: nn.Module,
    cfg: AdapterConfig | Mapping[str, AdapterConfig],
    *,
    name: str = DEFAULT,
    backend: str = "auto",
    calibration_data: CalibrationData | None = None,
) -> Attachment | dict[str, Attachment]:
    """Freeze `model` and put an adapter on each layer that `cfg` selects. The base weights are never changed.

    A model can carry several adapters under different names; all of them act, in the order in which they were attached,
    until `use` says otherwise. The hooks of two adapters on one layer nest: each acts on the input that the one before
    it leaves, and on the output likewise.

    Args:
        model: any module with linear-like layers (in_features, out_features, weight).
        cfg: a variant's config, such as `LoRAConfig(r=8)`; or a dict of them by name: all are attached, or none.
        name: of the adapter, for `use`, `save`, `detach` and the rest. A dict has the names itself.
        backend: "triton" for the fused kernels, "reference" for PyTorch, "auto" for kernels where they run.
        calibration_data: model inputs (dicts, tuples, tensors; a DataLoader works) for EVA and, optionally, AntiPaSTO.

    Returns:
        An `Attachment`, or a dict of them by name; print its `summary()`.

    Raises:
        AttachError: an adapter of that name is attached already, no layer matches, or a layer can't take this adapter.
        CalibrationError: the variant needs calibration data and got none or too little.
        In each case the model is as it was.
    """
    model = unwrap(model)
    if isinstance(cfg, Mapping):
        return _attach_all(model, cfg, backend, calibration_data)
    check_backend(backend)
    variant = variant_of(cfg)
    check_free(model, name)
    targets = find_targets(model, cfg)
    adapters = {target.name: build(target, variant, cfg, backend) for target in targets}
    if variant.calibration == "required" or (variant.calibration == "optional" and calibration_data is not None):
        statistics = {}
        for t in targets:
            with naming(t):
                statistics[t.name] = (t.layer, variant.statistic(adapters[t.name], t.layer, adapters[t.name].cfg))
        gathered = gather(model, statistics, calibration_data)
        planned: AdapterConfig = variant.plan(gathered, cfg)
        if planned is not cfg:
            cfg = planned
            targets = find_targets(model, cfg)
            adapters = {target.name: build(target, variant, cfg, backend) for target in targets}
        for layer, adapter in adapters.items():
            variant.calibrate(adapter, gathered[layer], adapter.cfg)
    else:
        init(targets, adapters)
    derive(targets, adapters)
    return install(model, name, cfg, backend, targets, adapters)


def _attach_all(
    model: nn.Module, configs: Mapping[str, AdapterConfig], backend: str, calibration_data: Any
) -> dict[str, Attachment]:
    attached: dict[str, Attachment] = {}
    if not all(isinstance(cfg, AdapterConfig) for cfg in configs.values()):
        variant_of(cast(AdapterConfig, configs))  # a dict of something else
    try:
        for name, cfg in configs.items():
            attached[name] = attach(model, cfg, name=name, backend=backend, calibration_data=calibration_data)
    except Exception:
        for name in attached:
            detach(model, name)
        raise
    return attached


def build(target: Target, variant: type[Variant], cfg: AdapterConfig, backend: str) -> Adapter:
    """A layer's adapter with its tensors as the specs start them, not yet on the layer."""
    with naming(target):
        return Adapter(target, variant, cfg.for_layer(target.name), backend)


def init(targets: list[Target], adapters: dict[str, Adapter]) -> None:
    """`Variant.init` for each layer. Factorisations are too small for many threads each, so on a CPU up to four layers
    at a time are done side by side, where the method allows it and the weights are dense already."""

    def of(t: Target) -> None:
        with naming(t):
            adapters[t.name].variant.init(adapters[t.name], t.layer, adapters[t.name].cfg)

    threads = torch.get_num_threads()
    workers = min(threads, 4)
    if workers == 1 or not all(adapters[t.name].variant.side_by_side and _dense_on_cpu(t) for t in targets):
        for t in targets:
            of(t)
        return
    torch.set_num_threads(threads // workers)
    try:
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(of, targets):
                pass
    finally:
        torch.set_num_threads(threads)


def _dense_on_cpu(t: Target) -> bool:
    weight = weight_of(t.layer)
    plain = type(weight) in (Tensor, nn.Parameter)  # neither quantised nor sharded
    return weight is not None and plain and weight.is_floating_point() and weight.device.type == "cpu"


def derive(targets: list[Target], adapters: dict[str, Adapter]) -> None:
    """`Variant.derive` for each layer."""
    for t in targets:
        with naming(t):
            adapters[t.name].variant.derive(adapters[t.name], t.layer, adapters[t.name].cfg)


def install(
    model: nn.Module, name: str, cfg: AdapterConfig, backend: str, targets: list[Target], adapters: dict[str, Adapter]
) -> Attachment:
    """Freeze the base and hook the layers. Nothing in here can fail half-way."""
    others = attachments(model)
    if others:
        requires_grad = others[0].requires_grad  # as they were before the first
    else:
        requires_grad = [(p, p.requires_grad) for p in model.parameters()]
        for p, _ in requires_grad:
            p.requires_grad_(False)
    handles = []
    for target in targets:
        adapter = adapters[target.name].train(target.layer.training)
        if target.mesh is not None:
            replicate(adapter, target.mesh)
        if not hasattr(target.layer, ADAPTERS):
            target.layer.add_module(ADAPTERS, nn.ModuleDict().train(target.layer.training))
        cast(nn.ModuleDict, getattr(target.layer, ADAPTERS))[name] = adapter
        handles.append(target.layer.register_forward_pre_hook(adapter.before, with_kwargs=True))
        handles.append(target.layer.register_forward_hook(adapter.after))
    attachment = Attachment(name, cfg, backend, targets, adapters, requires_grad, handles)
    setattr(model, _ATTACHMENTS, {**getattr(model, _ATTACHMENTS, {}), name: attachment})
    attachment.backends()  # warns now, and not in the middle of a forward, where "triton" has to fall back
    return attachment


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take off the adapter of that name, or all of them. After the last, every base tensor and `requires_grad` flag is
    as it was before `attach`.

    Raises:
        AttachError: nothing is attached, or nothing of that name.
    """
    model = unwrap(model)
    for attachment in chosen(model, name):
        for handle in attachment.handles:
            handle.remove()
        for target in attachment.targets:
            by_name = cast(nn.ModuleDict, getattr(target.layer, ADAPTERS))
            del by_name[attachment.name]
            if not by_name:
                delattr(target.layer, ADAPTERS)
        left = {each.name: each for each in attachments(model) if each is not attachment}
        setattr(model, _ATTACHMENTS, left)
        if not left:
            for p, flag in attachment.requires_grad:
                p.requires_grad_(flag)
            delattr(model, _ATTACHMENTS)


def use(model: nn.Module, *names: str | Sequence[str | None]) -> None:
    """Let only the adapters of these names act, until the next `use`. The others stay attached, without gradients.

    With a list, `use(model, ["a", "b", None])`, each entry of the following batches has an adapter of its own, or none.
    Low-rank sums of several adapters then run as one: x and y are looked at once.

    Raises:
        AttachError: one of them is not attached.
        ValueError: no name is given.
    """
    by_row = len(names) == 1 and not isinstance(names[0], str)
    of_rows = list(names[0] if by_row else names)
    if not of_rows:
        raise ValueError("use: name at least one adapter; disabled(model) is a context without any")
    model = unwrap(model)
    wanted = {require_attachment(model, cast(str, name)).name for name in of_rows if not (by_row and name is None)}
    for attachment in attachments(model):
        for adapter in attachment.adapters.values():
            adapter.enabled = attachment.name in wanted
            adapter.rows = [i for i, name in enumerate(of_rows) if name == attachment.name] if by_row else None
            adapter.batch = len(of_rows)


@contextmanager
def only(model: nn.Module, name: str) -> Iterator[None]:
    """Within this context the model computes with that adapter alone, on every entry of a batch."""
    with _restored(adapters_of(model, None)):
        for each in attachments(model):
            for adapter in each.adapters.values():
                adapter.enabled, adapter.rows = each.name == name, None
        yield


@contextmanager
def disabled(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Within this context the model computes as without the adapter of that name, or as without any.

    Raises:
        AttachError: nothing is attached, or nothing of that name.
    """
    adapters = adapters_of(unwrap(model), name)
    with _restored(adapters):
        for adapter in adapters:
            adapter.enabled = False
        yield


@contextmanager
def _restored(adapters: list[Adapter]) -> Iterator[None]:
    """After this context the adapters act where they did before."""
    before = [(adapter.enabled, adapter.rows) for adapter in adapters]
    try:
        yield
    finally:
        for adapter, state in zip(adapters, before, strict=True):
            adapter.enabled, adapter.rows = state


def parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """The trainable parameters of the adapter of that name, or of all, for an optimiser."""
    return [p for adapter in adapters_of(unwrap(model), name) for p in adapter.parameters() if p.requires_grad]


def param_groups(model: nn.Module, lr: float, lr_ratio: float = 16.0, name: str | None = None) -> list[dict[str, Any]]:
    """Groups for an optimiser in which B learns `lr_ratio` times as fast as the rest (LoRA+, Hayou et al. 2024, arXiv
    2402.12354).

    Raises:
        AttachError: nothing is attached, or the method has no trainable B.
        ValueError: lr or lr_ratio is not above 0.
    """
    if not (lr > 0 and lr_ratio > 0):
        raise ValueError(f"param_groups: lr and lr_ratio must be above 0; got {lr} and {lr_ratio}")
    found = chosen(unwrap(model), name)
    slow, fast = [], []
    for adapter in (adapter for each in found for adapter in each.adapters.values()):
        for key, p in adapter.named_parameters():
            if p.requires_grad:
                (fast if key == "lora_B" else slow).append(p)
    if not fast:
        variants = ", ".join(each.cfg.variant for each in found)
        raise AttachError(f"param_groups: {variants} has no trainable lora_B for lr_ratio; use parameters(model)")
    return [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * lr_ratio}]


def state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The adapter's tensors as "<layer>.<tensor>", as `save` writes them. They share memory with the model's.

    Raises:
        AttachError: nothing is attached, nothing of that name, or several adapters are and none is named.
    """
    adapters = require_attachment(unwrap(model), name).adapters
    return {f"{layer}.{key}": t for layer, adapter in adapters.items() for key, t in adapter.state_dict().items()}


def variant_of(cfg: AdapterConfig) -> type[Variant]:
    """The registered variant of a config."""
    name = getattr(cfg, "variant", None)
    if name not in REGISTRY or not isinstance(cfg, AdapterConfig):
        raise AttachError(
            f"cfg must be the config of a registered variant ({', '.join(REGISTRY)}); got {type(cfg).__name__}"
        )
    return REGISTRY[name]


def check_free(model: nn.Module, name: str) -> None:
    """Raise where `name` is taken or can't be a name, or where a layer carries an adapter that was attached through
    another model: a second one would freeze that."""
    try:
        nn.ModuleDict({name: nn.Identity()})
    except (KeyError, TypeError) as error:
        raise ValueError(f"name={name!r} can't be an adapter's name ({error}); use letters, digits and _") from None
    mine = attachments(model)
    if name in {each.name for each in mine}:
        raise AttachError(
            f"an adapter named {name!r} is attached to this model already; call detach(model) first, or give this one "
            "another name"
        )
    own = {id(adapter) for each in mine for adapter in each.adapters.values()}
    for path, module in model.named_modules():
        if any(id(adapter) not in own for adapter in getattr(module, ADAPTERS, {}).values()):
            raise AttachError(
                f"{path or type(module).__name__} carries an adapter already; call detach on the model it was attached "
                "through"
            )


def attachments(model: nn.Module) -> list[Attachment]:
    """All that is attached to the model, in the order in which it was."""
    return list(getattr(model, _ATTACHMENTS, {}).values())


def chosen(model: nn.Module, name: str | None) -> list[Attachment]:
    """The attachment of that name, or all where it is None; an AttachError where there is none."""
    if name is None and attachments(model):
        return attachments(model)
    return [require_attachment(model, name)]


def adapters_of(model: nn.Module, name: str | None) -> list[Adapter]:
    """The layers' adapters of that name, or of all; an AttachError where there is none."""
    return [adapter for each in chosen(model, name) for adapter in each.adapters.values()]


def require_attachment(model: nn.Module, name: str | None = None) -> Attachment:
    """The attachment of that name, or the only one; an AttachError where there is none, or no telling which."""
    found = {each.name: each for each in attachments(model)}
    if not found:
        raise AttachError("no adapter is attached to this model; call attach(model, cfg) or load(model, path) first")
    if name is None and len(found) > 1:
        raise AttachError(f"several adapters are attached ({', '.join(found)}); say which with name=")
    if name is not None and name not in found:
        raise AttachError(f"no adapter is attached under the name {name!r}; there are {', '.join(found)}")
    return found[name or next(iter(found))]


def unwrap(model: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped, so that layer names don't depend on compilation."""
    return getattr(model, "_orig_mod", model)


@contextmanager
def naming(target: Target) -> Iterator[None]:
    """Name the layer in what a variant raises about it."""
    try:
        yield
    except AttachError as error:
        layer: Any = target.layer
        raise AttachError(f"{target.name} ({layer.in_features} → {layer.out_features}): {error}") from None
