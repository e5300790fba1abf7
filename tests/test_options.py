"""Options that several methods share: rank-stabilised scaling, patterns of ranks and alphas, LoRA+'s groups."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    MATRIX_VARIANTS,
    VARIANTS,
    assert_close,
    attach,
    calibration_batches,
    llama,
    only_adapter,
    randomize,
    token_ids,
)
from torch import nn
from torch.nn.utils import parametrizations

import lora_lite as ll

PATTERNS = {"rank_pattern": {r"layers\.1\..*q_proj$": 8, "q_proj": 2}, "alpha_pattern": {"q_proj": 20.0}}


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_rslora_scales_by_the_root(variant: str) -> None:
    x = torch.randn(5, 24, dtype=torch.float64)
    plain, stable = nn.Linear(24, 20).double(), nn.Linear(24, 20).double()
    stable.load_state_dict(plain.state_dict())
    alpha, r = 6.0, 4
    # alpha·√r plain is alpha rank-stabilised: alpha·√r / r = alpha / √r
    torch.manual_seed(1)
    attach(plain, variant, r=r, alpha=alpha * math.sqrt(r), target_roles=(), dtype=torch.float64)
    torch.manual_seed(1)
    attach(stable, variant, r=r, alpha=alpha, rslora=True, target_roles=(), dtype=torch.float64)
    for model in (plain, stable):
        randomize(model)
    assert_close(stable(x), plain(x), 1e-12)


def test_rslora_starts_pissa_at_the_base() -> None:
    model: Any = llama()
    base = model(token_ids()).logits
    attach(model, "pissa", rslora=True)
    assert_close(model(token_ids()).logits, base, 1e-5)
    adapter = next(iter(ll.attachment.require_attachment(model).adapters.values()))
    assert adapter.cfg.scale == 6.0 / 2.0


@pytest.mark.parametrize("variant", MATRIX_VARIANTS)
def test_patterns(variant: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"block_size": 2} if variant == "antipasto" else {}
    model: Any = llama()
    attachment = attach(model, variant, calibration_batches(), **PATTERNS, **fields)
    randomize(model)
    ranks = {name: (adapter.cfg.r, adapter.cfg.alpha) for name, adapter in attachment.adapters.items()}
    usual, of_pattern = (16.0, 16.0) if "alpha" in attachment.cfg.unused else (6.0, 20.0)
    assert ranks["model.layers.0.self_attn.q_proj"] == (2, of_pattern)
    assert ranks["model.layers.1.self_attn.q_proj"] == (8, of_pattern)
    assert ranks["model.layers.1.self_attn.v_proj"] == (4, usual)
    for adapter in attachment.adapters.values():
        widths = {p.shape[0] for name, p in adapter.named_parameters() if name in ("lora_A", "lora_U") and p.ndim == 2}
        assert widths <= {adapter.cfg.r, 4}
        if variant in ("lora", "dora", "delora", "eva", "hra"):
            assert widths == {adapter.cfg.r}
    want = model(token_ids()).logits
    ll.save(model, tmp_path / "adapter.safetensors")
    ll.detach(model)
    assert ll.load(model, tmp_path / "adapter.safetensors").cfg == attachment.cfg
    assert torch.equal(model(token_ids()).logits, want)


@pytest.mark.parametrize("whose", ["the caller's", "the config's"])
def test_patterns_that_change_later(whose: str, tmp_path: Path) -> None:
    """A sweep goes on with its dict, or its config: what is attached and its file keep what they were made with."""
    alphas, ranks = {"q_proj": 20.0}, {"k_proj": 2}
    cfg = ll.LoRAConfig(r=4, alpha_pattern=alphas, rank_pattern=ranks)
    model: Any = llama()
    attachment = ll.attach(model, cfg)
    randomize(model)
    want = model(token_ids()).logits
    changed: Any = (alphas, ranks) if whose == "the caller's" else (cfg.alpha_pattern, cfg.rank_pattern)
    changed[0].update(q_proj=64.0, v_proj=64.0)
    changed[1].update(k_proj=3, o_proj=3)
    assert (attachment.cfg.alpha_pattern, attachment.cfg.rank_pattern) == ({"q_proj": 20.0}, {"k_proj": 2})
    ll.save(model, tmp_path / "adapter.safetensors")
    ll.detach(model)
    ll.load(model, tmp_path / "adapter.safetensors")
    assert torch.equal(model(token_ids()).logits, want)


def test_patterns_are_checked() -> None:
    with pytest.raises(ll.ConfigError, match=r"LoRAConfig\.r must be at least 1; got 0, from the pattern 'q_proj'"):
        ll.LoRAConfig(rank_pattern={"q_proj": 0})
    with pytest.raises(ll.ConfigError, match=r"alpha must be .* got -1, from the pattern"):
        ll.LoRAConfig(alpha_pattern={"q_proj": -1})
    for odd in ({"r": 3}, {"rank_pattern": {"q_proj": 3}}):
        with pytest.raises(ll.AttachError, match=r"q_proj .*: HRAConfig\.r must be even: .* got 3"):
            ll.attach(llama(), ll.HRAConfig(**odd))
    with pytest.raises(ll.ConfigError, match=r"rank_pattern: '.*' is not a regular expression"):
        ll.LoRAConfig(rank_pattern={"(": 4})
    with pytest.raises(ll.ConfigError, match="rank_pattern must be a dict"):
        ll.LoRAConfig(rank_pattern=[4])  # type: ignore[arg-type]
    with pytest.raises(ll.AttachError, match=r"q_proj.*r=33 is larger than the layer allows"):
        attach(llama(), "lora", rank_pattern={"q_proj": 33})


def test_param_groups() -> None:
    model: Any = llama()
    attach(model, "dora")
    groups = ll.param_groups(model, lr=1e-3, lr_ratio=8)
    assert [group["lr"] for group in groups] == [1e-3, 8e-3]
    fast = {id(p) for p in groups[1]["params"]}
    for adapter in ll.attachment.require_attachment(model).adapters.values():
        assert id(adapter.lora_B) in fast
        assert id(adapter.lora_A) not in fast
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in ll.parameters(model)}

    layer = nn.Linear(8, 8)
    attach(layer, "lora", target_roles=())
    adapter = only_adapter(layer)
    randomize(layer)
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    optimizer = torch.optim.SGD(ll.param_groups(layer, lr=1e-3, lr_ratio=10))
    layer(torch.randn(5, 8)).square().sum().backward()
    optimizer.step()
    for name, lr in (("lora_A", 1e-3), ("lora_B", 1e-2)):
        p = getattr(adapter, name)
        assert_close(before[name] - p, lr * p.grad, 1e-4, name)


def test_param_groups_of_a_parametrised_adapter() -> None:
    """What stands for B, its directions and their lengths, is of B's group."""
    layer = nn.Linear(8, 8)
    attach(layer, "lora", target_roles=())
    adapter = only_adapter(layer)
    for name in ("lora_A", "lora_B"):
        parametrizations.weight_norm(adapter, name)
    groups = ll.param_groups(layer, lr=1e-3, lr_ratio=8)
    assert [group["lr"] for group in groups] == [1e-3, 8e-3]
    for group, name in zip(groups, ("lora_A", "lora_B"), strict=True):
        assert {id(p) for p in group["params"]} == {id(p) for p in adapter.parametrizations[name].parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_weight_decay_spares_what_stands_at_other_values_than_zero(variant: str) -> None:
    model: Any = llama()
    attachment = attach(model, variant, modules_to_save=("norm$",))
    groups = ll.param_groups(model, lr=1e-3, lr_ratio=1, weight_decay=0.1)
    assert {group["lr"] for group in groups} == {1e-3}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays.keys() == {id(p) for p in ll.parameters(model)}
    for p in ll.parameters(model):
        assert decays[id(p)] == (0.1 if p.ndim > 1 else 0.0)
    if variant in ("ia3", "ia3_ff", "road"):
        assert set(decays.values()) == {0.0}
    assert attachment.trainable == sum(p.numel() for group in groups for p in group["params"])


def test_groups_of_two_rates_and_a_decay() -> None:
    model: Any = llama()
    attach(model, "dora")
    groups = ll.param_groups(model, lr=1e-3, lr_ratio=8, weight_decay=0.1)
    assert sorted((group["lr"], group["weight_decay"]) for group in groups) == [(1e-3, 0.0), (1e-3, 0.1), (8e-3, 0.1)]


def test_param_groups_refuse() -> None:
    model = llama()
    attach(model, "ia3")
    with pytest.raises(ll.AttachError, match="ia3 has no trainable lora_B"):
        ll.param_groups(model, lr=1e-3)
    with pytest.raises(ValueError, match="must be above 0"):
        ll.param_groups(model, lr=0.0)
    with pytest.raises(ValueError, match="weight_decay must be 0 or more"):
        ll.param_groups(model, lr=1e-3, weight_decay=-0.1)


def test_rho_is_in_the_file(tmp_path: Path) -> None:
    """The ranks that calibration chose come back without it, and layers that lost all of theirs stay free."""
    model, batches = llama(), calibration_batches()
    with torch.no_grad():  # what these layers read is nearly flat in one, and of rank one in the other
        model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: (args[0][..., :1] + 0 * args[0],))
    attachment = attach(model, "eva", batches, r=2, rho=4.0, rslora=True)
    ranks = {name: len(adapter.lora_A) for name, adapter in attachment.adapters.items()}
    everything = [target.name for target in ll.targets.find_targets(llama(), ll.EVAConfig())]
    assert sum(ranks.values()) == 2 * len(everything)
    assert len(set(ranks.values())) > 2
    assert set(ranks) < set(everything), "no layer lost all of its ranks"
    assert all(adapter.cfg.scale == pytest.approx(6 / 2**0.5) for adapter in attachment.adapters.values())
    randomize(model)
    want = model(token_ids()).logits
    ll.save(model, tmp_path / "adapter.safetensors")
    ll.detach(model)
    again = ll.load(model, tmp_path / "adapter.safetensors")
    assert {name: len(adapter.lora_A) for name, adapter in again.adapters.items()} == ranks
    assert torch.equal(model(token_ids()).logits, want)


class _OneOfTwo(nn.Module):
    """One layer's input is nearly of one direction, the other's is white."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.randn_like(self.a(x * torch.linspace(3, 0.01, 16) ** 4)))


def test_rho_may_leave_out_all_that_a_name_finds() -> None:
    model = nn.Sequential(_OneOfTwo(), _OneOfTwo())
    cfg = ll.EVAConfig(r=1, rho=2.0, target_names=("a$", "b$"), alpha_pattern={"b$": 4.0})
    attachment = ll.attach(model, cfg, calibration_data=[torch.randn(64, 16) for _ in range(3)])
    assert list(attachment.adapters) == ["0.a", "1.a"]
    assert any("excluded by" in each.why for each in attachment.left_out)


@pytest.mark.parametrize("rho", [0.5, float("nan"), float("inf"), "2", None])
def test_rho_is_a_number_of_at_least_one(rho: Any) -> None:
    with pytest.raises(ll.ConfigError, match=r"EVAConfig\.rho must be (a number|at least 1)"):
        ll.EVAConfig(rho=rho)


def test_rho_needs_more_tokens() -> None:
    with pytest.raises(ll.CalibrationError, match="at least 17 are needed"):
        attach(llama(), "eva", [{"input_ids": token_ids(1, 10)}], r=8, rho=2.0)
