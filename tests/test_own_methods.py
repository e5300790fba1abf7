"""Methods of a user's own, written as the guide shows: what they get wrong is refused by name, and what files and
merging can't hold is not written."""

import dataclasses
import enum
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from models import assert_close, randomize
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

import lora_lite as ll
from lora_lite.primitives import LowRankAdd, Primitive, RotatePairs, ScaleInput, ScaleOutput
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
    with pytest.raises(ll.AttachError, match=r"^0: Own\.primitive must return a Primitive; got None"):
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
