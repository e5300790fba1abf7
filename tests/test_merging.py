"""Merged weights: a plain model that computes what the adapted one does, from new tensors, on disk and in memory."""

import json
import warnings
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import huggingface_hub
import peft
import pytest
import sentence_transformers
import torch
import transformers
from models import (
    VARIANTS,
    assert_close,
    assert_same,
    attach,
    bert,
    calibration_batches,
    config,
    gpt2,
    gpt_neox,
    llama,
    load_tests,
    logits,
    qwen3,
    randomize,
    snapshot,
    token_ids,
)
from safetensors.torch import load_file
from sentence_transformers.sentence_transformer.modules import Dense
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune
from zoo import of

import lora_lite as ll
from lora_lite import merging

quantized = load_tests("test_quantized")
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


def adapted(model: nn.Module, variant: str, **fields: Any) -> nn.Module:
    attach(model, variant, calibration_batches() if variant == "eva" else None, **fields)
    randomize(model, by=0.3)
    return model


WRAPS = {"compiled": lambda module: torch.compile(module, backend="eager"), "checkpoint": checkpoint_wrapper}


@pytest.mark.parametrize("wrap", WRAPS)
def test_wrappers_are_no_part_of_names(wrap: str, tmp_path: Path) -> None:
    model = llama()
    names = model.state_dict().keys()
    model.model.layers[0] = WRAPS[wrap](model.model.layers[0])
    attach(model, "lora", modules_to_save=(r"input_layernorm$",))
    randomize(model)
    with torch.no_grad():
        ll.state_dict(model)["model.layers.0.input_layernorm.weight"].mul_(1.5)
    want = logits(model)
    assert ll.merged_state_dict(model).keys() == names
    assert {name for name, _ in merging.merged_parameters(model)} == names
    ll.save_merged(model, tmp_path / "merged")
    assert_close(logits(type(model).from_pretrained(tmp_path / "merged").eval()), want, 1e-5)
    ll.save(model, tmp_path / "adapter.safetensors")
    ll.export_peft(model, tmp_path / "peft")
    for read in (ll.load, ll.import_peft):
        again = llama()
        read(again, tmp_path / ("adapter.safetensors" if read is ll.load else "peft"))
        assert_close(logits(again), want, 1e-5)
    with_peft = peft.PeftModel.from_pretrained(llama(), tmp_path / "peft").eval()
    assert_close(logits(with_peft), want, 1e-5)
    ll.detach(model)
    for read in (ll.load, ll.import_peft):
        read(model, tmp_path / ("adapter.safetensors" if read is ll.load else "peft"))
        assert_close(logits(model), want, 1e-5)
        ll.detach(model)


def test_a_bias_that_is_made_of_others() -> None:
    class Doubled(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return 2 * t

    model = nn.Sequential(nn.Linear(4, 4))
    nn.utils.parametrize.register_parametrization(model[0], "bias", Doubled())
    attach(model, "lora", target_roles=())
    randomize(model)
    plain, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    plain.load_state_dict(ll.merged_state_dict(model))
    assert_close(plain(x), model(x), 1e-6)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, "bfloat16"], ids=str)
def test_dtypes_that_are_none_for_weights(dtype: Any, tmp_path: Path) -> None:
    model = llama()
    attach(model, "lora")
    for merge in (ll.merged_state_dict, lambda m, dtype: ll.save_merged(m, tmp_path / "m", dtype=dtype)):
        with pytest.raises(TypeError, match=r"dtype must be None or a floating-point torch\.dtype of 16 bits or more"):
            merge(model, dtype=dtype)
    assert not (tmp_path / "m").exists()


def test_numbers_beyond_float16_are_said() -> None:
    layer = nn.Linear(4, 4)
    attach(layer, "lora", target_roles=())
    randomize(layer)
    layer.weight.data[0, 0] = 1e5
    with pytest.warns(UserWarning, match="merged_state_dict: weight has numbers beyond float16's range"):
        ll.merged_state_dict(layer, dtype=torch.float16)


@EACH_VARIANT
@pytest.mark.parametrize("make", [llama, gpt_neox, bert], ids=lambda make: make.__name__)
def test_a_plain_model_computes_the_same(variant: str, make: Any, tmp_path: Path) -> None:
    """gpt_neox and bert have biases, which DoRA leaves out of its scale and IA3 scales."""
    fields: dict[str, Any] = {"dropout": 0.0 if variant in ("ia3", "ia3_ff", "hra", "road") else 0.1}
    if (make, variant) == (gpt_neox, "ia3"):
        fields["target_names"] = ("query_key_value",)  # which computes queries too, and is no default
    model: Any = adapted(make(), variant, **fields).train()
    want, before = logits(model), snapshot(model)
    with ll.disabled(model):
        base = logits(model)
    ll.save_merged(model, tmp_path)
    assert_same(model, before)
    plain = type(model).from_pretrained(tmp_path)
    assert [name for name, _ in plain.named_modules() if "lora" in name] == []
    assert_close(logits(plain), want, 1e-5)
    assert (want - base).norm() > 1e-2 * base.norm()
    merged = ll.merged_state_dict(model)
    memory: Any = make()
    memory.load_state_dict(merged)
    assert_close(logits(memory), want, 1e-5)
    own = {name: t for name, t in model.state_dict().items() if ".lora_lite." not in name}
    assert merged.keys() == own.keys()
    changed = {name for name, t in own.items() if not torch.equal(merged[name], t)}
    targets = {target.name for target in ll.attachment.require_attachment(model).targets}
    assert {name.rpartition(".")[0] for name in changed} == targets
    assert all(merged[name].dtype == t.dtype for name, t in own.items())


@EACH_VARIANT
def test_rounded_once(variant: str) -> None:
    """Of a bfloat16 base: the float64 result, rounded to the nearest; not one rounding more."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 24).bfloat16()
    ll.attach(
        layer,
        config(variant, target_names=()),
        calibration_data=[torch.randn(64, 40).bfloat16()] if variant == "eva" else None,
    )
    randomize(layer)
    merged = ll.merged_state_dict(layer)
    assert merged["weight"].dtype == torch.bfloat16
    adapter: Any = layer.lora_lite["default"]  # type: ignore[index,union-attr]
    eye = torch.eye(40, dtype=torch.float64)
    constant = adapter.by_reference(layer, torch.zeros_like(eye[:1]))
    exact = (adapter.by_reference(layer, eye) - constant).t()
    assert (merged["weight"].double() - exact).abs().le(2**-8 * exact.abs() + 1e-12).all()
    wide = ll.merged_state_dict(layer, dtype=torch.float32)
    assert {t.dtype for t in wide.values()} == {torch.float32}
    assert_close(wide["weight"], exact, 1e-7)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.parametrize("variant", ["lora", "dora", "hra"])
def test_quantised_bases(variant: str, kind: str, tmp_path: Path) -> None:
    """Dense in the dtype given, adapted layers and others; bitsandbytes' 8-bit rounds its tokens too, and we don't."""
    folder = tmp_path / "base"
    llama(**quantized.SIZES).save_pretrained(folder)  # type: ignore[operator]
    model = quantized.quantised(folder, kind)
    attach(model, variant, target_names=("q_proj", "down_proj"))
    randomize(model, by=0.3)
    bytes_before = quantized.base_bytes(model)
    with torch.no_grad():  # in training: in evaluation some CPUs pack 4-bit weights anew, and can't pack rows of 32
        want = model.train()(input_ids=token_ids()).logits
    ll.save_merged(model, tmp_path / "merged", dtype=torch.float32)
    after = quantized.base_bytes(model)
    assert all(torch.equal(after[name], t) for name, t in bytes_before.items())
    text = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in text
    assert text["dtype"] == "float32"
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert all(type(m) is nn.Linear for m in plain.modules() if hasattr(m, "in_features"))
    assert_close(logits(plain), want, 1e-5 if kind == "4bit" else 5e-2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_quantised_conv1d(kind: str, tmp_path: Path) -> None:
    """bitsandbytes' layers in the places of GPT-2's Conv1D hold N×K, and its checkpoints K×N: in square ones, too."""
    sizes = {"n_embd": 64, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    gpt2(**sizes).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    model = quantized.quantised(tmp_path / "base", kind, layers=8)
    attach(model, "lora", target_names=("c_attn", "mlp.c_proj"))  # and attn.c_proj, which is square, has no adapter
    randomize(model, by=0.3)
    with torch.no_grad():
        want = model.train()(input_ids=token_ids()).logits
    ll.save_merged(model, tmp_path / "merged", dtype=torch.float32)
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    memory: Any = gpt2(seed=1, **sizes)
    memory.load_state_dict(ll.merged_state_dict(model, dtype=torch.float32))
    for each in (plain, memory):
        assert type(each.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
        assert_close(logits(each), want, 1e-5 if kind == "4bit" else 5e-2)


def test_tied_weights_and_shards(tmp_path: Path) -> None:
    model: Any = adapted(qwen3(), "lora")
    ll.save_merged(model, tmp_path / "tied", max_shard_size="20KB")
    assert (tmp_path / "tied" / "model.safetensors.index.json").exists()
    names = json.loads((tmp_path / "tied" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "lm_head.weight" not in names
    plain: Any = type(model).from_pretrained(tmp_path / "tied")
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert_close(logits(plain), logits(model), 1e-5)

    ll.detach(model)
    ll.attach(model, ll.LoRAConfig(r=4, target_names=("q_proj", "lm_head")))  # now it is another than the embedding
    randomize(model, by=0.3)
    ll.save_merged(model, tmp_path / "untied")
    untied = type(model).from_pretrained(tmp_path / "untied")
    assert not untied.config.tie_word_embeddings
    assert model.config.tie_word_embeddings
    assert_close(logits(untied), logits(model), 1e-5)


BART = {
    "vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 56, "decoder_ffn_dim": 56, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {"vocab_size": 61, "d_model": 32, "d_ff": 56, "num_layers": 2, "num_heads": 4, "d_kv": 8}
ENCODER_DECODERS = {
    "bart": of("BartForConditionalGeneration", "BartConfig", **BART),
    "m2m_100": of("M2M100ForConditionalGeneration", "M2M100Config", **BART),
    "t5": of("T5ForConditionalGeneration", "T5Config", **T5),
    "t5_unscaled": of("T5ForConditionalGeneration", "T5Config", **T5, tie_word_embeddings=False),
}


@pytest.mark.parametrize(
    "names", [(r"lm_head$",), (r"encoder\.embed_tokens$",), (r"decoder\.embed_tokens$", "lm_head")]
)
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_what_stays_tied_beside_what_does_not(name: str, names: tuple[str, ...], tmp_path: Path) -> None:
    """One of four tied weights is another after merging; the checkpoint holds all four."""
    model: Any = ENCODER_DECODERS[name]()
    batch = {"input_ids": token_ids(), "decoder_input_ids": token_ids(length=9, seed=1)}
    ll.attach(model, ll.LoRAConfig(r=4, target_names=names))
    randomize(model)
    with torch.no_grad():
        want = model(**batch).logits
        with ll.disabled(model):
            base = model(**batch).logits
    assert (want - base).norm() > 1e-2 * base.norm()
    ll.save_merged(model, tmp_path)
    plain, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    with torch.no_grad():
        assert_close(plain(**batch).logits, want, 1e-5)
        ll.detach(model)
        assert_close(model(**batch).logits, base, 1e-6)


def test_a_model_that_asks_whether_it_is_tied(tmp_path: Path) -> None:
    """Switch scales its head's input by that: an untied checkpoint would compute something else."""
    make = of("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", **T5, num_experts=2)
    model: Any = make()
    ll.attach(model, ll.LoRAConfig(r=4, target_names=("lm_head",)))
    with pytest.raises(ll.AttachError, match=r"shared\.weight and .*lm_head\.weight are tied.*Switch.*exclude_names"):
        ll.save_merged(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    ll.detach(model)
    ll.attach(model, ll.LoRAConfig(r=4))
    randomize(model)
    ll.save_merged(model, tmp_path)
    batch = {"input_ids": token_ids(), "decoder_input_ids": token_ids(length=9, seed=1)}
    with torch.no_grad():
        assert_close(type(model).from_pretrained(tmp_path)(**batch).logits, model(**batch).logits, 1e-5)


def test_a_tied_model_takes_no_weights_that_are_parted() -> None:
    """Loaded into a tied model the head's would be the embedding's, too."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    for model, names in (
        (qwen3(), "model.embed_tokens.weight and lm_head.weight"),
        (Tied(), "first.weight and second"),
    ):
        ll.attach(model, ll.LoRAConfig(r=2, target_names=("lm_head|second",)))
        with pytest.warns(UserWarning, match=rf"merged_state_dict: {names}.* are tied in this model, and have values"):
            ll.merged_state_dict(model)
        with pytest.raises(ll.AttachError, match=f"{names}.* are tied"):
            ll.merging.merged_parameters(model)
        with warnings.catch_warnings(), ll.disabled(model):
            warnings.simplefilter("error")
            ll.merged_state_dict(model)
            assert list(ll.merging.merged_parameters(model))


def test_a_tie_that_offloading_hides(tmp_path: Path) -> None:
    """accelerate puts two tensors on the meta device in the place of a tied one."""
    model: Any = qwen3()
    ll.attach(model, ll.LoRAConfig(r=4, target_names=("lm_head",)))
    randomize(model)
    want = logits(model)
    accelerate.cpu_offload(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    ll.save_merged(model, tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    assert not plain.config.tie_word_embeddings
    assert_close(logits(plain), want, 1e-5)


def test_several_adapters_and_who_acts(tmp_path: Path) -> None:
    model: Any = llama()
    for name, variant in (("turn", "hra"), ("add", "lora"), ("gain", "ia3"), ("more", "dora")):
        attach_as = config(variant, target_names=("k_proj", "v_proj", "down_proj"))
        ll.attach(model, attach_as, name=name)
    randomize(model, by=0.3)
    for names in (("turn", "add", "gain", "more"), ("add", "more"), ("gain",)):
        ll.use(model, *names)
        memory: Any = llama()
        memory.load_state_dict(ll.merged_state_dict(model))
        assert_close(logits(memory), logits(model), 1e-5)
    with ll.disabled(model):
        assert all(torch.equal(t, llama().state_dict()[name]) for name, t in ll.merged_state_dict(model).items())
    ll.use(model, ["add", None])
    with pytest.raises(
        ll.AttachError, match=r"k_proj: each entry of a batch has an adapter of its own.*use\(model, name\)"
    ):
        ll.save_merged(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_any_module(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = self.first
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.second(torch.tanh(self.first(x))))

    model = Shared().eval()
    ll.attach(model, ll.LoRAConfig(r=2))
    randomize(model)
    ll.save_merged(model, tmp_path)
    plain = Shared().eval()
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = torch.randn(5, 6)
    assert_close(plain(x), model(x), 1e-6)


class OnTheHub(nn.Module, huggingface_hub.PyTorchModelHubMixin):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.config = {"width": width}
        self.layer = nn.Linear(width, width)


def of_diffusers() -> nn.Module:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 4, "norm_num_groups": 2}
    return diffusers.Transformer2DModel(**sizes)


def of_sentence_transformers() -> nn.Module:
    return sentence_transformers.SentenceTransformer(modules=[Dense(6, 6)], device="cpu")


@pytest.mark.parametrize("make", [lambda: OnTheHub(6), of_diffusers, of_sentence_transformers])
def test_who_else_has_a_config_and_save_pretrained(make: Any, tmp_path: Path) -> None:
    """They are none of transformers' models, whose `save_pretrained` writes the state dict that it is given."""
    model = make()
    ll.attach(model, ll.LoRAConfig(r=2))
    randomize(model)
    with pytest.raises(TypeError, match=r"max_shard_size are for transformers' save_pretrained, and a"):
        ll.save_merged(model, tmp_path / "x", max_shard_size="1GB")
    ll.save_merged(model, tmp_path / "merged")
    want, plain = ll.merged_state_dict(model), make()
    plain.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    assert all(torch.equal(t, want[name]) for name, t in plain.state_dict().items())
    assert [path.name for path in tmp_path.rglob("*")] == ["merged", "model.safetensors"]


class Wants(transformers.LlamaForCausalLM):
    """Made from more than its config."""

    def __init__(self, config: Any, more: int) -> None:
        super().__init__(config)


def test_a_class_that_its_config_does_not_make(tmp_path: Path) -> None:
    model = Wants(llama().config, 3)
    ll.attach(model, ll.LoRAConfig(r=2))
    with pytest.raises(ll.AttachError, match=r"no Wants can be made from its config alone \(.*more.*merged_state_dict"):
        ll.save_merged(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("sizes", [("10KB", "5GB"), ("5GB", "10KB"), ("10KB", "20KB")])
def test_an_earlier_checkpoint_leaves_nothing(sizes: tuple[str, str], tmp_path: Path) -> None:
    """`from_pretrained` takes the one file of before, where there is one, rather than the shards."""
    model: Any = adapted(llama(), "lora")
    ll.save_merged(model, tmp_path, max_shard_size=sizes[0])
    (tmp_path / "notes.txt").write_text("mine")
    randomize(model, seed=1)
    ll.save_merged(model, tmp_path, max_shard_size=sizes[1])
    assert_close(logits(type(model).from_pretrained(tmp_path)), logits(model), 1e-5)
    ll.save_merged(model, tmp_path / "new", max_shard_size=sizes[1])
    names = {path.name for path in tmp_path.iterdir()} - {"new", "notes.txt"}
    assert names == {path.name for path in (tmp_path / "new").iterdir()}
    assert (tmp_path / "notes.txt").exists()


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight * 0.25, self.bias)


def test_a_layer_that_is_not_its_weight() -> None:
    model = nn.Sequential(Scaled(6, 6), nn.Linear(6, 6))
    ll.attach(model, ll.LoRAConfig(r=2))
    with pytest.raises(ll.AttachError, match=r"0: its Scaled computes something else than W x \+ b"):
        ll.merged_state_dict(model)
    ll.detach(model)
    ll.attach(model, ll.LoRAConfig(r=2, exclude_names=("0",)))
    assert torch.equal(ll.merged_state_dict(model)["0.weight"], model[0].weight)


class Observed(nn.Linear):
    """Keeps the largest input that it has seen, as quantisation's observers do."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.largest.copy_(torch.maximum(self.largest, x.detach().abs().max()))
        return super().forward(x)


def test_a_layer_that_keeps_what_it_sees_is_left_as_it_was() -> None:
    model = nn.Sequential(Observed(6, 6))
    ll.attach(model, ll.LoRAConfig(r=2))
    assert ll.merged_state_dict(model)["0.largest"] == model[0].largest == 0


@pytest.mark.parametrize("of", [lambda m: prune.l1_unstructured(m, "weight", 0.5), parametrizations.weight_norm])
def test_weights_that_are_made_of_others(of: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    of(model[0])
    ll.attach(model, ll.LoRAConfig(r=2))
    randomize(model)
    plain = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    plain.load_state_dict(ll.merged_state_dict(model))
    x = torch.randn(5, 6)
    assert_close(plain(x), model(x), 1e-5)


class Counts(nn.Module):
    """Has a state that is no parameter and no buffer."""

    def __init__(self, seen: Any = 0) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(8, 8), seen

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.seen

    def get_extra_state(self) -> Any:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


@pytest.mark.parametrize("seen", [torch.tensor(3.0), 3])
def test_extra_state(seen: Any, tmp_path: Path) -> None:
    model, x = Counts(seen), torch.randn(2, 8)
    ll.attach(model, ll.LoRAConfig(r=2, target_roles=()))
    randomize(model)
    (plain := Counts()).load_state_dict(ll.merged_state_dict(model))
    assert_close(plain(x), model(x), 1e-6)
    assert [name for name, _ in merging.merged_parameters(model)] == ["linear.weight", "linear.bias"]
    if isinstance(seen, Tensor):
        ll.save_merged(model, tmp_path)
    else:
        with pytest.warns(UserWarning, match="save_merged: _extra_state is left out, since a safetensors file holds"):
            ll.save_merged(model, tmp_path)
    assert ("_extra_state" in load_file(tmp_path / "model.safetensors")) == isinstance(seen, Tensor)


def test_options_that_save_merged_gives_itself(tmp_path: Path) -> None:
    model = llama()
    attach(model, "lora")
    for name in ("state_dict", "save_directory"):
        with pytest.raises(TypeError, match=f"it gives save_pretrained {name} itself"):
            ll.save_merged(model, tmp_path / "new", **{name: {}})
    assert not (tmp_path / "new").exists()


def test_refuses() -> None:
    with pytest.raises(ll.AttachError, match="no adapter is attached"):
        ll.merged_state_dict(llama())


class Factor(nn.Module):
    """What `get_extra_state` is for, done by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.tensor(3.0)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}factor"] = self.factor


def test_what_a_module_writes_itself() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Factor())
    ll.attach(model, ll.LoRAConfig(r=2, target_roles=()))
    merged = ll.merged_state_dict(model)
    assert merged.keys() == {"0.weight", "0.bias", "1.factor"}
    assert torch.equal(merged["1.factor"], torch.tensor(3.0))
    assert [name for name, _ in merging.merged_parameters(model)] == ["0.weight", "0.bias"]


def test_a_fused_projection(tmp_path: Path) -> None:
    """A model that loads the file has the parts, on which no adapter acts."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_k, self.to_v, self.to_qkv = (nn.Linear(8, n) for n in (8, 8, 8, 24))
            self.fused_projections = True

        def forward(self, x: Tensor) -> Tensor:
            return self.to_qkv(x)

    model = nn.Sequential(Attention())
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("to_qkv",)))
    with pytest.raises(ll.AttachError, match=r"save_merged: 0\.to_qkv is fused"):
        ll.save_merged(model, tmp_path)
    assert not list(tmp_path.iterdir())
    with ll.disabled(model):
        ll.save_merged(model, tmp_path)
