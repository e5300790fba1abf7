"""`verify` apart from the kernels: what it leaves behind, what it accepts, what it refuses."""

from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from models import VARIANTS, attach, config, llama, randomize, snapshot, token_ids
from torch import Tensor, nn

import lora_lite as ll
from lora_lite import in_place


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_is_within_rounding(variant: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = llama().to(dtype)
        attachment = attach(model, variant)
        randomize(model, by=0.2)
        rows = ll.verify(model, {"input_ids": token_ids(), "labels": token_ids()})
        assert sorted(row.layer for row in rows) == sorted(attachment.adapters)
        for row in rows:
            adapter = attachment.adapters[row.layer]
            names = {"output", "grad_input", *(name for name, p in adapter.named_parameters() if p.requires_grad)}
            shares = row.layer.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
            if shares and not variant.startswith(("ia3", "road", "hra")):
                names |= {f"{name} together" for name in names}
            assert set(row.errors) == names
            assert row.excess <= 1
            assert row.layer in str(row)


def test_nothing_is_left_behind() -> None:
    model: Any = llama()
    attach(model, "lora")
    for p in ll.parameters(model):
        p.grad = torch.ones_like(p)
    before = snapshot(model)
    ll.verify(model, token_ids())
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert before["hooks"] == after["hooks"]
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in ll.parameters(model))


class _Doubled(torch.autograd.Function):
    """x, with twice its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


def spoilt(what: str, together: Any) -> Any:
    """`shrink_together` with twice the gradient, or with one product that is off."""

    def call(x: Tensor, *args: Any) -> Any:
        xs, (*hs, h) = together(_Doubled.apply(x) if what == "grad_input" else x, *args)
        return xs, [*hs, 1.05 * h if what == "output" else h]

    return call


@pytest.mark.parametrize(("what", "worst"), [("output", "(output|lora_.)"), ("grad_input", "grad_input")])
def test_what_layers_do_together_is_compared_too(what: str, worst: str) -> None:
    """Each by itself is right."""
    model = llama()
    ll.attach(model, ll.LoRAConfig(r=4, target_names=("q_proj", "k_proj", "v_proj", "o_proj")))
    randomize(model)
    wrong = spoilt(what, in_place.shrink_together)
    with (
        mock.patch.object(in_place, "shrink_together", wrong),
        pytest.raises(ll.KernelMismatchError, match=rf"(q|k|v)_proj \(reference\): {worst} together .* allowed"),
    ):
        ll.verify(model, token_ids())
    ll.verify(model, token_ids())


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_float64_in_which_sums_have_another_order(variant: str) -> None:
    """No wider dtype tells what rounding comes to; a product that is off by less than float32 can tell is named."""
    model = llama().double()
    ll.attach(model, config(variant, dtype=torch.float64))
    randomize(model)
    ids = token_ids(64, 64)
    ll.verify(model, ids)
    shrink = in_place.shrink_together

    def off(x: Tensor, *args: Any) -> Any:
        xs, hs = shrink(x, *args)
        return xs, [(1 + 1e-11) * h for h in hs]

    with mock.patch.object(in_place, "shrink_together", off), pytest.raises(ll.KernelMismatchError, match="together"):
        ll.verify(model, ids)


def test_gradients_of_siblings_that_cancel() -> None:
    """What is left of the input's gradient is rounding."""

    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(64, 64), nn.Linear(64, 64)
            self.k_proj.load_state_dict(self.q_proj.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            return self.q_proj(x) - self.k_proj(x)

    model = Difference().half()
    ll.attach(model, ll.LoRAConfig(r=4))
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=1e-4)
    rows = ll.verify(model, torch.randn(256, 64).half())
    assert "grad_input together" in rows[0].errors


class Shared(nn.Module):
    """Three layers that read one x, of which one is called twice, and x is written to before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(x)
        y = self.q_proj(x) + self.k_proj(x) * self.q_proj(x)
        with torch.no_grad():
            z = x.detach().mul_(2)
        return y + self.v_proj(z)


def test_what_siblings_read_and_share() -> None:
    model = nn.ModuleDict({"attn": Shared()})
    model.forward = lambda x: model["attn"](x)
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("_proj",)))
    randomize(model)
    ll.verify(model, torch.randn(5, 8))


class Gated(nn.Linear):
    """A layer whose forward asks another one, of another width, how much of its output is to count."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.gate = nn.Linear(8, 10)
        self.share: Any = None

    def forward(self, input: Tensor) -> Tensor:
        self.share = self.gate(input).mean(-1, keepdim=True)
        return super().forward(input)


def test_a_layer_that_calls_another() -> None:
    """The inner one's call ends before the outer one's."""
    model = nn.Sequential(Gated())
    model.forward = lambda x: model[0](x) * model[0].share  # type: ignore[method-assign]
    ll.attach(model, ll.LoRAConfig(r=2, target_roles=()))
    randomize(model)
    rows = ll.verify(model, torch.randn(4, 8))
    assert sorted(row.layer for row in rows) == ["0", "0.gate"]
    assert all(row.errors.keys() == {"output", "grad_input", "lora_A", "lora_B"} for row in rows)


@pytest.mark.parametrize("case", ["a target", "no rows", "written to"])
def test_gradients_that_one_call_of_a_layer_has(case: str) -> None:
    """It also runs without gradients, or on no rows; or a view of its output is written to. No warning says that it
    would not train."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(x: Tensor) -> Tensor:
        y = model[0](x).view(2, 2, 4).transpose(0, 1)
        if case == "written to":
            y *= 2
        elif case == "a target":
            with torch.no_grad():
                y = y - model[1](model[0](x)).view(2, 2, 4)
        else:
            model[1](model[0](x[:0]))
        return model[1](y.transpose(0, 1).reshape(2, 8).tanh())

    model.forward = forward  # type: ignore[method-assign,assignment]
    ll.attach(model, ll.LoRAConfig(r=2, target_roles=()))
    randomize(model)
    ll.verify(model, torch.randn(2, 8))


class Twice(nn.Module):
    """One layer that runs twice, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[str, Tensor]:
        return "a label", self.q_proj(torch.tanh(self.q_proj(x * scale)))


@pytest.mark.parametrize("batch", [torch.randn(3, 8), (torch.randn(3, 8), 2.0), {"x": torch.randn(3, 8)}])
def test_batches(batch: Any) -> None:
    model = Twice()
    ll.attach(model, ll.LoRAConfig(r=2))
    assert [row.layer for row in ll.verify(model, batch, partial=True)] == ["q_proj", "q_proj"]
    with pytest.raises(ll.AttachError, match=r"did not run these adapted layers: k_proj.*partial=True"):
        ll.verify(model, batch)


def test_refuses_inference_mode() -> None:
    """Where no tensor has a gradient; under no_grad it makes its own."""
    model = llama()
    attach(model, "lora")
    with torch.no_grad():
        ll.verify(model, token_ids())
    with pytest.raises(ll.AttachError, match=r"verify: .*inference_mode.*outside"), torch.inference_mode():
        ll.verify(model, token_ids())


def test_refuses() -> None:
    with pytest.raises(ll.AttachError, match="no adapter is attached"):
        ll.verify(llama(), token_ids())
    model = Twice()
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("k_proj",)))
    with pytest.raises(ll.AttachError, match="ran none of the adapted layers"):
        ll.verify(model, torch.randn(3, 8))


@pytest.mark.parametrize("rtol", [0.0, -1.0, float("nan")])
def test_refuses_a_tolerance_that_nothing_meets(rtol: float) -> None:
    model = Twice()
    ll.attach(model, ll.LoRAConfig(r=2))
    with pytest.raises(ValueError, match="rtol must be above 0"):
        ll.verify(model, torch.randn(3, 8), rtol=rtol)


def test_a_wrong_variant_of_the_users_own_is_not_its_business() -> None:
    """verify compares backends: both run the variant as it is written."""
    model = Twice()
    ll.attach(model, ll.LoRAConfig(r=2, alpha=123.0))
    assert ll.verify(model, torch.randn(3, 8), partial=True)


class FromZeros(nn.Module):
    """As decoders do that start from queries of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(torch.zeros_like(x)).tanh() + x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_input_of_zeros(variant: str, dtype: torch.dtype) -> None:
    """Gradients that are zero but for rounding."""
    torch.manual_seed(0)
    model = FromZeros().to(dtype)
    batches = [torch.randn(60, 16, dtype=dtype)] if variant == "antipasto" else None
    if variant == "eva":
        return  # its calibration refuses such a layer
    attach(model, variant, batches, r=4, target_names=(), target_roles=())
    randomize(model)
    ll.verify(model, torch.randn(7, 16, dtype=dtype))


@pytest.mark.parametrize("seed", range(6))
def test_gradients_that_cancel(seed: int) -> None:
    """A scalar's gradient is a sum over all tokens, of which little may be left in 16 bits."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).to(torch.bfloat16)
    ll.attach(model, ll.DeLoRAConfig(r=4, target_roles=()))
    randomize(model)
    ll.verify(model, torch.randn(50, 16, dtype=torch.bfloat16))


def test_an_output_that_nothing_uses() -> None:
    """It is compared on a gradient of its own, and said so."""

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, both: bool = False) -> tuple[Tensor, ...]:
            q, k = self.q_proj(x), self.k_proj(x)
            return (torch.ones(2), {"more": k}, q) if both else (q,)

    model = Unused()
    ll.attach(model, ll.LoRAConfig(r=2))
    randomize(model)
    with pytest.warns(UserWarning, match="an output that nothing uses.*: k_proj"):
        rows = ll.verify(model, torch.randn(3, 8))
    assert all(row.errors["lora_A"] > 0 for row in rows)
    with pytest.raises(ll.AttachError, match="no floating-point numbers"):
        ll.verify(model, torch.randn(0, 8))
    ll.verify(model, (torch.randn(3, 8), True))  # each output is one that training may use


@pytest.mark.parametrize("config", [ll.LoRAConfig(r=4), ll.DeLoRAConfig(r=2)], ids=["lora", "delora"])
def test_sums_in_another_order_are_no_fault(config: Any) -> None:
    """Layers that share x, few rows with a gradient, a sum of terms that cancel: each error is the luck of some
    roundings, of which the reference draws others."""
    for seed in range(12):
        torch.manual_seed(seed)
        base = transformers.ViTConfig(
            hidden_size=96,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=96,
            image_size=64,
            patch_size=8,
        )
        model = transformers.ViTForImageClassification(base).eval()
        ll.attach(model, config)
        randomize(model, seed=seed, by=0.02)
        ll.verify(model, {"pixel_values": torch.randn(8, 3, 64, 64), "labels": torch.randint(2, (8,))})
