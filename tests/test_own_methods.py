"""Methods of a user's own, written as the guide shows: what they get wrong is refused by name, and what files and
merging can't hold is not written."""

import dataclasses
import enum
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from models import assert_close, assert_same, qwen3_moe, randomize, snapshot, token_ids
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import gelu, linear
from torch.nn.utils import parametrizations

import lora_lite as ll
from lora_lite.calibration import InputPCA
from lora_lite.primitives import LowRankAdd, Primitive, RotatePairs, ScaleInput, ScaleOutput
from lora_lite.quantized import dense_weight
from lora_lite.variant import REGISTRY


@pytest.fixture(autouse=True)
def registered_here() -> Iterator[None]:
    before = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 8)).requires_grad_(False)


def method(primitive: Any, specs: Any = None) -> Any:
    """A method with LoRA's tensors, or these, and this primitive of (p, layer, cfg); its config's class."""

    @dataclasses.dataclass(frozen=True)
    class OwnConfig(ll.AdapterConfig):
        variant: ClassVar[str] = "own"
        own: Any = None

    def of_lora(in_features: int, out_features: int, cfg: Any) -> dict[str, ll.ParamSpec]:
        return {
            "lora_A": ll.ParamSpec((cfg.r, in_features), init="kaiming"),
            "lora_B": ll.ParamSpec((out_features, cfg.r), init="kaiming"),
            "lora_s": ll.ParamSpec((), init="ones"),
        }

    members = {"name": "own", "config": OwnConfig, "param_specs": staticmethod(specs or of_lora)}
    ll.register(type("Own", (ll.Variant,), {**members, "primitive": staticmethod(primitive)}))
    return OwnConfig


def test_a_scale_that_trains() -> None:
    """A backend takes numbers: it is part of B then."""
    cfg = method(lambda p, layer, cfg: LowRankAdd(p.lora_A, p.lora_B, p.lora_s))
    net, x = model(), torch.randn(5, 12)
    attachment = ll.attach(net, cfg(r=4, target_names=("0",)))
    adapter = attachment.adapters["0"]
    adapter.lora_s.data.fill_(0.7)
    y = net[0](x)
    y.square().sum().backward()
    s = torch.tensor(0.7, requires_grad=True)
    want = linear(x, net[0].weight, net[0].bias) + s * (x @ adapter.lora_A.t() @ adapter.lora_B.t())
    want.square().sum().backward()
    assert_close(y, want, 1e-5)
    assert_close(adapter.lora_s.grad, s.grad, 1e-5)


@pytest.mark.parametrize(
    "primitive",
    [
        lambda p, layer, cfg: ScaleOutput(p.lora_s.view(1)),
        lambda p, layer, cfg: ScaleInput(p.lora_A[0, :5]),
        lambda p, layer, cfg: LowRankAdd(p.lora_A[:, :7], p.lora_B),
        lambda p, layer, cfg: LowRankAdd(p.lora_A, p.lora_B[:9]),
        lambda p, layer, cfg: LowRankAdd(p.lora_A, p.lora_B[:, :3]),
        lambda p, layer, cfg: RotatePairs(p.lora_s.view(1), p.lora_s.view(1), 2),
        lambda p, layer, cfg: RotatePairs(p.lora_B[:, 0], p.lora_B[:, 1], 3),
        lambda p, layer, cfg: RotatePairs(p.lora_B[:, 0], p.lora_B[:, 1], 6),
    ],
)
def test_tensors_that_are_not_as_wide_as_the_layer(primitive: Any) -> None:
    """A kernel would read and write beside them."""
    net = model()
    ll.attach(net, method(primitive)(r=4, target_names=("0",)))
    with pytest.raises(ll.AttachError, match=r"^0: "):
        net(torch.randn(5, 12))


class Bent(Primitive):
    """y + B gelu(A x), which is no linear map."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.A, self.B = A, B

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        return x, gelu(linear(x, self.A.to(x.dtype)))

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        return y + linear(carry, self.B.to(y.dtype))


class Straight(Bent):
    """y + B A x, which is one."""

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        return x, linear(x, self.A.to(x.dtype))


def test_merging_asks_whether_a_primitive_is_a_linear_map() -> None:
    net, x = model(), torch.randn(5, 12)
    ll.attach(net, method(lambda p, layer, cfg: Bent(p.lora_A, p.lora_B))(r=4, target_names=("0",)))
    with pytest.raises(ll.AttachError, match=r"^0: .*something else than W x \+ b"):
        ll.merged_state_dict(net)
    ll.detach(net)
    del REGISTRY["own"]
    ll.attach(net, method(lambda p, layer, cfg: Straight(p.lora_A, p.lora_B))(r=4, target_names=("0",)))
    plain = model()
    plain.load_state_dict(ll.merged_state_dict(net))
    assert_close(plain(x), net(x), 1e-5)


def test_a_sum_of_ones_own_is_no_lora_for_peft(tmp_path: Path) -> None:
    class Rectified(LowRankAdd):
        def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
            return super().on_output(y, carry.relu(), ops)

    net = model()
    ll.attach(net, method(lambda p, layer, cfg: Rectified(p.lora_A, p.lora_B))(r=4, target_names=("0",)))
    with pytest.raises(ll.AttachError, match="Rectified"):
        ll.export_peft(net, tmp_path / "peft")


class Kind(enum.StrEnum):
    A = "a"


@dataclasses.dataclass
class Nested:
    depth: int = 1


@pytest.mark.parametrize("value", [{8: 5.0}, Kind.A, Nested(), [{"a": {1}}], torch.float16])
def test_values_that_a_file_would_give_back_as_others(value: Any) -> None:
    cfg = method(lambda p, layer, cfg: LowRankAdd(p.lora_A, p.lora_B))
    with pytest.raises(ll.ConfigError, match=r"OwnConfig\.own"):
        ll.attach(model(), cfg(r=4, own=value))


def test_a_primitive_that_is_none() -> None:
    net = model()
    ll.attach(net, method(lambda p, layer, cfg: None)(r=4, target_names=("0",)))
    with pytest.raises(ll.AttachError, match=r"^0: Own\.primitive must return a Primitive; got a NoneType"):
        net(torch.randn(5, 12))


def test_verify_of_a_method_that_leaves_a_tensor_out() -> None:
    net, x = model(), torch.randn(5, 12)
    ll.attach(net, method(lambda p, layer, cfg: LowRankAdd(p.lora_A, p.lora_B))(r=4, target_names=("0",)))
    assert ll.verify(net, x)


def test_a_copy_of_a_method_needs_a_name_of_its_own() -> None:
    original = REGISTRY["hra"]
    copied = type("HRA", (ll.Variant,), {"name": "hra", "config": original.config, "__qualname__": "HRA"})
    with pytest.raises(ValueError, match=r"registered already.*hra\.HRA"):
        ll.register(copied)
    assert REGISTRY["hra"] is original


def test_a_config_whose_defaults_are_not_those_it_shows() -> None:
    """They would be the parent's. What is no field may stand in any class."""

    class Undecorated(ll.AdapterConfig):
        variant: ClassVar[str] = "own"
        takes_dropout: ClassVar[bool] = False
        r: int = 64

    class Mixin:
        r: int = 64

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mixed(Mixin, ll.AdapterConfig):
        variant: ClassVar[str] = "own"

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class WithoutAType(ll.AdapterConfig):
        variant: ClassVar[str] = "own"
        r = 64

    class OfTheSameFields(ll.AdapterConfig):
        variant: ClassVar[str] = "own"
        takes_dropout: ClassVar[bool] = False

    def nothing(p: Any, layer: Any, cfg: Any) -> Primitive:
        return Primitive()

    def register(config: Any, primitive: Any = nothing) -> None:
        ll.register(type("Own", (ll.Variant,), {"name": "own", "config": config, "primitive": staticmethod(primitive)}))

    for config in (Undecorated, Mixed, WithoutAType):
        with pytest.raises(ValueError, match=rf"{config.__name__} gives r another default, .*in a dataclass"):
            register(config)
    with pytest.raises(ValueError, match="Own needs a `primitive`"):
        register(OfTheSameFields, ll.Variant.primitive)
    register(OfTheSameFields)


def test_a_config_of_ones_own_without_a_variant() -> None:
    @dataclasses.dataclass(frozen=True)
    class NotedConfig(ll.LoRAConfig):
        note: str = "x"

    with pytest.raises(ll.AttachError, match=r"NotedConfig has fields \(note\).*LoRAConfig.*register"):
        ll.attach(model(), NotedConfig(r=4))


def test_tensors_that_layers_share_are_saved(tmp_path: Path) -> None:
    cfg = method(lambda p, layer, cfg: LowRankAdd(p.lora_A, p.lora_B, p.lora_s))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    attachment = ll.attach(net, cfg(r=4, target_roles=()))
    first, second = attachment.adapters.values()
    second.lora_A = first.lora_A
    randomize(net)
    x = torch.randn(3, 8)
    y = net(x)
    with pytest.warns(UserWarning, match=r"save: .*train apart: 0\.lora_A = 1\.lora_A"):
        ll.save(net, tmp_path / "own.safetensors")
    ll.detach(net)
    ll.load(net, tmp_path / "own.safetensors")
    assert_close(net(x), y, 1e-6)
    assert len(load_file(tmp_path / "own.safetensors")) == 6


@pytest.mark.parametrize(
    "specs", [{}, None, {"cfg": ll.ParamSpec((2,))}, {"lora_.x": ll.ParamSpec((2,))}, {"lora_A": (2,)}]
)
def test_specs_that_are_none(specs: Any) -> None:
    cfg = method(lambda p, layer, cfg: Primitive(), lambda in_features, out_features, cfg: specs)
    net = model()
    with pytest.raises(ll.AttachError, match=r"Own\.param_specs"):
        ll.attach(net, cfg(r=4))
    assert not ll.attachment.attachments(net)


# ---- what a method's code gives ----


@dataclasses.dataclass
class Given(Primitive):
    """Whatever a test wants of it."""

    enter: Any = None
    leave: Any = None

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        return self.enter(x) if self.enter else (x, None)

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        return self.leave(y) if self.leave else y


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"enter": lambda x: x}, r"Given\.on_input must return \(x, carry\).*got \(2, 12\) of torch.float32"),
        ({"enter": lambda x: (x[:1], None)}, r"Given\.on_input .*got \(\(1, 12\) of torch.float32, NoneType\)"),
        ({"leave": lambda y: None}, r"Given\.on_output must return .*\(2, 16\) and dtype .*got NoneType"),
        ({"leave": lambda y: y.double()}, r"Given\.on_output .*got \(2, 16\) of torch.float64"),
        ({"leave": lambda y: y * torch.ones(3, 1, 1)}, r"Given\.on_output .*got \(3, 2, 16\)"),
    ],
)
def test_what_a_primitive_returns(given: dict[str, Any], message: str) -> None:
    """Two rows, as many as a tuple has places."""
    net, x = model(), torch.randn(2, 12)
    ll.attach(net, method(lambda p, layer, cfg: Given(**given))(r=4, target_names=("0",)))
    for call in (lambda: net(x), lambda: ll.verify(net, x)):
        with pytest.raises(ll.AttachError, match=rf"^0.*: {message}"):
            call()


def test_a_primitive_that_writes_to_its_input() -> None:
    """Which is the caller's; merging would have read its own."""
    net, x = model(), torch.randn(2, 12)
    ll.attach(net, method(lambda p, layer, cfg: Given(enter=lambda x: (x.mul_(2), None)))(r=4, target_names=("0",)))
    calls: list[Any] = [lambda: net(x), lambda: ll.merged_state_dict(net), lambda: ll.verify(net, x)]
    for call in calls:
        with torch.no_grad(), pytest.raises(ll.AttachError, match=r"Given\.on_input has written to x.*x = x \* g"):
            call()
    ll.detach(net)
    ll.attach(net, method(lambda p, layer, cfg: Given(leave=lambda y: y.mul_(2)))(r=4, target_names=("0",)))
    with ll.disabled(net):
        want = 2 * net[0](x)  # type: ignore[index]
    assert_close(net[0](x), want, 1e-6)  # type: ignore[index]


def test_what_a_users_code_raises_has_the_layers_name() -> None:
    net = model()
    ll.attach(net, method(lambda p, layer, cfg: Given(leave=lambda y: y @ y))(r=4, target_names=("0",)))
    with pytest.raises(RuntimeError, match="cannot be multiplied") as error:
        net(torch.randn(2, 12))
    assert error.value.__notes__ == ["in lora_lite, on the layer 0"]


def test_dropout_that_a_method_does_not_use() -> None:
    cfg = method(lambda p, layer, cfg: LowRankAdd(p.lora_A, p.lora_B, cfg.scale))
    net = model()
    with pytest.raises(ll.AttachError, match=r"dropout=0\.5: Own\.primitive does not use cfg\.dropout.*takes_dropout"):
        ll.attach(net, cfg(r=4, dropout=0.5))
    assert not ll.attachment.attachments(net)
    ll.attach(net, cfg(r=4))
    ll.detach(net)
    REGISTRY.clear()
    used = method(lambda p, layer, cfg: LowRankAdd(p.lora_A, p.lora_B, cfg.scale, cfg.dropout))
    ll.attach(net, used(r=4, dropout=0.5))


def test_an_effect_too_small_to_show_beside_the_layers_own_is_no_linear_map_either() -> None:
    net = model()
    ll.attach(net, method(lambda p, layer, cfg: Bent(p.lora_A, 1e-4 * p.lora_B))(r=4, target_names=("0",)))
    with pytest.raises(ll.AttachError, match=r"^0: .*something else than W x \+ b"):
        ll.merged_state_dict(net)
    (row,) = ll.diagnose(net).rows
    assert row.relative_change != row.relative_change, "no number stands for it"
    ll.detach(net)
    del REGISTRY["own"]
    ll.attach(net, method(lambda p, layer, cfg: Straight(p.lora_A, 1e-4 * p.lora_B))(r=4, target_names=("0",)))
    ll.merged_state_dict(net)
    assert ll.diagnose(net).rows[0].effective_rank == pytest.approx(4, abs=1)


def test_a_bias_changes_no_weight() -> None:
    net = model()
    cfg = method(lambda p, layer, cfg: Given(leave=lambda y: y + p.lora_B[:, 0]))
    ll.attach(net, cfg(r=4, target_names=("0",)))
    (row,) = ll.diagnose(net).rows
    assert row.relative_change == row.effective_rank == 0


def test_whole_numbers_are_kept_to_the_last() -> None:
    def specs(in_features: int, out_features: int, cfg: Any) -> dict[str, ll.ParamSpec]:
        exact = ll.ParamSpec((1,), init=lambda t: t.fill_(16777217), as_buffer=True, dtype=torch.int64)
        return {"lora_A": ll.ParamSpec((2,)), "lora_at": exact}

    attachment = ll.attach(model(), method(lambda p, layer, cfg: Primitive(), specs)(r=4, target_names=("0",)))
    assert attachment.adapters["0"].lora_at.item() == 16777217


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ll.ParamSpec((2,), init="xavier"), r"init of lora_A must be a callable or one of \('zeros'.*got 'xavier'"),  # type: ignore[arg-type]
        (ll.ParamSpec((2,), init="zeros", dtype=torch.int64), r"lora_A of torch.int64 can't train; make it as_buffer"),
    ],
)
def test_specs_that_no_tensor_can_be_made_of(spec: ll.ParamSpec, message: str) -> None:
    cfg = method(lambda p, layer, cfg: Primitive(), lambda in_features, out_features, cfg: {"lora_A": spec})
    with pytest.raises(ll.AttachError, match=rf"^0.*: Own\.param_specs: {message}"):
        ll.attach(model(), cfg(r=4))


def calibrated(step: str, own: Any) -> Any:
    """The config's class of a method that needs calibration, `own` being its init, its statistic or its calibrate."""
    cfg = method(lambda p, layer, cfg: LowRankAdd(p.lora_A, p.lora_B))
    steps = {"statistic": lambda p, layer, cfg: InputPCA(2), "calibrate": lambda p, statistic, cfg: None, step: own}
    for name, each in steps.items():
        setattr(REGISTRY["own"], name, staticmethod(each))
    REGISTRY["own"].calibration = "none" if step == "init" else "required"
    return cfg


@pytest.mark.parametrize("what", ["attribute", "parameter", "buffer", "module"])
@pytest.mark.parametrize("step", ["init", "statistic", "calibrate"])
def test_what_a_method_sets_and_no_file_holds(step: str, what: str) -> None:
    def own(p: Any, *_: Any) -> InputPCA:
        if what == "buffer":
            p.register_buffer("extra", torch.ones(2))
        else:
            p.extra = {"attribute": 3, "parameter": nn.Parameter(torch.ones(2)), "module": nn.Identity()}[what]
        return InputPCA(2)

    net, cfg = model(), calibrated(step, own)
    before, data = snapshot(net), None if step == "init" else [torch.randn(20, 12)]
    with pytest.raises(ll.AttachError, match=rf"^0 \(12 → 16\): Own\.{step} has set extra, which no file would hold"):
        ll.attach(net, cfg(r=4), calibration_data=data)
    assert_same(net, before)


@pytest.mark.parametrize("step", ["init", "statistic", "calibrate"])
def test_what_a_method_raises_as_it_starts_has_the_layers_name(step: str) -> None:
    def own(p: Any, *_: Any) -> Any:
        raise ll.AttachError("not on this one")

    data = None if step == "init" else [torch.randn(20, 12)]
    cfg = calibrated(step, own)
    with pytest.raises(ll.AttachError, match=r"^0 \(12 → 16\): not on this one"):
        ll.attach(model(), cfg(r=4), calibration_data=data)


def test_a_tensor_that_layers_share_is_one_for_an_optimizer() -> None:
    cfg = method(lambda p, layer, cfg: LowRankAdd(p.lora_A, p.lora_B, p.lora_s))
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    attachment = ll.attach(net, cfg(r=4, target_roles=()))
    first, second = attachment.adapters.values()
    before = attachment.trainable
    second.lora_A = first.lora_A
    assert attachment.trainable == before - first.lora_A.numel()
    assert len({id(p) for p in ll.parameters(net)}) == len(ll.parameters(net)) == 5
    groups = ll.param_groups(net, 1e-3)
    assert sum(len(group["params"]) for group in groups) == 5


# ---- what is derived of the weight ----


def deriving(seen: list[Tensor]) -> Any:
    """The config's class of a method that derives G = W Wᵀ, whose primitives' G go into `seen`: y + G B A x."""

    def specs(in_features: int, out_features: int, cfg: Any) -> dict[str, ll.ParamSpec]:
        return {
            "lora_A": ll.ParamSpec((cfg.r, in_features), init="kaiming"),
            "lora_B": ll.ParamSpec((out_features, cfg.r), init="kaiming"),
            "lora_G": ll.ParamSpec((out_features, out_features), init="zeros", derived=True),
        }

    def derive(p: Any, layer: Any, cfg: Any) -> None:
        W = dense_weight(layer, torch.float32)
        p.fill("lora_G", W @ W.t())

    def primitive(p: Any, layer: Any, cfg: Any) -> Primitive:
        seen.append(p.lora_G.clone())
        return LowRankAdd(p.lora_A, p.lora_G @ p.lora_B, cfg.scale)

    cfg = method(primitive, specs)
    REGISTRY["own"].derive = staticmethod(derive)  # type: ignore[method-assign]
    return cfg


@pytest.mark.parametrize("how", ["at attach", "anew in a call", "of a weight that stands in", "of a parametrisation"])
def test_what_is_derived_is_not_of_autocasts_dtype(how: str) -> None:
    seen: list[Tensor] = []
    net, x = model(), torch.randn(5, 12)
    if how == "of a parametrisation":
        parametrizations.weight_norm(net[0])  # type: ignore[index,arg-type]
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "at attach"):
        ll.attach(net, deriving(seen)(r=4, target_names=("0",)))
    W = net[0].weight.detach().clone()  # type: ignore[index,union-attr]
    if how == "anew in a call":
        W *= 1.5
        with torch.no_grad():
            net[0].weight.mul_(1.5)  # type: ignore[index,union-attr,operator]
    weights = {"0.weight": W.mul_(2)} if how == "of a weight that stands in" else {}
    with torch.autocast("cpu", torch.bfloat16):
        functional_call(net, weights, (x,))
    assert torch.equal(seen[-1], W @ W.t())


@pytest.mark.parametrize("parametrised", [False, True], ids=["plain", "parametrised"])
def test_two_calls_before_a_backward_keep_what_each_derived(parametrised: bool) -> None:
    """As of a loss over two batches; a parametrised weight is made anew in each call."""
    net, x = model(), torch.randn(2, 5, 12)
    if parametrised:
        parametrizations.weight_norm(net[0])  # type: ignore[index,arg-type]
    attachment = ll.attach(net, deriving([])(r=4, target_names=("0",)))
    adapter = attachment.adapters["0"]
    (net(x[0]).square().sum() + net(x[1]).square().sum()).backward()
    got = [p.grad for p in (adapter.lora_A, adapter.lora_B)]
    want = torch.autograd.grad(net(x).square().sum(), [adapter.lora_A, adapter.lora_B])
    for mine, its in zip(got, want, strict=True):
        assert_close(mine, its, 1e-5)


@pytest.mark.parametrize("how", ["loaded", "written to"])
def test_a_graph_takes_what_was_derived_of_a_parametrised_weight_last(how: str) -> None:
    """It derives nothing by itself: loading does, and a call does."""
    torch._dynamo.reset()
    net, x = model(), torch.randn(5, 12)
    parametrizations.weight_norm(net[0])  # type: ignore[index,arg-type]
    ll.attach(net, deriving([])(r=4, target_names=("0",)))
    with torch.no_grad():
        if how == "loaded":
            net.load_state_dict({k: 2 * t if "original" in k else t for k, t in net.state_dict().items()})
        else:
            net[0].parametrizations.weight.original0.mul_(2)  # type: ignore[index,union-attr,operator]
            net(x)
        got = torch.compile(net, backend="eager", fullgraph=True)(x)
        assert_close(got, net(x), 1e-5)


# ---- on a stack of experts ----


def mixture(primitive: Any, **options: Any) -> tuple[Any, Any]:
    """A mixture's stacks with such a method, of which each tensor has a random value; and the first stack's adapter."""
    net: Any = qwen3_moe()
    attachment = ll.attach(net, method(primitive)(r=4, target_roles=("expert",), **options))  # r: as many as experts
    randomize(net)
    return net, next(iter(attachment.adapters.values()))


def at_expert(net: Any, adapter: Any, delta: Any) -> None:
    """`verify` passes, and each expert of the first stack computes W x + delta(expert's tensors, W) x."""
    assert ll.verify(net, token_ids())
    key, merged = "model.layers.0.mlp.experts.gate_up_proj", ll.merged_state_dict(net)
    for i, W in enumerate(qwen3_moe().state_dict()[key].double()):
        want = W + delta(lambda name, i=i: getattr(adapter, name)[i].detach().double(), W)
        assert_close(merged[key][i].double(), want, 1e-5)


def test_a_scale_for_each_expert() -> None:
    """As many experts as ranks: the scale of each must not land on a rank."""
    net, adapter = mixture(lambda p, layer, cfg: LowRankAdd(p.lora_A, p.lora_B, p.lora_s))
    at_expert(net, adapter, lambda t, W: t("lora_s") * t("lora_B") @ t("lora_A"))


def test_one_for_all_experts_is_expanded() -> None:
    net, adapter = mixture(lambda p, layer, cfg: LowRankAdd(p.lora_A[:1].expand(4, -1, -1), p.lora_B))
    at_expert(net, adapter, lambda t, W: t("lora_B") @ adapter.lora_A[0].detach().double())
    REGISTRY.clear()
    net, adapter = mixture(lambda p, layer, cfg: ScaleOutput(p.lora_B[:1, :, 0].expand(4, -1)))
    at_expert(net, adapter, lambda t, W: (adapter.lora_B[0, :, :1].detach().double() - 1) * W)


@dataclasses.dataclass
class Composed(Primitive):
    """One after the other."""

    parts: list[Primitive] = dataclasses.field(default_factory=list)

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        carries = []
        for part in self.parts:
            x, carry = part.on_input(x, ops)
            carries.append(carry)
        return x, carries

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        for part, own in zip(self.parts, carry, strict=True):
            y = part.on_output(y, own, ops)
        return y


@dataclasses.dataclass(slots=True)
class Slotted(Primitive):
    """y + B A x, of what stands in slots."""

    A: Any = None
    B: Any = None

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        return x, linear(x, self.A.to(x.dtype))

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        return y + linear(carry, self.B.to(y.dtype))


class Mixin:
    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        return 2 * super().on_output(y, carry, ops)  # type: ignore[misc]


class Doubled(Mixin, LowRankAdd):
    pass


def test_primitives_of_ones_own_on_experts() -> None:
    net, adapter = mixture(
        lambda p, layer, cfg: Composed([LowRankAdd(p.lora_A, p.lora_B), LowRankAdd(p.lora_A, p.lora_B, 2.0)])
    )
    at_expert(net, adapter, lambda t, W: 3 * t("lora_B") @ t("lora_A"))
    REGISTRY.clear()
    assert not Doubled.takes_segments
    net = qwen3_moe()
    ll.attach(net, method(lambda p, layer, cfg: Doubled(p.lora_A, 0 * p.lora_B))(r=4, target_roles=("expert",)))
    with torch.no_grad():
        for bare, doubled in zip(qwen3_moe()(token_ids()).logits, net(token_ids()).logits, strict=True):
            assert not torch.equal(bare, doubled), "2 y + 0"
    REGISTRY.clear()
    for kind in (Straight, Slotted):  # the first is no dataclass
        REGISTRY.clear()
        net, adapter = mixture(lambda p, layer, cfg, kind=kind: kind(p.lora_A, p.lora_B))
        at_expert(net, adapter, lambda t, W: t("lora_B") @ t("lora_A"))


@pytest.mark.parametrize(
    ("primitive", "message"),
    [
        (lambda p, layer, cfg: ScaleOutput(p.lora_B[0, :, 0]), r"ScaleOutput: its g is of shape \(40,\)"),
        (lambda p, layer, cfg: LowRankAdd(p.lora_A[0, :3], p.lora_B), r"LowRankAdd: its A is of shape \(3, 32\)"),
        (
            lambda p, layer, cfg: LowRankAdd(p.lora_A.repeat(4, 1, 1), p.lora_B),
            r"LowRankAdd: its A is of shape \(16, 4, 32\)",
        ),
        (lambda p, layer, cfg: Composed([ScaleOutput(p.lora_B[0, :, 0])]), r"Composed: its g is of shape \(40,\)"),
    ],
)
def test_tensors_that_are_no_stacks(primitive: Any, message: str) -> None:
    """A kernel would read beside them."""
    net: Any = qwen3_moe()
    ll.attach(net, method(primitive)(r=4, target_roles=("expert",), target_names=("gate_up_proj",)))
    with pytest.raises(ll.AttachError, match=rf"gate_up_proj: {message}, and a stack of 4 needs a leading 4"):
        net(token_ids())


def test_what_would_be_lost_on_a_stack() -> None:
    def init(p: Any, layer: Any, cfg: Any) -> None:
        assert isinstance(p.device, torch.device)
        p.lora_A = torch.ones(4, layer.in_features)

    cfg = method(lambda p, layer, cfg: LowRankAdd(p.lora_A, p.lora_B))
    REGISTRY["own"].init = staticmethod(init)  # type: ignore[method-assign]
    with pytest.raises(ll.AttachError, match=r"p\.lora_A = … would be lost on a stack.*p\.fill\('lora_A', value\)"):
        ll.attach(qwen3_moe(), cfg(r=4, target_roles=("expert",)))


def test_under_autocast_dtypes_are_autocasts() -> None:
    net, x = model(), torch.randn(5, 12)

    def gained(p: Any, layer: Any, cfg: Any) -> Primitive:
        return Given(enter=lambda x: (x @ torch.eye(12), None), leave=lambda y: y * (1 + p.lora_B[:, 0]))

    ll.attach(net, method(gained)(r=4, target_names=("0",)))
    with torch.autocast("cpu", torch.bfloat16):
        net(x).sum().backward()


def test_dropout_by_what_is_in_force() -> None:
    """As TRL switches it."""
    cfg = method(lambda p, layer, cfg: LowRankAdd(p.lora_A, p.lora_B, cfg.scale, p.dropout_now))
    ll.attach(model(), cfg(r=4, dropout=0.5))
