"""Which layers are found, in real architectures and in models that have no config."""

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from models import ARCHITECTURES, assert_same, bert, gpt_neox, llama, qwen3, snapshot
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.targets import candidates, find_targets

ALL: dict[str, Any] = {"target_roles": (), "exclude_names": ()}


def kinds(model: nn.Module, **fields: Any) -> dict[str, str]:
    """Role by the last part of the layer's name."""
    found: dict[str, str] = {}
    for target in find_targets(model, ll.LoRAConfig(**fields)):
        kind = target.name.rpartition(".")[2]
        assert found.setdefault(kind, target.role) == target.role, f"{kind} has two roles"
    return found


def names(model: nn.Module, **fields: Any) -> list[str]:
    return [target.name for target in find_targets(model, ll.LoRAConfig(**fields))]


LLAMA = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "reader"),
    **dict.fromkeys(("o_proj", "down_proj"), "writer"),
}


def test_a_linear_that_counts_experts_is_no_stack() -> None:
    """As routers do that are linears themselves."""
    model = nn.Sequential(nn.Linear(8, 4))
    model[0].num_experts = 4  # type: ignore[assignment]
    attachment = ll.attach(model, ll.LoRAConfig(r=2, target_roles=()))
    assert attachment.adapters["0"].lora_A.shape == (2, 8)
    model(torch.randn(3, 8)).sum().backward()


def test_llama() -> None:
    """q_proj and o_proj are square: their names tell them apart."""
    assert kinds(llama()) == LLAMA


def test_qwen3_whose_heads_are_wider_than_the_residual_stream() -> None:
    model: Any = qwen3()
    q, o = model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.o_proj
    assert (q.out_features, o.in_features) == (64, 64) != (32, 32)
    assert kinds(model) == LLAMA


def test_gpt_neox() -> None:
    assert kinds(gpt_neox()) == {
        "query_key_value": "reader",
        "dense": "writer",
        "dense_h_to_4h": "reader",
        "dense_4h_to_h": "writer",
    }


def test_bert() -> None:
    """Its layers share the name `dense`; what they read and write tells them apart, but for the square one."""
    roles = {target.name: target.role for target in find_targets(bert(), ll.LoRAConfig(layers=(0,)))}
    prefix = "bert.encoder.layer.0."
    assert {name.removeprefix(prefix): role for name, role in roles.items()} == {
        "attention.self.query": "reader",
        "attention.self.key": "reader",
        "attention.self.value": "reader",
        "attention.output.dense": "writer",
        "intermediate.dense": "reader",
        "output.dense": "writer",
    }


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "bert"])
def test_head_and_embeddings_are_left_out(architecture: str) -> None:
    model: Any = ARCHITECTURES[architecture]()
    head, everything = model.get_output_embeddings(), {t.name: t.layer for t in candidates(model)}
    assert any(layer is head for layer in everything.values())
    assert not any(target.layer is head for target in find_targets(model, ll.LoRAConfig(target_roles=())))
    assert any(target.layer is head for target in find_targets(model, ll.LoRAConfig(**ALL)))
    embeddings = [name for name, layer in everything.items() if isinstance(layer, nn.Embedding)]
    assert embeddings
    assert [name for name in everything if name not in embeddings] == names(model, **ALL), "in the model's order"


def test_width_comes_from_the_text_part_of_a_multimodal_config() -> None:
    model: Any = nn.Module()
    model.config = type("Config", (), {"hidden_size": 99, "text_config": type("Text", (), {"hidden_size": 8})})
    model.layers = nn.ModuleList([nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(24, 24)])
    assert [t.role for t in candidates(model)] == ["reader", "writer", "inner"]


def test_sequential_without_a_config() -> None:
    """The width is the one that most layers read or write."""
    model = nn.Sequential(
        nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 40), nn.Linear(40, 16), nn.Linear(40, 40), nn.Linear(16, 3)
    )
    assert {t.name: t.role for t in candidates(model)} == {
        "0": "writer",
        "2": "reader",
        "3": "writer",
        "4": "inner",
        "5": "reader",
    }
    assert names(model) == ["0", "2", "3", "5"], "inner layers are left out by default"
    assert names(model, target_roles=("inner",)) == ["4"]
    assert names(nn.Linear(4, 4)) == [""]


@pytest.mark.parametrize("role", ["reader", "writer"])
def test_roles(role: str) -> None:
    assert kinds(llama(), target_roles=(role,)) == {kind: r for kind, r in LLAMA.items() if r == role}


def test_names_are_regular_expressions() -> None:
    model = llama()
    assert set(kinds(model, target_names=("q_proj", "v_proj"))) == {"q_proj", "v_proj"}
    assert set(kinds(model, target_names=(r"self_attn\.[qk]_",))) == {"q_proj", "k_proj"}
    assert set(kinds(model, target_names=(r"_proj$",), exclude_names=("mlp",))) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert names(model, target_names=(r"^model\.layers\.1\.mlp\.up",)) == ["model.layers.1.mlp.up_proj"]
    assert names(model, target_names=("lm_head",), exclude_names=()) == ["lm_head"]


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "bert"])
def test_layers(architecture: str) -> None:
    model = ARCHITECTURES[architecture](num_hidden_layers=12)
    blocks = Counter(next(part for part in name.split(".") if part.isdigit()) for name in names(model, layers=(1, 11)))
    per_block = {"llama": 7, "gpt_neox": 4, "bert": 6}[architecture]
    assert blocks == {"1": per_block, "11": per_block}, "1 must not match 10 and 11"


@pytest.mark.parametrize(
    ("variant", "architecture", "want"),
    [
        ("ia3", "llama", {"k_proj", "v_proj"}),
        ("ia3", "bert", {"key", "value"}),
        ("ia3_ff", "llama", {"down_proj"}),
        ("ia3_ff", "gpt_neox", {"dense_4h_to_h"}),
        ("ia3_ff", "bert", {"dense"}),
    ],
)
def test_defaults_of_ia3(variant: str, architecture: str, want: set[str]) -> None:
    found = find_targets(ARCHITECTURES[architecture](), ll.REGISTRY[variant].config())
    assert {t.name.rpartition(".")[2] for t in found} == want
    assert len(found) == 2 * len(want)
    if (variant, architecture) == ("ia3_ff", "bert"):
        assert all(t.layer.in_features == 56 for t in found), "the feed-forward output, not the attention's"


def built(name: str, **fields: Any) -> nn.Module:
    """The tiny model of a config class of transformers, on the meta device."""
    config = getattr(transformers, name)(vocab_size=32, **fields)
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config)


_SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
_MLA = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}


@pytest.mark.parametrize(
    ("config", "fields", "scaled", "fed"),
    [
        ("T5Config", _T5, TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING["t5"][:2], "wo"),
        ("DebertaV2Config", _SMALL, TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING["deberta-v2"][:2], "dense"),
        ("DeepseekV3Config", {**_SMALL, **_MLA, "first_k_dense_replace": 1}, ["kv_b_proj"], "down_proj"),
        ("GPTBigCodeConfig", {"n_embd": 32, "n_layer": 1, "n_head": 4}, [], "c_proj"),
        ("Phi3Config", {**_SMALL, "pad_token_id": 0}, [], "down_proj"),
        ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 1}, [], "down_proj"),
        ("ModernBertConfig", {**_SMALL, "pad_token_id": 0}, [], "Wo"),
        ("GPTNeoXConfig", _SMALL, [], "dense_4h_to_h"),
    ],
)
def test_ia3_scales_keys_values_and_the_feed_forward(
    config: str, fields: dict[str, Any], scaled: list[str], fed: str
) -> None:
    """PEFT's table names the keys and values where they have layers of their own. Where one layer computes queries
    too, IA3 is refused, naming it. The feed-forward layer is never one of the attention's."""
    model = built(config, **fields)
    found = [target.name for target in find_targets(model, ll.IA3FFConfig())]
    assert found
    assert {name.rpartition(".")[2] for name in found} == {fed}
    assert not any("attention" in name.lower() or ".attn" in name for name in found), found
    if scaled:
        found = [target.name for target in find_targets(model, ll.IA3Config())]
        assert {name.rpartition(".")[2] for name in found} == set(scaled)
    else:
        with pytest.raises(ll.AttachError, match=r"query_key_value|qkv_proj|Wqkv|c_attn"):
            find_targets(model, ll.IA3Config())


class LinearLike(nn.Module):
    """A layer that is no nn.Linear."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = 4, 6
        self.weight = nn.Parameter(torch.randn(6, 4))
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight)


def test_structure_decides_not_class() -> None:
    assert names(nn.ModuleDict({"mine": LinearLike(), "other": nn.Linear(4, 6)}), **ALL) == ["mine", "other"]
    no_linear = {
        "conv": nn.Conv1d(4, 4, 1),
        "norm": nn.LayerNorm(4),
        "bilinear": nn.Bilinear(4, 4, 4),
        "deferred": LinearLike(in_features=None),
        "parametrless": nn.Identity(),
    }
    assert [t.name for t in candidates(nn.ModuleDict(no_linear))] == []


class Computed(nn.Module):
    """A layer whose weight is made anew whenever it is asked for, around another one."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 8
        self.raw = nn.Parameter(torch.randn(8, 8))
        self.inner = inner

    @property
    def weight(self) -> Tensor:
        return self.raw * 1.0

    def forward(self, input: Tensor) -> Tensor:
        y = nn.functional.linear(input, self.weight)
        return y if self.inner is None else y + self.inner(input)


def test_weights_that_are_made_anew_are_of_layers_apart() -> None:
    """One that is gone may leave its place in memory to the next."""
    model = nn.Sequential(*(Computed(Computed()) for _ in range(20)))
    wanted = [name for i in range(20) for name in (f"{i}", f"{i}.inner")]
    assert [target.name for target in candidates(model)] == wanted
    attachment = ll.attach(model, ll.LoRAConfig(r=2, target_roles=()))
    assert list(attachment.adapters) == wanted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_bitsandbytes(kind: str) -> None:
    """Quantised layers match as they are, and training them works."""
    bnb = pytest.importorskip("bitsandbytes")
    options = (
        {"quant_type": "nf4", "compute_dtype": torch.float32} if kind == "Linear4bit" else {"has_fp16_weights": False}
    )
    quantised = getattr(bnb.nn, kind)(64, 64, bias=False, **options)
    model = nn.Sequential(quantised, nn.Linear(64, 32)).to("cpu")
    x = torch.randn(3, 64)
    base = model(x)
    assert not quantised.weight.is_floating_point()
    assert names(model, target_roles=()) == ["0", "1"]
    before = snapshot(model)
    attachment = ll.attach(model, ll.LoRAConfig(r=4, target_names=("0",)))
    (target,) = attachment.targets
    assert type(target.layer).__name__ == kind
    torch.testing.assert_close(model(x), base)
    model(x).square().sum().backward()
    _, B = ll.parameters(model)
    assert B.grad is not None
    assert B.grad.any()
    ll.detach(model)
    assert_same(model, before)


def test_weights_that_a_module_reads_by_itself_are_named() -> None:
    """Where they are most of a model that has no linear layer, as in Moshi's depth decoder."""

    class Flexible(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 32, 32))

    model = nn.ModuleDict({"embed": nn.Embedding(9, 32), "layer": Flexible(), "norm": nn.LayerNorm(32)})
    with pytest.raises(ll.AttachError, match=r"layer ×1: not adaptable, read by Flexible") as said:
        ll.attach(model, ll.LoRAConfig(r=4))
    assert "norm" not in str(said.value)
