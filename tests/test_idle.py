"""Adapters that never run, or do not train, are said by name, and no others. docs/silent_failures.md has the list."""

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import llama, logits, randomize, token_ids
from situations import Body, refused, step, warned
from torch import Tensor, nn
from zoo import ZOO

import lora_lite as ll
from lora_lite.trainer import AdapterCallback

L = ll.LoRAConfig


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
    optimizer = torch.optim.SGD(ll.parameters(model), lr=1e-3)

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
    with pytest.warns(UserWarning, match=r"without gradients \(under no_grad.*: tower\."):
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


def test_frozen_after_attach() -> None:
    model, x = Body(), torch.randn(3, 8)
    ll.attach(model, L(r=2))
    model.body.requires_grad_(False)
    (text,) = warned(lambda: step(model(x).sum(), ll.parameters(model)))
    assert "requires_grad was switched off after attach: body.* ×2" in text


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


class Languages(nn.Module):
    """A list of which the forward uses one entry, and no router chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.per_language = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.per_language[0](self.body(x))


def test_entries_of_a_list_that_are_never_used(tmp_path: Path) -> None:
    model, x = Languages(), torch.randn(3, 8)
    ll.attach(model, L(r=2, target_roles=()))
    optimizer = torch.optim.SGD(ll.parameters(model), lr=1e-3)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    assert not warned(lambda: train(19)), "they may have a turn"
    (text,) = warned(lambda: train(2))
    assert text.startswith("after 20 steps: these adapted layers never ran")
    assert "per_language.*.* ×2" in text
    with pytest.raises(ll.AttachError, match=r"did not run these adapted layers: per_language\.\*\.\* ×2"):
        ll.verify(model, x)
    blocks = nn.ModuleDict({"layers": nn.ModuleList(Languages() for _ in range(4)), "head": nn.Linear(8, 8)})
    blocks.forward = lambda x: blocks["head"](sum(layer(x) for layer in blocks["layers"]))  # type: ignore[union-attr, assignment]
    ll.attach(blocks, L(r=2, target_roles=()))
    with pytest.warns(UserWarning, match=r"did not run these adapted layers: layers\.\*\.per_language\.\*\.\* ×8"):
        ll.verify(blocks, x)
    (text,) = warned(lambda: ll.save(model, tmp_path / "a"))
    assert "per_language" in text


def test_a_copied_block(tmp_path: Path) -> None:
    """Depth up-scaling after attach: the copy's adapters act, and nobody trains, switches or saves them."""
    model: Any = llama()
    ll.attach(model, L(r=4))
    model.model.layers.append(copy.deepcopy(model.model.layers[1]))
    said = "copies of adapted layers.*model.layers.2.self_attn.q_proj"
    for call in (lambda: ll.use(model, "default"), lambda: ll.disabled(model).__enter__()):
        with pytest.raises(ll.AttachError, match=said):
            call()
    (text,) = warned(lambda: model(token_ids(), labels=token_ids()).loss.backward())
    assert re.search(said, text)
    (text,) = warned(lambda: ll.save(model, tmp_path / "a"))
    assert re.search(said, text)
    with pytest.warns(UserWarning, match="were copied with their adapters, which are taken off too"):
        ll.detach(model)
    assert not any("lora_lite" in name for name, _ in model.named_modules())
    model(token_ids())


def test_models_that_share_a_part_are_no_copies() -> None:
    """A value model on a policy's encoder: each detaches its own."""
    encoder, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    policy, value = nn.Sequential(encoder, nn.Linear(8, 8)), nn.Sequential(encoder, nn.Linear(8, 1))
    ll.attach(value, L(r=1, target_names=("1",)))
    ll.attach(policy, L(r=2, target_names=("0.0",)))
    randomize(policy)
    want = policy(x)
    ll.use(value, "default")
    with ll.disabled(value):
        pass
    assert not warned(lambda: step(value(x).sum(), ll.parameters(value)))
    ll.detach(value)
    assert torch.equal(policy(x), want)
    twin = copy.deepcopy(policy)
    ll.use(twin, "default")
    ll.detach(twin)
    assert torch.equal(policy(x), want)


class Branches(nn.Module):
    """All run, and one of them is taken in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.turn = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.turn += 1
        return [layer(x) for layer in self.proj][self.turn % 3]


def test_branches_that_are_used_in_turn() -> None:
    model, x = Branches(), torch.randn(3, 8)
    ll.attach(model, L(r=2, target_roles=()))
    optimizer = torch.optim.SGD(ll.parameters(model), lr=1e-3)

    def train() -> None:
        for _ in range(25):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()

    assert not warned(train)
