"""ParamSpec says what a variant keeps per layer; Params is the module that keeps it."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from .errors import AttachError

SITE = "lora_lite"  # attribute of a layer, under which its adapters' tensors stand
ATTACHMENTS = "_lora_lite"  # attribute of a model: its attachments by name
Init = Literal["zeros", "ones", "near_zero", "near_one", "kaiming"]


@dataclass(frozen=True)
class ParamSpec:
    """One tensor of a layer's adapter.

    Args:
        shape: of the tensor.
        init: how it starts: a name or a callable that fills the tensor in place. near_zero is N(0, 1e-4) and
            near_one 1 + N(0, 1e-4), for a tensor that alone stands between the base and the adapted layer: IA³'s gains
            l (their l = 1 leaves the activations as they are), RoAd's angles θ and scales α (R = I), AntiPaSTO's change
            of the singular values δ and its generators of R. At the exact value all of their entries are alike, as
            are both halves of a RoAd pair, and what is learned starts on that symmetry; and in bfloat16 such a start
            can be dead: its first steps are below the spacing at 1 (7.8e-3), and are rounded away. So they start
            beside the value, and in float32 whatever the config's dtype (vectors and scalars are, a matrix says so by
            `dtype`); step 0 is then the base model to 1e-3 (`near`). Where a factor can stand at exactly zero (LoRA's
            B) use that: step 0 is then the base model exactly, and the random factor beside it breaks the symmetry.
        trainable: whether it gets gradients.
        as_buffer: keep it as a buffer instead of a parameter.
        dtype: overrides the config's; see `resolve_dtype`.
        derived: recomputed from the base layer by `Variant.derive` on attach and on load, and never saved.
        copies: how many there are of it, along a leading dimension: one for each expert of a stack, set by the runtime.
    """

    shape: tuple[int, ...]
    init: Init | Callable[[Tensor], object] = "near_zero"
    trainable: bool = True
    as_buffer: bool = False
    dtype: torch.dtype | None = None
    derived: bool = False
    copies: int | None = None

    @property
    def near(self) -> bool:
        """Whether it starts beside the value at which the layer would be the base's: to 1e-3, not exactly."""
        return self.init in ("near_zero", "near_one")

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The shape with its copies."""
        return self.shape if self.copies is None else (self.copies, *self.shape)

    def resolve_dtype(self, config_dtype: torch.dtype) -> torch.dtype:
        """Its own dtype if it has one; else the config's, but at least float32 for vectors and scalars."""
        dtype = self.dtype or config_dtype
        if self.dtype is None and len(self.shape) <= 1:
            dtype = torch.promote_types(dtype, torch.float32)
        # A float64 config is for checking gradients: everything is float64 then.
        return torch.float64 if config_dtype is torch.float64 and dtype.is_floating_point else dtype

    def make(self, config_dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """A fresh tensor, initialised in at least float32 and rounded once; each copy by itself."""
        if self.copies is not None:
            one = dataclasses.replace(self, copies=None)
            return torch.stack([one.make(config_dtype, device) for _ in range(self.copies)])
        dtype = self.resolve_dtype(config_dtype)
        wide = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
        t = torch.empty(self.shape, dtype=wide, device=device)
        if callable(self.init):
            self.init(t)
        elif self.init == "zeros":
            t.zero_()
        elif self.init == "ones":
            t.fill_(1.0)
        elif self.init == "near_zero":
            t.normal_(0.0, 1e-4)
        elif self.init == "near_one":
            t.normal_(1.0, 1e-4)
        elif self.init == "kaiming":
            nn.init.kaiming_uniform_(t, a=5**0.5)  # as nn.Linear: uniform in ±1/√in_features
        else:
            raise ValueError(f"ParamSpec.init must be a callable or one of {get_args(Init)}; got {self.init!r}")
        return t.to(dtype)


class Params(nn.Module):
    """The tensors of one layer's adapter, as attributes under the names of their specs.

    `model.to(dtype)` converts them as their specs would have made them under a config of that dtype: vectors and
    scalars stay in float32. 8-bit dtypes convert nothing.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor: ...

    def __init__(self, specs: dict[str, ParamSpec], config_dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        # Without `init`, which may be a lambda: adapters are pickled.
        self.specs = {name: dataclasses.replace(spec, init="zeros") for name, spec in specs.items()}
        self._without_values: frozenset[str] = frozenset()  # tensors that got memory, and nothing has filled it since
        self.dtypes: dict[str, torch.dtype] = {}  # as made, or as `to` and the like have converted them
        for name, spec in specs.items():
            t = spec.make(config_dtype, device)
            if spec.as_buffer or spec.derived:
                self.register_buffer(name, t, persistent=not spec.derived)
            else:
                self.register_parameter(name, nn.Parameter(t, requires_grad=spec.trainable))
            self.dtypes[name] = t.dtype

    @property
    def recast(self) -> bool:
        """Whether something has given a tensor another dtype behind the back of `to` and the like: `p.data = …`."""
        return any(getattr(self, name).dtype != dtype for name, dtype in self.dtypes.items())

    def fill(self, name: str, value: Tensor) -> None:
        """Overwrite one tensor in place, converting dtype and device."""
        with torch.no_grad():
            getattr(self, name).copy_(value)
        self._without_values -= {name}

    def has_values(self) -> None:
        """Say that each tensor has been written to."""
        self._without_values = frozenset()

    def of(self, expert: int) -> "Params":
        """The tensors of one expert of a stack, under the same names: what is filled there is filled here."""
        return OneOf(self, expert)  # type: ignore[return-value]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `half`, `to_empty` and the like run on each tensor."""
        specs, before, emptied = {}, {}, set()
        all_of_them = getattr(fn, "__qualname__", "").startswith("Module.to_empty")
        for name, spec in self.specs.items():
            t = getattr(self, name)
            specs |= {id(t): spec, id(t.grad) if t.is_leaf else 0: spec}
            before[name] = t.dtype
            if (t.is_meta or all_of_them) and not spec.derived:  # what is derived is so anew
                emptied.add(name)

        def by_spec(t: Tensor) -> Tensor:
            moved, spec = fn(t), specs.get(id(t))
            if spec is None or moved.dtype == t.dtype:
                return moved
            if (
                moved.dtype.itemsize == 1
            ):  # a base that is stored in 8 bits (layerwise casting) is no adapter's business
                return t.to(moved.device)
            return t.to(moved.device, spec.resolve_dtype(moved.dtype))

        super()._apply(by_spec, recurse)
        now = {name: getattr(self, name).dtype for name in before}
        self.dtypes |= {name: dtype for name, dtype in now.items() if dtype != before[name]}
        self._without_values |= {name for name in emptied if not getattr(self, name).is_meta}
        return self

    @property
    def hollow(self) -> bool:
        """Whether a tensor has memory and no values: it was on the meta device, or was emptied."""
        return bool(self._without_values)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._without_values -= {name for name in self.specs if f"{prefix}{name}" in state_dict}


class OneOf:
    """One expert's tensors of a stack's: views under the same names."""

    def __init__(self, stack: Params, expert: int) -> None:
        vars(self).update(_stack=stack, _expert=expert)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._stack, name)
        return value[self._expert] if isinstance(value, Tensor) else value

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttachError(
            f"p.{name} = … would be lost on a stack of experts, of which p is one; write p.fill({name!r}, value)"
        )

    def fill(self, name: str, value: Tensor) -> None:
        """Overwrite one tensor in place, converting dtype and device."""
        with torch.no_grad():
            getattr(self, name).copy_(value)
