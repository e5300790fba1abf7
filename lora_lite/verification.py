"""verify: does the backend in force compute, on a real batch, what the reference computes in more precision?"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .adapter import Adapter, wider
from .attachment import require_attachment, unwrap
from .beside import buffers, differs
from .calibration import run_batch
from .errors import AttachError, KernelMismatchError, naming
from .idle import here_and_gone, listing, whole_kinds
from .layer_input import input_of
from .operators import version
from .quantized import evaluation_mode, weight_of
from .segments import Segments
from .selection import only
from .shapes import is_embedding
from .siblings import Family, as_called_by, family_under_way
from .site import Site
from .stacks import Stack
from .targets import Target

_REMEDIES = {
    True: "The reference ran: its base layer's own forward or backward is not what its weight says; or, of what is "
    "compared together, what it shares with layers that read the same x is wrong",
    False: 'attach(..., backend="reference") avoids the kernels',
}  # by whether it is the reference that is off
# No rounding explains a larger error, however wrong the layer's own weight is. The other gradients are sums over the
# tokens, of which little may be left.
_CEILINGS = {"output": 0.1, "grad_input": 0.1}
_CEILING = 1.0


@dataclass(frozen=True)
class Comparison:
    """One layer's row. Errors are relative norm errors against the wider reference, by what they are errors of:
    "output", "grad_input", and each trainable tensor's gradient under its name; with " together" behind it, of layers
    that read the same x as one; their grad_input is the sum of theirs."""

    layer: str
    backend: str
    errors: dict[str, float]
    allowed: dict[str, float]

    @property
    def worst(self) -> str:
        """What is furthest beyond, or nearest to, what is allowed."""
        return max(self.errors, key=lambda name: self.errors[name] / self.allowed[name])

    @property
    def excess(self) -> float:
        """The worst error as a multiple of what is allowed for it."""
        return self.errors[self.worst] / self.allowed[self.worst]

    def __str__(self) -> str:
        name = self.worst
        return f"{self.layer} ({self.backend}): {name} {self.errors[name]:.1e}, allowed {self.allowed[name]:.1e}"


class Call(NamedTuple):
    """A call of an adapted layer: its input, with the segments of its rows where it is a stack, the gradient of its
    output, and what it shares with others, if anything: its parent, by that one's call and x."""

    target: Target
    x: Tensor
    segments: Segments | None
    dy: Tensor
    parent: nn.Module | None
    shares: tuple[Any, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the tokens."""
        return self.dy.dtype if is_embedding(self.target.layer) else self.x.dtype


def verify(
    model: nn.Module, batch: Any, *, rtol: float | None = None, name: str | None = None, partial: bool = False
) -> list[Comparison]:
    """Run `batch` forward and backward and compare every adapted layer with the reference in float32, and of a float32
    layer in float64.

    Each layer is run again by itself, without dropout, on the input and the output gradient that the batch gave it:
    with the backend in force, with the PyTorch reference in the layer's own dtype, and with the wider one. Layers that
    read the same x as one (q, k and v) are run so too.

    Args:
        model: a model with an adapter attached. It is as it was afterwards, gradients included.
        batch: a dict, tuple or tensor as the model takes it. The backward starts at the output's `loss` where it has
            one (pass labels), otherwise at a fixed random projection of its floating-point tensors.
        rtol: relative norm error allowed. By default twice that of the PyTorch reference in the layer's own dtype, at
            least four roundings (in float64, which has no wider dtype, 256; of fewer than 16 numbers three times as
            many); of the output and the input's gradient at most 0.1.
        name: of the adapter, where several are attached; the others don't act meanwhile.
        partial: whether the batch may leave adapted layers out. Experts to which it was not routed it may anyway.

    Returns:
        One `Comparison` a call of an adapted layer, in the order in which they ran. Layers that ran without gradients,
        such as those of a part under no_grad, are named in a UserWarning and compared on a gradient of their own.

    Raises:
        ValueError: rtol is not above 0.
        AttachError: nothing is attached, adapted layers did not run, which the message names, one is sharded, or it is
            called within torch.inference_mode, where nothing has a gradient.
        KernelMismatchError: a layer's error is larger than allowed; it names the worst one.
    """
    if rtol is not None and not rtol > 0:
        raise ValueError(f"verify: rtol must be above 0, or None for the layer's own rounding; got {rtol}")
    if torch.is_inference_mode_enabled():
        raise AttachError(
            "verify: nothing has a gradient in torch.inference_mode, and it compares those; call it outside"
        )
    attachment = require_attachment(unwrap(model), name)
    for target in attachment.targets:
        if hasattr(weight_of(target.layer), "full_tensor"):
            raise AttachError(f"verify: {target.name} is sharded over processes; verify before fully_shard")
    with only(unwrap(model), attachment.name), _unseen(attachment.sites.values()), _buffers_kept(model):
        calls = _record(model, batch, attachment.targets)
        _require_all(unwrap(model), calls, attachment.targets, partial)
        rows: dict[int, Comparison] = {}
        for alike in _siblings(calls):
            rows |= zip(alike, _compare([calls[i] for i in alike], attachment.adapters, rtol), strict=True)
        found = [rows[i] for i in range(len(calls))]
    wrong = [row for row in found if not row.excess <= 1]  # a NaN is wrong too
    if wrong:
        worst = max(wrong, key=lambda row: row.excess if row.excess == row.excess else float("inf"))
        raise KernelMismatchError(
            f"{len(wrong)} of {len(found)} layers differ from the reference by more than rounding; the worst: "
            f"{worst}. {_REMEDIES[worst.backend == 'reference']}"
        )
    return found


@contextmanager
def _unseen(sites: Iterable[Site]) -> Iterator[None]:
    """What runs in here does not count as the layers' having run in training."""
    before = [(site, site.ran, site.ran_with_grad, site.ran_in_training) for site in sites]
    try:
        yield
    finally:
        for site, *ran in before:
            site.ran, site.ran_with_grad, site.ran_in_training = ran


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """What a forward in training writes to the base's buffers, such as BatchNorm's statistics, is undone. One that it
    leaves alone is not written to: whoever has made something of it would make that anew."""
    before = [(t, t.clone()) for t in buffers(model).values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for t, values in before:
                if differs(values, t):
                    t.copy_(values)


def _require_all(model: nn.Module, calls: list[Call], targets: list[Target], partial: bool) -> None:
    if not calls:
        raise AttachError("the batch ran none of the adapted layers: verify needs a batch that uses them")
    ran = {call.target.name for call in calls}
    here, gone = here_and_gone(model, targets)
    not_run = {t.name for t in here} - ran
    said = "verify: the batch did not run these adapted layers: {}. Their adapters do nothing if training does not run "
    said += "them either: leave them out, use a batch that runs them, or pass partial=True"
    if partial:
        return
    if idle := whole_kinds(here, not_run, "blocks") + gone:
        raise AttachError(said.format(listing(idle)))
    if idle := whole_kinds(here, not_run, "entries"):
        warnings.warn(said.format(listing(idle)), stacklevel=3)


def _record(model: nn.Module, batch: Any, targets: list[Target]) -> list[Call]:
    """Each call of an adapted layer."""
    seen: list[tuple[Target, Tensor, Segments | None, tuple[nn.Module, Family] | None]] = []
    outputs: dict[int, Tensor] = {}  # by the call's place in `seen`
    running: list[int] = []  # places: a layer may call another, or itself

    def before(target: Target) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            segments = kwargs["segments"] if isinstance(module, Stack) else None
            running.append(len(seen))
            seen.append((target, input_of(target.name, args, kwargs), segments, family_under_way()))

        return hook

    def after(module: nn.Module, args: Any, y: Tensor | None) -> Tensor | None:
        place = running.pop()
        if y is None:  # the call has raised, and somebody catches that
            return None
        outputs[place] = y
        return y.clone()  # a write into a view of y would lead its gradient past it

    handles = []
    for target in targets:
        handles.append(target.layer.register_forward_pre_hook(before(target), with_kwargs=True, prepend=True))
        handles.append(target.layer.register_forward_hook(after, always_call=True))
    try:
        with torch.enable_grad(), _without_checkpointing(model):
            loss = _loss(run_batch(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    ended = sorted(outputs)
    live = [outputs[i] for i in ended if outputs[i].requires_grad]
    found = torch.autograd.grad(loss, live, allow_unused=True) if live and loss.requires_grad else [None] * len(live)
    grads = iter(found)
    calls, with_gradient = [], set[str]()
    for i in ended:
        (target, x, segments, family), y = seen[i], outputs[i]
        dy = next(grads) if y.requires_grad else None
        if dy is not None and dy.any():
            with_gradient.add(target.name)
        elif dy is not None and dy.numel():
            dy = None
        parent, of_call = family or (None, None)
        dy = y.detach() if dy is None else dy
        calls.append(Call(target, x.detach(), segments, dy, parent, (id(of_call), id(x), version(x))))
    # A layer may run without gradients for once, as a target, or on no rows.
    names = dict.fromkeys(call.target.name for call in calls if call.x.numel())
    if without := [name for name in names if name not in with_gradient]:
        warnings.warn(
            "verify: these layers ran without gradients (under no_grad, detached, or an output that nothing uses), and "
            f"their adapters would not train: {listing(without)}. They are compared on a gradient of their own",
            stacklevel=3,
        )
    return calls


def _loss(output: Any) -> Tensor:
    if isinstance(loss := getattr(output, "loss", None), Tensor):
        return loss
    found = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    found = [t for t in found if t.numel()]
    found = [t for t in found if t.requires_grad] or found
    if not found:
        raise AttachError(
            f"verify: the model's output, a {type(output).__name__}, has no floating-point numbers to start a backward "
            "from; pass a batch with labels, or verify the part of the model that has one"
        )
    # No sum of squares: a rotation does not change one, and its gradient would be rounding alone.
    generator = torch.Generator().manual_seed(0)
    device = found[0].device
    means = [(y.float() * torch.randn(y.shape, generator=generator).to(y.device)).mean() for y in found]
    return torch.stack([mean.to(device) for mean in means]).sum()


@contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Reentrant checkpointing runs a block without gradients first, and again in the backward."""
    on = [module for module in model.modules() if getattr(module, "gradient_checkpointing", None) is True]
    try:
        for module in on:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def _siblings(calls: list[Call]) -> list[list[int]]:
    """The calls by their places; those that read the same x in one call of their parent, as one."""
    found: dict[Any, list[int]] = {}
    for i, call in enumerate(calls):
        found.setdefault(i if call.parent is None else call.shares, []).append(i)
    return list(found.values())


@dataclass
class _Run:
    """Of a call what is wanted, what the reference gives in the layer's dtype, and what is given."""

    want: dict[str, Tensor]
    plain: dict[str, Tensor]
    got: dict[str, Tensor]
    rows: int  # from which a gradient comes
    floors: dict[str, float]  # an error that is nothing
    joined: bool = False  # with layers that read the same x
    sizes: dict[str, float] = field(default_factory=dict)  # beside which an error counts; the result's own if not named

    def errors(self) -> dict[str, float]:
        return {name: self._error(name, got, self.floors.get(name, 0.0)) for name, got in self.got.items()}

    def allowed(self, dtype: torch.dtype) -> dict[str, float]:
        """Twice the reference's own error in that dtype; at least four roundings, or 256 where what is wanted is in no
        wider one: there the reference shows no error, and a sum in another order has one. Three times as much
        where the reference's error is luck: of a few numbers, and of parameters whose gradient comes from a few rows,
        there is not much to average over; and several layers as one add up in another order."""
        found = {}
        roundings = 4 if self.want["output"].dtype != dtype else 256
        for name, plain in self.plain.items():
            least = roundings * torch.finfo(dtype).eps / 2
            few = plain.numel() < 16 or (name not in _CEILINGS and self.rows < 16)
            luck = (3 if few else 1) * (3 if name not in _CEILINGS and self.joined else 1)
            found[name] = min(luck * max(2 * self._error(name, plain), least), _CEILINGS.get(name, _CEILING))
        return found

    def _error(self, name: str, result: Tensor, floor: float = 0.0) -> float:
        """‖result − want‖ / ‖want‖; 0 where the difference is no larger than a floor."""
        result, want = result.double(), self.want[name].double()
        difference, size = (result - want).norm().item(), self.sizes.get(name) or want.norm().item()
        if difference <= floor:
            return 0.0
        return difference / size if size else math.inf


def _compare(calls: list[Call], adapters: Mapping[str, Adapter], rtol: float | None) -> list[Comparison]:
    """A row for each of the calls: alone and, of several that read the same x, as one."""
    runs = []
    for call in calls:
        with naming(call.target.label):
            runs.append(_alone(call, adapters[call.target.name]))
    together = _together(calls, runs, adapters) if len(calls) > 1 else [None] * len(calls)
    rows = []
    for call, run, more in zip(calls, runs, together, strict=True):
        errors, allowed = run.errors(), run.allowed(call.dtype)
        if more is not None:
            errors |= {f"{name} together": error for name, error in more.errors().items()}
            allowed |= {f"{name} together": most for name, most in more.allowed(call.dtype).items()}
        allowed = allowed if rtol is None else dict.fromkeys(allowed, rtol)
        backend = adapters[call.target.name].in_force(call.x.device, call.dtype)
        rows.append(Comparison(call.target.name, backend, errors, allowed))
    return rows


def _alone(call: Call, adapter: Adapter) -> _Run:
    """A call of a layer by itself."""
    layer, x, segments, dy = cast(Any, call.target.layer), call.x, call.segments, call.dy
    wide = x if is_embedding(layer) else x.to(wider(call.dtype, x.device))

    def results(run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
        return _results([adapter], lambda x: [run(x)], x, [dy])[0]

    with evaluation_mode(adapter):  # two backends draw two masks
        want = results(lambda x: adapter.by_reference(layer, x, segments=segments), wide)
        # Around the layer itself: a quantised base has roundings of its own, which are no kernel's fault.
        plain = results(lambda x: adapter.by_reference(layer, x, False, segments), x)
        got = results(layer if segments is None else lambda x: layer(x, segments=segments), x)
    # A gain's gradient is a sum over the tokens, or two that cancel, of terms as large as dy ∘ y. Less than their
    # rounding is nothing; for a few numbers, less than what `allowed` has for those.
    terms = torch.finfo(call.dtype).eps * (dy.double() * want["output"].double()).norm().item()
    floors = {
        name: (6 if p.numel() < 16 else 1) * terms / max(p.detach().double().square().mean().sqrt().item(), 1.0)
        for name, p in adapter.named_parameters()
        if p.ndim < 2
    }
    rows = int(dy.reshape(-1, dy.shape[-1]).any(-1).sum())
    return _Run(want, plain, got, rows, floors)


def _together(calls: list[Call], alone: list[_Run], adapters: Mapping[str, Adapter]) -> list[_Run | None]:
    """The same calls as one, where their parent makes them so."""
    own = [adapters[call.target.name] for call in calls]
    with ExitStack() as stack:
        for adapter in own:
            stack.enter_context(evaluation_mode(adapter))
        family = stack.enter_context(as_called_by(cast(nn.Module, calls[0].parent)))
        found = _results(
            own, lambda x: [call.target.layer(x) for call in calls], calls[0].x, [each.dy for each in calls]
        )
    if not family.shares:
        return [None] * len(calls)
    wants, plains = (_summed(own, [getattr(run, kind) for run in alone]) for kind in ("want", "plain"))
    # Of gradients that cancel, rounding may be all that is left.
    sizes = {"grad_input": sum(run.want["grad_input"].double().norm().item() for run in alone)}
    of_each = zip(wants, plains, found, alone, strict=True)
    return [_Run(want, plain, got, run.rows, run.floors, True, sizes) for want, plain, got, run in of_each]


def _summed(adapters: list[Adapter], alone: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Results with the gradients that one tensor gets from several of them added up: x, and whatever layers share."""
    total: dict[Any, Tensor] = {}
    tensors = [{"grad_input": None, **dict(adapter.named_parameters())} for adapter in adapters]
    for own, results in zip(tensors, alone, strict=True):
        for name, t in own.items():
            if name in results:
                total[id(t)] = total[id(t)] + results[name] if id(t) in total else results[name]
    return [
        {name: total[id(own[name])] if name in own else each for name, each in results.items()}
        for own, results in zip(tensors, alone, strict=True)
    ]


def _results(
    adapters: Sequence[Adapter], run: Callable[[Tensor], list[Tensor]], x: Tensor, dys: Sequence[Tensor]
) -> list[dict[str, Tensor]]:
    """Of each layer its output, and the gradients of its trainable tensors and, unless that is ids, of the input, which
    is the same for all."""
    wanted = [{name: p for name, p in each.named_parameters() if p.requires_grad} for each in adapters]
    with torch.enable_grad():
        inputs = {"grad_input": (x := x.detach().requires_grad_())} if x.is_floating_point() else {}
        ys = run(x)
        tensors = [*inputs.values(), *(p for of_layer in wanted for p in of_layer.values())]
        grads = torch.autograd.grad(
            ys, tensors, [dy.to(y.dtype) for dy, y in zip(dys, ys, strict=True)], allow_unused=True
        )
    # A method may leave a tensor out.
    of = {id(t): torch.zeros_like(t) if grad is None else grad for t, grad in zip(tensors, grads, strict=True)}
    return [
        {"output": y.detach(), **{name: of[id(t)] for name, t in (inputs | of_layer).items()}}
        for y, of_layer in zip(ys, wanted, strict=True)
    ]
