"""Attachment: the record of what `attach` put on a model under a name, and how to look it up."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from rich.table import Table
from torch import Tensor, nn

from .adapter import Adapter, named_tensors
from .backend import select
from .beside import Beside
from .config import AdapterConfig
from .errors import AttachError
from .idle import copied, describe
from .left_out import LeftOut
from .params import ATTACHMENTS, SITE
from .placement import execution_device
from .quantized import token_dtype, weight_of
from .renaming import plain_name
from .shapes import described
from .site import Site
from .tables import text_of
from .targets import Target
from .watch import Watch
from .whole_modules import WholeModules, settle

DEFAULT = "default"
_SHOWN = 20  # lines of what is left out, in a summary


@dataclass(repr=False)
class Attachment:
    """What `attach` put on a model, under a name.

    Args:
        name, cfg, backend: as given to `attach`.
        targets: the adapted layers, in the model's order.
        adapters: each layer's, by the layer's name.
        left_out: what is not adapted: kinds of weights, how many, how large a part of the model, and why.
    """

    name: str
    cfg: AdapterConfig
    backend: str
    targets: list[Target]
    adapters: dict[str, Adapter]
    left_out: tuple[LeftOut, ...]
    sites: dict[str, Site]
    watch: Watch
    beside: Beside  # shared by all attachments of a model
    whole: WholeModules

    def __repr__(self) -> str:
        size = f"{self.trainable:,} trainable parameters on {len(self.targets)} layers"
        return f"Attachment({self.name!r}, {self.cfg.variant}: {size}; print its summary())"

    @property
    def trainable(self) -> int:
        """Number of trainable parameters, those of modules that train in full among them."""
        return sum(p.numel() for p in self.parameters())

    @property
    def acts(self) -> bool:
        """Whether `use` and `disabled` let it act."""
        return self.watch.acts

    @property
    def strength(self) -> float:
        """How many times as much as it has learned it changes its layers; 1 unless `use` was given another."""
        return next((site.strengths.get(self.name, 1) for site in self.sites.values()), 1)

    def parameters(self) -> list[nn.Parameter]:
        """Those for an optimiser."""
        own = [p for adapter in self.adapters.values() for p in adapter.parameters() if p.requires_grad]
        return _each_once([*own, *self.whole.parameters()])

    def backends(self) -> dict[str, tuple[str, str]]:
        """For each layer the backend in force, for tokens of its weight's dtype, and why."""
        return in_force(self.targets, self.backend)

    def summary(self) -> str:
        """A table with a row a layer: shape, role, trainable parameters, backend in force and why. Below it what is
        left out, largest part first."""
        base = self.beside.size
        what = self.cfg.variant if self.strength == 1 else f"{self.cfg.variant} at strength {self.strength}"
        table = Table(
            title=f"{self.name}, {what}: {self.trainable:,} trainable parameters on {len(self.targets)} layers "
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
                described(layer),
                target.role,
                f"{trainable:,}",
                "{} ({})".format(*backends[target.name]),
            )
        in_full = f"Trained in full: {self.whole}\n" if self.whole.names else ""
        return text_of(table, 160) + in_full + self._what_is_left_out()

    def _what_is_left_out(self) -> str:
        if not self.left_out:
            return ""
        share = 100 * sum(each.share for each in self.left_out)
        lines = [
            f"Left out, {share:.1f} % of the model's parameters:",
            *(f"  {each}" for each in self.left_out[:_SHOWN]),
        ]
        if len(self.left_out) > _SHOWN:
            lines.append(f"  and {len(self.left_out) - _SHOWN} more kinds: Attachment.left_out has them all")
        return "\n".join(lines) + "\n"


def _each_once(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Layers may share some, of which an optimiser would make two steps."""
    return list({id(p): p for p in parameters}.values())


def in_force(targets: list[Target], backend: str) -> dict[str, tuple[str, str]]:
    """Of each layer the backend that runs there, for tokens of its weight's dtype, and why."""
    found = {}
    for target in targets:
        weight = weight_of(target.layer)
        assert weight is not None
        device = execution_device(target.layer) or weight.device
        found[target.name] = select(backend, device, token_dtype(target.layer))[1:]
    return found


# ---- looking it up ---------------------------------------------------------------------------------------------------


def attachments(model: nn.Module) -> list[Attachment]:
    """All that is attached to the model, in the order in which it was."""
    return list(getattr(model, ATTACHMENTS, {}).values())


def record(model: nn.Module, attachment: Attachment) -> None:
    """Keep the attachment with the model."""
    setattr(model, ATTACHMENTS, {**getattr(model, ATTACHMENTS, {}), attachment.name: attachment})


def forget(model: nn.Module, attachment: Attachment) -> None:
    """Undo `record`."""
    left = {each.name: each for each in attachments(model) if each.name != attachment.name}
    if left:
        setattr(model, ATTACHMENTS, left)
    else:
        delattr(model, ATTACHMENTS)


def require_attachment(model: nn.Module, name: str | None = None) -> Attachment:
    """The attachment of that name, or the only one; an AttachError where there is none, or no telling which."""
    found = {each.name: each for each in attachments(model)}
    if not found:
        inside = next((path for path, module in model.named_modules() if path and attachments(module)), "")
        raise AttachError(
            "no adapter is attached to this model; call attach(model, cfg) or load(model, path) first"
            + (f", or pass the module through which one is attached: {inside}" if inside else "")
        )
    if name is None and len(found) > 1:
        raise AttachError(f"several adapters are attached ({', '.join(found)}); say which with name=")
    if name is not None and name not in found:
        raise AttachError(f"no adapter is attached under the name {name!r}; there are {', '.join(found)}")
    return found[name or next(iter(found))]


def settle_modules(model: nn.Module) -> None:
    """Put the modules that train in full, or the base's, in their places."""
    settle([(each.whole, each.acts) for each in attachments(model)])


def chosen(model: nn.Module, name: str | None) -> list[Attachment]:
    """The attachment of that name, or all where it is None; an AttachError where there is none."""
    if name is None and attachments(model):
        return attachments(model)
    return [require_attachment(model, name)]


def sites_of(model: nn.Module) -> list[Site]:
    """Every layer's site."""
    return list({id(site): site for each in attachments(model) for site in each.sites.values()}.values())


def require_no_copies(model: nn.Module, what: str) -> None:
    """Raise an AttachError where copies of adapted layers stand in the model, which `what` would not reach."""
    if found := copied(model):
        raise AttachError(f"{what}: {describe({'copied': list(found)})}")


def parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """The trainable parameters of the adapter of that name, or of all, for an optimiser."""
    return _each_once([p for each in chosen(unwrap(model), name) for p in each.parameters()])


def param_groups(
    model: nn.Module, lr: float, lr_ratio: float = 16.0, name: str | None = None, *, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Groups for an optimiser.

    Args:
        lr: the learning rate.
        lr_ratio: how many times as fast B learns as the rest (LoRA+, Hayou et al. 2024, arXiv 2402.12354); 1 for
            methods without one.
        name: of the adapter; all of them without it.
        weight_decay: of matrices. Vectors and scalars get none: gains, magnitudes and λ stand at other values than
            zero, to which it would pull them. Without it, groups leave it to the optimiser.

    Raises:
        AttachError: nothing is attached, or the method has no trainable B, and lr_ratio is not 1.
        ValueError: lr or lr_ratio is not above 0, or weight_decay below it.
    """
    if not (lr > 0 and lr_ratio > 0):
        raise ValueError(f"param_groups: lr and lr_ratio must be above 0; got {lr} and {lr_ratio}")
    if weight_decay is not None and not weight_decay >= 0:
        raise ValueError(f"param_groups: weight_decay must be 0 or more, or None; got {weight_decay}")
    found = chosen(unwrap(model), name)
    trained = [
        (p, key == "lora_B", len(adapter.specs[key].shape) < 2)
        for adapter in (adapter for each in found for adapter in each.adapters.values())
        for path, p in adapter.named_parameters()
        for key in [path.removeprefix("parametrizations.").partition(".")[0]]
        if p.requires_grad
    ]
    if lr_ratio != 1 and not any(is_B for _, is_B, _ in trained):
        variants = ", ".join(each.cfg.variant for each in found)
        raise AttachError(f"param_groups: {variants} has no trainable lora_B for lr_ratio; pass lr_ratio=1")
    trained += [(p, False, p.ndim < 2) for each in found for p in each.whole.parameters()]
    groups: dict[tuple[float, float | None], list[Any]] = {}
    for p, is_B, is_vector in trained:
        decay = 0.0 if is_vector and weight_decay is not None else weight_decay
        groups.setdefault((lr * lr_ratio if is_B else lr, decay), []).append(p)
    return [
        {"params": _each_once(params), "lr": rate, **({} if decay is None else {"weight_decay": decay})}
        for (rate, decay), params in groups.items()
    ]


def state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The adapter's tensors as "<layer>.<tensor>", as `save` writes them. They share memory with the model's.

    Raises:
        AttachError: nothing is attached, nothing of that name, or several adapters are and none is named.
    """
    attachment = require_attachment(unwrap(model), name)
    return named_tensors(attachment.adapters) | {name: t.detach() for name, t in attachment.whole.tensors().items()}


def own_tensors(model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Of the model's state dict, or of one like it, what belongs to its adapters, trains in full with them, or trains
    beside them, since its `requires_grad` was switched on after attach."""
    names = {name for each in attachments(model) for name in each.whole.entries}
    names |= {plain_name(name) for name, p in model.named_parameters() if p.requires_grad}
    tensors = model.state_dict() if tensors is None else tensors
    found = {name: t for name, t in tensors.items() if SITE in name.split(".") or plain_name(name) in names}
    for name, module in model.named_modules():
        # HQQ's layers give what they hold themselves, and not what stands on them.
        if SITE in module._modules and type(module).state_dict is not nn.Module.state_dict:
            found |= cast(nn.Module, module._modules[SITE]).state_dict(prefix=f"{name}.{SITE}.")
    return found


def unwrap(model: nn.Module) -> nn.Module:
    """The module that torch.compile, Fabric, DataParallel, DistributedDataParallel or DeepSpeed wraps: names don't
    depend on them. An AttachError where it is no module."""
    if not isinstance(model, nn.Module):
        raise AttachError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise AttachError(
            "the model is a torch.jit.ScriptModule, which no hook reaches; adapt the module that it was made of, and "
            "trace that"
        )
    for compiled_or_fabric in ("_orig_mod", "_original_module"):
        if isinstance(inner := model._modules.get(compiled_or_fabric), nn.Module):
            return unwrap(inner)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or _is_deepspeed(model):
        return unwrap(cast(nn.Module, model.module))
    return model


def _is_deepspeed(model: nn.Module) -> bool:
    return any(each.__name__ == "DeepSpeedEngine" for each in type(model).__mro__)
