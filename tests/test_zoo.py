"""What the default config makes of the models that people adapt: which layers, what is left out and why, and that every
adapter then trains."""

import math
import warnings
from collections import Counter
from typing import Any

import pytest
from models import assert_same, snapshot
from torch import Tensor, nn
from zoo import ZOO

import lora_lite as ll
from lora_lite.shapes import shape
from lora_lite.targets import fold

EXPERTS, ROUTER, HEAD = "stacked experts", "itself, which calls no layer for it", "the output head"
TUPLE, INNER, NARROW = (
    "its forward returns a tuple",
    "role inner: neither reads from nor writes into",
    "narrower than r=4",
)
ATTENTION = {"reader": "q_proj:2 k_proj:2 v_proj:2", "writer": "o_proj:2"}
LLAMA = {"reader": "q_proj:2 k_proj:2 v_proj:2 gate_proj:2 up_proj:2", "writer": "o_proj:2 down_proj:2"}
STACKED = {f"model.layers.*.mlp.experts.{name}": EXPERTS for name in ("gate_up_proj", "down_proj")}
GATE = "model.layers.*.mlp.gate"

# By role the adapted layers' last names and how many; what is left out, but embeddings and convolutions, and why.
EXPECTED: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "clip": (
        {
            "reader": "k_proj:4 v_proj:4 q_proj:4 fc1:4 visual_projection:1 text_projection:1",
            "writer": "out_proj:4 fc2:4",
        },
        {},
    ),
    "siglip": (
        {"reader": "k_proj:4 v_proj:4 q_proj:4 fc1:5 head:1", "writer": "out_proj:4 fc2:5"},
        {
            "vision_model.head.attention.in_proj_weight": "read by MultiheadAttention itself",
            "vision_model.head.attention.out_proj": "nn.MultiheadAttention reads its weight without calling it",
            "vision_model.head.probe": "read by SiglipMultiheadAttentionPoolingHead itself",
        },
    ),
    "deepseek_v3": (
        {"reader": "q_a_proj:2 kv_a_proj_with_mqa:2 gate_proj:2 up_proj:2", "writer": "o_proj:2 down_proj:2"},
        {
            **STACKED,
            "lm_head": HEAD,
            "model.layers.*.self_attn.q_b_proj": INNER,
            "model.layers.*.self_attn.kv_b_proj": INNER,
            GATE: ROUTER,
        },
    ),
    "qwen3_moe": (ATTENTION, {**STACKED, "lm_head": HEAD, GATE: ROUTER}),
    "mixtral": (ATTENTION, {**STACKED, "lm_head": HEAD, GATE: ROUTER}),
    "qwen2_moe": (
        LLAMA,
        {**STACKED, "lm_head": HEAD, GATE: ROUTER, "model.layers.*.mlp.shared_expert_gate": NARROW},
    ),
    "qwen3_next": (
        {
            "reader": "in_proj_qkvz:1 in_proj_ba:1 gate_proj:2 up_proj:2 q_proj:1 k_proj:1 v_proj:1",
            "writer": "out_proj:1 down_proj:2 o_proj:1",
        },
        {**STACKED, "lm_head": HEAD, GATE: ROUTER, "model.layers.*.mlp.shared_expert_gate": NARROW},
    ),
    "phimoe": (ATTENTION, {**STACKED, "lm_head": HEAD, "model.layers.*.mlp.router": TUPLE}),
    "llama4": (
        LLAMA,
        {
            "model.layers.*.feed_forward.experts.gate_up_proj": EXPERTS,
            "model.layers.*.feed_forward.experts.down_proj": EXPERTS,
            "lm_head": HEAD,
            "model.layers.*.feed_forward.router": TUPLE,
        },
    ),
    "whisper": (
        {"reader": "k_proj:6 v_proj:6 q_proj:6 fc1:4", "writer": "out_proj:6 fc2:4"},
        {"proj_out": HEAD},
    ),
    "modernbert": ({"reader": "Wqkv:2 Wi:2", "writer": "Wo:4 dense:1"}, {"decoder": HEAD}),
    "distilbert": (
        {"reader": "q_lin:2 k_lin:2 v_lin:2 lin1:2 vocab_transform:1", "writer": "out_lin:2 lin2:2"},
        {"vocab_projector": HEAD},
    ),
    "rwkv": (
        {"reader": "key:4 value:2 receptance:4", "writer": "output:2 value:2"},
        {
            "head": HEAD,
            **{f"rwkv.blocks.*.attention.time_mix_{part}": ROUTER for part in ("key", "value", "receptance")},
            **{f"rwkv.blocks.*.feed_forward.time_mix_{part}": ROUTER for part in ("key", "receptance")},
        },
    ),
    "t5": ({"reader": "q:6 k:6 v:6 wi:4", "writer": "o:6 wo:4"}, {"lm_head": HEAD}),
    "swin": (
        {"reader": "q_proj:4 k_proj:4 v_proj:4 fc1:4", "writer": "o_proj:4 fc2:4"},
        {
            "swin.encoder.layers.*.downsample.reduction": INNER,
            "swin.encoder.layers.*.blocks.*.attention.relative_position_bias.relative_position_bias_table": ROUTER,
            "classifier": NARROW,
        },
    ),
    "unet": (
        {
            "reader": "to_q:8 to_k:4 to_v:4 proj:4",
            "writer": "to_out.*:8 to_k:4 to_v:4 net.*:4 time_emb_proj:8",
        },
        {"time_embedding.linear_1": "excluded by 'embed'", "time_embedding.linear_2": "excluded by 'embed'"},
    ),
    "sentence_transformer": ({"reader": "query:2 key:2 value:2 dense:2", "writer": "dense:4"}, {}),
    "llava": (
        {
            "reader": "k_proj:4 v_proj:4 q_proj:4 fc1:2 linear_1:1 linear_2:1 gate_proj:2 up_proj:2",
            "writer": "out_proj:2 fc2:2 o_proj:2 down_proj:2",
        },
        {"lm_head": HEAD},
    ),
    "transformer_encoder": (
        {"reader": "linear1:2", "writer": "linear2:2"},
        {
            "layers.*.self_attn.in_proj_weight": "read by MultiheadAttention itself",
            "layers.*.self_attn.out_proj": "nn.MultiheadAttention reads its weight without calling it",
        },
    ),
    "mamba": (
        {"reader": "in_proj:2", "writer": "out_proj:2"},
        {
            "backbone.layers.*.mixer.x_proj": INNER,
            "backbone.layers.*.mixer.dt_proj": INNER,
            "backbone.layers.*.mixer.A_log": "read by MambaMixer itself",
            "lm_head": HEAD,
        },
    ),
    "gptq": ({"reader": "*:3"}, {}),
}


def last(name: str) -> str:
    parts = fold(name).split(".")
    return ".".join(parts[-2:]) if parts[-1] == "*" else parts[-1]


def run(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """A loss."""
    output: Any = model(*batch.values()) if set(batch) in ({"input"}, {"src"}) else model(**batch)
    output = getattr(output, "loss", output)
    output = output if isinstance(output, Tensor) else output[0]
    return output.float().square().mean()


@pytest.mark.parametrize("name", ZOO)
def test_defaults(name: str) -> None:
    make, batch = ZOO[name]
    model = make()
    run(model, batch())  # some leave notes on themselves at their first call
    before = snapshot(model)
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    attachment = ll.attach(model, ll.LoRAConfig(r=4))
    roles: dict[str, Counter[str]] = {}
    for target in attachment.targets:
        roles.setdefault(target.role, Counter())[last(target.name)] += 1
    wanted, without = EXPECTED[name]
    assert roles == {
        role: Counter({part.split(":")[0]: int(part.split(":")[1]) for part in text.split()})
        for role, text in wanted.items()
    }

    plain = [each for each in attachment.left_out if each.why.startswith(("an embedding", "a convolution"))]
    others = {each.kind: each.why for each in attachment.left_out if each not in plain}
    assert others.keys() == without.keys()
    for kind, why in without.items():
        assert why in others[kind], kind
    tables = {fold(path) for path, m in model.named_modules() if isinstance(m, nn.Embedding | nn.Conv2d | nn.Conv1d)}
    assert {each.kind for each in plain} <= tables
    # Nothing is lost between the two, and the shares are of the whole.
    kinds = {fold(target.name) for target in attachment.targets} | {each.kind for each in attachment.left_out}
    assert {fold(path) for path in linears} <= kinds
    adapted = sum(math.prod(shape(target.layer)) for target in attachment.targets)
    total = sum(p.numel() for path, p in model.named_parameters() if ".lora_lite." not in path)
    total += sum(32 * 32 for path, _ in model.named_buffers() if path.endswith("qweight"))
    vectors = sum(p.numel() for path, p in model.named_parameters() if p.ndim < 2 and ".lora_lite." not in path)
    said = sum(each.share for each in attachment.left_out)
    assert said == pytest.approx(1 - (adapted + vectors) / total, abs=1e-6)
    text = attachment.summary()
    assert all(f"  {each}" in text for each in attachment.left_out[:20])

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(model.train(), batch()).backward()
    diagnosis = ll.diagnose(model)
    assert not any(row.idle for row in diagnosis.rows)
    assert all(row.dead == ("lora_A",) for row in diagnosis.rows)  # B is zero
    model.zero_grad()
    ll.detach(model.eval())
    assert_same(model, before)


@pytest.mark.parametrize(
    ("name", "layers", "wanted"),
    [
        ("sentence_transformer", (1,), r"\.layer\.1\."),
        ("llava", (1,), r"\.layers\.1\."),
        ("t5", (0,), r"\.block\.0\."),
        ("rwkv", (1,), r"\.blocks\.1\."),
    ],
)
def test_block_numbers(name: str, layers: tuple[int, ...], wanted: str) -> None:
    import re

    attachment = ll.attach(ZOO[name][0](), ll.LoRAConfig(r=4, layers=layers))
    assert attachment.targets
    assert all(re.search(wanted, target.name) for target in attachment.targets)


def test_block_numbers_of_nested_runs() -> None:
    """Of two runs the longer has the blocks, for every name alike; experts are none, however many."""

    def stage(depth: int) -> nn.Module:
        part = nn.Module()
        part.blocks = nn.ModuleList(
            nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)}) for _ in range(depth)
        )
        return part

    def mixture() -> nn.Module:
        part = nn.Module()
        part.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 8), "w2": nn.Linear(8, 4)}) for _ in range(5))
        return part

    staged = nn.ModuleDict({"stages": nn.ModuleList([stage(2), stage(6), stage(3)])})
    found = ll.attach(staged, ll.LoRAConfig(r=2, layers=(2,))).targets
    assert [t.name.split(".")[:4] for t in found[::2]] == [["stages", s, "blocks", "2"] for s in "12"]
    mixed = nn.ModuleDict({"layers": nn.ModuleList([mixture(), mixture()])})
    found = ll.attach(mixed, ll.LoRAConfig(r=2, layers=(1,))).targets
    assert len(found) == 10
    assert all(t.name.startswith("layers.1.experts.") for t in found)
