"""The runtime's and PEFT's tests once more, with every layer on the kernels.

Under TRITON_INTERPRET=1 `backend="auto"` takes the kernels on a CPU, so the tests need no change: torch.compile without
graph breaks, both kinds of checkpointing, autocast, no_grad and inference_mode, generation with a cache, conversion
after attach, copies and pickles, strided inputs, dropout, an adapter for each row of a batch, embeddings, and PEFT's
outputs and gradients for the same weights.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import launches
import pytest
import torch
from models import VARIANTS, assert_close, attach, calibration_batches, load_tests, randomize, token_ids
from torch import Tensor, nn

import lora_lite as ll

runtime, against_peft, several = load_tests("test_runtime"), load_tests("test_peft"), load_tests("test_several")
dropout, embeddings, own = load_tests("test_dropout"), load_tests("test_embeddings"), load_tests("test_own_methods")
strengths = load_tests("test_strengths")

test_compile = runtime.test_compile
test_compile_with_checkpointing = runtime.test_compile_with_checkpointing
test_checkpointing = runtime.test_checkpointing
test_checkpointing_of_a_transformer = runtime.test_checkpointing_of_a_transformer
test_autocast = runtime.test_autocast
test_inference = runtime.test_inference
test_generation_with_a_cache = runtime.test_generation_with_a_cache
test_model_converted_after_attach = runtime.test_model_converted_after_attach
test_low_precision_base = runtime.test_low_precision_base
test_copies_are_independent = runtime.test_copies_are_independent
test_any_leading_shape = runtime.test_any_leading_shape
test_strided_input = runtime.test_strided_input
test_disabled_is_the_base_model = runtime.test_disabled_is_the_base_model
test_same_weights_same_outputs_and_gradients = against_peft.test_same_weights_same_outputs_and_gradients

test_embeddings_against_peft = embeddings.test_pefts_outputs_and_gradients
test_embeddings_for_each_entry = embeddings.test_several_and_an_adapter_for_each_entry
test_embeddings_compiled = embeddings.test_compile

test_dropout_in_training_alone = dropout.test_in_training_alone
test_start_is_the_base_in_training_too = dropout.test_start_is_the_base_in_training_too
test_checkpointing_draws_the_same_mask = dropout.test_checkpointing_draws_the_same_mask
test_compile_draws_the_same_mask = dropout.test_compile_draws_the_same_mask
test_rows_of_a_batch = dropout.test_rows_of_a_batch

registered_here = own.registered_here
test_a_scale_for_each_expert = own.test_a_scale_for_each_expert
test_one_for_all_experts_is_expanded = own.test_one_for_all_experts_is_expanded


@pytest.mark.parametrize("variant", ["lora", "dora", "hra"])
def test_an_adapter_for_each_row(variant: str) -> None:
    several.test_an_adapter_for_each_row(variant)


test_strengths_compiled = strengths.test_compiled_checkpointed_and_copied


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_strengths_of_experts(variant: str) -> None:
    strengths.test_experts(variant)


@pytest.mark.parametrize("make", embeddings.MODELS.values(), ids=embeddings.MODELS)
def test_embeddings_verified(make: Any, tmp_path: Path) -> None:
    embeddings.test_saved_loaded_verified_diagnosed(make, "lora", tmp_path)


@pytest.fixture(autouse=True)
def _on_the_kernels(request: Any) -> Iterator[None]:
    """A test that fell back to the reference would prove nothing; float64 has no kernels, and no tokens need none."""
    with launches.counted() as launched:
        yield
    assert launched or "float64" in request.node.name or "(0, " in request.node.name, "no kernel ran"


def test_sums_that_act_together_launch_as_often_as_one() -> None:
    """Two adapters of rank 4 and 6 are one sum of rank 10, forward and backward."""
    x = torch.randn(7, 12)
    counts = []
    for ranks in ((10,), (4, 6)):
        layer = nn.Linear(12, 11)
        for i, r in enumerate(ranks):
            ll.attach(layer, ll.LoRAConfig(r=r, target_roles=()), name=f"a{i}", backend="triton")
        randomize(layer)
        with launches.counted() as launched:
            layer(x.clone().requires_grad_()).sum().backward()
        counts.append(sorted(launched))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mixture_of_experts(variant: str) -> None:
    """Every method on stacked experts: each call's output and gradients are the float32 reference's."""
    model: Any = load_tests("test_experts").MIXTURES["gpt_oss"]().bfloat16()
    attach(model, variant, calibration_batches(12), target_names=(r"layers\.1.*\.experts\.",))
    randomize(model)
    rows = ll.verify(model, {"input_ids": token_ids(), "labels": token_ids()})
    assert [row.backend for row in rows] == ["triton", "triton"]


class Attention(nn.Module):
    """Projections of one x."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.q_proj(x)) * self.k_proj(x) + self.v_proj(x)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_layers_that_share_x_compile(variant: str) -> None:
    """Without a graph break, and in one launch: also where a call before has chosen the backend."""
    torch._dynamo.reset()
    model = Attention()
    attach(model, variant, r=4, target_names=(), target_roles=())
    randomize(model, by=0.3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (5, 9):
        x = torch.randn(rows, 16, requires_grad=True)
        with launches.counted() as launched:
            got = torch.autograd.grad(compiled(x).square().sum(), [x, *ll.parameters(model)])
        want = torch.autograd.grad(model(x).square().sum(), [x, *ll.parameters(model)])
        for mine, theirs in zip(got, want, strict=True):
            assert_close(mine, theirs, 1e-5)
        assert launched.count("_shrink_kernel") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_that_trains_beside_dora(dtype: torch.dtype) -> None:
    load_tests("test_running_wrong").test_a_bias_that_trains_beside_dora(dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_verify_knows_rounding_in_float32(variant: str) -> None:
    """The order in which a kernel adds is another than PyTorch's; and a loss may leave RoAd no gradient."""
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
        batches = [torch.randn(30, 8)] if variant in ("eva", "antipasto") else None
        own = {"antipasto": {"block_size": 2}, "road": {"group_size": 4}}.get(variant, {})
        attach(model, variant, batches, r=2, target_names=(), target_roles=(), **own)
        randomize(model, by=0.3)
        assert {row.backend for row in ll.verify(model, torch.randn(6, 8))} == {"triton"}


def test_a_compiled_mixture() -> None:
    """Without a graph break, tables of runs included."""
    block = load_tests("test_experts").MIXTURES["qwen3_moe"]().model.layers[0].mlp
    ll.attach(block, ll.LoRAConfig(r=4, target_names=(r"experts\.",)))
    randomize(block)
    compiled = torch.compile(block, fullgraph=True)
    for length in (9, 5):
        x = torch.randn(2, length, 32, requires_grad=True)
        (mine,), (theirs,) = (torch.autograd.grad(each(x).square().sum(), x) for each in (compiled, block))
        assert_close(mine, theirs, 1e-5)


@pytest.mark.parametrize("variant", ["lora", "dora", "ia3", "road", "hra"])
@pytest.mark.parametrize("size", [12, 40])
def test_a_layer_that_was_resized_after_attach(variant: str, size: int) -> None:
    """No kernel reads or writes beside a tensor."""
    model: Any = nn.Sequential(nn.Linear(20, 20))
    attach(model, variant, target_names=("0",))
    model(torch.randn(5, 20))
    model[0].weight = nn.Parameter(torch.randn(size, size), requires_grad=False)
    model[0].bias = nn.Parameter(torch.randn(size), requires_grad=False)
    model[0].in_features = model[0].out_features = size
    with pytest.raises(ll.AttachError, match=r"^0: .*attach anew"):
        model(torch.randn(5, size))
