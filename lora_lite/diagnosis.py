"""diagnose: what each layer's adapter does to its weight, and whether it still learns."""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor, nn

from .adapter import Adapter, around
from .attachment import require_attachment, unwrap
from .errors import AttachError
from .linalg import departure
from .primitives import LowRankAdd, Primitive
from .quantized import dense_weight, weight_of
from .reference import without_autocast
from .stacks import Stack
from .tables import text_of


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer's row.

    Args:
        layer: its name.
        gradients: norm of each trainable tensor's `.grad`; None for one that has none.
        relative_change: ‖ΔW‖ / ‖W‖ in the Frobenius norm, ΔW being what the adapter adds to the layer's linear map. NaN
            where the layer's weight can't be read, or is not finite, or the adapter isn't.
        effective_rank: exp of the entropy of ΔW's singular values over their sum (Roy & Vetterli 2007): how many
            directions share the change. 0 where ΔW is zero. Of a stack of experts the experts' mean.
        after_backward: whether the adapter has gradients in any layer: then a missing one is dead too.
        idle: why the adapter does nothing: its layer never ran, ran and got no gradient in training, or has left the
            model. Empty: nothing is known.
        not_finite: its tensors that have NaN or infinity.
    """

    layer: str
    gradients: dict[str, float | None]
    relative_change: float
    effective_rank: float
    after_backward: bool = False
    idle: str = ""
    not_finite: tuple[str, ...] = ()

    @property
    def grad_norm(self) -> float | None:
        """Of all its trainable tensors together; None before any backward."""
        found = [norm for norm in self.gradients.values() if norm is not None]
        return sum(norm**2 for norm in found) ** 0.5 if found else None

    @property
    def dead(self) -> tuple[str, ...]:
        """Trainable tensors that the last backward left with no gradient, a zero one, or one that is not finite."""
        if not self.after_backward:
            return ()
        return tuple(name for name, norm in self.gradients.items() if not (norm and math.isfinite(norm)))


@dataclass(frozen=True)
class Diagnosis:
    """A row a layer, in the model's order."""

    rows: list[LayerDiagnosis]

    def summary(self) -> str:
        """A table."""
        table = Table(title=f"{len(self.rows)} layers")
        for heading in ("layer", "gradient", "dead", "‖ΔW‖ / ‖W‖", "effective rank", "idle", "NaN or ∞"):
            right = heading in ("gradient", "‖ΔW‖ / ‖W‖", "effective rank")
            table.add_column(heading, justify="right" if right else "left")
        for row in self.rows:
            gradient = "–" if row.grad_norm is None else f"{row.grad_norm:.1e}"
            rank = f"{row.effective_rank:.1f}"
            dead = ", ".join(row.dead) or "–"
            broken = ", ".join(row.not_finite) or "–"
            table.add_row(row.layer, gradient, dead, f"{row.relative_change:.1e}", rank, row.idle or "–", broken)
        return text_of(table, 140)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw change, effective rank and gradient by layer into a picture file. Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(6.0, 0.12 * len(self.rows)), 6))
        columns: dict[str, Iterable[float | None]] = {
            "‖ΔW‖ / ‖W‖": (row.relative_change for row in self.rows),
            "effective rank": (row.effective_rank for row in self.rows),
            "gradient": (row.grad_norm for row in self.rows),
        }
        below: Any = figure.subplots(3, 1, sharex=True)
        for axes, (title, values) in zip(below, columns.items(), strict=True):
            axes.plot([float("nan") if value is None else value for value in values], marker=".", lw=0.8)
            axes.set_ylabel(title)
        below[-1].set_xlabel("layer, in the model's order")
        figure.tight_layout()
        figure.savefig(path)


@torch.no_grad()
def diagnose(model: nn.Module, name: str | None = None) -> Diagnosis:
    """What the attached adapter has become. Call it after a backward, before the gradients are cleared.

    `name` says which adapter, where several are attached. One layer's dense weight is held at a time; methods that are
    no low-rank sum take an SVD of N×K a layer.

    Raises:
        AttachError: nothing is attached.
    """
    model = unwrap(model)
    attachment = require_attachment(model, name)
    found = attachment.watch.idle(model)
    whys = {"never": "never ran", "unreached": "no gradient", "gone": "left the model"}
    idle = {layer: why for kind, why in whys.items() for layer in found.get(kind, [])}
    trained = any(p.grad is not None for adapter in attachment.adapters.values() for p in adapter.parameters())
    rows = []
    for target in attachment.targets:
        adapter = attachment.adapters[target.name]
        gradients = {
            name: None if p.grad is None else p.grad.float().norm().item()
            for name, p in adapter.named_parameters()
            if p.requires_grad
        }
        with without_autocast(adapter.device):
            changed, sizes, ranks = zip(*_each(adapter, target.layer), strict=True)
        change, size, why = math.hypot(*changed), math.hypot(*sizes), idle.get(target.name, "")
        if not (math.isfinite(change) and math.isfinite(size)):
            change = math.nan
        else:
            change = change / size if size else math.inf if change else 0.0
        named = (*adapter.named_parameters(), *adapter.named_buffers())
        broken = tuple(name for name, t in named if not (t.is_meta or t.isfinite().all()))  # meta: offloaded
        rows.append(LayerDiagnosis(target.name, gradients, change, sum(ranks) / len(ranks), trained, why, broken))
    return Diagnosis(rows)


def _each(adapter: Adapter, layer: Any) -> Iterator[tuple[float, float, float]]:
    """(‖ΔW‖, ‖W‖, effective rank) of a layer, or of each expert of a stack."""
    if not isinstance(layer, Stack) and weight_of(layer) is None:  # whoever has replaced the layer has taken it
        yield math.nan, math.nan, math.nan
        return
    primitive = adapter.at_rest(layer)
    parts = [(primitive, layer)]
    if isinstance(layer, Stack):
        parts = [(primitive.of(i), layer.expert(i)) for i in range(layer.num_experts)]
    for part, linear in parts:
        try:
            size = dense_weight(linear, torch.float32).norm().item()
            S = _singular_values(part, linear)
        except AttachError:  # a quantisation that can't be read
            yield math.nan, math.nan, math.nan
        else:
            yield S.norm().item(), size, _effective_rank(S)


def _singular_values(primitive: Primitive, layer: Any) -> Float[Tensor, " S"]:
    """Of ΔW, in float32."""
    if type(primitive) is LowRankAdd:  # those of B A, by two thin factorisations
        left, right = torch.linalg.qr(primitive.B.float()).R, torch.linalg.qr(primitive.A.float().t()).R
        return abs(primitive.scale) * _svdvals(left @ right.t())
    W = dense_weight(layer, torch.float32)
    eye = torch.eye(W.shape[1], device=W.device)
    constant = around(primitive, layer, torch.zeros_like(eye[:1]))
    change = (around(primitive, layer, eye) - constant).t() - W
    rounding = 4 * torch.finfo(W.dtype).eps * W.norm()
    if primitive.of_a_user:
        x, want, off = departure(lambda x: around(primitive, layer, x), W + change, constant)
        if off > 1e-3 * (want - constant - x @ W.t()).norm() + rounding * x.norm():  # it is no linear map
            change = torch.full_like(change, math.nan)
    return _svdvals(change if not change.norm() <= rounding else torch.zeros_like(change))


def _svdvals(M: Float[Tensor, "N K"]) -> Float[Tensor, " S"]:
    """NaN where M is not finite, and no error."""
    return torch.linalg.svdvals(M) if M.isfinite().all() else M.new_full((min(M.shape),), math.nan)


def _effective_rank(S: Float[Tensor, " S"]) -> float:
    if S.isnan().any():
        return math.nan
    if not S.sum() > 0:
        return 0.0
    shares = S / S.sum()
    return torch.special.entr(shares).sum().exp().item()
