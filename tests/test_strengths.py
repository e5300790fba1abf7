"""`use(model, {"a": 0.7})`: W + 0.7 (W' − W), of every method, on every kind of layer, run and merged."""

import copy
import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import peft
import pytest
import torch
from models import (
    VARIANTS,
    assert_close,
    attach,
    calibration_batches,
    config,
    llama,
    load_tests,
    logits,
    qwen3_moe,
    randomize,
    token_ids,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from lora_lite.primitives import LowRankAdd, Primitive, in_part, leave

runtime, own_methods = load_tests("test_runtime"), load_tests("test_own_methods")
registered_here = own_methods.registered_here  # each test's own methods are gone after it
STRENGTHS = (0.5, -1, 0, 2.5)


def as_merged(model: Any, make: Any) -> Tensor:
    """What the model's merged weights compute without adapters."""
    plain = make().to(model.dtype)
    plain.load_state_dict(ll.merged_state_dict(model))
    return logits(plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_changes_that_many_times_as_much(variant: str) -> None:
    """Outputs, and gradients of the method's tensors and of x."""
    layer, x, g = nn.Linear(16, 12).double(), torch.randn(2, 3, 16, dtype=torch.float64), torch.randn(2, 3, 12)
    base = layer(x)
    of_base = (base.detach() * 0 + g) @ layer.weight.detach()
    calibration = [torch.randn(40, 16).double() for _ in range(3)] if variant in ("eva", "antipasto") else None
    ll.attach(layer, config(variant, target_roles=(), target_names=()), calibration_data=calibration, name="a")
    randomize(layer.double(), by=0.3)
    parameters = ll.parameters(layer)

    def run() -> tuple[Tensor, list[Tensor]]:
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        return y.detach(), list(torch.autograd.grad(y, [leaf, *parameters], g.double()))

    full, (of_x, *of_parameters) = run()
    assert (full - base).norm() > 0.05 * base.norm()
    for strength in STRENGTHS:
        ll.use(layer, {"a": strength})
        y, (dx, *grads) = run()
        assert_close(y, base + strength * (full - base), 1e-12)
        assert_close(dx, of_base + strength * (of_x - of_base), 1e-12)
        for got, want in zip(grads, of_parameters, strict=True):
            assert (got - strength * want).norm() <= 1e-12 * want.norm()
    ll.use(layer, {"a": 1})
    assert torch.equal(run()[0], full)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_is_what_its_merged_weights_are(variant: str) -> None:
    """Layers that share x among them. Full strength and none are the model's with and without the adapter."""
    model = llama().double()
    base = logits(model)
    attach(model, variant, calibration_batches())
    randomize(model, by=0.3)
    (name,) = (each.name for each in ll.attachment.attachments(model))
    full = logits(model)
    for strength in (0.5, -1):
        ll.use(model, {name: strength})
        got = logits(model)
        assert_close(got, as_merged(model, llama), 1e-6)  # the model's norms round to float32
        assert min((got - other).norm() for other in (base, full)) > 0.05 * base.norm()
    ll.use(model, {name: 0})
    assert_close(logits(model), base, 1e-6)
    ll.use(model, name)
    assert torch.equal(logits(model), full)


@pytest.mark.parametrize("scale", [0.6, -1.5])
def test_pefts_scale(scale: float, tmp_path: Path) -> None:
    theirs: Any = peft.get_peft_model(llama(), peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))  # type: ignore[arg-type]
    randomize(theirs, by=0.3)
    theirs.save_pretrained(tmp_path)
    for layer in theirs.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.set_scale("default", scale)
    model = llama()
    ll.import_peft(model, tmp_path, name="a")
    ll.use(model, {"a": scale})
    assert_close(logits(model), logits(theirs), 1e-5)


@pytest.mark.parametrize("methods", [("lora", "pissa"), ("lora", "dora"), ("hra", "ia3"), ("dora", "delora")], ids=str)
def test_each_has_its_own(methods: tuple[str, str]) -> None:
    """Of two that act, on one layer: sums as one, and what nests."""
    layer, x = nn.Linear(16, 12).double(), torch.randn(5, 16, dtype=torch.float64)
    for name, variant in zip("ab", methods, strict=True):
        ll.attach(layer, config(variant, target_roles=(), target_names=()), name=name)
    randomize(layer.double(), by=0.3)
    ll.use(layer, {"a": 0.7, "b": -0.4})
    got = layer(x)
    ll.use(layer, {"a": 0.7})
    only_a = ll.merged_state_dict(layer)["weight"]
    ll.use(layer, {"b": -0.4, "a": 0.7})
    assert torch.equal(layer(x), got)
    merged = ll.merged_state_dict(layer)
    assert_close(got, x @ merged["weight"].T + merged["bias"], 1e-12)
    assert (merged["weight"] - only_a).norm() > 0.02 * only_a.norm()


@pytest.mark.parametrize("variant", ["lora", "dora", "hra", "ia3", "road", "delora"])
def test_experts(variant: str) -> None:
    model = qwen3_moe()
    ll.attach(model, config(variant, target_names=(r"\.experts\.",)), name="a")
    randomize(model, by=0.3)
    full = logits(model)
    ll.use(model, {"a": 0.5})
    assert_close(logits(model), as_merged(model, qwen3_moe), 1e-5)
    assert (logits(model) - full).norm() > 0.01 * full.norm()


def test_embeddings() -> None:
    model, ids = nn.Sequential(nn.Embedding(20, 8, padding_idx=0)), torch.randint(0, 20, (3, 7))
    base = model.double()(ids)
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("0",)), name="a")
    randomize(model, by=0.3)
    full = model(ids)
    ll.use(model, {"a": -0.5})
    assert_close(model(ids), base - 0.5 * (full - base), 1e-12)
    assert_close(ll.merged_state_dict(model)["0.weight"][ids], model(ids), 1e-12)


@dataclasses.dataclass
class Both(Primitive):
    """Of a user's own, on input and output: g ∘ W (g ∘ x)."""

    g: Tensor

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        return x * self.g, None

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        return y * self.g


@pytest.mark.parametrize("stack", [False, True])
def test_a_method_of_a_users_own(stack: bool) -> None:
    """On experts, where it knows no segments, too."""

    def gains(layer: nn.Module, g: Tensor) -> Tensor:
        """Both, at half strength, by the formula."""
        half = (1 + g) / 2
        return half[..., :, None] * layer.weight * half[..., None, :]  # type: ignore[operator]

    spec = lambda K, N, cfg: {"lora_g": ll.ParamSpec((min(K, N),), init="ones")}  # noqa: E731
    cfg = own_methods.method(lambda p, layer, cfg: Both(p.lora_g), spec)
    if stack:
        model = qwen3_moe(hidden_size=32, moe_intermediate_size=32)
        ll.attach(model, cfg(target_names=(r"experts\.down_proj",)), name="a")
        randomize(model, by=0.3)
        ll.use(model, {"a": 0.5})
        assert_close(logits(model), as_merged(model, lambda: qwen3_moe(hidden_size=32, moe_intermediate_size=32)), 1e-5)
        return
    layer, x = nn.Linear(8, 8, bias=False).double(), torch.randn(3, 8, dtype=torch.float64)
    adapter = ll.attach(layer, cfg(target_roles=()), name="a").adapters[""]
    randomize(layer.double(), by=0.3)
    ll.use(layer, {"a": 0.5})
    want = gains(layer, cast(Tensor, adapter.lora_g))
    assert_close(layer(x), x @ want.T, 1e-12)
    assert_close(ll.merged_state_dict(layer)["weight"], want, 1e-12)
    strange = Both(torch.ones(8))
    strange.on_output = lambda y, carry, ops: y[..., :3]  # type: ignore[method-assign]
    with pytest.raises(ll.AttachError, match=r"Both\.on_output must return an output"):
        leave(in_part(strange, 0.5), x, None, None)


@dataclasses.dataclass
class Written(Primitive):
    """Of a user's own: g ∘ y, into y."""

    g: Tensor

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        return y.mul_(self.g)


@dataclasses.dataclass
class Gained(LowRankAdd):
    """Of a user's own: W (g ∘ x) + scale · (g ∘ x) Aᵀ Bᵀ."""

    g: Any = None

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        return super().on_input(x * self.g[..., 0].to(x.dtype), ops)


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.0, 0.5, -1.0])
@pytest.mark.parametrize("stack", [False, True])
def test_a_users_own_that_writes_into_its_output(stack: bool, strength: float) -> None:
    """What is to be changed in part is not lost."""
    cfg = own_methods.method(lambda p, layer, cfg: Written(p.lora_B[..., 0]))
    model: Any = qwen3_moe() if stack else nn.Sequential(nn.Linear(12, 8))
    run = logits if stack else lambda model: model(x)
    x = torch.randn(5, 12)
    base = run(model)
    ll.attach(model, cfg(r=4, target_names=(r"experts\.down_proj" if stack else "0",)), name="a")
    randomize(model, by=0.3)
    full = run(model)
    ll.use(model, {"a": strength})
    assert_close(run(model), as_merged(model, qwen3_moe) if stack else base + strength * (full - base), 1e-5)
    assert (run(model) - full).norm() > 0.01 * full.norm()
    if not strength:
        assert_close(run(model), base, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.0, 0.5, -1.0])
def test_a_users_own_sum_that_changes_its_input_too(strength: float) -> None:
    cfg = own_methods.method(lambda p, layer, cfg: Gained(p.lora_A, p.lora_B, 1.5, g=p.lora_A.mT))
    layer, x = nn.Linear(12, 8), torch.randn(5, 12)
    adapter: Any = ll.attach(layer, cfg(r=4, target_roles=()), name="a").adapters[""]
    randomize(layer, by=0.3)
    ll.use(layer, {"a": strength})
    g = adapter.lora_A[0]
    want = layer.forward((1 + strength * (g - 1)) * x) + strength * 1.5 * (g * x) @ adapter.lora_A.T @ adapter.lora_B.T
    assert_close(layer(x), want, 1e-5)


@pytest.mark.parametrize("variant", ["lora", "dora", "hra", "ia3", "own"])
def test_under_autocast(variant: str) -> None:
    """Whose dtypes a user's own may mix."""
    layer, x = nn.Linear(12, 12), torch.randn(5, 12)
    base = layer(x)
    if variant == "own":
        cfg = own_methods.method(lambda p, layer, cfg: Both(p.lora_A[0]))(r=4, target_roles=())
    else:
        cfg = config(variant, target_roles=(), target_names=())
    ll.attach(layer, cfg, name="a")
    randomize(layer, by=0.3)
    ll.use(layer, {"a": 0.5})
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    got.float().sum().backward()
    assert_close(got, want, 2e-2)
    assert (want - base).norm() > 0.05 * base.norm()


@pytest.mark.parametrize("variant", ["lora", "dora", "hra"])
def test_one_graph_serves_all(variant: str) -> None:
    """But the first, which knows of none."""
    torch._dynamo.reset()
    model, x = runtime.block(variant), torch.randn(2, 3, 12)
    (name,) = (each.name for each in ll.attachment.attachments(model))
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    compiled(x)
    for strength in (0.5, -2, 3, 0.25, 7, 0.1, 0.2, 0.3, 0.4, 12, 0):
        ll.use(model, {name: strength})
        assert_close(compiled(x), model(x), 1e-5)
    assert graphs.frame_count <= 3


def test_compiled_checkpointed_and_copied() -> None:
    """A compiled model sees that the strength is another."""
    torch._dynamo.reset()
    model = runtime.block("dora")
    (name,) = (each.name for each in ll.attachment.attachments(model))
    x = torch.randn(2, 3, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x)
    for strength in (0.5, -2):
        ll.use(model, {name: strength})
        want, want_grads = runtime.loss_and_grads(model, model, x)
        for run in (compiled, lambda x: checkpoint(model, x, use_reentrant=False)):
            got, grads = runtime.loss_and_grads(model, run, x)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(grads, want_grads)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), want)
        ll.use(twin, name)
        assert torch.equal(model(x), want)
        assert not torch.allclose(twin(x), want)


def test_they_end_with_use_and_with_detach(tmp_path: Path) -> None:
    model = llama()
    for name in ("a", "b"):
        ll.attach(model, config("lora"), name=name)
    randomize(model)
    both = logits(model)
    ll.use(model, {"a": 0.5, "b": 2})
    weak = logits(model)
    with ll.disabled(model, "b"):
        half = logits(model)
        ll.use(model, "a")
        assert not torch.equal(logits(model), half)
    assert torch.equal(logits(model), weak)
    with pytest.warns(UserWarning, match=r"save: a file holds no strength; .* use\(model, \{'a': 0.5, 'b': 2.0\}\)"):
        ll.save(model, tmp_path / "b", name="b")
    assert "b, lora at strength 2.0: " in ll.attachment.require_attachment(model, "b").summary()
    ll.verify(model, {"input_ids": token_ids()}, name="b")
    assert torch.equal(logits(model), weak)
    ll.detach(model, "b")
    assert torch.equal(logits(model), half)
    ll.load(model, tmp_path / "b", name="b")
    again = logits(model)
    assert not torch.equal(again, weak)
    ll.use(model, {"a": 0.5, "b": 1})
    assert torch.equal(logits(model), again)
    ll.use(model, "a", "b")
    assert torch.equal(logits(model), both)
    ll.use(model, {"a": 0.5, "b": 2})
    ll.use(model, ["a", "b"])
    rows = logits(model)
    ll.use(model, "a")
    assert_close(rows[0], logits(model)[0], 1e-6)


def test_another_of_that_name_has_none() -> None:
    """Also on layers where the first did not stand, and after a context that began before."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("0",)), name="a")
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("1",)), name="b")
    ll.use(model, {"a": 0.5, "b": 1})
    with ll.disabled(model, "b"):
        ll.detach(model, "a")
        ll.attach(model, ll.LoRAConfig(r=2, target_names=("0", "1")), name="a")
    randomize(model, by=0.3)
    got = model(x)
    ll.use(model, "a", "b")
    assert torch.equal(model(x), got)


def test_training_at_none_is_told() -> None:
    model: Any = llama()
    ll.attach(model, config("lora"), name="a")
    randomize(model)
    ll.use(model, {"a": 0})
    optimizer = torch.optim.AdamW(ll.parameters(model), 1e-2)

    def train() -> None:
        for _ in range(12):
            optimizer.zero_grad()
            model.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
            optimizer.step()

    with pytest.warns(UserWarning, match=r"after 10 steps: adapter 'a' acts at strength 0, .* use\(model, ") as told:
        train()
    assert len(told) == 1


def test_numbers_of_other_kinds() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    ll.attach(layer, ll.HRAConfig(r=2, target_roles=()), name="a")
    randomize(layer)
    ll.use(layer, {"a": 0.5})
    want = layer(x)
    for half in (Fraction(1, 2), np.float32(0.5), np.float64(0.5)):
        ll.use(layer, {"a": half})  # type: ignore[dict-item]
        assert torch.equal(layer(x), want)
        assert repr(ll.attachment.require_attachment(layer, "a").strength) == "0.5"


@pytest.mark.parametrize(
    "strength", [None, "0.5", True, float("nan"), float("inf"), [0.5], 10**400], ids=lambda s: str(s)[:9]
)
def test_what_is_no_strength(strength: Any) -> None:
    model = llama()
    ll.attach(model, config("lora"), name="a")
    randomize(model)
    ll.use(model, {"a": 0.5})
    before = logits(model)
    with pytest.raises(ValueError, match="use: the strength of 'a' must be a finite number; got "):
        ll.use(model, {"a": strength})
    assert torch.equal(logits(model), before)


def test_what_can_have_none() -> None:
    model = llama()
    ll.attach(model, config("lora", modules_to_save=("norm",)), name="a")
    ll.attach(model, config("lora"), name="b")
    randomize(model)
    before = logits(model)
    with pytest.raises(ValueError, match=r"use: a trains whole modules .*; its strength can only be 1"):
        ll.use(model, {"a": 0.5, "b": 2})
    with pytest.raises(ll.AttachError, match="'c'"):
        ll.use(model, {"c": 0.5})
    with pytest.raises(ValueError, match="name at least one adapter"):
        ll.use(model, {})
    with pytest.raises(ValueError, match="lengths and batch_dim belong to a list of names"):
        ll.use(model, {"b": 0.5}, lengths=[17, 17])
    with pytest.raises(ValueError, match=r"a name is a string; got \{'b': 0.5\}"):
        ll.use(model, "a", {"b": 0.5})
    assert torch.equal(logits(model), before)
    ll.use(model, {"a": 1, "b": 0.5})
    assert not torch.equal(logits(model), before)
