"""A mixture's stacked experts: every method on them, against dense weights expert by expert."""

import contextlib
import copy
import dataclasses
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import (
    VARIANTS,
    assert_close,
    assert_same,
    attach,
    calibration_batches,
    llama,
    load_tests,
    logits,
    randomize,
    rel_error,
    snapshot,
    start_tolerance,
    token_ids,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import GptOssConfig
from transformers.integrations.finegrained_fp8 import FP8Experts
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts
from zoo import SHARED, TEXT, ZOO, of

import lora_lite as ll
from lora_lite import in_place, reference, stacks
from lora_lite.calibration import InputPCA
from lora_lite.interchange.experts import flat
from lora_lite.segments import Segments
from lora_lite.stacks import Stack, grouped_linear

FORMULAS = load_tests("test_formulas").FORMULAS
ON_EXPERTS = r"\.experts\.(gate_up|up|down)_proj$"
MIXTURES: dict[str, Callable[[], nn.Module]] = {
    **{name: ZOO[name][0] for name in ("qwen3_moe", "mixtral", "deepseek_v3")},
    "olmoe": of("OlmoeForCausalLM", "OlmoeConfig", **TEXT, num_experts=4, num_experts_per_tok=2),
    "granitemoe": of("GraniteMoeForCausalLM", "GraniteMoeConfig", **TEXT, num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": of(
        "GptOssForCausalLM", "GptOssConfig", **TEXT, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "nemotron_h": of(
        "NemotronHForCausalLM", "NemotronHConfig", **TEXT, layers_block_type=["moe", "full_attention"],
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=20, moe_shared_expert_intermediate_size=24,
        head_dim=8,
    ),
}  # fmt: skip


def mixture(name: str = "qwen3_moe") -> Any:
    return MIXTURES[name]()


def adapted(model: Any, variant: str = "lora", **fields: Any) -> ll.Attachment:
    """The model with random adapters of rank 3 on its experts."""
    attachment = attach(model, variant, **{"target_names": (ON_EXPERTS,), "r": 4, **fields})
    randomize(model)
    return attachment


@pytest.mark.parametrize("of_rows", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_weights", [torch.float32, torch.bfloat16])
def test_rows_are_weighted_and_summed_as_near_as_one_by_one(of_rows: torch.dtype, of_weights: torch.dtype) -> None:
    """Some models' routers give weights of more precision than the rows have."""
    places = torch.randperm(60)
    inputs = torch.randn(60, 33).to(of_rows), torch.rand(20, 3).to(of_weights)

    def eager(hidden: Tensor, weights: Tensor) -> Tensor:
        return (hidden[places] * weights.view(60, 1)).view(20, 3, 33).sum(1)

    def ours(hidden: Tensor, weights: Tensor) -> Tensor:
        order = places.argsort()
        return stacks._weighted_sum(hidden, weights, places.view(20, 3), order, order // 3)

    def results(function: Callable[..., Tensor], dtype: torch.dtype | None) -> list[Tensor]:
        leaves = [t.to(dtype or t.dtype).requires_grad_() for t in inputs]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    exact, plain, mine = results(eager, torch.float64), results(eager, None), results(ours, None)
    for want, its, got in zip(exact, plain, mine, strict=True):
        assert (got.dtype, got.shape) == (its.dtype, its.shape)
        assert (got - want).norm() <= 1.1 * (its - want).norm() + 1e-7 * want.norm()


@pytest.mark.parametrize("name", MIXTURES)
def test_a_model_with_dense_weights_computes_the_same(name: str) -> None:
    """And so do all gradients: W + s·B A, by transformers' own eager implementation. In float64, but for a model that
    computes its norms in float32 whatever its dtype."""
    dtype, tolerance = (torch.float32, 1e-5) if name == "nemotron_h" else (torch.float64, 1e-9)
    model = mixture(name).to(dtype)
    base = copy.deepcopy(model)
    base.config._experts_implementation = "eager"
    attachment = adapted(model, dtype=dtype)
    batch = {"input_ids": token_ids(), "labels": token_ids()}
    out = model(**batch)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    got = torch.autograd.grad(out.loss, [model.get_parameter(n) for n in names])

    merged = {}
    for target in attachment.targets:
        stack: Any = target.layer
        p = attachment.adapters[target.name]
        delta = attachment.cfg.scale * p.lora_B @ p.lora_A
        weight = base.get_parameter(target.name)
        merged[target.name] = weight + (delta.mT if stack.experts.is_transposed else delta)
    want_out = functional_call(base, merged, kwargs=batch)
    want = torch.autograd.grad(want_out.loss, [model.get_parameter(n) for n in names])
    assert_close(out.logits, want_out.logits, tolerance)
    for n, mine, theirs in zip(names, got, want, strict=True):
        assert theirs.abs().max() > 0, n
        assert_close(mine, theirs, tolerance, n)


def stack_of(variant: str, of_model: torch.dtype, **fields: Any) -> tuple[Stack, Any, Segments]:
    """One adapted stack, the adapter, and segments in which an expert has no row and another has one."""
    model = mixture("gpt_oss").to(of_model)
    model.config._experts_implementation = "eager"  # the others know no float64
    attachment = adapted(model, variant, target_names=("layers.1.*\\.down_proj$",), **fields)
    target = attachment.targets[0]
    return target.layer, attachment.adapters[target.name], Segments(torch.tensor([5, 5, 6, 13], dtype=torch.int32))


@pytest.mark.parametrize(
    ("variant", "fields"),
    [*((v, {}) for v in VARIANTS), ("antipasto", {"rotate_basis": "U", "block_size": 2})],
    ids=str,
)
def test_each_expert_has_the_method_s_own_formula(variant: str, fields: dict[str, Any]) -> None:
    stack, adapter, segments = stack_of(variant, torch.float64, dtype=torch.float64, alpha=6.0, **fields)
    x = torch.randn(13, stack.in_features, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(13, stack.out_features, dtype=torch.float64)
    leaves = [x, *(p for p in adapter.parameters() if p.requires_grad)]
    y = stack(x, segments=segments)
    got = torch.autograd.grad(y, leaves, dy)
    parts, start = [], 0
    for i, end in enumerate(segments.ends.tolist()):
        parts.append(FORMULAS[variant](stack.expert(i), adapter.of(i), x[start:end], adapter.cfg))
        start = end
    want = torch.cat(parts)
    assert_close(y, want, 1e-9)
    for mine, theirs in zip(got, torch.autograd.grad(want, leaves, dy), strict=True):
        assert theirs.abs().max() > 0
        assert_close(mine, theirs, 1e-9)


# A dtype, and those that the CPU has no instructions for products in: blocks of rows serve 16 bits, runs all others.
ON_A_CPU = {
    "fp32": (torch.float32, frozenset()),
    "bf16": (torch.bfloat16, frozenset()),
    "bf16 by float32": (torch.bfloat16, frozenset({torch.bfloat16})),
}


@pytest.mark.parametrize("variant", ["lora", "dora", "delora", "ia3", "hra", "road"])
@pytest.mark.parametrize(("dtype", "without"), ON_A_CPU.values(), ids=ON_A_CPU)
def test_in_low_precision_as_near_as_the_dense_formula(
    variant: str, dtype: torch.dtype, without: frozenset[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The formula expert by expert in the tokens' dtype is the measure, both against float64."""
    monkeypatch.setattr(reference, "WITHOUT_PRODUCTS", without)
    monkeypatch.setattr(reference, "_WORTH_16_BITS", 0)
    stack, adapter, segments = stack_of(variant, dtype, alpha=6.0)
    x, dy = torch.randn(13, stack.in_features).to(dtype), torch.randn(13, stack.out_features).to(dtype)

    def dense(to: torch.dtype) -> list[Tensor]:
        wide, start, parts = x.to(to).requires_grad_(), 0, []
        for i, end in enumerate(segments.ends.tolist()):
            parts.append(FORMULAS[variant](stack.expert(i).to(to), As(adapter.of(i), to), wide[start:end], adapter.cfg))
            start = end
        y = torch.cat(parts)
        return [y, *torch.autograd.grad(y, [wide, *(p for p in adapter.parameters() if p.requires_grad)], dy.to(to))]

    leaf = x.clone().requires_grad_()
    y = stack(leaf, segments=segments)
    got = [y, *torch.autograd.grad(y, [leaf, *(p for p in adapter.parameters() if p.requires_grad)], dy)]
    for mine, plain, exact in zip(got, dense(dtype), dense(torch.float64), strict=True):
        error, eager = rel_error(mine, exact), rel_error(plain, exact)
        assert error <= max(1.5 * eager, 1e-5 if dtype == torch.float32 else 0), f"{error:.1e} against {eager:.1e}"


@pytest.mark.parametrize(("dtype", "without"), ON_A_CPU.values(), ids=ON_A_CPU)
def test_a_sum_goes_into_the_stack_s_own_output(
    dtype: torch.dtype, without: frozenset[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the products are of its dtype, and nobody else needs it: a hook finds the base's."""
    monkeypatch.setattr(reference, "WITHOUT_PRODUCTS", without)
    monkeypatch.setattr(reference, "_WORTH_16_BITS", 0)
    stack, _, segments = stack_of("lora", dtype)
    x, add, places = torch.randn(13, stack.in_features).to(dtype).requires_grad_(), in_place.expand_add, []

    def noted(y: Tensor, *args: Any) -> Tensor:
        places.append(y.data_ptr())
        return add(y, *args)

    monkeypatch.setattr(in_place, "expand_add", noted)
    y = stack(x, segments=segments)
    assert (y.data_ptr() == places[0]) == (dtype not in without)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    with torch.inference_mode():
        assert torch.equal(stack(x, segments=segments), y)
    places.clear()

    kept: list[Tensor] = []
    stack.register_forward_hook(lambda module, args, y: kept.append(y), prepend=True)
    assert torch.equal(stack(x, segments=segments), y)
    assert not places
    assert torch.equal(kept[0], grouped_linear(x, stack.weight, stack.bias, segments))
    assert torch.equal(torch.autograd.grad(stack(x, segments=segments).square().sum(), x)[0], dx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_without_values(dtype: torch.dtype) -> None:
    """In FakeTensorMode, for shapes and memory: nobody knows where the runs end."""
    stack, _, segments = stack_of("lora", dtype)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.randn(13, stack.in_features).to(dtype)).requires_grad_()
        y = stack(x, segments=Segments(mode.from_tensor(segments.ends)))
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert (y.shape, dx.shape) == ((13, stack.out_features), x.shape)


class As:
    """An adapter's tensors in another dtype."""

    def __init__(self, p: Any, dtype: torch.dtype) -> None:
        self.p, self.dtype = p, dtype

    def __getattr__(self, name: str) -> Tensor:
        return getattr(self.p, name).to(self.dtype)


# ---- in a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_the_start_is_the_base_and_detach_restores_it(name: str, variant: str) -> None:
    model = mixture(name)
    before, want = snapshot(model), logits(model)
    implementation = model.config._experts_implementation
    batches = calibration_batches(12)
    attachment = attach(model, variant, batches, target_names=(ON_EXPERTS,), r=4)
    assert {target.role for target in attachment.targets} == {"expert"}
    assert_close(logits(model), want, start_tolerance(variant, 1e-5))
    assert variant != "lora" or torch.equal(logits(model), want), "rounded as the base rounds"
    randomize(model)
    assert rel_error(logits(model), want) > 1e-3
    assert model.config._experts_implementation == implementation, "the config that a model is saved with"
    ll.verify(model, {"input_ids": token_ids(), "labels": token_ids()})
    ll.detach(model)
    assert_same(model, before)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("name", MIXTURES)
def test_cached_generation_is_uncached_generation(name: str) -> None:
    """`generate` swaps the implementation that the config names; ours stays."""
    model = mixture(name)
    adapted(model)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ids = token_ids(2, 5)
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    stack = next(m for m in model.modules() if isinstance(m, Stack))
    assert stack.experts.config._experts_implementation == "lora_lite"


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_copies_and_merged_weights(variant: str, tmp_path: Path) -> None:
    """On experts with a transposed weight and a bias, and attention beside them."""
    model = mixture("gpt_oss")
    attach(model, variant, calibration_batches(12), target_names=(ON_EXPERTS, "q_proj$"), r=4)
    randomize(model)
    want = logits(model)
    ll.save(model, tmp_path / "adapter.safetensors")
    twin = copy.deepcopy(model)
    ll.detach(model)
    assert torch.equal(logits(twin), want), "a copy runs its own"
    ll.load(model, tmp_path / "adapter.safetensors")
    assert torch.equal(logits(model), want)
    merged = ll.merged_state_dict(model)
    ll.detach(model)
    assert merged.keys() == model.state_dict().keys()
    model.load_state_dict(merged)
    assert_close(logits(model), want, 1e-5)


def test_save_merged_writes_a_plain_mixture(tmp_path: Path) -> None:
    model = mixture()
    adapted(model)
    want = logits(model)
    ll.save_merged(model, tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    assert_close(logits(plain), want, 1e-5)
    assert plain.config._experts_implementation != "lora_lite"


def test_checkpointing() -> None:
    model = mixture()
    adapted(model)
    batch = {"input_ids": token_ids(), "labels": token_ids()}
    names = [n for n, p in model.named_parameters() if p.requires_grad]

    def grads(run: Callable[..., Any]) -> list[Tensor]:
        return list(torch.autograd.grad(run(**batch).loss, [model.get_parameter(n) for n in names]))

    want = grads(model.train())
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        for p in model.parameters():
            p.grad = None
        model(**batch).loss.backward()
        for name, theirs in zip(names, want, strict=True):
            assert_close(model.get_parameter(name).grad, theirs, 1e-5, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_checkpointing(dtype: torch.dtype) -> None:
    """Of all products, and nothing else: none of them is written to later."""
    adapted(model := mixture())
    model.to(dtype)

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if "mm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    def loss(x: Tensor) -> Tensor:
        return model(inputs_embeds=x, labels=token_ids()).loss

    x = torch.randn(2, 17, 32, dtype=dtype, requires_grad=True)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    want = torch.autograd.grad(loss(x), [x, *ll.parameters(model)])
    got = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False, context_fn=contexts), [x, *ll.parameters(model)])
    for mine, its in zip(got, want, strict=True):
        assert_close(mine, its, 1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("by_entry", [False, True])
def test_compile(by_entry: bool) -> None:
    adapted(model := mixture(), target_names=(ON_EXPERTS, "o_proj"))
    block = model.model.layers[0].mlp
    ll.use(model, ["default", None] if by_entry else "default")
    compiled = torch.compile(block, fullgraph=True)
    for length in (17, 9, 12):
        x = torch.randn(2, length, 32, requires_grad=True)
        (mine,), (theirs,) = (torch.autograd.grad(each(x).square().sum(), x) for each in (compiled, block))
        assert_close(mine, theirs, 1e-5)


def test_accounts_of_a_mixture() -> None:
    """Experts are not in the default roles, and the summary says how large a part they are."""
    model = mixture()
    default = ll.attach(model, ll.LoRAConfig(r=4))
    assert {t.role for t in default.targets} == {"reader", "writer"}
    said = [each for each in default.left_out if "expert" in each.why]
    assert [each.count for each in said] == [2, 2]
    sizes = [p.numel() for name, p in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]
    assert sum(each.share for each in said) == pytest.approx(sum(sizes) / default.beside.size)
    assert "target_roles or target_names must name" in default.summary()
    ll.detach(model)

    attachment = ll.attach(model, ll.LoRAConfig(r=4, target_roles=("reader", "expert"), rank_pattern={"down_proj": 2}))
    assert not [each for each in attachment.left_out if "expert" in each.why]
    assert "32 → 40, 4 experts" in attachment.summary()
    randomize(model)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    rows = {row.layer: row for row in ll.diagnose(model).rows}
    for target in attachment.targets:
        if target.role == "expert":
            p, stack = attachment.adapters[target.name], target.layer
            delta = attachment.cfg.for_layer(target.name).scale * p.lora_B @ p.lora_A
            assert p.lora_A.shape[1] == (2 if "down_proj" in target.name else 4)
            size = stack.weight.norm()
            assert rows[target.name].relative_change == pytest.approx((delta.norm() / size).item(), rel=1e-4)
            assert 1 < rows[target.name].effective_rank < p.lora_A.shape[1]
            assert not rows[target.name].dead


def test_r_divided_among_experts(tmp_path: Path) -> None:
    """As many ranks for a token as in a dense layer; the file loads without knowing of it."""
    model = mixture()
    cfg = ll.LoRAConfig(
        r=8, target_names=("q_proj$", ON_EXPERTS), divide_r_among_experts=True, rank_pattern={"0.*n_p": 3}
    )
    attachment = ll.attach(model, cfg)
    ranks = {name.partition("layers.")[2]: a.cfg.r for name, a in attachment.adapters.items()}
    assert ranks == {
        "0.self_attn.q_proj": 8, "0.mlp.experts.gate_up_proj": 4, "0.mlp.experts.down_proj": 3,
        "1.self_attn.q_proj": 8, "1.mlp.experts.gate_up_proj": 4, "1.mlp.experts.down_proj": 4,
    }  # fmt: skip
    whole_name = {r"^model\.layers\.0\.mlp\.experts\.down_proj$": 3}
    own = ll.attach(mixture(), dataclasses.replace(cfg, rank_pattern=whole_name))
    assert {name.partition("layers.")[2]: a.cfg.r for name, a in own.adapters.items()} == ranks
    ll.save(model, tmp_path / "a.safetensors")
    ll.detach(model)
    assert {a.cfg.r for a in ll.load(model, tmp_path / "a.safetensors").adapters.values()} == {8, 4, 3}
    with pytest.raises(ll.AttachError, match="no stack of experts is adapted"):
        ll.attach(mixture(), ll.LoRAConfig(divide_r_among_experts=True))


def test_refusals_name_the_experts() -> None:
    model = mixture()
    untouched = snapshot(model)
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(
        ll.AttachError, match=r"layers.1.mlp.experts.gate_up_proj .*Qwen3MoeExperts .*expert parallelism"
    ):
        ll.attach(model, ll.LoRAConfig(target_names=(ON_EXPERTS,)))
    model.model.layers[1].mlp.experts._is_expert_parallel = False
    own = type(model.model.layers[0].mlp.experts)
    kinds: list[tuple[Callable[[Any], nn.Module], str]] = [
        (lambda config: own(config).to(torch.float8_e4m3fn), r"0.mlp.experts.gate_up_proj .* are quantised .*float8"),
        (lambda config: own(config).to("meta"), r"0.mlp.experts.gate_up_proj .* offloaded or hold no values"),
        (lambda config: FP8Experts(config, block_size=(16, 16)), "stacked experts that FP8Experts runs"),
        (lambda config: Mxfp4GptOssExperts(GptOssConfig(num_local_experts=2)), "stacked experts that Mxfp4GptOssExp"),
    ]
    for make, said in kinds:
        other = mixture()
        other.model.layers[0].mlp.experts = make(other.config)
        with pytest.raises(ll.AttachError, match=said):
            ll.attach(other, ll.LoRAConfig(target_names=(r"layers.0.*\.experts\.",)))
        other.model.layers[1].mlp.experts = make(other.config)
        with pytest.raises(ll.AttachError, match=said):
            ll.attach(other, ll.LoRAConfig(target_roles=("reader", "expert")))
    with pytest.raises(
        ll.CalibrationError, match=r"gave \d tokens to its expert \d \(\d of 4 experts lack some\), and .* 5 are"
    ):
        attach(model, "eva", [{"input_ids": token_ids(1, 8)}], target_names=(ON_EXPERTS,))
    assert_same(model, untouched)
    adapted(model)
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(ll.AttachError, match="expert parallelism was switched on after attach"):
        logits(model)


def test_a_transformers_that_knows_no_expert_parallelism() -> None:
    """5.17 has the experts and not the attribute."""
    model = mixture()
    adapted(model)
    want = logits(model)
    for layer in model.model.layers:
        vars(layer.mlp.experts).pop("_is_expert_parallel", None)
    assert torch.equal(logits(model), want)


def test_eva_learns_from_the_rows_that_an_expert_got() -> None:
    """Its directions are those of the routed rows, padding left out."""
    model = mixture()
    batches = [{"input_ids": ids, "attention_mask": (torch.rand(ids.shape) > 0.3).long()} for ids in
               (token_ids(4, 40, seed=s) for s in range(3))]  # fmt: skip
    seen: list[list[Tensor]] = [[] for _ in range(4)]

    def keep(module: Any, args: Any) -> None:
        hidden, index, _ = args
        for i, each in enumerate(seen):
            each.append(hidden[(index == i).any(-1) & mask.flatten().bool()])

    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(keep)
    for batch in batches:
        mask = batch["attention_mask"]
        logits_of = model(**batch)
        del logits_of
    handle.remove()
    attachment = attach(model, "eva", batches, target_names=("layers.0.*gate_up_proj$",), center=False)
    A = next(iter(attachment.adapters.values())).lora_A
    for mine, rows in zip(A, seen, strict=True):
        pca = InputPCA(4, center=False)
        for batch_rows in rows:
            pca.update(batch_rows)
        wanted = pca.components()
        assert_close(mine.mT @ mine, wanted.mT @ wanted, 1e-4)


def test_a_primitive_that_knows_no_segments() -> None:
    """It runs on each expert's rows with that expert's tensors; rows of none pass."""

    @dataclass
    class Shift(ll.Primitive):
        b: Tensor

        def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
            return 2 * x, len(x)

        def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
            assert carry == len(y)
            return y + self.b

    segments = Segments(torch.tensor([2, 2, 5], dtype=torch.int32), torch.tensor([1, 0, -1]))
    b, x, y = torch.randn(2, 3), torch.randn(6, 4), torch.randn(6, 3)
    primitive = Shift(b).on(segments)
    got, carry = primitive.on_input(x, None)
    assert torch.equal(got, torch.cat([2 * x[:2], x[2:]]))
    assert torch.equal(primitive.on_output(y, carry, None), torch.cat([y[:2] + b[1], y[2:]]))
    of_none = Shift(b).on(Segments(torch.zeros(2, dtype=torch.int32), whole=True))
    got, carry = of_none.on_input(x[:0], None)
    assert got.shape == (0, 4)
    assert of_none.on_output(y[:0], carry, None).shape == (0, 3)


# ---- PEFT ------------------------------------------------------------------------------------------------------------


def of_peft(name: str, stacks: tuple[str, ...]) -> Any:
    """PEFT's LoRA on the same parameters, with random tensors."""
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=[f"experts.{each}" for each in stacks],
        rank_pattern={r"layers\.1\.mlp\.experts\.down_proj": 2},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(mixture(name), config).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("stacks", [("gate_up_proj", "down_proj"), ("gate_up_proj",)], ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_peft_s_files_both_ways(name: str, stacks: tuple[str, ...], tmp_path: Path) -> None:
    """What PEFT saves we compute, gradients included, and it what we save; attention beside the experts in one file."""
    theirs = of_peft(name, stacks)
    want = logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = mixture(name)
    attachment: Any = ll.import_peft(model, tmp_path / "theirs")
    assert {t.name.rpartition(".")[2] for t in attachment.targets} == {"q_proj", *stacks}
    assert_close(logits(model), want, 1e-5)

    batch = {"input_ids": token_ids(), "labels": token_ids()}
    grads = []
    for each in (model, theirs):
        for p in each.parameters():
            p.grad = None
        each(**batch).loss.backward()
    inner = f"model.layers.0.mlp.experts{'.base_layer' * (len(stacks) - 1)}"
    its = theirs.base_model.model.get_submodule(inner)
    mine = attachment.adapters["model.layers.0.mlp.experts.gate_up_proj"]
    grads = flat(mine.lora_A.grad, mine.lora_B.grad)
    assert_close(grads[0], its.lora_A.default.weight.grad, 1e-4)
    assert_close(grads[1], its.lora_B.default.weight.grad, 1e-4)

    randomize(model, seed=1)
    want = logits(model)
    ll.export_peft(model, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(logits(peft.PeftModel.from_pretrained(mixture(name), tmp_path / "ours")), want, 1e-5)
    ll.detach(model)
    ll.import_peft(model, tmp_path / "ours")
    assert_close(logits(model), want, 1e-6)


def by_peft(base: Any, folder: Path) -> Any:
    """The base with the adapter in a folder. PEFT warns of experts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, folder)


# Models in which PEFT takes the names of dense and shared feed-forwards for those of experts.
CONVERTED = {
    "deepseek_v3": MIXTURES["deepseek_v3"],
    "glm4_moe": of(
        "Glm4MoeForCausalLM", "Glm4MoeConfig", **TEXT, head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=20, n_group=1, topk_group=1, first_k_dense_replace=1,
    ),
    "qwen3_next": of(
        "Qwen3NextForCausalLM", "Qwen3NextConfig", **SHARED, layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("name", CONVERTED)
def test_feed_forwards_that_peft_takes_for_experts(name: str, experts: bool, tmp_path: Path) -> None:
    """By their weights PEFT takes them for what they are, with ranks and alphas of their own, and so do we; for
    servers, which read names of layers, they stay layers."""
    roles = {"target_roles": ("reader", "writer", *(["expert"] if experts else []))}
    patterns = {"rank_pattern": {r"mlp.*up_proj$": 2}, "alpha_pattern": {r"(mlp|shared_experts?)\.down_proj$": 40.0}}
    model: Any = CONVERTED[name]()
    attachment = attach(model, "lora", dropout=0.1, **roles, **patterns)
    feed_forwards = [t.name for t in attachment.targets if "mlp" in t.name and t.role != "expert"]
    assert len(feed_forwards) >= 6
    randomize(model)
    want = logits(model)
    with pytest.warns(UserWarning, match=r"PEFT has no dropout in a file with target_parameters .*: the file says 0"):
        ll.export_peft(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["lora_dropout"] == 0
    assert {f"{layer}.weight" for layer in feed_forwards} <= set(written["target_parameters"])
    theirs = by_peft(CONVERTED[name](), tmp_path)
    assert_close(logits(theirs), want, 1e-5)
    ll.detach(model)
    again: Any = ll.import_peft(model, tmp_path)
    assert again.adapters.keys() == attachment.adapters.keys()
    assert_close(logits(model), want, 1e-6)

    ll.export_peft(model, tmp_path / "vllm", for_="vllm")
    written = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())
    assert set(feed_forwards) <= set(written["target_modules"])
    assert ("target_parameters" in written) == experts


def test_what_peft_would_take_for_experts_is_no_dora(tmp_path: Path) -> None:
    model = CONVERTED["glm4_moe"]()
    attach(model, "dora")
    with pytest.raises(
        ll.AttachError, match=r"layers\.0\.mlp\.gate_proj: PEFT would take it for experts.*exclude_names"
    ):
        ll.export_peft(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    ll.detach(model)
    attach(model, "dora", exclude_names=("mlp",))
    randomize(model)
    ll.export_peft(model, tmp_path / "b")
    theirs = by_peft(CONVERTED["glm4_moe"](), tmp_path / "b")
    assert_close(logits(theirs), logits(model), 1e-5)


def test_what_transformers_renames_for_peft(tmp_path: Path) -> None:
    """Laguna's `mlp.shared_expert.` has a dot that matches any letter, so the last of its own `mlp.shared_experts`."""
    make = of(
        "LagunaForCausalLM", "LagunaConfig", **SHARED, mlp_layer_types=["dense", "sparse"],
        layer_types=["full_attention", "full_attention"],
    )  # fmt: skip
    model = make()
    attach(model, "lora")
    with pytest.raises(
        ll.AttachError, match=r"1\.mlp\.shared_experts\.gate_proj: .* PEFT would look for .*exclude_names"
    ):
        ll.export_peft(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    ll.detach(model)
    attach(model, "lora", exclude_names=("shared_experts", "lm_head"))
    randomize(model)
    ll.export_peft(model, tmp_path / "b")
    theirs = by_peft(make(), tmp_path / "b")
    assert_close(logits(theirs), logits(model), 1e-5)


def test_a_module_that_has_a_mixture_s_config(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = mixture()
            self.config = self.model.config

    wrapper = Wrapper()
    attach(wrapper, "lora", target_names=("q_proj",))
    ll.export_peft(wrapper, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"][0].startswith("model.model.")


def test_patterns_of_weights_that_peft_was_told(tmp_path: Path) -> None:
    """A linear layer among the `target_parameters`, whose patterns must name the weight."""
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=r".*\.q_proj", target_parameters=["o_proj.weight"], lora_dropout=0.0,
        rank_pattern={r"layers\.1\.self_attn\.o_proj\.weight": 2}, alpha_pattern={"o_proj": 50, "q_proj": 7},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(llama(), config).eval()  # type: ignore[arg-type]
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    model = llama()
    attachment: Any = ll.import_peft(model, tmp_path)
    assert {name.rpartition(".")[2] for name in attachment.adapters} == {"q_proj", "o_proj"}
    assert_close(logits(model), logits(theirs), 1e-5)


def test_what_peft_has_not_on_experts(tmp_path: Path) -> None:
    model = mixture()
    adapted(model, "dora")
    with pytest.raises(ll.AttachError, match="PEFT has no dora on stacked experts"):
        ll.export_peft(model, tmp_path / "a")
    ll.detach(model)
    adapted(model, target_names=(r"experts\.gate_up_proj$",))
    with pytest.raises(ll.AttachError, match=r"experts.gate_up_proj: vLLM takes stacked experts with their down_proj"):
        ll.export_peft(model, tmp_path / "a", for_="vllm")
    with pytest.raises(ll.AttachError, match=r"gate_up_proj: llama\.cpp's converter knows no adapter of stacked"):
        ll.export_peft(model, tmp_path / "a", for_="llama.cpp")
    assert not (tmp_path / "a").exists()
    of_peft("qwen3_moe", ("down_proj",)).save_pretrained(tmp_path / "b")
    with pytest.raises(ll.CheckpointError, match=r"no stacked experts experts.down_proj \(target_parameters\)"):
        ll.import_peft(llama(), tmp_path / "b")


def test_experts_are_in_no_default() -> None:
    """Whatever names a method looks for by itself."""
    model = mixture()
    for kind in ll.REGISTRY.values():
        with contextlib.suppress(ll.AttachError, ll.CalibrationError):
            attached = ll.attach(model, kind.config(), name=kind.name)
            assert not any(target.role == "expert" for target in attached.targets), kind.name
    ll.attach(model, ll.IA3FFConfig(target_roles=("expert",)), name="asked for")
    with pytest.raises(ll.AttachError, match=r"no layer matches .*down_proj"):
        ll.attach(mixture(), ll.IA3FFConfig())
