"""attach and detach: put a variant's parameters on the matching layers, hook them, and take all of it off again."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

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
from .quantized import dense_weight, weight_of
from .targets import Target, find_targets
from .variant import REGISTRY, Variant

_ATTACHMENT = "_lora_lite"  # attribute of the model: its Attachment
ADAPTERS = "lora_lite"  # attribute of a layer: its adapters by name
_DEFAULT = "default"


class Adapter(Params):
    """One layer's adapter: its tensors, and the two hooks that run its primitive around the layer."""

    def __init__(self, target: Target, variant: type[Variant], cfg: AdapterConfig, backend: str) -> None:
        layer: Any = target.layer
        specs = variant.param_specs(layer.in_features, layer.out_features, cfg)
        weight = weight_of(layer)
        assert weight is not None  # it is a target
        super().__init__(specs, cfg.dtype, weight.device)
        self.variant, self.cfg, self.backend, self.enabled = variant, cfg, backend, True
        # Between the two hooks of one call: the primitive, what on_input kept, and the operations. A list, since
        # nn.Module's own __setattr__ is slow enough to show.
        self._running: list[Any] = []

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
        primitive = self.variant.primitive(self, layer, self.cfg)
        x, carry = primitive.on_input(x, ops)
        self._running.append((primitive, carry, ops))
        return (x, *rest), kwargs

    def after(self, layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> Any:
        """Forward hook."""
        if not self._running:
            return None
        primitive, carry, ops = self._running.pop()
        return primitive.on_output(y, carry, ops)

    def by_reference(self, layer: Any, x: Tensor) -> Tensor:
        """What the layer gives for x, all of it in PyTorch and in x's dtype: the dense weight, the bias, this adapter."""
        primitive = self.variant.primitive(self, layer, self.cfg)
        x, carry = primitive.on_input(x, reference)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return primitive.on_output(linear(x, dense_weight(layer, x.dtype), bias), carry, reference)

    def in_force(self, x: Tensor) -> str:
        """The backend that runs for this input."""
        return select(self.backend, x.device, x.dtype)[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_running": []}  # a call that raised may have left what can't be copied

    def extra_repr(self) -> str:
        return f"{self.variant.name}, r={self.cfg.r}"


@dataclass
class Attachment:
    """What `attach` put on a model."""

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
            title=f"{self.cfg.variant}: {self.trainable:,} trainable parameters on {len(self.targets)} layers "
            f"({100 * self.trainable / max(base, 1):.3f} % of the base's {base:,})"
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


def attach(
    model: nn.Module,
    cfg: AdapterConfig,
    *,
    backend: str = "auto",
    calibration_data: CalibrationData | None = None,
) -> Attachment:
    """Freeze `model` and put an adapter on each layer that `cfg` selects. The base weights are never changed.

    Args:
        model: any module with linear-like layers (in_features, out_features, weight).
        cfg: a variant's config, such as `LoRAConfig(r=8)`.
        backend: "triton" for the fused kernels, "reference" for PyTorch, "auto" for kernels where they run.
        calibration_data: model inputs (dicts, tuples, tensors; a DataLoader works) for EVA and, optionally, AntiPaSTO.

    Returns:
        An `Attachment`; print its `summary()`.

    Raises:
        AttachError: an adapter is attached already, no layer matches, or a layer can't take this adapter.
        CalibrationError: the variant needs calibration data and got none or too little.
        In each case the model is as it was.
    """
    model = unwrap(model)
    check_backend(backend)
    variant = variant_of(cfg)
    check_free(model)
    targets = find_targets(model, cfg)
    adapters = {target.name: build(target, variant, cfg, backend) for target in targets}
    if variant.calibration == "required" or (variant.calibration == "optional" and calibration_data is not None):
        statistics = {}
        for t in targets:
            with naming(t):
                statistics[t.name] = (t.layer, variant.statistic(adapters[t.name], t.layer, adapters[t.name].cfg))
        for name, statistic in gather(model, statistics, calibration_data).items():
            variant.calibrate(adapters[name], statistic, adapters[name].cfg)
    else:
        init(targets, adapters)
    derive(targets, adapters)
    return install(model, cfg, backend, targets, adapters)


def build(target: Target, variant: type[Variant], cfg: AdapterConfig, backend: str) -> Adapter:
    """A layer's adapter with its tensors as the specs start them, not yet on the layer."""
    with naming(target):
        return Adapter(target, variant, cfg.for_layer(target.name), backend)


def init(targets: list[Target], adapters: dict[str, Adapter]) -> None:
    """`Variant.init` for each layer."""
    for t in targets:
        with naming(t):
            adapters[t.name].variant.init(adapters[t.name], t.layer, adapters[t.name].cfg)


def derive(targets: list[Target], adapters: dict[str, Adapter]) -> None:
    """`Variant.derive` for each layer."""
    for t in targets:
        with naming(t):
            adapters[t.name].variant.derive(adapters[t.name], t.layer, adapters[t.name].cfg)


def install(
    model: nn.Module, cfg: AdapterConfig, backend: str, targets: list[Target], adapters: dict[str, Adapter]
) -> Attachment:
    """Freeze the base and hook the layers. Nothing in here can fail half-way."""
    requires_grad = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in requires_grad:
        p.requires_grad_(False)
    handles = []
    for target in targets:
        adapter = adapters[target.name]
        by_name = nn.ModuleDict({_DEFAULT: adapter}).train(target.layer.training)
        target.layer.add_module(ADAPTERS, by_name)
        handles.append(target.layer.register_forward_pre_hook(adapter.before, with_kwargs=True))
        handles.append(target.layer.register_forward_hook(adapter.after))
    attachment = Attachment(cfg, backend, targets, adapters, requires_grad, handles)
    setattr(model, _ATTACHMENT, attachment)
    attachment.backends()  # warns now, and not in the middle of a forward, where "triton" has to fall back
    return attachment


def detach(model: nn.Module) -> None:
    """Take the adapter off. Every base tensor and `requires_grad` flag is as it was before `attach`.

    Raises:
        AttachError: nothing is attached.
    """
    model = unwrap(model)
    attachment = require_attachment(model)
    for handle in attachment.handles:
        handle.remove()
    for target in attachment.targets:
        delattr(target.layer, ADAPTERS)
    for p, flag in attachment.requires_grad:
        p.requires_grad_(flag)
    delattr(model, _ATTACHMENT)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes as without its adapter."""
    adapters = list(require_attachment(unwrap(model)).adapters.values())
    before = [adapter.enabled for adapter in adapters]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter, enabled in zip(adapters, before, strict=True):
            adapter.enabled = enabled


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The adapter's trainable parameters, for an optimiser."""
    adapters = require_attachment(unwrap(model)).adapters.values()
    return [p for adapter in adapters for p in adapter.parameters() if p.requires_grad]


def param_groups(model: nn.Module, lr: float, lr_ratio: float = 16.0) -> list[dict[str, Any]]:
    """Groups for an optimiser in which B learns `lr_ratio` times as fast as the rest (LoRA+, Hayou et al. 2024, arXiv
    2402.12354).

    Raises:
        AttachError: nothing is attached, or the method has no trainable B.
        ValueError: lr or lr_ratio is not above 0.
    """
    if not (lr > 0 and lr_ratio > 0):
        raise ValueError(f"param_groups: lr and lr_ratio must be above 0; got {lr} and {lr_ratio}")
    attachment = require_attachment(unwrap(model))
    slow, fast = [], []
    for adapter in attachment.adapters.values():
        for name, p in adapter.named_parameters():
            if p.requires_grad:
                (fast if name == "lora_B" else slow).append(p)
    if not fast:
        raise AttachError(
            f"param_groups: {attachment.cfg.variant} has no trainable lora_B for lr_ratio; use parameters(model)"
        )
    return [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * lr_ratio}]


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors as "<layer>.<tensor>", as `save` writes them. They share memory with the model's."""
    adapters = require_attachment(unwrap(model)).adapters
    return {f"{name}.{key}": t for name, adapter in adapters.items() for key, t in adapter.state_dict().items()}


def variant_of(cfg: AdapterConfig) -> type[Variant]:
    """The registered variant of a config."""
    name = getattr(cfg, "variant", None)
    if name not in REGISTRY or not isinstance(cfg, AdapterConfig):
        raise AttachError(
            f"cfg must be the config of a registered variant ({', '.join(REGISTRY)}); got {type(cfg).__name__}"
        )
    return REGISTRY[name]


def check_free(model: nn.Module) -> None:
    """Raise an AttachError where this model or a layer of it carries an adapter: a second one would freeze that."""
    if hasattr(model, _ATTACHMENT):
        raise AttachError("an adapter is attached to this model already; call detach(model) first")
    for name, module in model.named_modules():
        if hasattr(module, ADAPTERS):
            raise AttachError(
                f"{name or type(module).__name__} carries an adapter already; call detach on the model it was attached "
                "through"
            )


def require_attachment(model: nn.Module) -> Attachment:
    """What is attached to the model; an AttachError where nothing is."""
    attachment = getattr(model, _ATTACHMENT, None)
    if attachment is None:
        raise AttachError("no adapter is attached to this model; call attach(model, cfg) or load(model, path) first")
    return attachment


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
