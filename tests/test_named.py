"""What a config names is adapted, or an error says why not. docs/silent_failures.md has the list."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import llama
from situations import Inference, refused
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from zoo import ZOO

import lora_lite as ll

L = ll.LoRAConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_names": ("q_proj$", "qkv_proj$")}, r"no layer matches 'qkv_proj\$' of .*nearest: .*q_proj"),
        ({"target_names": ("q_proj$", "embed_position")}, r"'embed_position' of (.|\n)*nearest: embed_tokens"),
        ({"rank_pattern": {"q_prj": 2}}, r"rank_pattern: 'q_prj' matches none of the 14.*nearest: q_proj"),
        ({"alpha_pattern": {r"^layers\.0": 2}}, r"alpha_pattern: '\^layers\\\\.0' matches none of the 14"),
        ({"target_names": ("q_proj",), "target_roles": ("writer",)}, r"finds .*\(.*0\.self_attn\.q_proj: role reader"),
        ({"target_names": ("q_p", "o_p"), "modules_to_save": ("attn",)}, r"q_proj: trained in full \(modules_to"),
        ({"target_names": ("q_proj",), "exclude_names": ("q_",)}, r"q_proj: excluded by 'q_'"),
        ({"layers": (0, 2)}, r"no layer matches 2 of .*layers=\(0, 2\)"),
        ({"exclude_names": ("mpl",)}, r"exclude_names: 'mpl' matches nothing in the model.*nearest: mlp"),
        ({"target_names": ("q_proj",), "exclude_names": ("self_attn",)}, "no layer matches 'q_proj' of"),
        ({"target_names": ("q_proj", r"0\.mlp\.up"), "layers": (1,)}, r"no layer matches '0\\\\.mlp\\\\.up' of"),
        ({"rank_pattern": {"q_proj": 40}}, r"q_proj \(32 → 32\): r=40 is larger"),
    ],
)  # fmt: skip
def test_what_is_named_must_be_there(fields: dict[str, Any], message: str) -> None:
    refused(llama(), L(**{"r": 4, **fields}), message)


class WithBags(nn.Module):
    """An embedding that no adapter can stand on, among layers that have and have not their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.first, self.norm = nn.EmbeddingBag(9, 8), nn.Linear(8, 8), nn.LazyBatchNorm1d()
        self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.LazyLinear(4)}), nn.ModuleDict({"fc": nn.Linear(4, 4)})])

    def forward(self, ids: Tensor) -> Tensor:
        return self.blocks[1]["fc"](self.blocks[0]["fc"](self.norm(self.first(self.bag(ids)))))  # type: ignore[index]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_names": ("bag",)}, "It finds what is not adaptable \\(bag: read by EmbeddingBag itself, which"),
        ({"target_names": (r"^bag$", "first")}, "'\\^bag\\$' of (.|\n)*\\(bag: read by EmbeddingBag itself"),
        ({"target_names": (r"\.0\.fc$",)}, r"\(blocks\.0\.fc: it has no shape before its first call; run one batch"),
        ({"target_names": ("fc",)}, r"blocks\.0\.fc, which target_names matches, can't be adapted yet: .*run one"),
        ({"modules_to_save": ("0.fc",)}, r"blocks\.0\.fc, which modules_to_save matches, can't train yet: .*run one"),
        ({"modules_to_save": ("norm",)}, r"norm, which modules_to_save matches, can't train yet: .*run one batch"),
    ],
)
def test_what_is_named_and_out_of_reach(fields: dict[str, Any], message: str) -> None:
    model = WithBags()
    with pytest.raises(ll.AttachError, match=message):
        ll.attach(model, L(r=2, **fields))
    assert all(p.requires_grad for p in model.parameters())
    ll.attach(model, L(r=2, target_names=("fc",), exclude_names=(r"0\.fc",)))


def test_a_layer_that_has_no_shape_yet(tmp_path: Path) -> None:
    """It is left out and said so; it gets its shape, stays frozen, and trains again after detach."""
    model, ids = WithBags(), torch.randint(9, (5, 3))
    attachment = ll.attach(model, L(r=2, target_roles=()))
    assert [t.name for t in attachment.targets] == ["first", "blocks.1.fc"]
    assert "blocks.*.fc ×1 (0.0 %): it has no shape before its first call; run one batch" in attachment.summary()
    model(ids).sum().backward()
    with pytest.warns(UserWarning, match="buffers that have changed since attach"):
        ll.save(model, tmp_path / "a")
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_lite" not in name)
    ll.detach(model)
    assert all(p.requires_grad for p in model.parameters())
    assert len(ll.attach(model, L(r=2, target_names=("fc",))).targets) == 2


def test_explicit_names_are_not_filtered_by_defaults() -> None:
    head = ll.attach(llama(), L(r=4, target_names=("q_proj$", "lm_head$")))
    assert [t.name for t in head.targets][-1] == "lm_head"
    towers = ll.attach(ZOO["clip"][0](), L(r=4, target_names=("q_proj$", "v_proj$")))
    assert len(towers.targets) == 8
    low_rank = ll.attach(ZOO["deepseek_v3"][0](), L(r=4, target_names=("q_b_proj$",)))
    assert {t.role for t in low_rank.targets} == {"inner"}
    some = ll.attach(llama(), L(r=4, target_names=("proj$",), target_roles=("writer",)))
    assert {t.name.rpartition(".")[2] for t in some.targets} == {"o_proj", "down_proj"}, "roles that are given count"


def test_stacked_experts_by_name() -> None:
    """Llama 4's, which transformers does not dispatch."""
    message = r"'gate_up_proj\$' of (.|\n)*experts.gate_up_proj ×2: not adaptable, stacked experts that Llama4TextExp"
    refused(ZOO["llama4"][0](), L(r=4, target_names=("q_proj$", "gate_up_proj$")), message)


@pytest.mark.parametrize(
    ("model", "role", "fields", "message"),
    [
        ("llama4", "expert", {}, r"a stack of experts \(.*gate_up_proj ×2: .* Llama4TextExperts runs by itself"),
        ("llama", "expert", {}, r"a stack of experts \(the model has none\); leave 'expert' out of target_roles"),
        (
            "qwen2_moe",
            "expert",
            {"exclude_names": (r"\.experts",)},
            r"experts\.gate_up_proj: excluded by '\\\\\.experts'",
        ),
        ("llama", "embedding", {"layers": (0,)}, r"an embedding \(model\.embed_tokens: not in layers=\(0,\)\)"),
        ("llama", "embedding", {"modules_to_save": ("embed",)}, r"model\.embed_tokens: trained in full"),
    ],
)
def test_a_kind_that_is_asked_for_must_be_there(model: str, role: Any, fields: dict[str, Any], message: str) -> None:
    made = llama() if model == "llama" else ZOO[model][0]()
    refused(made, L(r=4, target_roles=("reader", "writer", role), **fields), message)


def test_roles_that_are_places_may_be_empty_and_so_may_those_of_a_default() -> None:
    @dataclass(frozen=True, kw_only=True)
    class WithExperts(ll.LoRAConfig):
        target_roles: tuple = ("reader", "expert")

    for cfg in (L(r=4, target_roles=("reader", "inner")), WithExperts(r=4)):
        assert {t.role for t in ll.attach(llama(), cfg).targets} == {"reader"}
    assert "expert" in {t.role for t in ll.attach(ZOO["qwen2_moe"][0](), WithExperts(r=4)).targets}


def test_defaults_leave_narrow_layers_out_but_not_all() -> None:
    attachment = ll.attach(ZOO["qwen2_moe"][0](), L(r=16))
    assert not any(t.name.endswith("gate") for t in attachment.targets)
    refused(llama(), L(r=33), r"r=33 is larger than the layer allows; use r ≤ 32")
    refused(ZOO["qwen2_moe"][0](), L(r=4, target_names=("shared_expert_gate",)), r"shared_expert_gate.*use r ≤ 1")


def test_names_with_brackets_are_shown() -> None:
    model = nn.ModuleDict({"[red]": nn.Linear(8, 8), ":cat:": nn.Linear(8, 8)})
    attachment = ll.attach(model, L(r=2, target_roles=()), name="run[/v2]")
    for text in (attachment.summary(), ll.diagnose(model).summary()):
        assert "[red]" in text
        assert ":cat:" in text
    assert "run[/v2]" in attachment.summary()


def test_a_base_layer_of_ones_own() -> None:
    model = nn.ModuleDict({"base_layer": nn.Linear(8, 8), "head": nn.Linear(8, 8)})
    assert len(ll.attach(model, L(r=2, target_roles=())).targets) == 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q_proj, self.up = nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(16, 48)


@pytest.mark.parametrize("names", [("q_proj",), ("embed", "q_proj")], ids=" ".join)
@pytest.mark.parametrize("wrap", [checkpoint_wrapper, torch.compile])
def test_what_is_left_out_of_wrapped_blocks(wrap: Any, names: tuple[str, ...]) -> None:
    """It is the same without the wrappers, and says so by the same names."""
    found = []
    for around in (lambda block: block, wrap):
        model = nn.ModuleDict({"layers": nn.ModuleList([around(Block()) for _ in range(2)])})
        found.append(ll.attach(model, L(r=2, target_names=names)).left_out)
    assert [each.kind for each in found[0]] == ["layers.*.up", "layers.*.embed"][: 3 - len(names)]
    assert found[1] == found[0]


def test_a_weight_that_is_a_buffer_is_left_out_aloud() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Inference())
    weight = model[1].weight.data
    del model[1].weight
    model[1].register_buffer("weight", weight)
    attachment = ll.attach(model, L(r=2, target_names=("0",)))
    assert [(each.kind, each.why) for each in attachment.left_out] == [("*", "not in target_names")]
    assert attachment.left_out[0].share == pytest.approx(64 / (64 + 64 + 8), rel=0.01)
