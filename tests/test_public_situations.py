"""What people have met with, in their own software and in others': each ended with an adapter that was idle, wrong or
lost. Here it acts, or its user is told by name. docs/silent_failures.md has the list."""

import contextlib
import copy
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune
from zoo import ZOO

import lora_lite as ll
from lora_lite.quantized import dense_weight
from lora_lite.trainer import AdapterCallback

EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
L = ll.LoRAConfig
CPU = torch.device("cpu")


def warned(call: Callable[[], Any]) -> list[str]:
    """The library's warnings during a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [
        str(w.message)
        for w in caught
        if re.match(r"after (the first |\d+ )(backward|step)s?:|\w*(save|export|verify|merged)\w*:", str(w.message))
    ]


def refused(model: nn.Module, cfg: Any, message: str, **options: Any) -> None:
    before = snapshot(model)
    with pytest.raises(ll.AttachError, match=message):
        ll.attach(model, cfg, **options)
    assert_same(model, before)


# ---- names are promises ----


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


# ---- layers that never run ----


@pytest.mark.parametrize("use", ["never", "its weight alone", "detached"])
def test_an_idle_layer_beside_one_that_reads_the_same_x(use: str, tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            if use == "never":
                return self.q_proj(x)
            if use == "its weight alone":
                return self.q_proj(x) + x @ self.k_proj.weight.T
            return self.q_proj(x) + self.k_proj(x).detach()

    model, x = nn.Sequential(Attention(), nn.Linear(8, 8)), torch.randn(4, 8)
    ll.attach(model, L(r=2, target_names=("q_proj", "k_proj")))
    optimizer = torch.optim.SGD(ll.parameters(model), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    said = [text for _ in range(25) for text in warned(step)]
    assert len(said) == 1
    assert "0.k_proj" in said[0]
    assert "0.q_proj" not in said[0]
    (text,) = warned(lambda: ll.save(model, tmp_path / "a"))
    assert "0.k_proj" in text


def test_multihead_attention_never_calls_its_out_proj() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1)
    refused(model, L(r=4, target_names=(r"out_proj$", r"linear1$")), "out_proj.*nn.MultiheadAttention reads its weight")
    ll.attach(model, L(r=4))
    model.eval()
    randomize(model)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        fast = model(x)  # torch.nn has a path of its own for this
    torch.testing.assert_close(fast, model(x))


def test_a_kernel_that_reads_the_weight(tmp_path: Path) -> None:
    """Mamba multiplies by dt_proj.weight."""
    model = ZOO["mamba"][0]()
    ll.attach(model, L(r=2, target_roles=()))
    batch = {"input_ids": token_ids(), "labels": token_ids()}
    (once,) = warned(lambda: model(**batch).loss.backward())
    assert "never ran" in once
    assert "backbone.layers.*.mixer.dt_proj ×2" in once
    assert "state-space kernels" in once
    assert not warned(lambda: model(**batch).loss.backward()), "once"
    rows = {row.layer: row for row in ll.diagnose(model).rows}
    assert rows["backbone.layers.0.mixer.dt_proj"].dead == ("lora_A", "lora_B")
    assert rows["backbone.layers.0.mixer.dt_proj"].idle == "never ran"
    assert rows["backbone.layers.0.mixer.in_proj"].dead == ("lora_A",)
    assert "never ran" in ll.diagnose(model).summary()
    with pytest.raises(ll.AttachError, match=r"did not run these adapted layers: backbone.layers.\*.mixer.dt_proj ×2"):
        ll.verify(model, batch)
    assert len(ll.verify(model, batch, partial=True)) == 6
    (again,) = warned(lambda: ll.save(model, tmp_path / "adapter.safetensors"))
    assert again.startswith("save: these adapted layers never ran")
    for what, call in merging(model, tmp_path / "merged").items():
        (again,) = warned(call)
        assert again.startswith(f"{what}: these adapted layers never ran")
        with ll.disabled(model):
            assert not warned(call)
    ll.detach(model)
    ll.attach(model, L(r=2, target_roles=(), exclude_names=("out_proj", "lm_head")))  # PEFT takes no out_proj
    warned(lambda: model(**batch).loss.backward())
    (again,) = warned(lambda: ll.export_peft(model, tmp_path / "peft"))
    assert "dt_proj" in again


def merging(model: nn.Module, folder: Path) -> dict[str, Callable[[], Any]]:
    """All that makes merged weights."""
    return {
        "merged_state_dict": lambda: ll.merged_state_dict(model),
        "merged_parameters": lambda: dict(ll.merging.merged_parameters(model)),
        "save_merged": lambda: ll.save_merged(model, folder),
    }


def test_a_loss_that_multiplies_by_the_heads_weight() -> None:
    model: Any = llama()
    ll.attach(model, L(r=4, target_names=("q_proj$", "lm_head$"), exclude_names=()))

    def step() -> None:
        (model.model(token_ids()).last_hidden_state @ model.lm_head.weight.t()).square().mean().backward()

    (text,) = warned(step)
    assert "lm_head" in text
    assert "q_proj" not in text


@pytest.mark.parametrize("leave", ["removed", "resized"])
def test_layers_that_left_the_model(leave: str, tmp_path: Path) -> None:
    model: Any = llama()
    ll.attach(model, L(r=4, target_names=("q_proj$", "lm_head$")))
    if leave == "removed":
        model.model.layers = model.model.layers[:1]
        gone = "model.layers.1.self_attn.q_proj"
    else:
        model.resize_token_embeddings(80)
        gone = "lm_head"
    (text,) = warned(lambda: model(token_ids(), labels=token_ids()).loss.backward())
    assert f"no longer part of the model: {gone}" in text
    assert {row.layer for row in ll.diagnose(model).rows if row.idle == "left the model"} == {gone}
    with pytest.raises(ll.AttachError, match=f"did not run these adapted layers: {gone}"):
        ll.verify(model, token_ids())
    (text,) = warned(lambda: ll.save(model, tmp_path / "adapter.safetensors"))
    assert gone in text
    for what, call in merging(model, tmp_path / "merged").items():
        (text,) = warned(call)
        assert re.match(rf"{what}: .*{gone}.*nothing of those on layers that are no longer part", text)
    ll.detach(model)


class Mixture(nn.Module):
    """Experts in a ModuleList; a batch is routed to some, by the sign of its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0 if x.mean() < 0 else 1](self.router(x))


def test_experts_that_were_not_chosen_are_no_news(tmp_path: Path) -> None:
    model, x = Mixture(), torch.randn(3, 8)
    ll.attach(model, L(r=2, target_roles=()))
    assert not warned(lambda: model(x).sum().backward())
    assert not warned(lambda: ll.save(model, tmp_path / "adapter.safetensors"))
    assert len(ll.verify(model, x)) == 2
    ll.detach(model)
    ll.attach(model, L(r=2, target_roles=()))
    (text,) = warned(lambda: model.router(x).sum().backward())
    assert "experts.* ×4" in text, "a whole kind is"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_looks_idle_to_nobody(reentrant: bool) -> None:
    """Reentrant checkpointing ends a backward for each block; no block is idle because its turn has not come."""
    model: Any = llama().train()
    model.enable_input_require_grads()
    ll.attach(model, L(r=4))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for _ in range(2):
        assert not warned(lambda: model(token_ids(), labels=token_ids()).loss.backward())
    ll.detach(model)
    ll.attach(model, L(r=4, target_names=("q_proj", "lm_head")))

    def step() -> None:
        model.model(token_ids()).last_hidden_state.square().mean().backward()

    texts = [*warned(step), *warned(step)]
    assert len(texts) == 1
    assert "never ran" in texts[0]
    assert "lm_head" in texts[0]


def test_compiled_layers_are_not_idle() -> None:
    torch._dynamo.reset()
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    ll.attach(model, L(r=2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert not warned(lambda: compiled(torch.randn(3, 8)).sum().backward())
    ll.detach(model)
    ll.attach(model, L(r=2))
    head = torch.compile(model[0], fullgraph=True, backend="aot_eager")
    (text,) = warned(lambda: head(torch.randn(3, 8)).sum().backward())
    assert text.count("1") == 1


class Frozen(nn.Module):
    """A tower under no_grad, as people freeze it, and a part that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.tower(x)
        return self.head(h)


def test_a_part_under_no_grad() -> None:
    model, x = Frozen(), torch.randn(3, 8)
    ll.attach(model, L(r=2))
    randomize(model)
    with pytest.warns(UserWarning, match=r"without gradients, under no_grad.*: tower\."):
        rows = ll.verify(model, x)
    assert {row.layer for row in rows} == {"tower", "head"}
    (text,) = warned(lambda: model(x).sum().backward())
    assert "no gradient reached their adapters" in text
    assert "tower" in text
    assert "head" not in text
    dead = {row.layer: row.dead for row in ll.diagnose(model).rows}
    assert dead == {"tower": ("lora_A", "lora_B"), "head": ()}


def test_what_is_switched_off_is_not_idle() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for name in ("a", "b"):
        ll.attach(model, L(r=2), name=name)
    ll.use(model, "b")
    assert not warned(lambda: model(torch.randn(3, 8)).sum().backward())


# ---- weights are what they seem ----


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


def test_empty_shards_of_zero3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without DeepSpeed they are refused; with it they are gathered, those of the base too."""
    model, path = nn.Sequential(nn.Linear(8, 6)), tmp_path / "adapter.safetensors"
    ll.attach(model, L(r=2))
    randomize(model)
    whole = {name: t.clone() for name, t in ll.state_dict(model).items()}

    def partition(p: Any) -> None:
        p.ds_id, p.kept = 3, p.data
        p.data = torch.empty(0)

    for p in ll.parameters(model):
        partition(p)
    for call in (lambda: ll.save(model, path), lambda: ll.export_peft(model, tmp_path / "peft")):
        with pytest.raises(ll.CheckpointError, match=r"0: it is an empty shard of ZeRO-3 \(it has a ds_id\)"):
            call()
    assert not list(tmp_path.glob("*.safetensors"))

    class GatheredParameters:
        def __init__(self, parameters: list[Any]) -> None:
            self.parameters = parameters

        def __enter__(self) -> None:
            for p in self.parameters:
                p.data = p.kept

        def __exit__(self, *_: Any) -> None:
            for p in self.parameters:
                p.data = torch.empty(0)

    fake = type("zero", (), {"GatheredParameters": GatheredParameters})
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", type("deepspeed", (), {"zero": fake}))
    monkeypatch.setitem(__import__("sys").modules, "deepspeed.zero", fake)
    ll.save(model, path)
    assert all(torch.equal(load_file(path)[name], t) for name, t in whole.items())
    ll.export_peft(model, tmp_path / "peft")
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists()
    base: Any = nn.Linear(8, 6)
    W = base.weight.detach().clone()
    partition(base.weight)
    assert torch.equal(dense_weight(base), W)


def test_a_tensor_of_another_shape_is_never_written(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    ll.attach(model, L(r=2))
    adapter = model[0].lora_lite["default"]  # type: ignore[index,union-attr]
    adapter.lora_A.data = torch.zeros(3, 8)
    for call in (lambda: ll.save(model, tmp_path / "a"), lambda: ll.export_peft(model, tmp_path / "b")):
        with pytest.raises(ll.CheckpointError, match=r"0: lora_A has shape \(3, 8\), not \(2, 8\)"):
            call()
    assert not any(tmp_path.iterdir())


class Inference(nn.Module):
    """A quantised layer whose kernel has no backward."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.in_features, self.out_features = size, size
        self.weight = nn.Parameter(torch.randint(-127, 127, (size, size), dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return nn.functional.linear(x, self.weight.to(x.dtype) / 100)


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


# ---- other libraries' adapters and files ----


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


def test_a_parametrised_adapter(tmp_path: Path) -> None:
    """It trains; a file has no place for what its tensors are made of."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    attachment = ll.attach(model, L(r=2, target_roles=()))
    adapter = attachment.adapters["0"]
    torch.nn.utils.parametrizations.weight_norm(adapter, "lora_A")
    optimizer = torch.optim.SGD(ll.parameters(model), lr=0.1)
    for _ in range(2):
        model(torch.randn(3, 8)).square().sum().backward()
        optimizer.step()
    with pytest.raises(ll.CheckpointError, match=r"0: its tensors are parametrised; .*remove_parametrizations"):
        ll.save(model, tmp_path / "a.safetensors")
    torch.nn.utils.parametrize.remove_parametrizations(adapter, "lora_A")
    ll.save(model, tmp_path / "a.safetensors")


def test_a_model_that_peft_adapts_is_refused() -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    for names in (("q_proj",), ("k_proj",), ()):
        refused(model, L(r=2, target_names=names), r"q_proj is PEFT's Linear: PEFT.*unload\(\)")
    ll.attach(model.unload(), L(r=2, target_names=("q_proj",)))


def test_peft_put_on_top(tmp_path: Path) -> None:
    """It freezes all that is there: said at the first step, and in no file until it is taken off."""
    model: Any = llama()
    ll.attach(model, L(r=4))
    for p in ll.parameters(model):
        p.requires_grad_(False)
    logits(model)
    assert not warned(torch.optim.SGD(model.parameters(), lr=0.0).step), "all of it is frozen by intent"
    ll.detach(model)
    ll.attach(model, L(r=4))
    randomize(model)
    want = logits(model)
    theirs: Any = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"])).train()
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    theirs(input_ids=token_ids(), labels=token_ids()).loss.backward()
    (text,) = warned(optimizer.step)
    assert "PEFT was put on this model and has frozen these adapters" in text
    assert "self_attn.k_proj ×2" in text
    callback = AdapterCallback()
    for each in (model, theirs):
        for what, write in {
            "save": lambda m: ll.save(m, tmp_path / "a"),
            "export_peft": lambda m: ll.export_peft(m, tmp_path / "a"),
            "merging": lambda m: ll.save_merged(m, tmp_path / "a"),
            "AdapterCallback": lambda m: callback.on_train_begin(None, None, None, m),
        }.items():
            with pytest.raises(ll.AttachError, match=rf"^{what}: .*q_proj is PEFT's Linear.*unload\(\)"):
                write(each)
    assert not list(tmp_path.iterdir())
    theirs.unload()
    assert torch.equal(logits(model), want)
    ll.save(model, tmp_path / "a")
    other: Any = llama()
    ll.load(other, tmp_path / "a")
    assert torch.equal(logits(other), want)


@pytest.mark.parametrize("kind", ["list", "regex"])
def test_a_peft_file_that_lacks_a_layer(kind: str, tmp_path: Path) -> None:
    names: Any = ["q_proj", "v_proj"] if kind == "list" else r".*\.(q_proj|v_proj)"
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=names))
    theirs.save_pretrained(tmp_path)
    ll.import_peft(llama(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "layers.1.self_attn.v_proj" not in name}, file)
    model = llama()
    before = snapshot(model)
    with pytest.raises(ll.CheckpointError, match=r"match 4 layers.*no tensors for model.layers.1.self_attn.v_proj"):
        ll.import_peft(model, tmp_path)
    assert_same(model, before)
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**text, "layers_to_transform": [0]}))
    with pytest.raises(ll.CheckpointError, match=r"do not match model.layers.1.self_attn.q_proj, for which it has"):
        ll.import_peft(model, tmp_path)  # PEFT leaves that layer as it is, without a word
    assert_same(model, before)


# ---- what trained beside the adapter ----


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16))
        self.classifier = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))


def test_what_the_file_does_not_hold_is_said(tmp_path: Path) -> None:
    model, x = Classifier(), torch.randn(9, 16)
    ll.attach(model, L(r=4, target_names=("body",)))
    model.eval()
    model(x).sum().backward()
    assert not warned(lambda: ll.save(model, tmp_path / "a"))
    model.to(torch.bfloat16).to(torch.float32)  # rounding is no change
    assert not warned(lambda: ll.save(model, tmp_path / "a"))
    model.classifier.requires_grad_(True)
    (text,) = warned(lambda: ll.save(model, tmp_path / "a"))
    assert "parameters of the base that train (classifier.weight, classifier.bias)" in text
    assert "running" not in text
    model.train()
    model(x)
    for call in (lambda: ll.save(model, tmp_path / "a"), lambda: ll.export_peft(model, tmp_path / "b")):
        (text,) = warned(call)
        assert "body.1.running_mean, body.1.running_var, body.1.num_batches_tracked" in text
        assert "classifier.weight" in text


def test_transformers_of_the_zoo_save_without_a_word(tmp_path: Path) -> None:
    """Nothing that a forward leaves behind (caches, rotary tables) is taken for training."""
    for name in ("qwen3_next", "whisper", "swin", "rwkv"):
        make, batch = ZOO[name]
        model = make().train()
        ll.attach(model, L(r=4))
        model(**batch()).loss.backward()
        assert not warned(lambda model=model: ll.save(model, tmp_path / "a")), name


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


# ---- the same kinds, elsewhere ----


def step(loss: Tensor, parameters: Any) -> None:
    loss.backward()
    torch.optim.SGD(list(parameters), lr=1e-3).step()


class Body(nn.Module):
    """A body of which the caller says how it is run, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor, how: str = "") -> Tensor:
        if how == "skipped":
            return self.head(x)
        with torch.set_grad_enabled(how != "no_grad"):
            h = self.body(x)
        return self.head(h.detach() if how == "detached" else h)


@pytest.mark.parametrize(
    ("how", "said"), [("no_grad", "no gradient reached"), ("detached", "no gradient reached"), ("skipped", "never ran")]
)
def test_no_adapter_gets_a_gradient(how: str, said: str, tmp_path: Path) -> None:
    """Only what stands beside them trains: no backward reaches the attachment, the optimiser's step tells."""
    model = Body()
    ll.attach(model, L(r=2, target_names=("body",)))
    model.head.requires_grad_(True)
    model(torch.randn(3, 8), how)
    (text,) = warned(lambda: step(model(torch.randn(3, 8), how).sum(), model.parameters()))
    assert text.startswith("after the first step: ")
    assert said in text
    assert "body.* ×2" in text
    assert any(said in each for each in warned(lambda: ll.save(model, tmp_path / "a")))


def test_all_adapted_layers_are_replaced() -> None:
    """As a conversion to another kind of linear layer does it: no call, no gradient, and the optimiser steps on."""
    model = Body()
    ll.attach(model, L(r=2, target_names=("body",)))
    model.head.requires_grad_(True)
    optimizer = torch.optim.SGD(ll.parameters(model), lr=1e-3)
    model.body = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def train() -> None:
        model(torch.randn(3, 8)).sum().backward()
        optimizer.step()

    (text,) = warned(train)
    assert "no longer part of the model: body.* ×2" in text


def test_two_losses_in_one_step() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    ll.attach(model, L(r=2))
    x = torch.randn(3, 8)

    def both() -> None:
        first, second = model["a"](x).sum(), model["b"](x).sum()
        first.backward()
        step(second, ll.parameters(model))

    assert not warned(both)


def test_a_first_backward_that_fails_or_is_of_the_base() -> None:
    model, x = Body(), torch.randn(3, 8)
    ll.attach(model, L(r=2))

    def fails() -> None:
        y = model(x)
        y.register_hook(lambda grad: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            y.sum().backward()

    assert not warned(fails)
    model.head.requires_grad_(True)
    with ll.disabled(model):
        assert not warned(lambda: model(x).sum().backward())
    (text,) = warned(lambda: step(model(x, "skipped").sum(), model.parameters()))
    assert "never ran" in text or "no gradient" in text


def test_frozen_after_attach() -> None:
    model, x = Body(), torch.randn(3, 8)
    ll.attach(model, L(r=2))
    model.body.requires_grad_(False)
    (text,) = warned(lambda: step(model(x).sum(), ll.parameters(model)))
    assert "requires_grad was switched off after attach: body.* ×2" in text


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


def test_layers_that_moved_within_the_model(tmp_path: Path) -> None:
    """A file has the names that the model has when it is saved."""
    model: Any = llama()
    ll.attach(model, L(r=4))
    randomize(model)
    model.model.layers = model.model.layers[::-1]
    want = logits(model)
    for tool in (ll.diagnose, lambda m: ll.verify(m, token_ids()), lambda m: ll.save(m, tmp_path / "a")):
        assert not warned(lambda tool=tool: tool(model))
    ll.export_peft(model, tmp_path / "peft")
    for load in (lambda m: ll.load(m, tmp_path / "a"), lambda m: ll.import_peft(m, tmp_path / "peft")):
        other: Any = llama()
        other.model.layers = other.model.layers[::-1]
        load(other)
        assert_close(logits(other), want, 1e-5)

    model = llama()
    ll.attach(model, L(r=4))
    del model.model.layers[0]
    texts = warned(lambda: model(token_ids(), labels=token_ids()).loss.backward())
    assert any("no longer part of the model: model.layers.0." in text for text in texts)
    with pytest.raises(ll.CheckpointError, match="another layer now has the name of one that has left"):
        ll.save(model, tmp_path / "b")


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_block_that_is_never_used_is_said_after_a_while(evaluated: bool) -> None:
    """Chance may leave a block out of a step (LayerDrop), not out of twenty. An evaluation before tells nothing."""
    model: Any = llama().train()
    ll.attach(model, L(r=4))
    if evaluated:
        logits(model.eval())
        model.train()
    model.config.num_hidden_layers = 1
    optimizer = torch.optim.SGD(ll.parameters(model), lr=1e-3)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(token_ids(), labels=token_ids()).loss.backward()
            optimizer.step()

    assert not warned(lambda: train(19))
    (text,) = warned(lambda: train(2))
    found = "these ran, but no gradient reached" if evaluated else "these adapted layers never ran"
    assert text.startswith(f"after 20 steps: {found}")
    assert "model.layers.1.self_attn.q_proj" in text
    with pytest.raises(ll.AttachError, match=r"did not run these adapted layers: .*model.layers.1"):
        ll.verify(model, token_ids())


@pytest.mark.parametrize("name", ["experts", "expert_{}"])
def test_experts_of_several_layers(name: str) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            made = [nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(4)]
            self.gate = nn.Linear(8, 8)
            self.experts: Any = (
                nn.ModuleList(made)
                if name == "experts"
                else nn.ModuleDict({name.format(i): each for i, each in enumerate(made)})
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[2 if name == "experts" else name.format(2)](self.gate(x))

    model = Experts()
    ll.attach(model, L(r=2))
    assert not warned(lambda: step(model(torch.randn(3, 8)).sum(), ll.parameters(model)))
    ll.verify(model, torch.randn(3, 8))


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


def test_base_weights_that_changed(tmp_path: Path) -> None:
    """Trained and frozen again, or loaded anew: the file does not hold them, and DoRA's norms are of the old ones."""
    model, x = Body(), torch.randn(3, 8)
    ll.attach(model, L(r=2, target_names=("body",)))
    model.head.requires_grad_(True)
    step(model(x).sum(), [*ll.parameters(model), *model.head.parameters()])
    model.head.requires_grad_(False)
    (text,) = warned(lambda: ll.save(model, tmp_path / "a"))
    assert "parameters of the base that have changed since attach (head.weight, head.bias)" in text
    other = Body()
    ll.attach(other, L(r=2))
    other(x).sum().backward()
    assert not warned(lambda: ll.save(other, tmp_path / "b"))
    other.load_state_dict({name: t + 0.1 for name, t in other.state_dict().items()})
    (text,) = warned(lambda: ll.save(other, tmp_path / "b"))
    assert "have changed since attach" in text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["assign", "offload"])
def test_flags_of_tensors_that_were_replaced(how: str) -> None:
    model: Any = llama()
    model.lm_head.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    ll.attach(model, L(r=4))
    if how == "assign":
        model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    else:
        accelerate.cpu_offload(model, execution_device=CPU)
    ll.detach(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


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


def test_wrapped_models(tmp_path: Path) -> None:
    """In DataParallel, and within another module."""
    model = nn.DataParallel(Body())
    attachment = ll.attach(model, L(r=2))
    assert list(attachment.adapters) == ["body.0", "body.1", "head"]
    ll.save(model, tmp_path / "a")
    ll.load(Body(), tmp_path / "a")
    ll.detach(model)
    outer = nn.ModuleDict({"encoder": Body()})
    ll.attach(outer["encoder"], L(r=2))
    with pytest.raises(ll.AttachError, match="pass the module through which one is attached: encoder"):
        ll.save(outer, tmp_path / "b")


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
    with pytest.raises(ll.AttachError, match="a list, has no floating-point tensor"):
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


def test_a_peft_file_with_a_layer_too_many(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    theirs.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**text, "target_modules": ["q_proj"]}))
    with pytest.raises(ll.CheckpointError, match=r"do not match model.layers.0.self_attn.v_proj.*has tensors"):
        ll.import_peft(llama(), tmp_path)


def test_detach_of_the_only_one_that_acted() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    for name in ("a", "b"):
        ll.attach(model, L(r=2), name=name)
    ll.use(model, "a")
    with pytest.warns(UserWarning, match=r"what is left \(b\) does not act.*use\(model, name\)"):
        ll.detach(model, "a")


def test_detach_of_what_entries_of_a_batch_take() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    for name in ("a", "b", "c"):
        ll.attach(model, L(r=2), name=name)
    ll.use(model, ["a", "b", None])
    with pytest.warns(UserWarning, match=r"gave to b have no adapter now; call use again"):
        ll.detach(model, "b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ll.detach(model, "c")  # which no entry took
        ll.use(model, "a")
        ll.detach(model)


def test_a_weight_that_is_a_buffer_is_left_out_aloud() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Inference())
    weight = model[1].weight.data
    del model[1].weight
    model[1].register_buffer("weight", weight)
    attachment = ll.attach(model, L(r=2, target_names=("0",)))
    assert [(each.kind, each.why) for each in attachment.left_out] == [("*", "not in target_names")]
    assert attachment.left_out[0].share == pytest.approx(64 / (64 + 64 + 8), rel=0.01)


def test_a_warning_that_is_an_error_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_lite.backend._warned", set())
    model = nn.Sequential(nn.Linear(8, 8)).double()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="reference instead"):
            ll.attach(model, L(r=2), backend="triton")
    assert_same(model, before)


# ---- weights that change under an adapter ----


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


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_dora_normalises_by_the_weight_that_is_there(change: str, compiled: bool) -> None:
    """Its norm takes ‖W‖² from before; here W is another afterwards."""
    if compiled and not change.startswith("load_state_dict"):
        pytest.skip("runs uncompiled: a graph can't ask whether a weight has been written to (docs/silent_failures.md)")
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


# ---- modes of PyTorch ----


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


@pytest.mark.parametrize("how", ["autograd.grad", "functional_call", "assign"])
def test_gradients_that_come_another_way_are_seen(how: str) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
    ll.attach(model, L(r=2, target_roles=()))
    if how == "assign":
        model.load_state_dict(model.state_dict(), assign=True)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(params.values(), 0.1)

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    if how == "autograd.grad":
        for p, g in zip(params.values(), torch.autograd.grad(model(x).sum(), list(params.values())), strict=True):
            p.grad = g
    elif how == "functional_call":
        grads = torch.func.grad(loss)({name: p.detach() for name, p in params.items()})
        for name, p in params.items():
            p.grad = grads[name]
    else:
        model(x).sum().backward()
    assert not warned(optimizer.step)


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


# ---- inputs that no adapter takes ----


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


# ---- steps and backwards that are not one of each ----


class Adversaries(nn.Module):
    """A generator and a discriminator, and in each a layer that nobody calls, if so wanted."""

    def __init__(self, idle: bool) -> None:
        super().__init__()
        self.gen, self.disc = (nn.ModuleDict({"fc": nn.Linear(8, 8), "out": nn.Linear(8, 8)}) for _ in range(2))
        for part in (self.gen, self.disc) if idle else ():
            part["spare"] = nn.Linear(8, 8)

    def forward(self, part: str, x: Tensor) -> Tensor:
        layers = getattr(self, part)
        return layers["out"](layers["fc"](x).relu())


def _generated(model: Adversaries, how: str, z: Tensor) -> Tensor:
    """What the discriminator learns from."""
    with torch.set_grad_enabled(how != "no_grad"):
        return model("gen", z).detach()


def _turns(model: Adversaries, how: str, rounds: int) -> None:
    """How people train such a pair."""
    own = {part: [p for p in getattr(model, part).parameters() if p.requires_grad] for part in ("gen", "disc")}
    gen, disc = (torch.optim.SGD(own[part], lr=1e-3) for part in ("gen", "disc"))
    z = torch.randn(4, 8)
    if how == "evaluated first":
        with torch.no_grad():
            model("disc", model("gen", z))
    if how in ("an empty step first", "evaluated first"):
        gen.step()
    for _ in range(rounds):
        if how == "frozen in turns":
            for p in own["disc"]:
                p.requires_grad_(False)
            model("disc", model("gen", z)).sum().backward()
            gen.step()
            for part in ("gen", "disc"):
                for p in own[part]:
                    p.requires_grad_(part == "disc")
            model("disc", _generated(model, how, z)).sum().backward()
            disc.step()
            for p in own["gen"]:
                p.requires_grad_(True)
        elif how == "two backwards before a step":
            model("gen", z).sum().backward()
            model("disc", z).sum().backward()
            gen.step()
            disc.step()
        elif how == "both step in each turn":
            for part in ("disc", "gen"):
                model(part, z).sum().backward()
                for each in (gen, disc):
                    each.step()
                    each.zero_grad()
        else:
            disc.zero_grad()
            model("disc", _generated(model, how, z)).sum().backward()
            disc.step()
            gen.zero_grad()
            model("disc", model("gen", z)).sum().backward()
            gen.step()


TURNS = (
    "no_grad", "detached", "frozen in turns", "two backwards before a step", "both step in each turn",
    "an empty step first", "evaluated first",
)  # fmt: skip


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("how", TURNS)
def test_a_generator_and_a_discriminator(how: str, idle: bool) -> None:
    """Each is judged by its own optimiser's step, and what is idle in it is said then."""
    model = Adversaries(idle)
    ll.attach(model, L(r=2, target_roles=(), target_names=("gen", "disc")))
    first = warned(lambda: _turns(model, how, 2))
    assert all(text.startswith("after the first step: these adapted layers never ran") for text in first)
    assert {name for name in ("gen", "disc") if any(f"{name}.spare" in text for text in first)} == (
        {"gen", "disc"} if idle else set()
    )
    assert not any(each in text for text in first for each in (".fc", ".out"))
    assert not warned(lambda: _turns(model, how, 25))


@pytest.mark.parametrize("way", ["trains", "a part under no_grad", "one is idle", "no adapter gets a gradient"])
def test_optimizers_that_step_within_the_backward(way: str) -> None:
    """One for each tensor, as PyTorch's recipe has it. Who gets no gradient then makes no step either."""
    model = Adversaries(idle=way == "one is idle")
    ll.attach(model, L(r=2, target_roles=(), target_names=("gen",)))
    head = model.disc["fc"].requires_grad_(way == "no adapter gets a gradient")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = {p: torch.optim.SGD([p], lr=1e-3) for p in trained}

    def hook(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        optimizers[p].zero_grad()  # type: ignore[index]

    for p in trained:
        p.register_post_accumulate_grad_hook(hook)
    z = torch.randn(4, 8)

    def backward() -> None:
        if way == "no adapter gets a gradient":
            return head(model("gen", z).detach()).sum().backward()
        with torch.set_grad_enabled(way != "a part under no_grad"):
            h = model.gen["fc"](z)
        return model.gen["out"](h).sum().backward()

    before = [p.detach().clone() for p in trained]
    said = [text for _ in range(25) for text in warned(backward)]
    assert all(p.grad is None for p in trained)
    if way == "trains":
        assert not said
        assert not any(torch.equal(p, old) for p, old in zip(trained, before, strict=True))
    else:
        (text,) = said
        idle = {"a part under no_grad": "gen.fc", "one is idle": "gen.spare", "no adapter gets a gradient": "gen.fc"}
        assert text.startswith("after 20 steps: ")
        assert idle[way] in text


def test_an_optimizer_that_never_gets_a_gradient() -> None:
    """What trains beside the adapters has another optimizer, or none."""
    model, x = Body(), torch.randn(3, 8)
    ll.attach(model, L(r=2, target_names=("body",)))
    model.head.requires_grad_(True)
    optimizer = torch.optim.SGD(ll.parameters(model), lr=1e-3)

    def train() -> None:
        model(x, "detached").sum().backward()
        optimizer.step()

    (text,) = [text for _ in range(25) for text in warned(train)]
    assert text.startswith("after 20 steps: these ran, but no gradient reached")
    assert "body.* ×2" in text


def test_an_optimizer_whose_steps_are_not_seen() -> None:
    """It exists, and steps in a way of its own or not at all: the backwards tell after a while."""
    model, x = Body(), torch.randn(3, 8)
    ll.attach(model, L(r=2))
    kept = torch.optim.SGD(ll.parameters(model), lr=1e-3)
    for _ in range(19):
        assert not warned(lambda: model(x, "skipped").sum().backward())
    with pytest.warns(UserWarning, match=r"after 20 backwards: these adapted layers never ran.*body\.\* ×2"):
        model(x, "skipped").sum().backward()
    del kept


def test_a_backward_that_fails_half_way() -> None:
    """The next one is looked at as the first."""
    model, x = Body(), torch.randn(3, 8)
    ll.attach(model, L(r=2))
    h = model.body(x)
    h.register_hook(lambda grad: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        model.head(h).sum().backward()
    for site in (model.body[0].lora_lite, model.body[1].lora_lite):
        site.ran = site.ran_with_grad = site.ran_in_training = False
    (text,) = warned(lambda: model(x, "skipped").sum().backward())
    assert text.startswith("after the first backward: these adapted layers never ran")


@pytest.mark.parametrize("how", ["around a compiled step", "alone", "not by Dynamo"])
def test_a_compiled_backward(how: str) -> None:
    """Compiled autograd traces hooks of parameters. The model trains as without, and the step tells who is idle."""
    from torch._dynamo.compiled_autograd import _enable

    def trained(compiled: bool) -> Tensor:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Adversaries(idle=True)
        ll.attach(model, L(r=2, target_roles=(), target_names=("gen",)))
        randomize(model, by=0.3)
        optimizer, x = torch.optim.SGD(ll.parameters(model), lr=1e-2), torch.randn(4, 8)

        def backward() -> None:
            model("gen", x).square().mean().backward()

        with contextlib.ExitStack() as stack:
            call: Callable[[], None] = backward
            if compiled and how == "around a compiled step":
                stack.enter_context(torch._dynamo.config.patch(compiled_autograd=True))
                call = torch.compile(backward, backend="eager")
            elif compiled:
                stack.enter_context(_enable(torch.compile(backend="eager") if how == "alone" else lambda graph: graph))
            (text,) = [*warned(call), *warned(optimizer.step)]
            assert text.startswith("after the first step: these adapted layers never ran")
            assert "gen.spare" in text
            for _ in range(3):
                optimizer.zero_grad()
                call()
                optimizer.step()
        return torch.cat([p.detach().flatten() for p in ll.parameters(model)])

    assert_close(trained(True), trained(False), 1e-6)


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


def test_an_optimizer_that_does_not_hold_the_adapters(tmp_path: Path) -> None:
    """It was made before them, or of those that they replaced."""

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 25) -> list[str]:
        def loop() -> None:
            for _ in range(steps):
                optimizer.zero_grad()
                model(torch.randn(4, 8)).square().sum().backward()
                optimizer.step()

        return warned(loop)

    def two() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    model = two()
    early = torch.optim.SGD(model.parameters(), lr=1e-3)
    ll.attach(model, L(r=2, target_roles=()))
    (text,) = train(model, early)
    assert "after 10 steps: these adapters get gradients, and no optimiser holds them" in text
    assert "* ×2" in text
    model = two().requires_grad_(False)
    ll.attach(model, L(r=2, target_roles=()))
    stale = torch.optim.SGD(ll.parameters(model), lr=1e-3)
    assert not train(model, stale)
    ll.save(model, tmp_path / "adapter.safetensors")
    ll.detach(model)
    ll.load(model, tmp_path / "adapter.safetensors")
    (text,) = train(model, stale)
    assert "no optimiser holds them" in text
    model = two().requires_grad_(False)
    attachment = ll.attach(model, L(r=2, target_roles=()))
    one = torch.optim.SGD(attachment.adapters["0"].parameters(), lr=1e-3)
    (text,) = train(model, one)
    assert "do not train: 1. Make" in text
    model = two().requires_grad_(False)
    attachment = ll.attach(model, L(r=2, target_roles=()))
    copies = [p.detach().clone().requires_grad_() for p in ll.parameters(model)]

    class OfCopies(torch.optim.SGD):
        """As those that train float32 copies of 16-bit tensors."""

        def step(self, closure: Any = None) -> Any:
            for copied, p in zip(copies, ll.parameters(model), strict=True):
                copied.grad = p.grad
            found = super().step(closure)
            for copied, p in zip(copies, ll.parameters(model), strict=True):
                p.data.copy_(copied.data)
            return found

    del early, stale, one
    assert not train(model, OfCopies(copies, lr=1e-3))


def _steps(model: nn.Module, lr: float = 1e-3, steps: int = 25) -> list[str]:
    kind = torch.optim.SGD if lr < 1e-3 else torch.optim.AdamW  # whose weight decay moves what gets no gradient
    optimizer = kind(ll.parameters(model), lr=lr)

    def loop() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 8, dtype=model[0].weight.dtype)).float().square().sum().backward()  # type: ignore
            optimizer.step()

    return warned(loop)


@pytest.mark.parametrize("variant", ["dora", "delora", "hra"])
def test_a_weight_of_zeros_gives_no_gradient(variant: str) -> None:
    """As of layers that start so, and have not been trained: these methods stay where they are."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    nn.init.zeros_(model[1].weight)  # type: ignore[arg-type]
    ll.attach(model, ll.REGISTRY[variant].config(r=2, target_roles=()))
    (text,) = _steps(model)
    assert "after 10 steps: the gradients of these adapters were zero" in text
    assert "do not train: *" in text  # and through it no gradient reaches the first
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    ll.attach(model, ll.REGISTRY[variant].config(r=2, target_roles=()))
    assert not _steps(model)


def test_steps_that_are_lost_in_rounding() -> None:
    def model(dtype: torch.dtype) -> nn.Module:
        bare = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(torch.bfloat16).requires_grad_(False)
        ll.attach(bare, ll.PiSSAConfig(r=2, alpha=2, target_roles=(), dtype=dtype))
        return bare

    (text,) = _steps(model(torch.bfloat16), lr=1e-7)
    assert "after 10 steps: the optimiser's steps have not changed these adapters: * ×2" in text
    assert "dtype=torch.float32" in text
    assert not _steps(model(torch.float32), lr=1e-5)
    assert not _steps(model(torch.bfloat16), lr=0.0)  # not to be trained yet


def test_unused_in_a_compiled_region() -> None:
    """A layer that shares x with others gets a gradient of zeros there, and not none."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) + self.k(x).detach()

    model = Reads().requires_grad_(False)
    ll.attach(model, L(r=2, target_names=("q", "k")))
    compiled, optimizer = torch.compile(model, backend="aot_eager"), torch.optim.SGD(ll.parameters(model), lr=1e-3)

    def loop() -> None:
        for _ in range(12):
            optimizer.zero_grad()
            compiled(torch.randn(4, 8, requires_grad=True)).square().sum().backward()
            optimizer.step()

    text = warned(loop)[-1]
    assert "after 10 steps: the gradients of these adapters were zero" in text
    assert "do not train: k." in text


def test_only_steps_with_gradients_of_its_own_count() -> None:
    """An expert that the first step visits, and no other for a while; and a layer that comes later, whose adapter no
    optimiser holds."""
    model = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)).requires_grad_(False)
    ll.attach(model, L(r=2, target_roles=()))
    attachment = ll.attachment.require_attachment(model)
    held = [p for name in ("0", "1") for p in attachment.adapters[name].parameters()]
    optimizer = torch.optim.SGD(held, lr=1e-3)

    def loop() -> None:
        for i in range(18):
            optimizer.zero_grad()
            model[2].zero_grad()
            which = (0, 1, 2) if i == 0 else (0, 2) if i > 3 else (0,)
            sum(model[each](torch.randn(4, 8)).square().sum() for each in which).backward()  # type: ignore[union-attr]
            optimizer.step()

    (text,) = warned(loop)
    assert "no optimiser holds them, so that they do not train: 2." in text


def test_not_trained_after_a_look_in_evaluation(tmp_path: Path) -> None:
    """A layer that ran before training alone: `save` says so, once chance has hardly left it out."""
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 8)}).eval()
    ll.attach(model, L(r=2, target_roles=()))
    with torch.no_grad():
        model["head"](model["body"](torch.randn(4, 8)))
    optimizer = torch.optim.SGD(ll.parameters(model), lr=1e-3)

    def loop() -> None:
        for _ in range(12):
            optimizer.zero_grad()
            model.train()["body"](torch.randn(4, 8)).square().sum().backward()  # type: ignore[index]
            optimizer.step()

    assert not warned(loop)
    (text,) = warned(lambda: ll.save(model, tmp_path / "adapter.safetensors"))
    assert text.startswith("save: these ran, but no gradient reached their adapters")
    assert ": head. " in text
