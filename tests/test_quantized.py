"""Every method on 4-bit and 8-bit bases of bitsandbytes, loaded by transformers, on a CPU."""

import gc
import pickle
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import torchao.quantization
import transformers
from models import (
    VARIANTS,
    assert_close,
    attach,
    calibration_batches,
    llama,
    load_tests,
    randomize,
    start_tolerance,
    token_ids,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig

import lora_lite as ll

identity, against_peft = load_tests("test_identity"), load_tests("test_peft")
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
KINDS: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "4bit-nested": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "8bit": {"load_in_8bit": True},
}  # fmt: skip
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
SIZES = {"hidden_size": against_peft.SIZES["hidden_size"], "intermediate_size": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk, for transformers to quantise as it loads."""
    path = tmp_path_factory.mktemp("llama")
    model: Any = llama(**SIZES)
    model.save_pretrained(path)
    return path


def quantised(folder: Path, kind: str, layers: int = 14) -> Any:
    config = BitsAndBytesConfig(**KINDS[kind])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    assert sum(isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) for m in model.modules()) == layers
    # On CPUs with bfloat16 instructions bitsandbytes packs 4-bit weights anew at the first forward in evaluation: it
    # rounds their absmaxes, passes no gradient on, and fails where a layer is narrower than a block.
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.train()


def base_bytes(model: Any) -> dict[str, Tensor]:
    """Every tensor of the base as it is stored: packed weights, absmaxes and row factors too."""
    found = {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            row_absmax = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            found[f"{name}.SCB"] = row_absmax.clone()
        elif isinstance(module, bnb.nn.Linear4bit):
            found[f"{name}.absmax"] = module.weight.quant_state.absmax.clone()
    return found


def train(model: Any, ids: Tensor, lr: float, steps: int) -> list[float]:
    """The loss of each step."""
    optimizer = torch.optim.AdamW(ll.parameters(model), lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@EACH_KIND
@EACH_VARIANT
def test_a_whole_life(folder: Path, tmp_path: Path, variant: str, kind: str) -> None:
    """Start, training, save, detach, load, and the same file on the unquantised model."""
    model, ids = quantised(folder, kind), token_ids()
    with torch.no_grad():
        base = model(ids).logits
    before = base_bytes(model)
    attach(model, variant, calibration_batches())
    with torch.no_grad():
        assert identity.relative_change(model(ids).logits, base) <= start_tolerance(variant, 1e-5)
    assert identity.asleep(identity.backward(model, ids)) == identity.ASLEEP.get(variant, set())

    losses = train(model, ids, lr=0.05 if variant in ("ia3", "ia3_ff", "antipasto", "road") else 1e-2, steps=20)
    assert losses[-1] < 0.97 * losses[0]

    with torch.no_grad():
        trained = model(ids).logits
    ll.save(model, tmp_path / "adapter.safetensors")
    ll.detach(model)
    after = base_bytes(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base)
    ll.load(model, tmp_path / "adapter.safetensors")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, trained)

    plain = llama(**SIZES)
    with torch.no_grad():
        plain_base = plain(ids).logits
    ll.load(plain, tmp_path / "adapter.safetensors")
    with torch.no_grad():
        assert identity.relative_change(plain(ids).logits, plain_base) > 1e-3


@EACH_KIND
def test_delora_measures_the_dequantised_weight(folder: Path, kind: str) -> None:
    model = quantised(folder, kind)
    attachment = attach(model, "delora")
    for target in attachment.targets:
        layer: Any = target.layer
        # The layer's own answer to the identity is its weight, transposed. int8 also quantises its input: 1 in 127.
        with ll.disabled(model), torch.no_grad():
            weight = layer(torch.eye(layer.in_features)).t()
        assert_close(attachment.adapters[target.name].lora_wnorm, weight.norm(dim=0), 2e-2 if kind == "8bit" else 1e-5)


class _LargestAtOnce(TorchDispatchMode):
    """How many dense floating-point matrices of a layer's size there are at one time, at the most."""

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.smallest, self.alive, self.most = smallest, {}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            dense = isinstance(t, Tensor) and t.is_floating_point() and t.ndim == 2
            if dense and t.numel() >= self.smallest:
                storage = t.untyped_storage()
                self.alive[storage.data_ptr()] = torch.multiprocessing.reductions.StorageWeakRef(storage)
        self.alive = {at: ref for at, ref in self.alive.items() if not ref.expired()}
        self.most = max(self.most, len(self.alive))
        return result


@pytest.mark.parametrize("variant", ["pissa", "dora", "delora", "antipasto"])
def test_attach_holds_one_dense_layer_at_a_time(folder: Path, variant: str) -> None:
    """However many layers there are: of one, its dense weight and the copies that its SVD or its norm works on."""
    most = {}
    for layers in ((0,), (0, 1)):
        model = quantised(folder, "4bit")
        gc.collect()
        with _LargestAtOnce(smallest=32 * 32) as mode:
            attach(model, variant, layers=layers, r=4)
        most[len(layers)] = mode.most
    assert 1 <= most[1] <= 4
    assert most[2] == most[1], "more layers, more dense weights at once"


def dequantise(model: Any) -> None:
    """Put a plain linear with the dequantised weight in the place of each quantised one."""
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = nn.Parameter(ll.quantized.dense_weight(module, torch.float32), requires_grad=False)
            model.set_submodule(name, plain)


@pytest.mark.parametrize("variant", ["lora", "dora", "ia3", "hra", "road"])
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_same_as_peft(folder: Path, variant: str, kind: str) -> None:
    ours, theirs = quantised(folder, kind), quantised(folder, kind)
    attachment = attach(ours, variant, r=against_peft.R, alpha=against_peft.ALPHA)
    config = against_peft.peft_config(variant, list(attachment.adapters))
    if variant == "hra":  # PEFT's takes the stored bytes for the weight: it gets the dequantised model
        dequantise(theirs)
    theirs = peft.get_peft_model(theirs, config).train()
    randomize(ours, by=0.3)
    against_peft.copy_to_peft(theirs, attachment)
    got, of_got = against_peft.logits_and_gradients(ours)
    want, of_want = against_peft.logits_and_gradients(theirs)
    # int8 quantises each layer's input: a last bit here is another integer there.
    tolerance = 3e-2 if kind == "8bit" else 1e-5
    assert_close(got, want, tolerance, "logits")
    assert_close(of_got, of_want, tolerance, "gradient of the input")
    for name, p, q in against_peft.pairs(theirs, attachment):
        assert p.grad is not None, name
        assert q.grad is not None, name
        assert_close(p.grad, against_peft.like(q.grad, p.grad), tolerance, name)


def test_pretrained(pretrained: Any) -> None:
    """Two layers of SmolLM2-135M in 4 bit with DoRA, the one that reads W at every step: at its start, and trained."""
    model = pretrained.train()
    model.model.layers = model.model.layers[:2]
    for name, module in list(model.model.named_modules()):
        if type(module) is nn.Linear:
            four = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=torch.float32)
            four.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            model.model.set_submodule(name, four.to("cpu"))
    ids = token_ids(1, 24, vocab=model.config.vocab_size)
    with torch.no_grad():
        base = model(ids).logits
    attach(model, "dora", r=8)
    with torch.no_grad():
        assert identity.relative_change(model(ids).logits, base) <= 1e-5
    losses = train(model, ids, lr=3e-3, steps=5)
    assert losses[-1] < 0.9 * losses[0]


def test_dense_weight_of_a_layer_packed_for_inference() -> None:
    """Where the CPU has what bitsandbytes packs for, and by its own function everywhere."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    for nested in (False, True):
        layer = bnb.nn.Linear4bit(128, 96, bias=False, compute_dtype=torch.float32)
        options = {"quant_type": "nf4", "compress_statistics": nested}
        layer.weight = bnb.nn.Params4bit(torch.randn(96, 128), requires_grad=False, **options)
        layer = layer.to("cpu")
        want = ll.quantized.dense_weight(layer, torch.float32)
        layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )
        assert ll.quantized.stored_weight(layer).kind == "inference"
        assert_close(ll.quantized.dense_weight(layer, torch.float32), want, 4e-3)  # absmaxes are rounded to bf16


@EACH_KIND
def test_some_rows(folder: Path, kind: str) -> None:
    for layer in (quantised(folder, kind).model.layers[0].mlp.up_proj, llama(**SIZES).model.layers[0].mlp.up_proj):
        whole = ll.quantized.dense_weight(layer, torch.float32)
        part = ll.quantized.dense_weight(layer, torch.float32, slice(5, 40))
        assert part.shape == (35, whole.shape[1])
        assert torch.equal(part, whole[5:40])


def with_torchao(model: Any) -> None:
    """int8 weights, whose tensors say that they are float32 and N×K."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda m, name: type(m) is nn.Linear and "lm_head" not in name)


def with_hqq(model: Any) -> None:
    """4 bit in layers of its own, which have no `weight`."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=16)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            model.set_submodule(name, HQQLinear(module, config, compute_dtype=torch.float32, device="cpu"))


@EACH_VARIANT
@pytest.mark.parametrize("quantise", [with_torchao, with_hqq])
def test_other_libraries(quantise: Any, variant: str, tmp_path: Path) -> None:
    model, ids = llama(**SIZES), token_ids()
    quantise(model)
    layer = model.model.layers[0].self_attn.q_proj
    assert type(getattr(layer, "weight", None)) is not nn.Parameter
    with torch.no_grad():
        base = model(ids).logits
        assert_close(layer(torch.eye(layer.in_features)).t(), ll.quantized.dense_weight(layer, torch.float32), 1e-5)
    attach(model, variant, calibration_batches())
    model.to("cpu")  # which swaps tensors of torchao's
    with torch.no_grad():
        assert identity.relative_change(model(ids).logits, base) <= start_tolerance(variant, 1e-5)
    assert ll.verify(model, {"input_ids": ids, "labels": ids})
    losses = train(model, ids, lr=0.05 if variant in ("ia3", "ia3_ff", "antipasto", "road") else 1e-2, steps=10)
    assert losses[-1] < 0.99 * losses[0]
    with torch.no_grad():
        trained = model(ids).logits
    ll.save(model, tmp_path / "adapter.safetensors")
    ll.detach(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base)
    ll.load(model, tmp_path / "adapter.safetensors")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, trained)


def test_layers_that_write_themselves_alone_into_a_state_dict(tmp_path: Path) -> None:
    """HQQ's: a Trainer's checkpoint has their adapters, and gives them back."""
    frameworks = load_tests("test_frameworks")

    def model(trained: bool) -> Any:
        found = llama(**SIZES)
        with_hqq(found)
        attach(found, "lora")
        if trained:
            randomize(found)
        return found

    trainer = frameworks.Trainer(
        first := model(trained=True),
        frameworks.arguments(tmp_path / "first", save_strategy="steps", save_steps=2),
        train_dataset=frameworks.examples(),
        callbacks=[frameworks.AdapterCallback()],
    )
    trainer.train()
    assert len(ll.attachment.own_tensors(first)) == len(ll.state_dict(first))
    again = frameworks.Trainer(
        second := model(trained=False),
        frameworks.arguments(tmp_path / "second"),
        train_dataset=frameworks.examples(),
        callbacks=[frameworks.AdapterCallback()],
    )
    again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert all(torch.equal(t, ll.state_dict(first)[name]) for name, t in ll.state_dict(second).items())


class Unreadable(nn.Module):
    """A quantised layer of a kind that nobody here knows: packed numbers, and a product of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 12, 10
        self.register_buffer("qweight", torch.randint(0, 100, (10, 12), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight.to(x.dtype) / 100).t()


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_unpickled(folder: Path, variant: str, kind: str) -> None:
    """bitsandbytes' weights are plain parameters then, and their layers keep what belongs to them."""
    model = quantised(folder, kind)
    attach(model, variant)
    randomize(model)
    want = model(token_ids()).logits
    assert torch.equal(pickle.loads(pickle.dumps(model))(token_ids()).logits, want)


def test_quantised_after_attach() -> None:
    """By a kind that passes no gradient, which attach refuses."""
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), torch.randn(8, 64)
    ll.attach(model, ll.LoRAConfig(r=4, target_roles=()))
    torchao.quantization.quantize_(model, torchao.quantization.Int8DynamicActivationInt8WeightConfig())
    with pytest.warns(UserWarning, match=r"these layers have become Int8Tensor, and pass no gradient .*: \* ×2\. Use"):
        model(x).square().sum().backward()


@pytest.mark.parametrize("variant", ["lora", "ia3", "ia3_ff", "hra", "road"])
def test_what_needs_no_weight_takes_a_layer_that_can_t_be_read(variant: str) -> None:
    """As on the dense layer that it stands for; the other methods are refused by name."""
    own = {"group_size": 2} if variant == "road" else {}
    layer, dense = nn.Sequential(Unreadable()), nn.Sequential(nn.Linear(12, 10, bias=False))
    dense[0].weight.data.copy_(layer[0].qweight / 100)
    x = torch.randn(5, 12)
    assert torch.allclose(layer(x), dense(x), atol=1e-6)
    for model in (layer, dense):
        torch.manual_seed(0)
        attach(model, variant, target_names=("0",), dtype=torch.float32, **own)
        randomize(model)
    assert_close(layer(x), dense(x), 1e-5)
    ll.diagnose(layer)
    for needs_it in (ll.merged_state_dict, lambda model: ll.verify(model, x)):
        with pytest.raises(ll.AttachError, match=r"^0.*: its weight is .*int32.* which can't be read"):
            needs_it(layer)
    ll.detach(layer)
    for other in ("pissa", "dora", "delora", "antipasto"):
        with pytest.raises(ll.AttachError, match=r"0 \(12 → 10\): .*int32.* which can't be read, as this"):
            attach(layer, other, target_names=("0",))
