"""dropout: zeroes inputs of the low-rank sum in training, and nothing else, as PEFT's does."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import (
    MATRIX_VARIANTS,
    VARIANTS,
    assert_close,
    attach,
    calibration_batches,
    config,
    llama,
    load_tests,
    randomize,
    start_tolerance,
    token_ids,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_lite as ll

against_peft = load_tests("test_peft")
WITH = [variant for variant in MATRIX_VARIANTS if variant != "hra"]
SMALL: dict[str, Any] = {"target_roles": (), "dropout": 0.4}


def fields(variant: str) -> dict[str, Any]:
    return {**SMALL, **({"block_size": 2} if variant == "antipasto" else {})}


def trained(variant: str, **changed: Any) -> Any:
    layer = nn.Sequential(nn.Linear(24, 20))
    attach(layer, variant, [torch.randn(64, 24)], **{**fields(variant), **changed})
    randomize(layer, by=0.3)
    return layer.train()


@pytest.mark.parametrize("variant", WITH)
def test_in_training_alone(variant: str) -> None:
    layer, x = trained(variant), torch.randn(50, 24)
    plain = copy.deepcopy(layer)
    assert not torch.equal(layer(x), layer(x))
    for module in plain.modules():  # as trainers switch it off: TRL's disable_dropout
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.equal(layer.eval()(x), plain(x))
    for module in layer.modules():  # and users on, to sample
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(layer(x), layer(x))
    ll.verify(layer, (x,))
    assert not torch.equal(layer(x), layer(x))
    layer.train()
    attachment = ll.attachment.require_attachment(layer)
    with ll.disabled(layer.train()):
        assert torch.equal(layer(x), layer(x))
    assert attachment.cfg.dropout == 0.4


@pytest.mark.parametrize("variant", WITH)
def test_start_is_the_base_in_training_too(variant: str) -> None:
    layer, x = nn.Sequential(nn.Linear(24, 20)).train(), torch.randn(50, 24)
    base = layer(x)
    attach(layer, variant, [torch.randn(64, 24)], **fields(variant))
    assert_close(layer(x), base, start_tolerance(variant, 1e-5))


@pytest.mark.parametrize("variant", WITH)
def test_mean_is_the_output_without(variant: str) -> None:
    """Survivors are scaled up. The mean of n draws is within five standard errors, all of them alike."""
    layer, x = trained(variant), torch.randn(8, 24)
    want, draws = layer.eval()(x), []
    layer.train()
    with torch.no_grad():
        draws = torch.stack([layer(x) for _ in range(2000)])
    off = (draws.mean(0) - want).abs() / (draws.std(0) / 2000**0.5).clamp_min(1e-6)
    assert off.max() < 5
    assert (draws.std(0) > 0).all()


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in WITH])
def test_methods_without_a_low_rank_sum_refuse(variant: str) -> None:
    with pytest.raises(ll.ConfigError, match=rf"dropout must be 0: {variant} adds no low-rank sum"):
        ll.REGISTRY[variant].config(dropout=0.1)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1, float("nan"), "half", None])
def test_what_is_no_probability_is_refused(dropout: Any) -> None:
    with pytest.raises(ll.ConfigError, match=r"LoRAConfig\.dropout must be a (probability|number)"):
        ll.LoRAConfig(dropout=dropout)


@pytest.mark.parametrize("variant", ["lora", "delora"])
def test_as_peft(variant: str) -> None:
    """The same weights, the same state of the generator: the same masks, outputs and gradients. PEFT's DoRA drops its
    base's inputs too, and has no such oracle."""
    ours, theirs = llama(), llama()
    attachment = attach(ours, variant, dropout=0.3)
    randomize(ours, by=0.2)
    names, shared = list(attachment.adapters), {"r": attachment.cfg.r, "target_modules": list(attachment.adapters)}
    if variant == "lora":
        its: Any = peft.LoraConfig(lora_alpha=attachment.cfg.alpha, lora_dropout=0.3, **shared)
    else:
        its = peft.DeloraConfig(module_dropout=0.3, **shared)
    theirs = peft.get_peft_model(theirs, its)
    modules = {name: theirs.base_model.model.get_submodule(name) for name in names}
    for name, adapter in attachment.adapters.items():
        if variant == "lora":
            pairs = ((modules[name].lora_A.default.weight, "A"), (modules[name].lora_B.default.weight, "B"))
        else:
            module = modules[name]
            pairs = ((module.delora_A.default, "A"), (module.delora_B.default, "B"))
            module.delora_lambda.default.data.copy_(adapter.lora_lambda)
        for tensor, key in pairs:
            tensor.data.copy_(getattr(adapter, f"lora_{key}"))
    got, want = [], []
    for model, found in ((ours, got), (theirs, want)):
        model.train()
        torch.manual_seed(5)
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        found.append(loss.detach())
    assert_close(got[0], want[0], 1e-6, "loss")
    for name, adapter in attachment.adapters.items():
        kind = modules[name].lora_B.default.weight if variant == "lora" else modules[name].delora_B.default
        assert_close(adapter.lora_B.grad, kind.grad, 1e-4, name)  # type: ignore[arg-type]
    assert_close(ours.eval()(token_ids()).logits, theirs.eval()(token_ids()).logits, 1e-5)


def step(run: Any, layer: Any, x: Tensor) -> list[Tensor]:
    torch.manual_seed(11)
    x = x.clone().requires_grad_()
    y = run(x)
    return [y, *torch.autograd.grad(y.square().mean(), [x, *ll.parameters(layer)])]


@pytest.mark.parametrize("variant", WITH)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_mask(variant: str, use_reentrant: bool) -> None:
    layer, x = trained(variant), torch.randn(50, 24)
    again = step(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant), layer, x) if not use_reentrant else None
    want = step(layer, layer, x)
    if use_reentrant:  # it has no torch.autograd.grad
        torch.manual_seed(11)
        leaf = x.clone().requires_grad_()
        y: Any = checkpoint(layer, leaf, use_reentrant=True)
        y.square().mean().backward()
        again = [y, leaf.grad, *(p.grad for p in ll.parameters(layer))]
    assert again is not None
    for a, b in zip(again, want, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("variant", WITH)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile_draws_the_same_mask(variant: str, compiler: str) -> None:
    layer, x = trained(variant), torch.randn(50, 24)
    want = step(layer, layer, x)
    torch._dynamo.reset()
    got = step(torch.compile(layer, fullgraph=True, backend=compiler), layer, x)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-4)


def test_inductor_drops_and_learns() -> None:
    """Its generator is its own, so the masks differ; their rate and the mean of outputs don't."""
    layer, x = trained("lora"), torch.randn(400, 24)
    compiled = torch.compile(layer, fullgraph=True)
    want = layer.eval()(x)
    layer.train()
    draws = torch.stack([compiled(x).detach() for _ in range(200)])
    assert (draws.std(0) > 0).all()
    off = (draws.mean(0) - want).abs() / (draws.std(0) / 200**0.5)
    assert off.mean() < 1
    assert off.max() < 7
    y = compiled(x)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in ll.parameters(layer))


@pytest.mark.parametrize("variant", WITH)
def test_rows_of_a_batch(variant: str) -> None:
    """An adapter for each row drops as well; the row without one is the base's."""
    layer = nn.Sequential(nn.Linear(24, 20))
    base, x = layer(torch.ones(3, 5, 24)), torch.ones(3, 5, 24)
    for i, name in enumerate(("a", "b")):
        kind = config(variant, **fields(variant))
        ll.attach(layer, kind, name=name, calibration_data=[torch.randn(64, 24)] if variant == "eva" else None)
        randomize(layer, seed=i, by=0.3)
    ll.use(layer, ["b", None, "a"])
    layer.train()
    torch.manual_seed(0)
    first = layer(x)
    assert_close(first[1], base[1], 1e-6)
    assert not torch.equal(first, layer(x))
    layer.eval()
    want = layer(x)
    for row, name in ((0, "b"), (2, "a")):
        ll.use(layer, name)
        assert_close(want[row], layer(x)[row], 1e-5)


def test_different_dropouts_in_a_batch() -> None:
    layer, x = nn.Sequential(nn.Linear(24, 20)), torch.randn(4, 5, 24)
    for name, dropout in (("still", 0.0), ("loose", 0.5)):
        ll.attach(layer, ll.LoRAConfig(r=4, target_roles=(), dropout=dropout), name=name)
        randomize(layer, by=0.3)
    layer.train()
    ll.use(layer, "still")
    want = layer(x)
    ll.use(layer, ["still", "loose", "loose", "still"])
    first, second = layer(x), layer(x)
    for row in (0, 3):
        assert_close(first[row], want[row], 1e-5)
        assert torch.equal(first[row], second[row])
    for row in (1, 2):
        assert not torch.equal(first[row], second[row])


def test_verify_and_diagnose_take_none(tmp_path: Path) -> None:
    model: Any = llama().train()
    attach(model, "dora", dropout=0.5)
    randomize(model, by=0.2)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert ll.verify(model, {"input_ids": token_ids(), "labels": token_ids()})
    assert str(ll.diagnose(model)) == str(ll.diagnose(model))
    assert all(adapter.training for adapter in ll.attachment.require_attachment(model).adapters.values())


@pytest.mark.parametrize("variant", ["lora", "dora", "delora"])
def test_files(variant: str, tmp_path: Path) -> None:
    """Ours and PEFT's keep it, and it acts after loading either."""
    model: Any = llama()
    attach(model, variant, calibration_batches(), dropout=0.25)
    ll.save(model, tmp_path / "a.safetensors")
    ll.export_peft(model, tmp_path / "peft")
    for load in (lambda: ll.load(model, tmp_path / "a.safetensors"), lambda: ll.import_peft(model, tmp_path / "peft")):
        ll.detach(model)
        assert load().cfg.dropout == 0.25
        assert next(iter(ll.attachment.require_attachment(model).adapters.values())).cfg.dropout == 0.25
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "peft"))
    assert getattr(config, "module_dropout" if variant == "delora" else "lora_dropout") == 0.25
