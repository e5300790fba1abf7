"""Stacks: a mixture's experts, which transformers keeps as 3-D parameters, as layers that an adapter can stand on.

transformers runs such a module by an implementation that its config names. `join` puts one of our own there, which
calls each projection as a layer, a `Stack`, so that hooks reach it. E experts, T tokens, k experts a token, M = T·k
rows sorted by expert, K in_features, N out_features.
"""

import copy
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .errors import AttachError
from .operators import transformed
from .params import SITE
from .rows import Tokens
from .segments import Segments, product

STACKS = "lora_lite_stacks"  # attribute of an experts module, under which its projections stand as layers
IMPLEMENTATION = "lora_lite"  # our name among transformers' implementations


def is_experts(module: nn.Module) -> bool:
    """Whether transformers runs the module by the implementation that its config names."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "_apply_gate", "config", "num_experts"))


class Stack(nn.Module):
    """One projection of all experts as a layer, called with rows and the segments that say which are whose. It holds
    no tensor: the experts module keeps the parameters."""

    def __init__(self, experts: nn.Module, key: str) -> None:
        super().__init__()
        self.key = key
        self.rebind(experts)
        self.num_experts, self.out_features, self.in_features = self.weight.shape
        self.train(experts.training)

    def rebind(self, experts: nn.Module) -> None:
        """Read the parameters of this module: a replica's stacks are to read the replica's."""
        self._of = (experts,)  # in a tuple: as a submodule it would be its own child's child

    @property
    def experts(self) -> Any:
        """The module whose parameters it reads."""
        return self._of[0]

    @property
    def weight(self) -> Float[Tensor, "E N K"]:
        """A view of the parameter."""
        weight = getattr(self.experts, self.key)
        return weight.mT if self.experts.is_transposed else weight

    @property
    def bias(self) -> Float[Tensor, "E N"] | None:
        return getattr(self.experts, f"{self.key}_bias") if self.experts.has_bias else None

    @property
    def active(self) -> int:
        """The number of experts that a token visits, as the model's config has it.

        Raises:
            AttachError: it has none under a known name.
        """
        for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "top_k"):
            if isinstance(found := getattr(self.experts.config, name, None), int):
                return found
        raise AttachError("the model's config does not say how many experts a token visits; give r by rank_pattern")

    def forward(
        self, x: Float[Tensor, "M K"], segments: Segments, tokens: Tokens | None = None
    ) -> Float[Tensor, "M N"]:
        """The base's product of each row with its expert's weight. `tokens` is for hooks."""
        return grouped_linear(x.to(self.weight.dtype), self.weight, self.bias, segments)

    def expert(self, i: int) -> nn.Linear:
        """Expert i as a linear layer whose tensors are views of the stack's."""
        weight, bias = self.weight.detach(), self.bias
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(weight[i], requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach()[i], requires_grad=False)
        return linear

    def extra_repr(self) -> str:
        return f"{self.key}, num_experts={self.num_experts}, {self.in_features} → {self.out_features}"


def grouped_linear(
    x: Float[Tensor, "M K"], weight: Float[Tensor, "E N K"], bias: Float[Tensor, "E N"] | None, segments: Segments
) -> Float[Tensor, "M N"]:
    """W_e x + b_e of each row, e being its expert."""
    y = product(x, weight, segments)
    return y if bias is None else y + segments.vectors(bias.to(x.dtype), len(x), 0.0)


def stacks_of(experts: nn.Module) -> dict[str, Stack]:
    """Its projections as layers, by the names of their parameters: those that stand there, or new ones; none
    where they are no 3-D parameters."""
    if (joined := experts._modules.get(STACKS)) is not None:
        return dict(joined.items())  # type: ignore[return-value]
    keys = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    tensors = [getattr(experts, key, None) for key in keys]
    if not all(isinstance(t, Tensor) and t.ndim == 3 for t in tensors):
        return {}
    return {key: Stack(experts, key) for key in keys}


def _shared_out(experts: Any) -> bool:
    """By expert parallelism, of which transformers 5.17 says nothing."""
    return getattr(experts, "_is_expert_parallel", False)


def unfit_stack(stack: Stack) -> str:
    """Why no adapter could act on it; empty: nothing is known against it."""
    experts = stack.experts
    kind, weight = type(experts).__name__, getattr(experts, stack.key)
    if _shared_out(experts):
        return f"{kind} is shared out by expert parallelism, of which an adapter would get a part of the experts"
    if not weight.is_floating_point() or weight.dtype.itemsize == 1:
        return f"the experts of {kind} are quantised ({weight.dtype}), and have an implementation of their own"
    if weight.is_meta:
        return f"the experts of {kind} are offloaded or hold no values; load the model's weights before attach"
    return ""


# ---- in the model ----------------------------------------------------------------------------------------------------


def join(stacks: Iterable[Stack]) -> None:
    """Let the experts modules of these stacks call their projections as layers. The model's config stays as it is."""
    for stack in stacks:
        experts = stack.experts
        if STACKS not in experts._modules:
            _register()
            experts.add_module(STACKS, nn.ModuleDict(stacks_of(experts)))
            experts.__dict__["_config_of_the_base"] = experts.config
            experts.config = _dispatched(experts.config)
        experts._modules[STACKS][stack.key] = stack


def part(stacks: Iterable[Stack]) -> None:
    """Undo `join` where no projection carries an adapter any more."""
    for stack in stacks:
        experts = stack.experts
        standing = experts._modules.get(STACKS)
        if standing is not None and not any(SITE in each._modules for each in standing.values()):
            delattr(experts, STACKS)
            experts.config = experts.__dict__.pop("_config_of_the_base")


@contextmanager
def joined(stacks: list[Stack]) -> Iterator[None]:
    """Within this context the stacks are called, with or without adapters."""
    join(stacks)
    try:
        yield
    finally:
        part(stacks)


def _dispatched(config: Any) -> Any:
    """The same config for one module, naming our implementation. A copy: the model's is shared by all layers, is saved
    with the model, and `generate` swaps the implementation that it names."""
    own = copy.copy(config)
    internal = "_experts_implementation_internal"  # behind a property that would set it in nested configs too
    vars(own)[internal if internal in vars(own) else "_experts_implementation"] = IMPLEMENTATION
    return own


def _register() -> None:
    moe = sys.modules["transformers.integrations.moe"]  # whoever has a decorated module has imported it
    moe.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def experts_forward(
    experts: Any,
    hidden_states: Float[Tensor, "T H"],
    top_k_index: Int[Tensor, "T k"],
    top_k_weights: Float[Tensor, "T k"],
) -> Float[Tensor, "T H"]:
    """What transformers' implementations compute, each projection being a layer. No host sync.

    Raises:
        AttachError: expert parallelism was switched on after attach.
    """
    if _shared_out(experts):
        raise AttachError(f"{type(experts).__name__}: expert parallelism was switched on after attach; detach before")
    up, down = experts._modules[STACKS].values()
    for stack in (up, down):
        if stack.experts is not experts:
            stack.rebind(experts)
    T, k = top_k_index.shape
    experts_sorted, order = torch.sort(top_k_index.reshape(-1), stable=True)
    after = torch.arange(1, experts.num_experts + 1, device=order.device)
    segments = Segments(torch.searchsorted(experts_sorted, after, out_int32=True), whole=True)
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(T * k, device=order.device)).view(T, k)
    tokens = Tokens(order // k, T)
    hidden = up(_gather(hidden_states, tokens.of_rows, rows), segments=segments, tokens=tokens)
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    hidden = down(hidden, segments=segments, tokens=tokens)
    if experts.has_post_expert_norm:
        hidden = experts.post_expert_norm(hidden)
    return _weighted_sum(hidden, top_k_weights, rows, order, tokens.of_rows).to(hidden_states.dtype)


def _gather(rows: Tensor, index: Tensor, adjoint: Tensor) -> Tensor:
    """The rows that `index` names, summed over its second dimension where it has one.

    `adjoint` names for each row the places that it goes to, so that the gradient is the same the other way: not added
    into place, which is slower, and in low precision less exact.
    """
    if transformed():
        return rows[index] if index.ndim == 1 else rows[index].sum(1)
    return _Gather.apply(rows, index, adjoint)  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, adjoint: Tensor) -> Tensor:
        ctx.save_for_backward(index, adjoint)
        if index.ndim == 1:
            return rows.index_select(0, index)
        return nn.functional.embedding_bag(index, rows, mode="sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        index, adjoint = ctx.saved_tensors
        return _Gather.apply(*grads, adjoint, index), None, None  # type: ignore[return-value]


def _weighted_sum(
    hidden: Float[Tensor, "M H"],
    weights: Float[Tensor, "T k"],
    rows: Int[Tensor, "T k"],
    order: Int[Tensor, " M"],
    token: Int[Tensor, " M"],
) -> Float[Tensor, "T H"]:
    """Of each token the sum of its rows by their weights. Of each row: its place in `rows`, and its token."""
    if transformed():
        return (hidden[rows] * weights[..., None]).sum(1)
    return _WeightedSum.apply(hidden, weights, rows, order, token)


class _WeightedSum(torch.autograd.Function):
    """Rounded as transformers rounds it, so that a start is the base model's output to the bit."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor, rows: Tensor, order: Tensor, token: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weights, rows, order, token)
        return _gather(hidden * _by_row(weights, rows, order), rows, token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weights, rows, order, token = ctx.saved_tensors
        needs_hidden, needs_weights, *_ = ctx.needs_input_grad
        of_rows = _gather(grads[0], token, rows)
        d_hidden = d_weights = None
        if needs_weights:
            d_weights = _gather((of_rows * hidden).sum(1, keepdim=True), rows.view(-1), order)
            d_weights = d_weights.view_as(weights).to(weights.dtype)
        if needs_hidden:
            scale = of_rows.mul if torch.is_grad_enabled() else of_rows.mul_  # its last use
            d_hidden = scale(_by_row(weights, rows, order)).to(hidden.dtype)
        return d_hidden, d_weights, None, None, None


def _by_row(weights: Float[Tensor, "T k"], rows: Int[Tensor, "T k"], order: Int[Tensor, " M"]) -> Float[Tensor, "M 1"]:
    return _gather(weights.reshape(-1, 1), order, rows.view(-1))
