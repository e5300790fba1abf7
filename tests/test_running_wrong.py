"""Adapters that run, and would be wrong: they are right, or refused by name. docs/silent_failures.md has the list."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from models import (
    VARIANTS,
    assert_close,
    assert_same,
    attach,
    calibration_batches,
    config,
    llama,
    logits,
    randomize,
    rel_error,
    snapshot,
    start_tolerance,
    token_ids,
)
from safetensors.torch import load_file
from situations import Body, Classifier, Inference, refused
from torch import Tensor, nn
from torch.nn.utils import prune

import lora_lite as ll
from lora_lite.quantized import dense_weight

EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
L = ll.LoRAConfig
CPU = torch.device("cpu")


def float8_layer(shape: tuple[int, int], block: tuple[int, int] | None) -> tuple[Any, Tensor]:
    """transformers' FP8Linear of a random weight, and that weight."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    N, K = shape
    W = torch.randn(N, K) * torch.rand(N, 1).exp()
    n, k = block or (1, K)
    scale = torch.stack([torch.stack([b.abs().max() / 448 for b in row.split(k, 1)]) for row in W.split(n, 0)])
    layer = FP8Linear(K, N, block_size=block)
    wide = scale.repeat_interleave(n, 0)[:N].repeat_interleave(k, 1)[:, :K]
    layer.weight.data = (W / wide).to(torch.float8_e4m3fn)
    layer.weight_scale_inv = nn.Parameter(scale)
    return layer, W


@pytest.mark.parametrize(
    ("shape", "block"), [((64, 96), (32, 32)), ((70, 50), (32, 32)), ((70, 50), (16, 50)), ((64, 96), None)], ids=str
)
def test_float8_is_read_with_its_scales(shape: tuple[int, int], block: tuple[int, int] | None) -> None:
    layer, W = float8_layer(shape, block)
    assert rel_error(dense_weight(layer), W) < 0.05
    if block is None:
        layer.weight_scale_inv = nn.Parameter(layer.weight_scale_inv.flatten())
        assert rel_error(dense_weight(layer), W) < 0.05
    ll.attach(nn.ModuleDict({"fp8": layer}), ll.DoRAConfig(r=4, target_names=("fp8",)))
    assert rel_error(layer.lora_lite["default"].lora_m, W.norm(dim=1)) < 0.05


def test_float8_without_readable_scales_is_refused() -> None:
    layer, _ = float8_layer((64, 96), (32, 32))
    model = nn.ModuleDict({"fp8": layer})
    layer.weight_scale_inv = nn.Parameter(torch.ones(5, 7))
    refused(
        model, ll.PiSSAConfig(r=4), r"fp8 \(96 → 64\): its weight_scale_inv of shape \(5, 7\) fits no rows or blocks"
    )
    del layer.weight_scale_inv
    refused(model, ll.PiSSAConfig(r=4), r"float8_e4m3fn, whose values mean nothing without their scales")
    plain = nn.Linear(8, 8)
    plain.weight = nn.Parameter(plain.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    refused(plain, ll.DoRAConfig(r=4), "whose values mean nothing without their scales")
    attachment = ll.attach(model, L(r=4))  # needs no weight
    assert "float8" not in str(attachment.backends())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("disk", [False, True], ids=["cpu", "disk"])
@EACH_VARIANT
def test_offloaded_by_accelerate(variant: str, disk: bool, tmp_path: Path) -> None:
    """Attached, loaded, offloaded, saved, verified in whatever order."""
    first = llama()
    attach(first, variant, calibration_batches() if variant == "eva" else None)
    randomize(first, by=0.2)
    want, path = logits(first), tmp_path / "adapter.safetensors"
    ll.save(first, path)

    def offload(model: nn.Module, folder: str) -> None:
        if disk:
            accelerate.disk_offload(model, str(tmp_path / folder), execution_device=CPU)
        else:
            accelerate.cpu_offload(model, execution_device=CPU)

    offload(first, "before")
    assert all(p.is_meta for p in ll.parameters(first))
    assert_close(logits(first), want, 1e-6)
    ll.save(first, tmp_path / "again.safetensors")
    for name, t in load_file(path).items():
        assert torch.equal(load_file(tmp_path / "again.safetensors")[name], t), name

    after = llama()
    offload(after, "after")
    loaded = ll.load(after, path)
    assert not any(p.is_meta for p in ll.parameters(after))
    assert_close(logits(after), want, 1e-6)
    assert all(device != "meta" for device, _ in loaded.backends().values())
    ll.verify(after, token_ids())
    ll.detach(after)
    attach(after, variant, calibration_batches() if variant == "eva" else None)
    tolerance = start_tolerance(variant, 1e-5)
    assert_close(logits(after), logits(llama()), tolerance)  # the start, from the offloaded weights


def test_offloaded_as_a_whole_block_takes_no_adapter_afterwards() -> None:
    model: Any = llama()
    accelerate.cpu_offload(model, execution_device=CPU, preload_module_classes=["LlamaDecoderLayer"])
    message = r"q_proj \(32 → 32\): accelerate offloads its weight with the whole of model.layers.0.*attach before"
    with pytest.raises(ll.AttachError, match=message):
        ll.attach(model, L(r=4))
    adapted: Any = llama()
    ll.attach(adapted, L(r=4))
    randomize(adapted)
    want = logits(adapted)
    accelerate.cpu_offload(adapted, execution_device=CPU, preload_module_classes=["LlamaDecoderLayer"])
    assert_close(logits(adapted), want, 1e-6)


@pytest.mark.parametrize("variant", ["lora", "ia3", "ia3_ff", "hra", "road"])
def test_adapters_on_meta_raise_before_they_compute(variant: str, tmp_path: Path) -> None:
    """Those that start without the weight; the rest are refused at attach (test_misuse.py)."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    ll.attach(model, config(variant, target_names=()))
    model(torch.randn(2, 8, device="meta"))
    weights = {"0.weight": torch.randn(8, 8), "0.bias": torch.randn(8)}
    model.load_state_dict(weights, assign=True, strict=False)
    with pytest.raises(ll.AttachError, match="0: its adapter is on the meta device"):
        model(torch.randn(2, 8))
    with pytest.raises(ll.CheckpointError, match=r"save: 0: lora_\w+ holds no values"):
        ll.save(model, tmp_path / "adapter.safetensors")
    model.to_empty(device="cpu")
    with pytest.raises(ll.AttachError, match="given memory there and no values"):
        model(torch.randn(2, 8))
    with pytest.raises(ll.CheckpointError, match="holds no values"):
        ll.save(model, tmp_path / "adapter.safetensors")
    assert not (tmp_path / "adapter.safetensors").exists()
    other = nn.Sequential(nn.Linear(8, 8))
    ll.attach(other, config(variant, target_names=()))
    model.load_state_dict(other.state_dict())
    x = torch.randn(2, 8)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "eva"])
def test_memory_without_values_stays_so_until_the_adapters_own_are_loaded(variant: str, tmp_path: Path) -> None:
    """Materialise, then load the base: the order in which large models are loaded."""
    model = nn.Sequential(nn.Linear(8, 8))
    base, x = dict(model.state_dict()), torch.randn(2, 8)
    attach(model, variant, target_roles=(), target_names=())
    randomize(model)
    want, full, own = model(x), dict(model.state_dict()), ll.state_dict(model)
    own = {name: t.clone() for name, t in own.items()}
    some = [name for name in full if "lora" in name][1:]

    def refused() -> None:
        with pytest.raises(ll.AttachError, match="given memory there and no values"):
            model(x)
        with pytest.raises(ll.CheckpointError, match="holds no values"):
            ll.save(model, tmp_path / "adapter.safetensors")

    model.to("meta").to_empty(device="cpu")
    for tensors in (base, {name: t for name, t in full.items() if name not in some}):
        model.load_state_dict(tensors, strict=False)
        if some or tensors is base:
            refused()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(base)
    ll.load_state_dict(model, own)
    assert torch.equal(model(x), want)
    model.to_empty(device="cpu")
    refused()
    model.load_state_dict(full)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("how", ["another parameter", "data"])
def test_weights_that_are_slices_of_one_tensor(how: str) -> None:
    """Checkpoints that are stacked, or flat buffers: DoRA's norm is that of the slice."""
    bases, x = torch.stack([torch.randn(8, 8), 3 * torch.randn(8, 8)]), torch.randn(5, 8)
    layer = nn.Linear(8, 8, bias=False)
    layer.weight = nn.Parameter(bases[0], requires_grad=False)
    model = nn.Sequential(layer)
    attach(model, "dora", target_roles=(), target_names=())
    randomize(model)
    (adapter,) = ll.attachment.require_attachment(model).adapters.values()
    for W in (bases[0], bases[1], bases[1].t(), bases[0]):
        if how == "data":
            layer.weight.data = W
        else:
            layer.weight = nn.Parameter(W, requires_grad=False)
        V = W + adapter.cfg.scale * adapter.lora_B @ adapter.lora_A
        assert_close(model(x), x @ (adapter.lora_m[:, None] * V / V.norm(dim=1, keepdim=True)).t(), 1e-5)


def test_a_base_that_passes_no_gradient(tmp_path: Path) -> None:
    """Refused to train on; a trained adapter still runs there."""
    dense = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    ll.attach(dense, L(r=2))
    ll.save(dense, tmp_path / "adapter.safetensors")
    model = nn.Sequential(nn.Linear(8, 8), Inference())
    refused(model, L(r=2), r"1 \(8 → 8\): its Inference passes no gradient to its input")
    refused(model, L(r=2, target_names=("1",)), r"1 \(8 → 8\): its Inference passes no gradient")
    ll.load(model, tmp_path / "adapter.safetensors")
    model(torch.randn(3, 8))


def test_a_wrong_weight_does_not_excuse_itself() -> None:
    """A layer whose dense weight is read wrongly is far off by the reference too; that allows it nothing."""

    class Rescaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(1000 * input)

    model = nn.Sequential(Rescaled(8, 8))
    ll.attach(model, L(r=2, target_roles=()))
    with pytest.raises(ll.KernelMismatchError, match=r"0 \(reference\): .*allowed 1.0e-01\. The reference ran"):
        ll.verify(model, torch.randn(3, 8))


@EACH_VARIANT
def test_vectors_stay_in_float32(variant: str) -> None:
    """After `model.to(bfloat16)` too; their values, to the bit, and gains move at a rate of 1e-3."""
    model = llama()
    attach(model, variant, calibration_batches() if variant == "eva" else None)
    randomize(model)
    for convert in (lambda: model.to(torch.bfloat16), model.half, model.bfloat16):
        before = {name: t.clone() for name, t in ll.state_dict(model).items()}
        convert()
        for name, t in ll.state_dict(model).items():
            if t.ndim < 2 or name.endswith("rot_T"):
                assert t.dtype == torch.float32
                assert torch.equal(t, before[name])
            else:
                assert t.dtype in (torch.bfloat16, torch.float16)
    model.float()
    assert {t.dtype for t in ll.state_dict(model).values()} == {torch.float32}
    model.double()
    assert {t.dtype for t in ll.state_dict(model).values()} == {torch.float64}


def test_gains_of_a_bfloat16_model_move() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    ll.attach(model, ll.IA3Config(target_names=()))
    model.to(torch.bfloat16)
    (gain,) = ll.parameters(model)
    start = gain.detach().clone()
    optimizer = torch.optim.SGD([gain], lr=1e-3)
    (model(torch.ones(1, 8).bfloat16()) * 0 + gain.sum()).sum().backward()
    optimizer.step()
    assert_close(gain, start - 8e-3, 1e-6)


class GroupedLinear(nn.Linear):
    """A weight of blocks, each for a group of rows (DeepSeek-V4's output projection)."""

    def forward(self, x: Tensor) -> Tensor:
        W = self.weight.view(4, -1, self.in_features).mT
        y = x.reshape(-1, 4, self.in_features).transpose(0, 1) @ W
        return y.transpose(0, 1).reshape(*x.shape[:-2], 4, -1)


def test_a_layer_whose_blocks_are_for_groups() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Unflatten(-1, (4, 8)), GroupedLinear(8, 16))
    attachment = ll.attach(model, L(r=2, target_roles=()))
    assert "its forward returns (1, 4, 48) for rows (1, 48, 8), not out_features=16" in attachment.summary()
    assert [target.name for target in attachment.targets] == ["0"]
    model(torch.randn(3, 8))


def test_a_model_that_peft_adapts_is_refused() -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    for names in (("q_proj",), ("k_proj",), ()):
        refused(model, L(r=2, target_names=names), r"q_proj is PEFT's Linear: PEFT.*unload\(\)")
    ll.attach(model.unload(), L(r=2, target_names=("q_proj",)))


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_model_whose_tensors_are_swapped(variant: str) -> None:
    """PyTorch refuses to swap a tensor that has a weak reference."""
    model = nn.Sequential(nn.Linear(8, 8))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        ll.attach(model, config(variant, target_names=("0",)))
        model(torch.randn(4, 8)).sum().backward()
        model.double()
        model.load_state_dict(model.state_dict())
        randomize(model)
        ll.verify(model, torch.randn(4, 8, dtype=torch.float64))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_verify_undoes_what_its_forward_writes_to_buffers() -> None:
    model = Classifier().train()
    before = snapshot(model)
    ll.attach(model, L(r=4, target_names=("body",)))
    ll.verify(model, torch.randn(9, 16))
    ll.detach(model)
    assert_same(model, before)


def test_a_shallow_copy_has_the_same_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    before = snapshot(model)
    ll.attach(model, L(r=2))
    ll.detach(copy.copy(model))
    with pytest.warns(UserWarning, match="the adapters of 0 had been taken off already"):
        ll.detach(model)
    assert_same(model, before)
    ll.attach(model, L(r=2))
    ll.detach(model)


def test_a_model_is_freed(tmp_path: Path) -> None:
    """Also before its first backward: hooks of parameters are out of the garbage collector's sight."""
    import gc
    import weakref

    model = Body()
    ll.attach(model, L(r=2))
    ll.save(model, tmp_path / "a")
    del model
    for used in (False, True):
        model = Body()
        ll.load(model, tmp_path / "a")
        if used:
            model(torch.randn(3, 8))
        alive = weakref.ref(model.head.weight)
        del model
        gc.collect()
        assert alive() is None


def test_an_offloaded_adapter_is_not_trained() -> None:
    model: Any = llama().train()
    ll.attach(model, L(r=4))
    accelerate.cpu_offload(model, execution_device=CPU)
    with pytest.raises(ll.AttachError, match="it runs, but can't be trained; attach, or load its file, after"):
        model(token_ids())
    logits(model)


def test_attach_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Linear(8, 8)
    with torch.inference_mode(), pytest.raises(ll.AttachError, match=r"inference_mode can't be trained"):
        ll.attach(model, L(r=2))


def test_eight_bit_storage_is_the_bases_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    ll.attach(model, L(r=2))
    ll.attach(model, ll.DoRAConfig(r=2), name="b")
    randomize(model)
    before = {name: t.clone() for name, t in model.state_dict().items() if "lora_lite" in name}
    model.to(torch.float8_e4m3fn)
    assert model[0].weight.dtype == torch.float8_e4m3fn
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())


@pytest.mark.parametrize("norm", ["spectral_norm", "weight_norm", "orthogonal"])
@pytest.mark.parametrize("variant", ["lora", "dora", "pissa"])
def test_parametrised_weights(norm: str, variant: str) -> None:
    """Asking leaves the power iteration where it was; what starts from the weight takes it as in evaluation."""
    model = nn.Sequential(getattr(nn.utils.parametrizations, norm)(nn.Linear(8, 8)), nn.Linear(8, 8)).train()
    before = snapshot(model)
    ll.attach(model, config(variant, target_names=("0", "1")))
    ll.detach(model)
    assert_same(model, before)
    refused(model, config(variant, r=9, target_names=("0", "1")), "r=9 is larger")
    x = torch.randn(3, 8)
    base = model.eval()(x)
    ll.attach(model, config(variant, target_names=("0", "1")))
    assert_close(model(x), base, 1e-4)
    randomize(model)
    ll.verify(model, x)
    ll.diagnose(model)


def test_asking_a_layer_leaves_its_notes_alone() -> None:
    class Observed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.register_buffer("largest", torch.zeros(()))

        def forward(self, input: Tensor) -> Tensor:
            self.largest.copy_(torch.maximum(self.largest, input.detach().abs().max()))  # type: ignore[operator,arg-type]
            return super().forward(input)

    model = nn.Sequential(Observed())
    ll.attach(model, L(r=2))
    assert model[0].largest == 0


def test_wrappers_are_no_part_of_a_name(tmp_path: Path) -> None:
    model: Any = llama()
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    attachment = ll.attach(model, L(r=4))
    assert not any("_orig_mod" in name for name in attachment.adapters)
    ll.save(model, tmp_path / "a")
    ll.export_peft(model, tmp_path / "peft")
    ll.load(llama(), tmp_path / "a")
    peft.PeftModel.from_pretrained(llama(), tmp_path / "peft")
    small = nn.Sequential(torch.compile(nn.Linear(8, 8), backend="eager"))  # type: ignore[arg-type]
    assert [t.name for t in ll.attach(small, L(r=2)).targets] == ["0"]


def test_a_wrapper_that_passes_for_its_layer_is_not_adapted_twice() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model = nn.Sequential(Wrapper(nn.Linear(8, 8)))
    assert [t.name for t in ll.attach(model, L(r=2)).targets] == ["0.inner"]


def test_verify_and_calibration_by_keyword() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = Projection(8, 8)

        def forward(self, x: Tensor) -> Any:
            return None, [{"boxes": self.proj(hidden_states=x)}]

    class Projection(nn.Linear):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states)

    model = Named()
    ll.attach(model, ll.EVAConfig(r=2), calibration_data=[torch.randn(64, 8)])
    assert len(ll.verify(model, torch.randn(3, 8))) == 1
    silent = nn.Sequential(nn.Linear(8, 8))
    ll.attach(silent, L(r=2))
    silent.forward = lambda x: [super(nn.Sequential, silent).__getattr__("0")(x).long()]  # type: ignore[assignment]
    with pytest.raises(ll.AttachError, match="a list, has no floating-point numbers"):
        ll.verify(silent, torch.randn(3, 8))


def test_verify_of_a_model_that_checkpoints() -> None:
    model: Any = llama().train()
    ll.attach(model, L(r=4))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert len(ll.verify(model, {"input_ids": token_ids(), "labels": token_ids()})) == 14
    assert all(m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing"))


@pytest.mark.filterwarnings("ignore")
@EACH_VARIANT
def test_diagnose_of_offloaded_and_of_zero_weights(variant: str) -> None:
    model: Any = llama()
    attach(model, variant, calibration_batches() if variant == "eva" else None)
    randomize(model, by=0.2)
    want = ll.diagnose(model).rows
    accelerate.cpu_offload(model, execution_device=CPU)
    for row, before in zip(ll.diagnose(model).rows, want, strict=True):
        assert row.relative_change == pytest.approx(before.relative_change, rel=1e-4)
    if variant in ("lora", "ia3"):
        zero = nn.Linear(8, 8)
        nn.init.zeros_(zero.weight)
        ll.attach(zero, config(variant, target_names=()))
        assert ll.diagnose(zero).rows[0].relative_change == 0
        randomize(zero)
        assert ll.diagnose(zero).rows[0].relative_change in (0, float("inf"))


def test_a_model_with_pefts_prompts_is_refused() -> None:
    prompted = peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ll.AttachError, match="PEFT adapts this model already"):
        ll.attach(prompted, L(r=2))
    assert any(p.requires_grad for p in prompted.parameters())


def test_a_warning_that_is_an_error_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_lite.backend._warned", set())
    model = nn.Sequential(nn.Linear(8, 8)).double()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="reference instead"):
            ll.attach(model, L(r=2), backend="triton")
    assert_same(model, before)


def _loaded(model: Any) -> None:
    model.load_state_dict(_perturbed(1).state_dict())


def _assigned(model: Any) -> None:
    model.load_state_dict(_perturbed(1).state_dict(), assign=True)


def _without_values(model: Any) -> None:
    model.to("meta")
    _assigned(model)


def _tied(model: Any) -> None:
    model[1].weight = model[0].weight


def _written(model: Any) -> None:
    with torch.no_grad():
        model[1].weight.mul_(3)


CHANGES: dict[str, Callable[[Any], None]] = {
    "load_state_dict": _loaded,
    "load_state_dict(assign=True)": _assigned,
    "load_state_dict(assign=True) on the meta device": _without_values,
    "tied": _tied,
    "written to": _written,
    "pruned": lambda model: prune.l1_unstructured(model[1], "weight", 0.5),
    "another tensor in place": lambda model: setattr(model[1].weight, "data", torch.randn(8, 8)),
    "weight_norm": lambda model: nn.utils.parametrizations.weight_norm(model[1]),
    "spectral_norm": lambda model: nn.utils.parametrizations.spectral_norm(model[1].eval()),
}


def _perturbed(seed: int) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    ll.attach(model, ll.DoRAConfig(r=2, target_roles=()))
    randomize(model, by=0.3)
    return model


# A graph can ask whether a state dict was loaded, and not whether a weight was written to (docs/silent_failures.md).
SEEN_COMPILED = [change for change in CHANGES if change.startswith("load_state_dict")]


@pytest.mark.parametrize(("change", "compiled"), [*((c, False) for c in CHANGES), *((c, True) for c in SEEN_COMPILED)])
def test_dora_normalises_by_the_weight_that_is_there(change: str, compiled: bool) -> None:
    """Its norm takes ‖W‖² from before; here W is another afterwards."""
    model, x = _perturbed(0), torch.randn(5, 8)
    model(x)
    CHANGES[change](model)
    if compiled:
        torch._dynamo.reset()
        got = torch.compile(model, backend="eager")(x)
    else:
        got = model(x)
    want = x.double()
    for layer in (model[0], model[1]):
        p, W = layer.lora_lite["default"], layer.weight.double()
        V = W + 1.0 * p.lora_B.double() @ p.lora_A.double() * layer.lora_lite["default"].cfg.scale
        want = want @ (p.lora_m.double()[:, None] * V / V.norm(dim=1, keepdim=True)).mT + layer.bias.double()
    assert rel_error(got.double(), want) < 1e-5


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_dora_on_a_weight_that_a_pre_hook_makes(norm: str, first: bool, shared: bool) -> None:
    """The older norms make the weight anew at each call, before or after the adapter's own pre-hook."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.q_proj(x) + self.k_proj(x)

    torch.manual_seed(0)
    model = Block()
    norm_of = getattr(nn.utils, norm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        if first:
            norm_of(model.k_proj)
        ll.attach(model, ll.DoRAConfig(r=2, target_names=("q_proj", "k_proj") if shared else ("k_proj",)))
        if not first:
            norm_of(model.k_proj)
    randomize(model, by=0.3)
    x = torch.randn(5, 8)
    for _ in range(3):
        got, want = model(x).double(), torch.zeros(5, 8, dtype=torch.float64)
        for layer in (model.q_proj, model.k_proj):
            W = layer.weight.detach().double()
            if "lora_lite" in layer._modules:
                p = layer.lora_lite["default"]
                V = W + p.cfg.scale * p.lora_B.double() @ p.lora_A.double()
                W = p.lora_m.double()[:, None] * V / V.norm(dim=1, keepdim=True)
            want = want + x.double() @ W.mT
        assert rel_error(got, want) < 1e-5
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(("_g", "_orig")):
                    p.mul_(1.5).add_(0.1 * torch.randn_like(p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_that_trains_beside_dora(dtype: torch.dtype) -> None:
    """It stands in the formula twice: y = g ∘ (Wx + b − b + …) + b."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    ll.attach(model, ll.DoRAConfig(r=2, target_roles=()))
    randomize(model)
    model.to(dtype)
    model.bias.requires_grad_(True)
    dy = torch.randn(50, 8, dtype=dtype)
    (got,) = torch.autograd.grad(model(torch.randn(50, 8, dtype=dtype)), model.bias, dy)
    assert rel_error(got.double(), dy.double().sum(0)) < (1e-5 if dtype == torch.float32 else 2e-2)


@EACH_VARIANT
def test_under_a_default_device(variant: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    want = model(x := torch.randn(3, 8))
    batches = [torch.randn(30, 8)] if variant in ("eva", "antipasto") else None
    own = {"antipasto": {"block_size": 2}, "road": {"group_size": 4}}.get(variant, {})
    with torch.device("meta"):
        attach(model, variant, batches, r=2, target_names=(), target_roles=(), **own)
    assert rel_error(model(x), want) < start_tolerance(variant, 1e-5)


def test_load_in_inference_mode(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    ll.attach(model, L(r=2))
    ll.save(model, tmp_path / "a")
    ll.detach(model)
    before = snapshot(model)
    with torch.inference_mode(), pytest.raises(ll.AttachError, match=r"can't be trained; attach or load outside of it"):
        ll.load(model, tmp_path / "a")
    assert_same(model, before)


@EACH_VARIANT
def test_an_output_may_be_written_to(variant: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(0.1, inplace=True)).to(torch.bfloat16)
    batches = [torch.randn(30, 8, dtype=torch.bfloat16)] if variant in ("eva", "antipasto") else None
    own = {"antipasto": {"block_size": 2}, "road": {"group_size": 4}}.get(variant, {})
    attach(model, variant, batches, r=2, target_names=(), target_roles=(), **own)
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    model[0](x).add_(1).sum().backward()
    y = model(x)
    y.sum().backward()


def test_evaluated_in_inference_mode_and_then_trained() -> None:
    """Entries with adapters of their own, whose places are found once."""
    for kinds, options in (
        ((L, ll.DoRAConfig), {}),
        ((L, L), {}),
        ((L, L), {"lengths": [2, 3]}),
        ((L, ll.DoRAConfig), {"lengths": [2, 3]}),
        ((L, L), {"batch_dim": 1}),
    ):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        for name, kind in zip("ab", kinds, strict=True):
            ll.attach(model, kind(r=2, target_roles=()), name=name)
        ll.use(model, ["a", "b"], **options)
        x = torch.randn(1, 5, 8) if "lengths" in options else torch.randn(2, 2, 8)
        with torch.inference_mode():
            model(x)
        model(x).sum().backward()


class Jagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=torch.tensor([[False] * 5, [False] * 3 + [True] * 2]))


def test_nested_tensors() -> None:
    model = Jagged().eval()
    ll.attach(model, L(r=2, target_names=("linear1", "linear2")))
    with torch.no_grad(), pytest.raises(ll.AttachError, match=r"linear1: .*nested tensor.*use_nested_tensor is False"):
        model(torch.randn(2, 5, 8))
    model.encoder.use_nested_tensor = False
    with torch.no_grad():
        model(torch.randn(2, 5, 8))


@pytest.mark.parametrize("x", [None, [1.0], torch.tensor(1.0), torch.ones(2, 8, dtype=torch.bool)], ids=repr)
def test_what_is_no_row_of_numbers(x: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    ll.attach(model, L(r=2))
    with pytest.raises(ll.AttachError, match=r"^0: its adapter got .*floating-point"):
        model(x)


def test_complex_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.complex64), nn.Linear(8, 8))
    refused(model, L(r=2, target_names=("0",)), "its weight is complex")
    attachment = ll.attach(model, L(r=2))
    assert list(attachment.adapters) == ["1"]


def test_a_script_and_a_submodule_of_our_name() -> None:
    with pytest.raises(ll.AttachError, match="ScriptModule"):
        ll.attach(torch.jit.script(nn.Sequential(nn.Linear(8, 8))), L(r=2))
    refused(nn.ModuleDict({"a": nn.ModuleDict({"lora_lite": nn.Linear(8, 8)})}), L(r=2), "^a has a submodule named")


@pytest.mark.parametrize("variant", ["lora", "dora", "ia3", "antipasto"])
def test_a_layer_that_was_resized_after_attach(variant: str, tmp_path: Path) -> None:
    """A head that is tied to an embedding: transformers resizes it in its place."""
    model = llama(tie_word_embeddings=True)
    attach(model, variant, target_names=("lm_head", "q_proj"))
    randomize(model)
    model.resize_token_embeddings(70)  # type: ignore[operator]
    for call in (lambda: logits(model), lambda: ll.merged_state_dict(model)):
        with pytest.raises(ll.AttachError, match=r"^lm_head: .*attach anew"):
            call()
    with pytest.raises(ll.CheckpointError, match="save: lm_head: it is 32 → 70, and its adapter is for 32 → 61"):
        ll.save(model, tmp_path / "adapter.safetensors")
    assert not list(tmp_path.iterdir())
