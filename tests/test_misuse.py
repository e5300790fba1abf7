"""Misuse: each error names the layer or field, what is wrong and the remedy, and leaves the model as it was."""

import dataclasses
import inspect
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import peft
import pytest
import torch
from models import VARIANTS, assert_close, assert_same, config, llama, randomize, snapshot, start_tolerance, token_ids
from torch import Tensor, nn

import lora_lite as ll

Q0 = "model.layers.0.self_attn.q_proj"
NEED_WEIGHT = ("pissa", "dora", "delora", "antipasto")


def refused(error: type[Exception], call: Callable[[], Any], *fragments: str, model: nn.Module | None = None) -> str:
    """`call` raises `error` with these fragments in its message, and `model` is bit for bit as it was."""
    before = snapshot(model) if model else None
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    for fragment in fragments:
        assert fragment in message
    if model and before:
        assert_same(model, before)
    return message


def refused_attach(cfg: Any, *fragments: str, error: type[Exception] = ll.AttachError, **options: Any) -> str:
    """attach to a Llama with a mix of flags is refused; then a good config still attaches and runs."""
    model: Any = llama().train()
    next(model.parameters()).requires_grad_(False)
    model.model.layers[0].eval()
    message = refused(error, lambda: ll.attach(model, cfg, **options), *fragments, model=model)
    ll.attach(model, ll.LoRAConfig(r=2))
    model(token_ids())
    return message


# ---- attach and detach out of turn ----


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: torch.compile(m, backend="eager")], ids=["plain", "compiled"])
def test_attach_twice(wrap: Callable[[nn.Module], Any]) -> None:
    model = llama()
    ll.attach(model, ll.LoRAConfig(r=4))
    randomize(model)
    again = wrap(model)
    refused(ll.AttachError, lambda: ll.attach(again, ll.IA3Config()), "attached", "detach(model) first", model=model)
    ll.detach(again)
    ll.attach(model, ll.IA3Config())


@pytest.mark.parametrize("call", [ll.detach, ll.parameters, ll.state_dict, lambda m: ll.disabled(m).__enter__()])
def test_nothing_attached(call: Callable[[nn.Module], Any]) -> None:
    model = llama()
    refused(ll.AttachError, lambda: call(model), "no adapter is attached", "attach(model, cfg)", "load", model=model)
    ll.attach(model, ll.LoRAConfig(r=4))
    ll.detach(model)
    refused(ll.AttachError, lambda: call(model), "no adapter is attached", model=model)


# ---- No layer to adapt ----


@pytest.mark.parametrize(
    "fields",
    [
        {"target_names": ("qproj",)},
        {"layers": (7,)},
        {"target_roles": ("inner",)},
        {"exclude_names": (".",)},
        {"target_names": ("q_proj", "lm_head.weight")},
    ],
    ids=str,
)
def test_no_match_lists_the_candidates(fields: dict[str, Any]) -> None:
    message = refused_attach(
        ll.LoRAConfig(**fields),
        "no layer matches",
        *(f"{name}={value}" for name, value in fields.items()),
        "  model.layers.*.self_attn.q_proj (reader) ×2",
        "  model.layers.*.mlp.down_proj (writer) ×2",
        "  lm_head (reader) ×1",
        "  model.embed_tokens (embedding) ×1",
    )
    assert len(message.splitlines()) == 1 + 9, "a line for each kind of layer, not for each layer"


def test_no_match_keeps_digits_that_are_no_block_index() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)}) for _ in "abc"])

    message = refused(ll.AttachError, lambda: ll.attach(Net(), ll.LoRAConfig(target_names=("query",))))
    assert "stack.*.fc1 (reader) ×3" in message
    assert "stack.*.fc2 (writer) ×3" in message


def test_no_linear_layer_at_all() -> None:
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.LayerNorm(3))
    refused(ll.AttachError, lambda: ll.attach(model, ll.LoRAConfig()), "the model has no linear layer", model=model)


# ---- Config and layer do not fit ----


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ("ia3", "ia3_ff", "road")])
def test_r_larger_than_the_layer(variant: str) -> None:
    cfg = config(variant, r=36, target_names=("q_proj",))
    data = [{"input_ids": token_ids(4)}]
    refused_attach(cfg, f"{Q0} (32 → 32): r=36 is larger", "use r ≤ 32", calibration_data=data)


def test_groups_that_do_not_divide_the_layer() -> None:
    cfg = ll.RoadConfig(target_names=("q_proj",))
    refused_attach(
        cfg, f"{Q0} (32 → 32): group_size=64 does not divide its out_features=32", "use a group_size that does"
    )
    attachment = ll.attach(llama(), ll.RoadConfig(group_size=32))
    assert {t.layer.out_features for t in attachment.targets} == {32}
    assert "group_size=32 does not divide its width" in attachment.summary()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": 3}, r"kind must be one of \(1, 2, 4\); got 3"),
        ({"group_size": 7}, "group_size must be even and at least 2.*got 7"),
        ({"group_size": 0}, "group_size must be even and at least 2.*got 0"),
        ({"dropout": 0.1}, "dropout must be 0: road adds no low-rank sum"),
    ],
)
def test_road_configs_that_no_layer_could_use(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ConfigError, match=rf"RoadConfig\.{message}"):
        ll.RoadConfig(**fields)


FIELDS = {"r": 12, "rank_pattern": {"0": 12}, "alpha": 3.0, "alpha_pattern": {"0": 3.0}, "rslora": True}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_field_counts_or_attach_says_that_it_does_not(variant: str, field: str) -> None:
    """Whether it counts shows in the shapes, or in what the layer computes with tensors that are no start's."""

    def computed(**fields: Any) -> tuple[list[Tensor], str]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16)).requires_grad_(False)
        own = {"target_roles": (), "target_names": ("0",), **({"group_size": 4} if variant == "road" else {})}
        cfg = dataclasses.replace(ll.REGISTRY[variant].config.from_common(r=4, **own), **fields)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ll.attach(model, cfg, calibration_data=[torch.randn(32, 16)] if variant == "eva" else None)
        randomize(model)
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
        return [*ll.parameters(model), model(x)], " ".join(str(each.message) for each in caught)

    usual, silence = computed()
    given, said = computed(**{field: FIELDS[field]})
    counts = not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(usual, given, strict=True))
    value = FIELDS[field]
    expected = "" if counts else f"({field}={value!r}): {variant} has no use for {field}; leave it out"
    assert (silence, said.partition("Config")[2]) == ("", expected)
    assert counts == (field not in ll.REGISTRY[variant].config.unused)


def test_what_methods_are_given_alike() -> None:
    assert ll.HRAConfig.from_common(r=6, alpha=3.0) == ll.HRAConfig(r=6)
    assert ll.IA3Config.from_common(r=6, alpha=3.0, dtype=torch.float64) == ll.IA3Config(dtype=torch.float64)
    assert ll.HRAConfig.from_common(r=6, dropout=0.1) == ll.HRAConfig(r=6)
    assert ll.LoRAConfig.from_common(r=6, alpha=3.0) == ll.LoRAConfig(r=6, alpha=3.0)
    with pytest.raises(TypeError):
        ll.HRAConfig.from_common(rank=6)


def test_fields_of_several_methods_that_count_for_nothing(tmp_path: Path) -> None:
    """attach says so, of each; a file that has them is loaded without a word."""
    model = llama()
    given = r"HRAConfig\(alpha=3\.0, rslora=True\): hra has no use for alpha, rslora"
    with pytest.warns(UserWarning, match=f"attach: {given}"):
        ll.attach(model, {"a": ll.LoRAConfig(r=2, alpha=3.0), "b": ll.HRAConfig(r=2, alpha=3.0, rslora=True)})
    ll.save(model, tmp_path / "b.safetensors", name="b")
    ll.detach(model)
    assert ll.load(model, tmp_path / "b.safetensors").cfg.alpha == 3.0


def test_r_larger_than_the_last_layer_only() -> None:
    """Earlier layers were built by then: none of them may keep anything."""
    cfg = ll.LoRAConfig(r=20, target_names=("q_proj", r"1\.self_attn\.v_proj"))
    refused_attach(cfg, "model.layers.1.self_attn.v_proj (32 → 16): r=20", "use r ≤ 16")


class Packed(nn.Module):
    """A linear layer whose weight is stored as int8 in a layout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 8
        self.weight = nn.Parameter(torch.randint(-127, 127, (8, 8), dtype=torch.int8), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype) / 50)


@pytest.mark.parametrize("variant", NEED_WEIGHT)
def test_weight_that_cannot_be_read(variant: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), Packed())
    fragments = ("1 (8 → 8): its weight is a Parameter of dtype torch.int8", "lora, ia3, ia3_ff, hra and road")
    refused(ll.AttachError, lambda: ll.attach(model, config(variant)), *fragments, model=model)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in NEED_WEIGHT])
def test_weight_that_need_not_be_read(variant: str) -> None:
    """The variants that the message above offers do work on such a layer."""
    model, x = nn.Sequential(nn.Linear(8, 8), Packed()), torch.randn(30, 8)
    base = model(x)
    ll.attach(model, config(variant, target_names=()), calibration_data=[x] if variant == "eva" else None)
    assert_close(model(x), base, start_tolerance(variant, 1e-5))
    randomize(model)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ll.parameters(model))
    assert not torch.allclose(model(x), base, atol=1e-3)
    ll.detach(model)
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("variant", NEED_WEIGHT)
def test_weight_on_the_meta_device(variant: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(
        ll.AttachError, match=r"0 \(8 → 8\): its weight is on the meta device.*load the model's weights"
    ):
        ll.attach(model, config(variant))
    assert len(list(model.modules())) == 2
    assert not model[0]._forward_hooks
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("variant", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("sizes", [(8, 0), (0, 8)])
def test_a_layer_without_inputs_or_outputs(variant: str, sizes: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(*sizes))
    cfg = config(variant, target_names=("1",))
    message = f"1 ({sizes[0]} → {sizes[1]}): it has no inputs or no outputs"
    refused(ll.AttachError, lambda: ll.attach(model, cfg), message)
    assert "it has no inputs or no outputs" in ll.attach(model, ll.LoRAConfig(r=2, target_roles=())).summary()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("fields", [{}, {"svd": "exact"}], ids=str)
@pytest.mark.parametrize("variant", NEED_WEIGHT)
def test_weight_that_is_not_finite(variant: str, fields: dict[str, Any], value: float) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight.data[3, 5] = value
    cfg = config(variant, **fields if variant in ("pissa", "antipasto") else {})
    message = "1 (64 → 64): its weight has NaN or infinity"
    refused(ll.AttachError, lambda: ll.attach(model, cfg), message, "exclude_names")
    ll.attach(model, config(variant, exclude_names=("1",)))


# ---- Arguments of attach ----


@pytest.mark.parametrize("model", [None, [nn.Linear(3, 3)], nn.Linear, "model"], ids=lambda v: type(v).__name__)
def test_no_model(model: Any, tmp_path: Path) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: ll.attach(model, ll.LoRAConfig()),
        lambda: ll.detach(model),
        lambda: ll.use(model, "default"),
        lambda: ll.disabled(model).__enter__(),
        lambda: ll.unchanged(model).__enter__(),
        lambda: ll.parameters(model),
        lambda: ll.state_dict(model),
        lambda: ll.save(model, tmp_path / "a"),
        lambda: ll.load(model, tmp_path / "a"),
        lambda: ll.verify(model, {}),
        lambda: ll.diagnose(model),
        lambda: ll.merged_state_dict(model),
        lambda: ll.save_merged(model, tmp_path),
        lambda: ll.export_peft(model, tmp_path),
        lambda: ll.import_peft(model, tmp_path),
    ]
    for call in calls:
        with pytest.raises(ll.AttachError, match=f"model must be a torch.nn.Module; got {type(model).__name__}"):
            call()


def test_a_dict_of_no_configs() -> None:
    refused_attach({}, "cfg is an empty dict; give it a config for each adapter's name")


@pytest.mark.parametrize("backend", ["cuda", "", None, "Triton"])
def test_unknown_backend(backend: Any) -> None:
    refused_attach(ll.LoRAConfig(r=4), "backend", "'triton'", repr(backend), error=ValueError, backend=backend)


@dataclass(frozen=True, kw_only=True)
class UnregisteredConfig(ll.AdapterConfig):
    variant: ClassVar[str] = "unregistered"


@pytest.mark.parametrize(
    "cfg",
    [UnregisteredConfig(), ll.AdapterConfig(), ll.LoRAConfig, {"variant": "lora"}, "lora", None],
    ids=["unregistered", "base class", "class", "dict", "str", "None"],
)
def test_config_of_no_variant(cfg: Any) -> None:
    refused_attach(cfg, "config of a registered variant", "lora", "antipasto", type(cfg).__name__)


def exhausted() -> Iterator[Tensor]:
    batches = iter([token_ids()])
    list(batches)
    return batches


@pytest.mark.parametrize(
    ("data", "fragments"),
    [
        (None, ["calibration_data is missing", "pass attach(..., calibration_data=batches)"]),
        ([], ["gave no batch", "run out", "pass attach("]),
        (exhausted(), ["gave no batch", "run out", "pass attach("]),
        ([token_ids(1, 3)], [f"{Q0}: calibration_data gave 3 tokens, and at least 9 are needed", "lower r"]),
        ((token_ids(1, 2, seed=s) for s in range(2)), ["gave 4 tokens", "at least 9", "more or longer batches"]),
    ],
    ids=["none", "empty", "exhausted", "too few", "generator runs out"],
)
def test_calibration_data_that_runs_out(data: Any, fragments: list[str]) -> None:
    refused_attach(ll.EVAConfig(r=8), *fragments, error=ll.CalibrationError, calibration_data=data)


def test_too_little_calibration_data_for_antipasto() -> None:
    cfg = ll.AntiPaSTOConfig(r=8)
    fragments = (f"{Q0}: calibration_data gave 3 tokens", "at least 8")
    refused_attach(cfg, *fragments, error=ll.CalibrationError, calibration_data=[token_ids(1, 3)])


def test_batch_that_the_model_refuses() -> None:
    """The model's own error comes through; hooks and modes do not stay behind."""
    batches = [{"input_ids": token_ids()}, {"labels": token_ids()}]
    refused_attach(ll.EVAConfig(r=4), "input_ids", error=ValueError, calibration_data=batches)


# ---- Configs that no layer could use ----

BAD_FIELDS: list[tuple[type[ll.AdapterConfig], dict[str, Any], str]] = [
    (ll.LoRAConfig, {"r": 0}, "at least 1; got 0"),
    (ll.LoRAConfig, {"r": -4}, "at least 1; got -4"),
    (ll.LoRAConfig, {"r": 4.0}, "a whole number below 2³¹; got 4.0"),
    (ll.LoRAConfig, {"r": "8"}, "a whole number below 2³¹; got '8'"),
    (ll.LoRAConfig, {"alpha": 0}, "greater than 0; got 0"),
    (ll.LoRAConfig, {"alpha": -16.0}, "greater than 0; got -16.0"),
    (ll.LoRAConfig, {"alpha": math.nan}, "a number in float32's range; got nan"),
    (ll.LoRAConfig, {"alpha": math.inf}, "a number in float32's range; got inf"),
    (ll.LoRAConfig, {"alpha": "16"}, "a number in float32's range; got '16'"),
    (ll.LoRAConfig, {"dtype": torch.int8}, "a floating-point torch.dtype of 16 bits or more; got torch.int8"),
    (ll.LoRAConfig, {"dtype": "bfloat16"}, "a floating-point torch.dtype of 16 bits or more; got 'bfloat16'"),
    (ll.LoRAConfig, {"dtype": torch.float8_e4m3fn}, "16 bits or more; got torch.float8_e4m3fn"),
    (ll.LoRAConfig, {"r": True}, "a whole number below 2³¹; got True"),
    (ll.LoRAConfig, {"alpha": True}, "a number in float32's range; got True"),
    (ll.LoRAConfig, {"alpha": 10**400}, "a number in float32's range; got 1000"),
    (ll.LoRAConfig, {"dropout": False}, "a number in float32's range; got False"),
    (ll.LoRAConfig, {"layers": True}, "indices of 0 or more, or None; got (True,)"),
    (ll.LoRAConfig, {"target_names": None}, "regular expressions, or () for none; got None"),
    (ll.LoRAConfig, {"modules_to_save": None}, "regular expressions, or () for none; got None"),
    (ll.DeLoRAConfig, {"lambda0": math.inf}, "a number in float32's range; got inf"),
    (ll.LoRAConfig, {"dtype": torch.complex64}, "a floating-point torch.dtype"),
    (
        ll.LoRAConfig,
        {"target_roles": ("readers",)},
        "some of ('reader', 'writer', 'inner', 'expert', 'embedding'); got ('readers',)",
    ),
    (ll.LoRAConfig, {"target_roles": 3}, "some of ('reader', 'writer', 'inner', 'expert', 'embedding')"),
    (ll.LoRAConfig, {"target_names": ("q_proj", "(")}, "'(' is not a regular expression"),
    (ll.LoRAConfig, {"target_names": ("*_proj",)}, "'*_proj' is not a regular expression"),
    (ll.LoRAConfig, {"exclude_names": ("[a",)}, "'[a' is not a regular expression"),
    (ll.LoRAConfig, {"target_names": (3,)}, "regular expressions; got (3,)"),
    (ll.LoRAConfig, {"target_names": 3.5}, "a sequence; got 3.5"),
    (ll.LoRAConfig, {"layers": (0, -1)}, "indices of 0 or more, or None; got (0, -1)"),
    (ll.LoRAConfig, {"layers": ("0",)}, "indices of 0 or more, or None; got ('0',)"),
    (ll.DeLoRAConfig, {"lambda0": 0}, "greater than 0; got 0"),
    (ll.DeLoRAConfig, {"lambda0": -1.0}, "greater than 0; got -1.0"),
    (ll.AntiPaSTOConfig, {"r": 10}, "divisible by block_size=4; got 10"),
    (ll.AntiPaSTOConfig, {"r": 8, "block_size": 3}, "divisible by block_size=3; got 8"),
    (ll.AntiPaSTOConfig, {"block_size": 1}, "at least 2; got 1"),
    (ll.AntiPaSTOConfig, {"max_rotation_angle": 4}, "between 0 and π; got 4"),
    (ll.AntiPaSTOConfig, {"max_rotation_angle": 0}, "between 0 and π; got 0"),
    (ll.AntiPaSTOConfig, {"rotate_basis": "W"}, "one of ('V', 'U', 'none'); got 'W'"),
    (ll.AntiPaSTOConfig, {"svd": "fast"}, "one of ('randomized', 'exact'); got 'fast'"),
    (ll.PiSSAConfig, {"svd": "fast"}, "one of ('randomized', 'exact'); got 'fast'"),
    (ll.LoRAConfig, {"rslora": "False"}, "True or False; got 'False'"),
    (ll.LoRAConfig, {"rslora": None}, "True or False; got None"),
    (ll.LoRAConfig, {"divide_r_among_experts": math.nan}, "True or False; got nan"),
    (ll.LoRAConfig, {"alpha": 1e300}, "a number in float32's range; got 1e+300"),
    (ll.LoRAConfig, {"alpha": 1e-300}, "a number in float32's range; got 1e-300"),
    (ll.LoRAConfig, {"alpha": torch.tensor(4.0)}, "a number in float32's range; got tensor(4.)"),
    (ll.LoRAConfig, {"target_names": torch.tensor(4)}, "a sequence; got tensor(4)"),
    (ll.LoRAConfig, {"target_roles": (["reader"],)}, "some of ('reader',"),
    (ll.LoRAConfig, {"dtype": None}, "a floating-point torch.dtype of 16 bits or more; got None"),
    (ll.EVAConfig, {"center": "False"}, "True or False; got 'False'"),
    (ll.EVAConfig, {"rho": True}, "a number in float32's range; got True"),
    (ll.DeLoRAConfig, {"lambda0": 1e300}, "a number in float32's range; got 1e+300"),
    (ll.DeLoRAConfig, {"lambda0": "15"}, "a number in float32's range; got '15'"),
    (ll.AntiPaSTOConfig, {"block_size": "4"}, "a whole number below 2³¹; got '4'"),
    (ll.AntiPaSTOConfig, {"block_size": 2.0}, "a whole number below 2³¹; got 2.0"),
    (ll.AntiPaSTOConfig, {"max_rotation_angle": None}, "a number in float32's range; got None"),
    (ll.RoadConfig, {"kind": True}, "one of (1, 2, 4); got True"),
    (ll.RoadConfig, {"kind": [1]}, "one of (1, 2, 4); got [1]"),
    (ll.RoadConfig, {"group_size": "64"}, "a whole number below 2³¹; got '64'"),
]


@pytest.mark.parametrize(("cls", "fields", "message"), BAD_FIELDS, ids=lambda v: str(getattr(v, "variant", v))[:30])
def test_bad_field(cls: Any, fields: dict[str, Any], message: str) -> None:
    """Said when the config is made, before there is a model to harm, and by the field's name."""
    name = "r" if message.startswith(("divisible", "even")) else list(fields)[-1]
    text = refused(ll.ConfigError, lambda: cls(**fields), f"{cls.__name__}.{name}", message)
    assert text.startswith(f"{cls.__name__}.{name}")
    if "regular expression" in message and "got" not in message:
        assert "backslash" in text


def test_unknown_field() -> None:
    refused(TypeError, lambda: ll.LoRAConfig(rank=8), "LoRAConfig has no field rank; rank is r here")  # type: ignore[call-arg]
    refused(TypeError, lambda: ll.LoRAConfig(8), "positional")  # type: ignore[misc]
    refused(TypeError, lambda: ll.DoRAConfig.from_common(target_name="q"), "target_name; did you mean target_names?")
    refused(TypeError, lambda: ll.HRAConfig.from_common(task_type="CAUSAL_LM"), "no field task_type; it has r, alpha, ")


def test_unknown_fields_of_peft() -> None:
    """Each that has a counterpart is told it: a field, or a method."""
    values = dict.fromkeys(inspect.signature(peft.LoraConfig).parameters)
    known = {each.name for each in dataclasses.fields(ll.LoRAConfig)}
    text = refused(TypeError, lambda: ll.LoRAConfig(**values))
    told = dict(re.findall(r"; (\w+) is (?:a method of its own, )?(\w+)", text))
    assert {"lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_dora", "use_rslora"} <= told.keys()
    assert told.keys() <= values.keys() - known
    assert all(name in known or hasattr(ll, name) for name in told.values()), told


def test_configs_are_frozen(tmp_path: Path) -> None:
    refused(AttributeError, lambda: setattr(ll.LoRAConfig(), "r", 4), "r")
    ranks = {"q_proj": 2}
    model = llama()
    ll.attach(model, ll.LoRAConfig(rank_pattern=ranks))
    ranks["q_proj"] = 9
    ll.save(model, tmp_path / "a")
    assert ll.load(llama(), tmp_path / "a").cfg.rank_pattern == {"q_proj": 2}


NUMPY: list[tuple[type[ll.AdapterConfig], dict[str, Any]]] = [
    (ll.LoRAConfig, {"r": np.int64(4), "alpha": np.float32(8), "rslora": np.True_, "dropout": np.float64(0.1)}),
    (ll.LoRAConfig, {"layers": np.array([0, 1]), "divide_r_among_experts": np.False_, "target_names": np.str_("q_")}),
    (ll.LoRAConfig, {"layers": np.int64(1), "target_names": [np.str_("q_proj")]}),
    (ll.LoRAConfig, {"rank_pattern": {np.str_("q_proj"): np.int64(2)}, "alpha_pattern": {"q_proj": np.float32(0.1)}}),
    (ll.EVAConfig, {"center": np.True_, "rho": np.float32(1.5)}),
    (ll.AntiPaSTOConfig, {"max_rotation_angle": np.float32(0.5), "block_size": np.int64(4), "svd": np.str_("exact")}),
    (ll.RoadConfig, {"kind": np.int64(2), "group_size": np.int32(8)}),
    (ll.DeLoRAConfig, {"lambda0": np.float16(2)}),
]


@pytest.mark.parametrize(("cls", "fields"), NUMPY, ids=lambda v: ",".join(v) if isinstance(v, dict) else v.variant)
def test_numbers_of_numpy_become_pythons(cls: Any, fields: dict[str, Any]) -> None:
    """What a sweep draws is numpy's, which JSON does not know: the file could not be written after the training."""
    cfg = cls(**fields)
    assert cls.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    assert hash(cfg) == hash(cls(**fields))


@dataclass(frozen=True, kw_only=True)
class OwnConfig(ll.LoRAConfig):
    """A user's: its fields are settled as ours are, before its own checks run."""

    gates: tuple[int, ...] = ()
    power: int | None = None
    mode: Literal["fast", "slow"] = "fast"
    note: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.power is None or self.power > 0, "power", "above 0")


def test_a_config_of_ones_own() -> None:
    values: Any = {"gates": [np.int64(1), 2], "power": np.int64(3), "mode": np.str_("slow"), "note": {"a": np.True_}}
    cfg = OwnConfig(**values)
    assert (cfg.gates, cfg.power, cfg.mode, cfg.note) == ((1, 2), 3, "slow", {"a": True})
    assert OwnConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    refused(
        ll.ConfigError,
        lambda: OwnConfig(power="3"),
        "OwnConfig.power must be a whole number below 2³¹ or None; got '3'",
    )  # type: ignore[arg-type]
    refused(ll.ConfigError, lambda: OwnConfig(mode="no"), "OwnConfig.mode must be one of ('fast', 'slow')")  # type: ignore[arg-type]
    refused_attach(OwnConfig(note=torch.ones(2)), "OwnConfig.note can't be written to a file", error=ll.ConfigError)

    @dataclass(frozen=True, kw_only=True)
    class Local(ll.LoRAConfig):
        flag: "bool" = True
        other: "Unknown" = None  # type: ignore[name-defined]  # noqa: F821

    assert Local(flag=np.False_).flag is False  # type: ignore[arg-type]
    refused(ll.ConfigError, lambda: Local(flag="no"), "Local.flag must be True or False; got 'no'")  # type: ignore[arg-type]


def test_one_name_or_layer_may_stand_alone() -> None:
    """A string is one name, not a sequence of letters."""
    cfg = ll.LoRAConfig(target_names="q_proj", target_roles="reader", exclude_names="embed", layers=1)  # type: ignore[arg-type]
    assert cfg == ll.LoRAConfig(
        target_names=("q_proj",), target_roles=("reader",), exclude_names=("embed",), layers=(1,)
    )


def test_errors_of_a_kind_can_be_caught_as_one() -> None:
    for error in (ll.AttachError, ll.CalibrationError, ll.CheckpointError, ll.ConfigError):
        assert issubclass(error, ll.LoraLiteError)
    assert issubclass(ll.ConfigError, ValueError)


def test_a_larger_rank_that_means_fewer_layers() -> None:
    """By default narrower layers are left out, which a sweep over r has to be told."""
    model = llama(hidden_size=64, num_attention_heads=4, num_key_value_heads=1)  # k and v are 64 → 16
    told = r"r=24 is larger .* no adapter: \S+k_proj ×2, \S+v_proj ×2\. Take r ≤ 16"
    with pytest.warns(UserWarning, match=f"attach: {told}"):
        ll.attach(model, ll.LoRAConfig(r=24))
    ll.detach(model)
    ll.attach(model, ll.LoRAConfig(r=24, exclude_names=("k_proj", "v_proj")))
    ll.detach(model)
    ll.attach(model, ll.LoRAConfig(r=24, rank_pattern={"(k|v)_proj": 16}))
