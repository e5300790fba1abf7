"""The runtime: what attach puts on a model, what runs with it on, and what detach takes off again."""

import copy
import io
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from models import (
    VARIANTS,
    assert_close,
    assert_same,
    attach,
    calibration_batches,
    llama,
    logits,
    randomize,
    rel_error,
    snapshot,
    token_ids,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
import lora_lite.backend
from lora_lite import calls
from lora_lite.site import Site

EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
Q0 = "model.layers.0.self_attn.q_proj"


class Block(nn.Module):
    """Two linears with biases, named so that every variant's default targets match one: IA3's, IA3-FF's, the rest's."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.down_proj = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.tanh(self.k_proj(x)))


def block(variant: str | None = None, **fields: Any) -> Block:
    """A Block, with a variant attached and moved away from its start where one is named."""
    model = Block()
    if variant:
        batches = [torch.randn(64, 12)] if variant == "eva" else None
        attach(model, variant, batches, **fields)
        randomize(model)
    return model


def loss_and_grads(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of x and of each adapter parameter for a fixed function of the output."""
    x = x.clone().requires_grad_()
    y = run(x)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    grads = torch.autograd.grad((y.float() * weights).sum(), [x, *ll.parameters(model)])
    return y.detach(), list(grads)


# ---- What attach returns ----


def test_attachment_describes_what_was_attached() -> None:
    model = llama()
    cfg = ll.LoRAConfig(r=4, target_names=("q_proj", "down_proj"), layers=(1,))
    attachment = ll.attach(model, cfg)
    assert attachment.cfg == cfg
    assert [(t.name, t.role) for t in attachment.targets] == [
        ("model.layers.1.self_attn.q_proj", "reader"),
        ("model.layers.1.mlp.down_proj", "writer"),
    ]
    assert attachment.trainable == 4 * (32 + 32) + 4 * (56 + 32)
    assert attachment.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert [id(p) for p in ll.parameters(model)] == [id(p) for p in model.parameters() if p.requires_grad]
    assert not any(module.training for module in model.modules()), "adapters take their layer's mode"


def test_backends_say_what_runs_and_why() -> None:
    model = Block()
    requested = ll.attach(model, ll.LoRAConfig(r=4), backend="reference").backends()
    assert requested == dict.fromkeys(("k_proj", "down_proj"), ("reference", "requested"))
    ll.detach(model)
    for backend, why in ll.attach(model.double(), ll.LoRAConfig(r=4), backend="auto").backends().values():
        assert backend == "reference"  # float64 has no kernel anywhere
        assert why not in ("", "requested")


def test_triton_that_falls_back_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name, unlike with "auto", the kernels must not be missing in silence; nor at every call."""
    model, x = Block().double(), torch.randn(3, 12).double()  # float64 has no kernel anywhere
    monkeypatch.setattr("lora_lite.backend._warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attachment = ll.attach(model, ll.LoRAConfig(r=4), backend="triton")
        for _ in range(3):
            model(x)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == len(set(messages))
    for name, why in attachment.backends().values():
        assert name == "reference"
        assert any("reference instead" in message and why in message for message in messages)


FALL_BACK = """
import sys, warnings
if {blocked}:
    sys.modules["triton"] = None
import torch
import lora_lite as ll
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    attachment = ll.attach(model, ll.LoRAConfig(r=2), backend="triton")
    model(torch.randn(2, 8)).sum().backward()
print(len([w for w in caught if "reference instead" in str(w.message)]), attachment.summary())
assert "lora_lite.kernels.ops" not in sys.modules
"""


@pytest.mark.parametrize(
    ("blocked", "why"), [(False, "TRITON_INTERPRET=1, set before Python starts"), (True, "Triton is not installed")]
)
def test_without_the_interpreter_or_without_triton(blocked: bool, why: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = FALL_BACK.format(blocked=blocked)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 "), done.stdout
    assert why in " ".join(done.stdout.replace("│", " ").split())


def test_summary_has_a_row_for_each_layer() -> None:
    attachment = ll.attach(llama(), ll.LoRAConfig(r=4), backend="reference")
    text = attachment.summary()
    assert f"lora: {attachment.trainable:,} trainable" in text
    rows = {
        target.name: [line for line in text.splitlines() if f" {target.name} " in line] for target in attachment.targets
    }
    assert len(rows) == 14
    for name, lines in rows.items():
        assert len(lines) == 1, name
        assert "reference (requested)" in lines[0]
    (row,) = rows["model.layers.0.mlp.down_proj"]
    assert all(cell in row for cell in ("56 → 32", "writer", f"{4 * (56 + 32)}"))


def test_state_dict_holds_the_adapter_and_shares_its_memory() -> None:
    model = block("pissa")
    tensors = ll.state_dict(model)
    assert list(tensors) == [f"{n}.lora_{t}" for n in ("k_proj", "down_proj") for t in ("A", "B", "A0", "B0")]
    with torch.no_grad():
        ll.parameters(model)[0].zero_()
    assert not tensors["k_proj.lora_A"].any()
    assert "k_proj.lora_w_sq" not in ll.state_dict(block("dora")), "derived tensors are not the adapter's to keep"


def test_base_is_frozen_and_only_the_adapter_trains() -> None:
    model, ids = llama(), token_ids()
    base = dict(model.named_parameters())
    attach(model, "lora")
    assert not any(p.requires_grad for p in base.values())
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is None for p in base.values())


# ---- disabled ----


@EACH_VARIANT
def test_disabled_is_the_base_model(variant: str) -> None:
    model, x = Block(), torch.randn(3, 12)
    base = model(x)
    attach(model, variant, [torch.randn(64, 12)] if variant == "eva" else None)
    randomize(model)
    adapted = model(x)
    assert not torch.allclose(adapted, base, atol=1e-3)
    with ll.disabled(model):
        assert torch.equal(model(x), base)
        with ll.disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base), "the inner context switched the adapter on"
    assert torch.equal(model(x), adapted)
    with pytest.raises(KeyError), ll.disabled(model):
        raise KeyError
    assert torch.equal(model(x), adapted)


# ---- Copies, dtypes ----


@EACH_VARIANT
def test_copies_are_independent(variant: str) -> None:
    model, x = block(variant), torch.randn(3, 12)
    adapted = model(x)
    with ll.disabled(model):
        base = model(x)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(duplicate(x), adapted)
        assert [p.requires_grad for p in duplicate.parameters()] == [p.requires_grad for p in model.parameters()]
        with torch.no_grad():
            for p in ll.parameters(duplicate):
                p.add_(0.1)
        assert not torch.equal(duplicate(x), adapted)
        with ll.disabled(duplicate):
            assert torch.equal(model(x), adapted), "disabling the copy reached the original"
        ll.detach(duplicate)
        assert torch.equal(duplicate(x), base)
        assert all(p.requires_grad for p in duplicate.parameters())
        assert torch.equal(model(x), adapted)


@EACH_VARIANT
def test_module_state_dict_round_trip(variant: str) -> None:
    """A trainer's checkpoint of the whole model: torch.save of state_dict, loaded into another attached model."""
    model, x, file = block(variant), torch.randn(3, 12), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    randomize(other, seed=1)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), model(x))


@EACH_VARIANT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
def test_model_converted_after_attach(variant: str, dtype: torch.dtype) -> None:
    model, x = block(variant), torch.randn(3, 5, 12)
    want, want_grads = loss_and_grads(model, model, x)
    model.to(dtype)
    got, grads = loss_and_grads(model, model, x.to(dtype))
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 6e-2
    assert_close(got, want, tolerance)
    for g, w in zip(grads, want_grads, strict=True):
        assert g.isfinite().all()
        assert_close(g, w, tolerance * 3)


@EACH_VARIANT
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_low_precision_base(variant: str, adapter_dtype: torch.dtype) -> None:
    """A bf16 base keeps its dtype whatever the adapter's is."""
    model = Block().bfloat16()
    attach(model, variant, [torch.randn(64, 12).bfloat16()] if variant == "eva" else None, dtype=adapter_dtype)
    randomize(model)
    y, grads = loss_and_grads(model, model, torch.randn(3, 12).bfloat16())
    assert y.dtype == torch.bfloat16
    for p, grad in zip(ll.parameters(model), grads[1:], strict=True):
        assert p.dtype == (torch.float32 if p.ndim < 2 else p.dtype)
        assert grad.dtype == p.dtype
        assert grad.isfinite().all()


# ---- Training and the machinery around it ----


@EACH_VARIANT
def test_training_lowers_the_loss(variant: str) -> None:
    model, ids = llama(num_hidden_layers=1), token_ids(2, 9)
    attach(model, variant)
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    few = variant in ("ia3", "ia3_ff", "antipasto", "road")  # parameters, and large steps
    optimizer = torch.optim.AdamW(ll.parameters(model), lr=0.1 if few else 2e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < (0.9 if few else 0.8) * losses[0]
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)


@EACH_VARIANT
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(variant: str, backend: str) -> None:
    torch._dynamo.reset()
    model, x = block(variant), torch.randn(2, 3, 12)
    want, want_grads = loss_and_grads(model, model, x)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    got, grads = loss_and_grads(model, compiled, x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, want_grads)
    with ll.disabled(compiled):
        base = compiled(x)
    ll.detach(compiled)
    torch.testing.assert_close(base, model(x))


@EACH_VARIANT
def test_compile_with_checkpointing(variant: str) -> None:
    """In one graph, in which a block that is run again may write to nothing outside of it."""
    torch._dynamo.reset()
    model, x = block(variant), torch.randn(2, 3, 12)
    want, want_grads = loss_and_grads(model, model, x)
    compiled = torch.compile(lambda x: checkpoint(model, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    got, grads = loss_and_grads(model, compiled, x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, want_grads)


@EACH_VARIANT
def test_blocks_that_are_compiled_one_by_one_share_a_graph(variant: str) -> None:
    """As trainers and diffusers compile repeated blocks; the first, whose input needs no gradient, has its own."""
    torch._dynamo.reset()
    attach(model := llama(num_hidden_layers=4), variant, calibration_batches(2))
    randomize(model)
    want, counter = logits(model), CompileCounter()
    for each in model.model.layers:
        each.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        found = model(input_ids=token_ids(), labels=token_ids(), use_cache=False)
        assert_close(found.logits, want, 1e-6)
        found.loss.backward()
    assert counter.frame_count == 2


def test_compile_where_no_backend_was_asked_for() -> None:
    """An unpickled model in another process, or one of another dtype by now."""
    torch._dynamo.reset()
    model, x = block("lora").double(), torch.randn(3, 12, dtype=torch.float64)
    want = model(x)
    lora_lite.backend._in_force.clear()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), want)


class Breaks(nn.Linear):
    """Breaks a graph that is compiled."""

    def forward(self, input: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(input)


@pytest.mark.parametrize("uncompiled", ["neither", "before", "after", "both"])
def test_a_graph_that_breaks_within_the_layer(uncompiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two hooks may be compiled, and the other not, as where it was compiled too often."""
    torch._dynamo.reset()
    for name in {"neither": (), "both": ("before", "after")}.get(uncompiled, (uncompiled,)):
        monkeypatch.setattr(Site, name, torch.compiler.disable(getattr(Site, name)))
    model, x = nn.Sequential(Breaks(8, 8), nn.Tanh(), Breaks(8, 8)), torch.randn(3, 8, requires_grad=True)
    ll.attach(model, ll.LoRAConfig(r=2, target_roles=()))
    randomize(model)
    want = torch.autograd.grad(model(x).square().sum(), [x, *ll.parameters(model)])
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        got = torch.autograd.grad(compiled(x).square().sum(), [x, *ll.parameters(model)])
        for mine, theirs in zip(got, want, strict=True):
            assert rel_error(mine, theirs) < 1e-6
    assert not calls._thread.calls


def test_a_late_pre_hook_where_one_of_the_two_hooks_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(Site, "after", torch.compiler.disable(Site.after))
    model, x = nn.Sequential(Breaks(8, 8), nn.Tanh(), Breaks(8, 8)), torch.randn(3, 8)
    ll.attach(model, ll.LoRAConfig(r=2, target_roles=()))
    randomize(model)
    for layer in (model[0], model[2]):
        layer.register_forward_pre_hook(lambda layer, args: None)
    assert_close(torch.compile(model, backend="eager")(x), model(x), 1e-6)


@EACH_VARIANT
def test_checkpointing(variant: str) -> None:
    model, x = block(variant), torch.randn(3, 12)
    want, want_grads = loss_and_grads(model, model, x)
    got, grads = loss_and_grads(model, lambda x: checkpoint(model, x, use_reentrant=False), x)
    assert torch.equal(got, want)
    assert all(torch.equal(g, w) for g, w in zip(grads, want_grads, strict=True))


def test_checkpointing_of_a_transformer() -> None:
    """As trainers switch it on. Inputs are token ids, so that only the adapters need gradients."""
    model, ids = llama().train(), token_ids()
    attach(model, "lora")
    randomize(model)
    want = torch.autograd.grad(model(ids, labels=ids).loss, ll.parameters(model))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = torch.autograd.grad(model(ids, labels=ids).loss, ll.parameters(model))
    torch.testing.assert_close(got, want)


@EACH_VARIANT
def test_autocast(variant: str) -> None:
    model, x = block(variant), torch.randn(3, 5, 12)
    want, want_grads = loss_and_grads(model, model, x)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    got, grads = loss_and_grads(model, run, x)
    assert_close(got, want, 3e-2)
    for p, g, w in zip([x, *ll.parameters(model)], grads, want_grads, strict=True):
        assert g.dtype == p.dtype
        assert g.isfinite().all()
        assert_close(g, w, 6e-2)


@EACH_VARIANT
def test_inference(variant: str) -> None:
    model, x = block(variant), torch.randn(3, 12)
    want, want_grads = loss_and_grads(model, model, x)
    with torch.no_grad():
        y = model(x)
    assert torch.equal(y, want)
    assert not y.requires_grad
    with torch.inference_mode():
        assert torch.equal(model(x), want)
    got, grads = loss_and_grads(model, model, x)  # nothing of inference mode is left behind
    assert torch.equal(got, want)
    assert all(torch.equal(g, w) for g, w in zip(grads, want_grads, strict=True))


@EACH_VARIANT
def test_generation_with_a_cache(variant: str) -> None:
    model, prompt = llama(), token_ids(2, 5)
    attach(model, variant)
    randomize(model, by=0.3)
    # min_new_tokens: the random model's end token must not cut the comparison short.
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(prompt, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    assert cached.sequences.shape == (2, 11)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
    with ll.disabled(model):
        base = model.generate(prompt, use_cache=True, **options)
    assert not torch.allclose(torch.stack(base.logits), torch.stack(cached.logits), atol=1e-2)


# ---- Ways in which a layer is called ----


@EACH_VARIANT
def test_layer_called_by_keyword(variant: str) -> None:
    model = block(variant)
    for layer in (model.k_proj, model.down_proj):
        x = torch.randn(3, layer.in_features)
        assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("shape", [(12,), (0, 12), (3, 12), (2, 1, 3, 12)], ids=str)
@EACH_VARIANT
def test_any_leading_shape(variant: str, shape: tuple[int, ...]) -> None:
    model = block(variant)
    x = torch.randn(shape)
    assert model(x).shape == shape
    rows = model(x.reshape(-1, 12))
    torch.testing.assert_close(model(x).reshape(-1, 12), rows)


@EACH_VARIANT
def test_strided_input(variant: str) -> None:
    model = block(variant)
    for x in (torch.randn(12, 6).t(), torch.randn(4, 12, 6).transpose(1, 2), torch.randn(1, 1, 12).expand(2, 3, 12)):
        torch.testing.assert_close(model(x), model(x.contiguous()))


@EACH_VARIANT
def test_error_inside_the_base_layer(variant: str) -> None:
    """The pre-hook has run and the hook has not: nothing of that call may reach the next one, or a copy."""
    model, x = block(variant), torch.randn(3, 12)
    want = model(x)
    for _ in range(2):
        with pytest.raises((RuntimeError, TypeError)):
            model.k_proj(x, x)  # nn.Linear takes one argument
    with ll.disabled(model):
        base = model(x)
    assert not torch.allclose(base, want, atol=1e-3)
    with pytest.raises((RuntimeError, TypeError)):
        model.k_proj(x, x)
    assert torch.equal(copy.deepcopy(model)(x), want)
    assert torch.equal(model(x), want)
    ll.detach(model)
    assert torch.equal(model(x), base)


def test_layer_that_is_the_model() -> None:
    model, x = nn.Linear(6, 6), torch.randn(2, 6)
    base = model(x)
    ll.attach(model, ll.LoRAConfig(r=2))
    randomize(model)
    assert not torch.allclose(model(x), base, atol=1e-3)
    ll.detach(model)
    assert torch.equal(model(x), base)


def test_module_under_two_names_has_one_adapter() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6, bias=False)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    model, x = Shared(), torch.randn(2, 6)
    attachment = ll.attach(model, ll.LoRAConfig(r=2))
    randomize(model)
    assert [t.name for t in attachment.targets] == ["first"]
    A, B = ll.parameters(model)
    W = model.first.weight + 16 / 2 * B @ A  # applied once a call, not twice
    torch.testing.assert_close(model(x), torch.tanh(x @ W.t()) @ W.t())
    ll.detach(model)
    torch.testing.assert_close(model(x), torch.tanh(x @ model.first.weight.t()) @ model.first.weight.t())


@pytest.mark.parametrize("targets", ["q_proj", "k_proj"])
def test_second_adapter_inside_an_attached_model(targets: str) -> None:
    """Whether or not the layers overlap: the second attach would freeze the first one's parameters."""
    model = llama()
    ll.attach(model, ll.LoRAConfig(r=4, target_names=("q_proj",)))
    before = snapshot(model)
    with pytest.raises(ll.AttachError, match=r"layers\.0\.self_attn\.q_proj|^self_attn\.q_proj") as raised:
        ll.attach(model.model.layers[0], ll.LoRAConfig(r=4, target_names=(targets,)))
    assert "detach" in str(raised.value)
    assert_same(model, before)


def test_second_adapter_around_an_attached_submodule() -> None:
    model = llama()
    ll.attach(model.model.layers[0], ll.LoRAConfig(r=4, target_names=("q_proj",)))
    before = snapshot(model)
    with pytest.raises(ll.AttachError, match=Q0):
        ll.attach(model, ll.LoRAConfig(r=4, target_names=("k_proj",)))
    assert_same(model, before)


# ---- The registry and ParamSpec ----


@pytest.fixture
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(ll.variant, "REGISTRY", registry := dict(ll.REGISTRY))
    monkeypatch.setattr(ll.checkpoint, "REGISTRY", registry)


@dataclass(frozen=True, kw_only=True)
class ShiftConfig(ll.AdapterConfig):
    variant: ClassVar[str] = "shift"
    start: float = 0.0


class Shift(ll.Variant):
    """y + c, and a frozen mask, a derived tensor, a scalar: each kind of ParamSpec."""

    name = "shift"
    config = ShiftConfig

    @staticmethod
    def param_specs(in_features: int, out_features: int, cfg: Any) -> dict[str, ll.ParamSpec]:
        return {
            "lora_c": ll.ParamSpec((out_features,), init=lambda t: t.fill_(cfg.start)),
            "lora_frozen": ll.ParamSpec((out_features,), init="ones", trainable=False),
            "lora_mask": ll.ParamSpec((out_features,), init="ones", as_buffer=True),
            "lora_derived": ll.ParamSpec((), init="zeros", derived=True),
        }

    @staticmethod
    def derive(p: ll.Params, layer: nn.Module, cfg: Any) -> None:
        p.fill("lora_derived", layer.weight.norm())  # type: ignore[operator,union-attr,arg-type]

    @staticmethod
    def primitive(p: ll.Params, layer: nn.Module, cfg: Any) -> ll.Primitive:
        return Add(p.lora_c * p.lora_frozen * p.lora_mask * p.lora_derived)


@dataclass
class Add(ll.Primitive):
    """A primitive of the user's own needs no kernel."""

    c: Tensor

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        return y + self.c


@pytest.mark.usefixtures("_registry")
def test_variant_of_the_users_own(tmp_path: Any) -> None:
    assert ll.register(Shift) is Shift
    ll.register(Shift)  # a notebook runs its cells twice
    model, path = Block(), tmp_path / "shift.safetensors"
    h = torch.randn(3, 20)
    plain = model.down_proj(h)
    attachment = ll.attach(model, ShiftConfig(start=0.5, target_names=("down_proj",)))
    assert attachment.trainable == 12
    assert [p.shape for p in ll.parameters(model)] == [(12,)], "the frozen parameter is not for an optimiser"
    assert set(ll.state_dict(model)) == {f"down_proj.lora_{t}" for t in ("c", "frozen", "mask")}
    want = plain + 0.5 * model.down_proj.weight.norm()
    torch.testing.assert_close(model.down_proj(h), want)
    ll.save(model, path)
    ll.detach(model)
    assert torch.equal(model.down_proj(h), plain)
    loaded = ll.load(model, path)
    assert loaded.cfg == ShiftConfig(start=0.5, target_names=("down_proj",))
    torch.testing.assert_close(model.down_proj(h), want)


def variant_class(**attributes: Any) -> Any:
    return type("Broken", (ll.Variant,), attributes)


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "Broken needs `name` and `config`"),
        ({"name": "broken"}, "needs `name` and `config`"),
        ({"config": ShiftConfig}, "needs `name` and `config`"),
        ({"name": "other", "config": ShiftConfig}, "config.variant == name; got 'other'"),
        ({"name": "lora", "config": ll.LoRAConfig}, r"'lora' is registered already, lora_lite\.variants\.lora\.LoRA"),
    ],
)
def test_register_refuses(attributes: dict[str, Any], message: str) -> None:
    before = dict(ll.variant.REGISTRY)
    with pytest.raises(ValueError, match=message):
        ll.register(variant_class(**attributes))
    assert before == ll.variant.REGISTRY


def made(*shape: int, cfg_dtype: torch.dtype = torch.float32, **fields: Any) -> Tensor:
    return ll.ParamSpec(shape, **fields).make(cfg_dtype, "cpu")


def test_inits() -> None:
    assert not made(50, 40, init="zeros").any()
    assert (made(50, 40, init="ones") == 1).all()
    for center, t in ((0, made(200, 200)), (0, made(200, 200, init="near_zero")), (1, made(200, 200, init="near_one"))):
        deviation = t.double() - center
        assert deviation.mean().abs() < 3e-6
        assert 0.95e-4 < deviation.std() < 1.05e-4
    kaiming = made(100, 64, init="kaiming")
    assert 0.99 / 8 < kaiming.abs().max() <= 1 / 8  # uniform in ±1/√in_features
    assert abs(kaiming.std() * 8 - 3**-0.5) < 0.02
    assert torch.equal(made(3, init=lambda t: t.copy_(torch.arange(3.0))), torch.tensor([0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match="'nearly'"):
        made(3, init="nearly")


def test_gains_move_in_a_bf16_config() -> None:
    """A gain near one kept in bf16 is exactly one, and an update of 1e-3 is lost: hence float32."""
    gain = made(100, init="near_one", cfg_dtype=torch.bfloat16)
    assert gain.dtype == torch.float32
    assert gain.unique().numel() > 50
    assert (gain + 1e-3 != gain).all()


@pytest.mark.parametrize("config", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes(config: torch.dtype) -> None:
    vector = torch.float64 if config == torch.float64 else torch.float32
    assert made(4, 3, cfg_dtype=config).dtype == config
    assert made(4, cfg_dtype=config).dtype == vector
    assert made(cfg_dtype=config).dtype == vector
    assert made(4, 3, cfg_dtype=config, dtype=torch.float32).dtype == vector


def test_params_of_each_kind() -> None:
    specs = Shift.param_specs(5, 7, ShiftConfig())
    params = ll.Params(specs, torch.bfloat16, "cpu")
    assert {name: p.requires_grad for name, p in params.named_parameters()} == {"lora_c": True, "lora_frozen": False}
    assert {name for name, _ in params.named_buffers()} == {"lora_mask", "lora_derived"}
    assert set(params.state_dict()) == {"lora_c", "lora_frozen", "lora_mask"}
    params.fill("lora_c", torch.arange(7))
    assert params.lora_c.dtype == torch.float32
    assert params.lora_c.requires_grad
    assert params.lora_c[6] == 6


@pytest.mark.parametrize("what", ["model", "layer", "forward"])
@pytest.mark.parametrize("with_grad", [False, True])
def test_attached_to_what_is_compiled(what: str, with_grad: bool) -> None:
    """torch.compile does not ask whether a layer of its has got hooks since, or lost them."""
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).eval().requires_grad_(False), torch.randn(4, 6)
    run: Any = model
    if what == "model":
        run = torch.compile(model, backend="eager")
    elif what == "layer":
        model[0].compile(backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    with torch.set_grad_enabled(with_grad):
        base = run(x)
        for name, layer in (("a", "0"), ("b", "1"), ("c", "0")):
            ll.attach(model, ll.LoRAConfig(r=2, target_names=(layer,)), name=name)
            randomize(model)
            W = ll.merged_state_dict(model)
            want = (x @ W["0.weight"].T + W["0.bias"]) @ W["1.weight"].T + W["1.bias"]
            assert_close(run(x), want, 1e-5)
            if name == "a":
                ll.detach(model)
                assert_close(run(x), base, 1e-6)
