"""`modules_to_save`: heads, embeddings and norms that train in full beside an adapter, on copies."""

import copy
import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models import (
    SIZES,
    VARIANTS,
    assert_close,
    assert_same,
    attach,
    build,
    calibration_batches,
    config,
    llama,
    logits,
    qwen3,
    randomize,
    snapshot,
    start_tolerance,
    token_ids,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import lora_lite as ll
from lora_lite.trainer import AdapterCallback

EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
LABELS = torch.tensor([0, 2])


def classifier(seed: int = 0) -> Any:
    made = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, num_labels=3)
    return build(transformers.LlamaForSequenceClassification, made, seed)


class Normed(nn.Module):
    """A norm with running statistics, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))


def train(model: Any, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(ll.parameters(model), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=token_ids(), labels=LABELS).loss.backward()
        optimizer.step()


@EACH_VARIANT
def test_a_whole_life(variant: str, tmp_path: Path) -> None:
    model, path = classifier(), tmp_path / "adapter.safetensors"
    before, base = snapshot(model), logits(model)
    held = model.score.weight
    attachment = attach(model, variant, calibration_batches() if variant == "eva" else None, modules_to_save=("score",))
    assert_close(logits(model), base, start_tolerance(variant, 1e-5))
    assert model.score.weight.requires_grad
    assert any(p is model.score.weight for p in ll.parameters(model))
    assert not any(t.name == "score" for t in attachment.targets)
    assert f"Trained in full: score ({3 * 32} parameters)" in attachment.summary()
    assert attachment.trainable == sum(p.numel() for p in ll.parameters(model))
    train(model)
    trained = logits(model)
    assert not torch.equal(model.score.weight, before["tensors"]["score.weight"])
    assert torch.equal(held, before["tensors"]["score.weight"]), "the base's own tensor is left alone"
    with ll.disabled(model):
        assert model.score.weight is held
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), trained)
    ll.save(model, path)
    assert torch.equal(load_file(path)["score.weight"], model.score.weight)
    assert "score.weight" in ll.state_dict(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), trained)
        ll.detach(twin)
        assert torch.equal(logits(twin), base)
    model.zero_grad()
    ll.detach(model)
    assert model.score.weight is held
    assert_same(model, before)
    ll.load(model, path)
    assert torch.equal(logits(model), trained)
    ll.detach(model)
    assert_same(model, before)


def test_merged(tmp_path: Path) -> None:
    model = classifier()
    attach(model, "lora", modules_to_save=("score", r"model\.norm$"))
    train(model)
    ll.save_merged(model, tmp_path)
    assert_close(logits(type(model).from_pretrained(tmp_path)), logits(model), 1e-5)


@pytest.mark.parametrize("apart", [False, True])
def test_a_tie_that_loading_breaks(apart: bool) -> None:
    """Each place gets the base's tensor back, or what it had instead."""
    model: Any = qwen3()
    base = logits(model)
    ll.attach(model, ll.LoRAConfig(r=4, modules_to_save=("lm_head",)))
    with torch.no_grad():
        for p in ll.parameters(model):
            p.add_(0.1)
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    if apart:
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
    trained = logits(model)
    with ll.disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), trained)
    ll.detach(model)
    assert torch.equal(logits(model), base)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_weights_train_once(tmp_path: Path) -> None:
    model: Any = qwen3()
    before, base = snapshot(model), logits(model)
    ll.attach(model, ll.LoRAConfig(r=4, modules_to_save=("lm_head",)))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p is model.lm_head.weight for p in ll.parameters(model)) == 1
    optimizer = torch.optim.SGD(ll.parameters(model), lr=0.1)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()
    trained = logits(model)
    ll.save(model, tmp_path / "a")
    model.zero_grad()
    ll.detach(model)
    assert_same(model, before)
    ll.load(model, tmp_path / "a")
    assert torch.equal(logits(model), trained)
    with ll.disabled(model):
        assert torch.equal(logits(model), base)
    ll.export_peft(model, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(qwen3(), tmp_path / "peft").eval()
    assert_close(logits(theirs), trained, 1e-5)


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied_or_not(tied: bool) -> Any:
    """The same outputs either way."""
    model: Any = qwen3(tie_word_embeddings=tied)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    return model


def refuses(load: Any, model: Any, path: Path, *fragments: str) -> None:
    before = snapshot(model)
    with pytest.raises(ll.CheckpointError) as raised:
        load(model, path)
    assert all(fragment in str(raised.value) for fragment in fragments)
    assert_same(model, before)


@pytest.mark.parametrize("names", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")], ids=str)
def test_a_file_of_tied_weights_is_for_tied_ones(names: tuple[str, ...], tmp_path: Path) -> None:
    """What trains in one place would be missing in the other."""
    for tied in (True, False):
        model = tied_or_not(tied)
        assert torch.equal(logits(model), logits(tied_or_not(not tied)))
        ll.attach(model, ll.LoRAConfig(r=4, modules_to_save=names))
        randomize(model)
        ll.save(model, tmp_path / "a")
        same = tied_or_not(tied)
        ll.load(same, tmp_path / "a")
        assert torch.equal(logits(same), logits(model))
        fragments = (
            ["it trains", f"{EMBED} and {HEAD} as one", "tie_word_embeddings=True"]
            if tied
            else [f"this model ties {EMBED} and {HEAD}, and it trains", "apart", "a tensor of its own first"]
        )
        refuses(ll.load, tied_or_not(not tied), tmp_path / "a", *fragments)


def test_a_tie_with_what_the_model_has_not(tmp_path: Path) -> None:
    model = tied_or_not(True)
    ll.attach(model, ll.LoRAConfig(r=4, modules_to_save=("embed_tokens",)))
    randomize(model)
    ll.save(model, tmp_path / "a")
    headless = tied_or_not(False).model.eval()
    ll.load(headless, tmp_path / "a", prefix_map={"model": ""})
    assert torch.equal(headless(token_ids()).last_hidden_state, model.model(token_ids()).last_hidden_state)


def test_two_tensors_with_the_same_values_are_as_good_as_one(tmp_path: Path) -> None:
    model = tied_or_not(False)
    ll.attach(model, ll.LoRAConfig(r=4, modules_to_save=("embed_tokens", "lm_head")))
    randomize(model)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    ll.save(model, tmp_path / "a")
    tied = tied_or_not(True)
    ll.load(tied, tmp_path / "a")
    assert torch.equal(logits(tied), logits(model))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize("apart", [False, True])
def test_the_file_of_a_tie_that_loading_broke(apart: bool, tmp_path: Path) -> None:
    model = tied_or_not(True)
    ll.attach(model, ll.LoRAConfig(r=4, modules_to_save=("embed_tokens",)))
    randomize(model)
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    if apart:
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
    with pytest.warns(UserWarning, match=rf"parameters of the base that train \({re.escape(HEAD)}\)"):
        ll.save(model, tmp_path / "a")
    if apart:
        refuses(ll.load, tied_or_not(True), tmp_path / "a", f"it trains {EMBED} apart")
    else:
        tied = tied_or_not(True)
        ll.load(tied, tmp_path / "a")
        assert torch.equal(logits(tied), logits(model))


def test_a_file_that_does_not_say_what_was_tied(tmp_path: Path) -> None:
    """As earlier versions wrote it: taken as the model has it."""
    model = tied_or_not(True)
    ll.attach(model, ll.LoRAConfig(r=4, modules_to_save=("embed_tokens",)))
    randomize(model)
    ll.save(model, tmp_path / "a")
    with safe_open(tmp_path / "a", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["whole_aliases"]) == {HEAD: EMBED}
    for broken in ("[]", '{"lm_head.weight": "another"}', '{"lm_head.weight": [1]}', "{"):
        save_file(load_file(tmp_path / "a"), tmp_path / "b", {**metadata, "whole_aliases": broken})
        refuses(ll.load, tied_or_not(True), tmp_path / "b", "its whole_aliases")
    del metadata["whole_aliases"]
    save_file(load_file(tmp_path / "a"), tmp_path / "a", metadata)
    tied = tied_or_not(True)
    ll.load(tied, tmp_path / "a")
    assert torch.equal(logits(tied), logits(model))
    ll.load(tied_or_not(False), tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_files_in_8_bit_floats(dtype: torch.dtype, tmp_path: Path) -> None:
    """PyTorch computes little with them: a file that has them is read as one of their values in float32."""
    model = tied_or_not(True)
    ll.attach(model, ll.LoRAConfig(r=4, modules_to_save=("embed_tokens", "norm")))
    randomize(model)
    ll.save(model, tmp_path / "a")
    ll.export_peft(model, tmp_path / "peft")
    with safe_open(tmp_path / "a", framework="pt") as file:
        metadata = file.metadata()
    found = []
    for path, load in ((tmp_path / "a", ll.load), (tmp_path / "peft" / "adapter_model.safetensors", ll.import_peft)):
        narrow = {name: t.to(dtype) for name, t in load_file(path).items()}
        for each in (narrow, {name: t.float() for name, t in narrow.items()}):
            save_file(each, path, metadata)
            again = tied_or_not(True)
            load(again, path if load is ll.load else path.parent)
            found.append(logits(again))
        pairs = {name: t.view(torch.uint8).view(torch.float4_e2m1fn_x2) for name, t in narrow.items()}
        save_file(pairs, path, metadata)
        refuses(load, tied_or_not(True), path if load is ll.load else path.parent, "is of torch.uint8")
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_a_base_with_buffers_in_8_bit_floats(dtype: torch.dtype, tmp_path: Path) -> None:
    """Beside the adapter, and in a module that trains in full."""
    for in_full in ((), ("norm",)):
        model: Any = Normed()
        model.norm.register_buffer("gain", torch.ones(8).to(dtype))
        before = snapshot(model)
        ll.attach(model, ll.LoRAConfig(r=2, target_names=("body",), modules_to_save=in_full))
        ll.save(model, tmp_path / "a")
        model.norm.gain.fill_(4.0)
        if in_full:
            ll.save(model, tmp_path / "a")
        else:
            with pytest.warns(UserWarning, match=r"buffers that have changed since attach \(norm\.gain\)"):
                ll.save(model, tmp_path / "a")
            model.norm.gain.fill_(1.0)
        ll.detach(model)
        assert_same(model, before)
        ll.load(model, tmp_path / "a")
        assert model.norm.gain.float().eq(4.0 if in_full else 1.0).all()


def test_new_tokens() -> None:
    model: Any = llama()
    model.resize_token_embeddings(70)
    ids = torch.full((1, 5), 66)
    ll.attach(model, ll.LoRAConfig(r=4, modules_to_save=("embed_tokens", "lm_head")))
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad[66].any()
    assert model.lm_head.weight.grad.any()


def test_buffers_train_and_come_back(tmp_path: Path) -> None:
    model = Normed()
    before = snapshot(model)
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("body",), modules_to_save=("norm", "head")))
    randomize(model)
    for _ in range(3):
        model(torch.randn(9, 8)).square().sum().backward()
    x = torch.randn(4, 8)
    want = model.eval()(x)
    model.train()
    assert not torch.equal(model.norm.running_mean, torch.zeros(8))  # type: ignore[arg-type]
    ll.save(model, tmp_path / "a")  # no warning: pyproject.toml makes it an error
    model.zero_grad()
    ll.detach(model)
    assert_same(model, before)
    ll.load(model, tmp_path / "a")
    assert torch.equal(model.eval()(x), want)


def test_moved_meanwhile() -> None:
    """`model.to` reaches what stands in the model; what does not follows when it comes back."""
    model = Normed()
    base = copy.deepcopy(model).double()
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("body",), modules_to_save=("head",)))
    randomize(model)
    x = torch.randn(4, 8).double()
    model.eval().double()
    want = model(x)
    with ll.disabled(model):
        assert_close(model(x), base.eval()(x), 1e-6)
        model.float()
        model.double()
    assert_close(model(x), want, 1e-6)
    ll.detach(model)
    assert model.head.weight.dtype == torch.float64


def test_two_adapters_with_a_head_each(tmp_path: Path) -> None:
    model, x = Normed().eval(), torch.randn(4, 8)
    before, base = snapshot(model), model(x)
    fields: dict[str, Any] = {"target_names": ("body",), "modules_to_save": ("head",)}
    ll.attach(model, config("lora", **fields), name="a")
    randomize(model, seed=1)
    of_a = model(x)
    with_a = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="'b' do so with a too"):
            ll.attach(model, config("ia3", **fields), name="b")
    assert_same(model, with_a)
    with pytest.warns(UserWarning, match="'b' do so with a too"):
        ll.attach(model, config("ia3", **fields), name="b")
    ll.use(model, "b")
    assert_close(model(x), base, start_tolerance("ia3"), "its head starts as the base's, not as a's")
    for p in ll.parameters(model, "b"):
        p.data.mul_(1.5)
    of_b = model(x)
    for _ in range(2):
        ll.use(model, "a")
        assert torch.equal(model(x), of_a)
        ll.use(model, "b")
        assert torch.equal(model(x), of_b)
    for name in ("a", "b"):  # whichever stands in the model
        ll.export_peft(model, tmp_path / name, name=name)
    with pytest.warns(UserWarning, match="'c' do so with a, b too"):
        ll.import_peft(model, tmp_path / "a", name="c")
    ll.use(model, "c")
    assert_close(model(x), of_a, 1e-6)
    ll.detach(model, "c")
    ll.use(model, "b")
    with ll.disabled(model):
        assert torch.equal(model(x), base)
    with pytest.raises(ValueError, match="a, b trains whole modules"):
        ll.use(model, ["a", "b", None, None])
    ll.detach(model, "b")
    ll.use(model, "a")
    assert torch.equal(model(x), of_a)
    ll.detach(model)
    assert_same(model, before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modules_to_save": ("clasifier",)}, "modules_to_save: 'clasifier' matches no module"),
        ({"modules_to_save": ("score",), "target_names": ("q_proj", "score")}, "no layer matches 'score' of"),
        ({"modules_to_save": ("layers.0",), "layers": (0,)}, "no layer matches"),
        (
            {"modules_to_save": (r"^model$", "score")},
            r"modules_to_save=.*: model, score train in full, and hold all layers",
        ),
    ],
)
def test_refuses(fields: dict[str, Any], message: str) -> None:
    model = classifier()
    before = snapshot(model)
    with pytest.raises(ll.AttachError, match=message):
        ll.attach(model, ll.LoRAConfig(r=2, **fields))
    assert_same(model, before)


def test_adapters_and_whole_modules_exclude_each_other() -> None:
    model = classifier()
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("score",)), name="a")
    with pytest.raises(ll.AttachError, match="modules_to_save: score carries an adapter"):
        ll.attach(model, ll.LoRAConfig(r=2, target_names=("q_proj",), modules_to_save=("score",)), name="b")
    ll.detach(model)
    ll.attach(model, ll.LoRAConfig(r=2, modules_to_save=("score",)), name="a")
    with pytest.raises(ll.AttachError, match=r"score .*trains in full with the adapter 'a'"):
        ll.attach(model, ll.LoRAConfig(r=2, target_names=("score",)), name="b")


def test_a_file_of_another_head(tmp_path: Path) -> None:
    model = classifier()
    attach(model, "lora", modules_to_save=("score",))
    ll.save(model, tmp_path / "a")
    other: Any = build(
        transformers.LlamaForSequenceClassification,
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, num_labels=5),
    )
    before = snapshot(other)
    with pytest.raises(ll.CheckpointError, match=r"score.weight has shape \(3, 32\), not \(5, 32\)"):
        ll.load(other, tmp_path / "a")
    with pytest.raises(ll.CheckpointError, match="the model has no module score"):
        ll.load(llama(), tmp_path / "a")
    assert_same(other, before)


def test_a_module_that_was_replaced(tmp_path: Path) -> None:
    """What trains is not what runs: told after the first backward, in no file, and left to the model by detach."""
    model = classifier()
    before = snapshot(model)
    ll.attach(model, ll.LoRAConfig(r=4, modules_to_save=("score",)))
    (tmp_path / "a").write_bytes(b"earlier")
    new = model.score = nn.Linear(32, 3, bias=False)
    with pytest.warns(UserWarning, match=r"modules_to_save.*other modules in their places: score\.weight"):
        train(model, 1)
    for write in (ll.save, ll.export_peft):
        with pytest.raises(ll.CheckpointError, match=r"not what the model has .* now: score\.weight"):
            write(model, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"earlier"
    weight = new.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"detach: .*replaced.*stay as they are: score\.weight"):
        ll.detach(model)
    assert model.score is new
    assert torch.equal(new.weight, weight)
    model.score = classifier().score
    model.zero_grad()
    now = snapshot(model)
    assert all(torch.equal(now["tensors"][name], t) for name, t in before["tensors"].items())
    ll.attach(model, ll.LoRAConfig(r=4, modules_to_save=(r"layers\.0\.input_layernorm",)))
    model.model.layers = model.model.layers[::-1]
    with pytest.raises(ll.CheckpointError, match=r"now: model\.layers\.0\.input_layernorm\.weight"):
        ll.save(model, tmp_path / "a")


@pytest.mark.parametrize("make", [llama, qwen3], ids=["untied", "tied"])
def test_embeddings_that_are_resized_after_attach(make: Any, tmp_path: Path) -> None:
    """transformers resizes an embedding in its place, and replaces an untied head."""
    model, new_ids = make(), torch.full((1, 5), 66)
    tied = make is qwen3
    ll.attach(model, ll.LoRAConfig(r=4, modules_to_save=("embed_tokens", "lm_head")[: 2 - tied]))
    randomize(model)
    model.resize_token_embeddings(70, mean_resizing=False)
    want = logits(model)
    with (
        pytest.raises(ll.AttachError, match=r"embed_tokens\.weight .* \(61, .*has \(70, .*resize before"),
        ll.disabled(model),
    ):
        pass
    with pytest.raises(ll.AttachError, match=r"modules_to_save: .*embed_tokens\.weight was resized"):
        ll.attach(model, ll.LoRAConfig(r=4, modules_to_save=("embed_tokens",)), name="b")
    assert torch.equal(logits(model), want)
    if tied:
        ll.save(model, tmp_path / "a")
        other = make()
        other.resize_token_embeddings(70, mean_resizing=False)
        ll.load(other, tmp_path / "a")
        assert torch.equal(logits(other), want)
    else:
        with pytest.raises(ll.CheckpointError, match=r"now: lm_head\.weight"):
            ll.save(model, tmp_path / "a")
    trained = model.model.embed_tokens.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"detach: .*stay as they are: model\.embed_tokens\.weight.*lm_head\.weight"):
        ll.detach(model)
    assert torch.equal(model.model.embed_tokens.weight, trained)
    assert model(new_ids).logits.shape[-1] == 70
    assert all(p.requires_grad for p in model.parameters())
    ll.attach(model, ll.LoRAConfig(r=4, modules_to_save=("embed_tokens",)))
    ll.detach(model)
    assert torch.equal(model.model.embed_tokens.weight, trained)


@pytest.mark.parametrize("variant", ["lora", "dora", "hra"])
def test_pefts_files_both_ways(variant: str, tmp_path: Path) -> None:
    ours = classifier()
    attach(ours, variant, modules_to_save=("score",))
    train(ours)
    ll.export_peft(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(classifier(), tmp_path / "ours").eval()
    assert_close(logits(theirs), logits(ours), 1e-5)

    kind = {"lora": peft.LoraConfig, "dora": peft.LoraConfig, "hra": peft.HRAConfig}[variant]
    options: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]}
    options |= {"use_dora": True} if variant == "dora" else {}
    saved = peft.get_peft_model(classifier(), kind(**options)).eval()
    randomize(saved, by=0.3)
    saved.save_pretrained(tmp_path / "theirs")
    again = classifier()
    before = snapshot(again)
    ll.import_peft(again, tmp_path / "theirs")
    assert_close(logits(again), logits(saved), 1e-5)
    ll.detach(again)
    assert_same(again, before)


def test_peft_trains_a_tied_head_apart(tmp_path: Path) -> None:
    saved = peft.get_peft_model(qwen3(), peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    saved.save_pretrained(tmp_path)
    with pytest.raises(ll.CheckpointError, match=r"ties model.embed_tokens.weight and lm_head.weight"):
        ll.import_peft(qwen3(), tmp_path)


def test_in_a_trainer(tmp_path: Path) -> None:
    """Checkpoints hold the head too; the best one comes back with it; a run resumes with it."""
    ids = token_ids(8, 12)
    data = [{"input_ids": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(ids)]
    found = []
    for resumed in (False, True):
        torch.manual_seed(0)
        model = classifier()
        attach(model, "lora", modules_to_save=("score",))
        for steps in (2, 4) if resumed else (4,):
            if resumed and steps == 4:
                randomize(model, seed=9)
            arguments = TrainingArguments(
                output_dir=str(tmp_path / str(resumed)), max_steps=steps, per_device_train_batch_size=2, save_steps=2,
                eval_strategy="steps", eval_steps=2, save_strategy="steps", use_cpu=True, report_to=[],
                load_best_model_at_end=not resumed, greater_is_better=True, disable_tqdm=True, learning_rate=1e-2,
                lr_scheduler_type="constant",
            )  # fmt: skip
            trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=[AdapterCallback()])
            trainer.train(resume_from_checkpoint=resumed and steps == 4)
        if not resumed:
            best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
            assert "score.weight" in best
            assert all(torch.equal(model.state_dict()[name], t) for name, t in best.items())
        checkpoint = tmp_path / str(resumed) / "checkpoint-4"
        found.append(load_file(checkpoint / "model.safetensors"))
        other = classifier()
        ll.load(other, checkpoint / "adapter.safetensors")
        assert torch.equal(other.score.weight, found[-1]["score.weight"])
    assert all(torch.equal(found[0][name], t) for name, t in found[1].items())
    assert not torch.equal(found[0]["score.weight"], classifier().score.weight)
