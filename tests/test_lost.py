"""What has trained is in the file, or its user is told by name. docs/silent_failures.md has the list."""

import json
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from models import (
    assert_close,
    assert_same,
    llama,
    logits,
    randomize,
    snapshot,
    token_ids,
)
from safetensors.torch import load_file, save_file
from situations import Body, Classifier, step, warned
from torch import nn
from zoo import ZOO

import lora_lite as ll
from lora_lite.quantized import dense_weight

L = ll.LoRAConfig
CPU = torch.device("cpu")


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


def test_a_peft_file_with_a_layer_too_many(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    theirs.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**text, "target_modules": ["q_proj"]}))
    with pytest.raises(ll.CheckpointError, match=r"do not match model.layers.0.self_attn.v_proj.*has tensors"):
        ll.import_peft(llama(), tmp_path)


def test_tensors_of_an_offloaded_adapter(tmp_path: Path) -> None:
    """There is no memory that a state dict could be written to."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    ll.attach(model, ll.LoRAConfig(r=2, target_roles=()))
    randomize(model)
    tensors = {name: t.clone() for name, t in ll.state_dict(model).items()}
    accelerate.cpu_offload(model, execution_device=CPU)
    with pytest.raises(ll.CheckpointError, match=r"load_state_dict: 0\.lora_A.*offloaded by accelerate.*load the"):
        ll.load_state_dict(model, tensors)
    ll.save(model, tmp_path / "a.safetensors")
    assert all(torch.equal(t, tensors[name]) for name, t in load_file(tmp_path / "a.safetensors").items())
