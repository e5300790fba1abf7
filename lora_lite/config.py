"""AdapterConfig: the fields that all variants share. Each variant's file adds its own in a subclass."""

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch

from .errors import ConfigError

Role = Literal["reader", "writer", "inner", "expert", "embedding"]
ROLES: tuple[Role, ...] = ("reader", "writer", "inner", "expert", "embedding")
KINDS: tuple[Role, ...] = ("expert", "embedding")  # of layers; the other roles are places beside the residual stream
_FLOAT32 = torch.finfo(torch.float32)
OF_THE_RANK = ("r", "rank_pattern", "divide_r_among_experts")  # fields
OF_THE_MODEL = (  # which layers, and how they train; not what one computes
    "target_roles", "target_names", "exclude_names", "layers", "modules_to_save", "rank_pattern", "alpha_pattern",
    "divide_r_among_experts", "dropout", "dtype",
)  # fmt: skip
OF_THE_SCALE = ("alpha", "alpha_pattern", "rslora")
_HERE = {  # names of fields in other libraries' configs, and what stands for them
    "rank": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "target_modules": 'target_names, regular expressions such as r"(q|v)_proj$", or target_roles',
    "exclude_modules": "exclude_names, regular expressions",
    "layers_to_transform": "layers",
    "use_dora": "a method of its own, DoRAConfig",
    "init_lora_weights": "a method of its own, PiSSAConfig or EVAConfig",
}
USUALLY_LEFT_OUT = ("lm_head", "embed", r"cls\.predictions")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which layers are adapted, and how large the adapter is.

    Args:
        r: rank of the update (number of reflections for HRA).
        alpha: the update is scaled by alpha / r where the method has a scale.
        rslora: scale by alpha / √r instead, which keeps the update's size as r grows (Kalajdzievski 2023, arXiv
            2312.03732).
        dropout: probability with which an element of x is left out of x Aᵀ in training; the rest is scaled up by
            1 / (1 − dropout). Base and start stay exact. For the methods that add a low-rank sum to the output.
        rank_pattern: regular expression → r of the layers in whose name it is found; the first that is counts.
        alpha_pattern: likewise for alpha.
        dtype: of the matrices. One-dimensional parameters stay float32 (float64 if this is float64): a gain near 1
            has a spacing of 7.8e-3 in bfloat16 and would not move. Arithmetic on tokens runs in the tokens' dtype.
        target_names: regular expressions searched in the layer's name; one must match. Empty: all. Each that is given
            must find a layer, or attach raises.
        target_roles: keep the layers that read from the residual stream ("reader": in_features is its width), write
            into it ("writer"), or neither ("inner"), or a mixture's stacked experts ("expert"). Empty: all. By default
            readers and writers; all, where `target_names` is given. Embeddings are adapted only where they are meant:
            by the role "embedding", or by a name of theirs in `target_names`; ".*" names none. The others are places
            beside the residual stream, and may be empty; "expert" and "embedding" name kinds of layers, and each that
            is given must find one that takes an adapter, or attach raises.
        exclude_names: regular expressions; a layer whose name matches one is left alone. By default output heads and
            what belongs to embeddings; nothing, where `target_names` is given. Output heads, whatever their name, stay
            out unless this is empty or `target_names` names them. The default spares embeddings that a role asks for.
        layers: indices of the transformer blocks to adapt. None: all.
        modules_to_save: regular expressions; modules in whose name one is found train in full beside the adapter
            (heads, embeddings, norms), on copies, and are saved in its file. Each must find a module.
        divide_r_among_experts: a stack of experts gets r divided by the number of experts that a token visits, at least
            1, so that a token meets as many ranks there as in a dense layer (Schulman 2025, "LoRA Without Regret").
            alpha stays. It becomes the attachment's `rank_pattern`; entries of that which match come first.

    Raises:
        ConfigError: a field's value is of another kind than its annotation says, or out of range; the message names the
            field. numpy's numbers are taken for Python's.
        TypeError: it has no field of that name; the message says what stands for PEFT's.
    """

    variant: ClassVar[str]
    unused: ClassVar[tuple[str, ...]] = ()  # fields that count for nothing in the method; `attach` warns of them
    takes_dropout: ClassVar[bool] = True  # whether it adds a low-rank sum to the output, which can leave inputs out

    r: int = 8
    alpha: float = 16.0
    dtype: torch.dtype = torch.float32
    target_roles: tuple[Role, ...] = None  # type: ignore[assignment]  # __post_init__ resolves it
    target_names: tuple[str, ...] = ()
    exclude_names: tuple[str, ...] = None  # type: ignore[assignment]  # likewise
    layers: tuple[int, ...] | None = None
    rslora: bool = False
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)  # a dict has none
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    modules_to_save: tuple[str, ...] = ()
    divide_r_among_experts: bool = False

    def __new__(cls, *args: Any, **values: Any) -> Self:
        takes = inspect.signature(cls.__init__).parameters
        unknown = [name for name in values if name not in takes]
        if unknown and not any(each.kind is each.VAR_KEYWORD for each in takes.values()):
            hints, known = "".join(_hint(name, takes) for name in unknown), ", ".join(f.name for f in fields(cls))
            raise TypeError(f"{cls.__name__} has no field {', '.join(unknown)}{hints or f'; it has {known}'}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._settle_kinds()
        for name in ("target_names", "modules_to_save"):
            self.require(getattr(self, name) is not None, name, "regular expressions, or () for none")
        defaults = {"target_roles": ("reader", "writer"), "exclude_names": USUALLY_LEFT_OUT}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, () if self.names_given else value)

        self.require(self.r >= 1, "r", "at least 1")
        self.require(self.alpha > 0, "alpha", "greater than 0")
        computes = isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point and self.dtype.itemsize > 1
        self.require(computes, "dtype", "a floating-point torch.dtype of 16 bits or more")
        self.require(0 <= self.dropout < 1, "dropout", "a probability of at least 0 and less than 1")
        if not self.takes_dropout:
            self.require(
                self.dropout == 0, "dropout", f"0: {self.variant} adds no low-rank sum that could leave inputs out"
            )
        self.require(all(role in ROLES for role in self.target_roles), "target_roles", f"some of {ROLES}")
        for name in ("rank_pattern", "alpha_pattern"):
            self.require(isinstance(getattr(self, name), Mapping), name, "a dict of regular expressions")
        for name in ("target_names", "exclude_names", "rank_pattern", "alpha_pattern", "modules_to_save"):
            for pattern in getattr(self, name):
                self.require(isinstance(pattern, str), name, "regular expressions")
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigError(
                        f"{type(self).__name__}.{name}: {pattern!r} is not a regular expression ({error}); "
                        "escape special characters with a backslash"
                    ) from None
        if self.layers is not None:
            self.require(all(_fits(i, int) and i >= 0 for i in self.layers), "layers", "indices of 0 or more, or None")
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            try:
                self._with_patterns_of(lambda other, pattern=pattern: other == pattern)
            except ConfigError as error:
                raise ConfigError(f"{error}, from the pattern {pattern!r}") from None

    def _settle_kinds(self) -> None:
        """Each field as a file would give it back: numbers of numpy as Python's, sequences as tuples, dicts of its own.
        And a ConfigError where it is none of what its annotation says: nothing else would tell "False" from True."""
        for name, hint in _hints(type(self)).items():
            value = _plain(getattr(self, name))
            if value is not None and any(tuple in (each, get_origin(each)) for each in _alternatives(hint)):
                value = (value,) if isinstance(value, str | int) else value  # a string is one name
                try:
                    value = tuple(map(_plain, value))
                except TypeError:
                    self.require(False, name, "a sequence")
            object.__setattr__(self, name, value)
            if not _fits(value, hint):
                self.require(False, name, " or ".join(map(_words, _alternatives(hint))))

    def require(self, ok: bool, field: str, wanted: str) -> None:
        """Raise a ConfigError that says what `field` must be, unless `ok`."""
        if not ok:
            raise ConfigError(f"{type(self).__name__}.{field} must be {wanted}; got {getattr(self, field)!r}")

    def require_storable(self) -> None:
        """Raise a ConfigError where a field has a value that no file can hold, before hours of training."""
        for name in (each.name for each in fields(self) if each.name != "dtype"):
            if found := _not_storable(getattr(self, name)):
                raise ConfigError(
                    f"{type(self).__name__}.{name} can't be written to a file and read back ({found}); give it "
                    "numbers, strings, or sequences and dicts of them, by strings"
                )

    @property
    def names_given(self) -> bool:
        """Whether the user named layers: those are adapted or an error says why not; none is filtered by a default."""
        return bool(self.target_names) and self.target_names != type(self).target_names

    @property
    def kinds_given(self) -> tuple[Role, ...]:
        """The roles that the user gave which name a kind of layer: one is adapted or an error says why not."""
        default = type(self).target_roles or ()
        return tuple(role for role in KINDS if role in self.target_roles and role not in default)

    @property
    def idle(self) -> dict[str, Any]:
        """Of the fields that the method has no use for, those that the user gave, with their values."""
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(self)}
        return {name: value for name in self.unused if (value := getattr(self, name)) != defaults[name]}

    @property
    def scale(self) -> float:
        """The factor of the update: alpha / r, or alpha / √r with rslora."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def for_layer(self, name: str) -> Self:
        """This config with the r and the alpha that its patterns give the layer of that name."""
        return self._with_patterns_of(lambda pattern: re.search(pattern, name) is not None)

    def renamed(self, names: Mapping[str, str]) -> Self:
        """This config for layers that have other names now, by the old ones: what the patterns gave a layer stays."""
        if all(old == new for old, new in names.items()) or not (self.rank_pattern or self.alpha_pattern):
            return self
        own = {rf"^{re.escape(new)}$": self.for_layer(old) for old, new in names.items()}
        ranks = {new: cfg.r for new, cfg in own.items() if cfg.r != self.r}
        alphas = {new: cfg.alpha for new, cfg in own.items() if cfg.alpha != self.alpha}
        return dataclasses.replace(self, rank_pattern=ranks, alpha_pattern=alphas)

    def _with_patterns_of(self, applies: Callable[[str], bool]) -> Self:
        values: dict[str, Any] = {}
        for name, patterns in (("r", self.rank_pattern), ("alpha", self.alpha_pattern)):
            found = [value for pattern, value in patterns.items() if applies(pattern)]
            values |= {name: found[0]} if found else {}
        if not (self.rank_pattern or self.alpha_pattern):
            return self
        return dataclasses.replace(self, **values, rank_pattern={}, alpha_pattern={})

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON-ready values; `from_dict` of the variant's config class reads it back."""
        values = dataclasses.asdict(self)
        for name in ("modules_to_save", "divide_r_among_experts"):
            if not values[name]:
                del values[name]  # earlier versions don't know it
        return {"variant": self.variant, **values, "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_common(cls, **values: Any) -> Self:
        """A config from what several methods are given alike, as in a sweep; what has no use here is left out."""
        without = cls.unused if cls.takes_dropout else (*cls.unused, "dropout")
        return cls(**{name: value for name, value in values.items() if name not in without})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AdapterConfig":
        """Rebuild a config; unknown fields are an error, since they would change what the adapter computes."""
        values = {name: value for name, value in values.items() if name != "variant"}
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ConfigError(f"{cls.__name__} has no field {', '.join(unknown)}; a newer lora-lite may know it")
        dtype = getattr(torch, str(values.get("dtype", "float32")), None)
        return cls(**{**values, "dtype": dtype})


def _hint(name: str, known: Mapping[str, Any]) -> str:
    """What a field's name that is not known may stand for; empty: nothing near."""
    if name in _HERE:
        return f"; {name} is {_HERE[name]} here"
    return "".join(f"; did you mean {near}?" for near in get_close_matches(name, known, n=1, cutoff=0.85))


def is_number(value: Any) -> bool:
    """Whether it is a number and no flag, and float32, in which adapters compute, takes it for neither zero nor
    infinity."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == 0 or _FLOAT32.tiny <= abs(value) <= _FLOAT32.max


# ---- what annotations say --------------------------------------------------------------------------------------------

_SCALARS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("a whole number below 2³¹", lambda value: isinstance(value, int) and is_number(value) and abs(value) < 2**31),
    float: ("a number in float32's range", is_number),
    str: ("a string", lambda value: isinstance(value, str)),
    NoneType: ("None", lambda value: value is None),
}


@functools.cache
def _hints(cls: type[AdapterConfig]) -> dict[str, Any]:
    """The annotations of a config's fields; as they stand where they name what can't be found."""
    try:
        found = get_type_hints(cls)
    except Exception:  # a class in a function may be annotated by what is there
        found = {f.name: {each.__name__: each for each in _SCALARS}.get(f.type, f.type) for f in fields(cls)}
    return {f.name: found.get(f.name, Any) for f in fields(cls)}


@functools.cache
def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _words(hint: Any) -> str:
    return f"one of {get_args(hint)}" if get_origin(hint) is Literal else _SCALARS.get(hint, (str(hint),))[0]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a kind that is told apart here, or the annotation says another."""
    if get_origin(hint) is Literal:
        return any(type(value) is type(each) and value == each for each in get_args(hint))  # True == 1
    if (found := _alternatives(hint)) != (hint,):
        return any(_fits(value, each) for each in found)
    return hint not in _SCALARS or _SCALARS[hint][1](value)


def _not_storable(value: Any) -> str:
    """What in it JSON has no word for, or another would come back of; empty: nothing."""
    if isinstance(value, Mapping):
        keys = (f"a key is a {type(key).__name__}" for key in value if type(key) is not str)
        return next(keys, "") or next(filter(None, map(_not_storable, value.values())), "")
    if isinstance(value, list | tuple):
        return next(filter(None, map(_not_storable, value)), "")
    return "" if value is None or type(value) in (str, int, float, bool) else f"a {type(value).__name__}"


def _plain(value: Any) -> Any:
    """The value without numpy, which JSON doesn't know, and in dicts that the caller can't change."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {_plain(key): _plain(each) for key, each in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value
