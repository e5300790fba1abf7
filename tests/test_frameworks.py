"""Training frameworks: transformers' Trainer, accelerate, 8-bit and fused AdamW, torch.compile in them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import attach, build, llama, load_tests, randomize, token_ids
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

import lora_lite as ll
from lora_lite.attachment import own_tensors
from lora_lite.trainer import AdapterCallback


def examples(count: int = 8) -> list[dict[str, Tensor]]:
    ids = token_ids(count, 12)
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "use_cpu": True, "report_to": [], "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "lr_scheduler_type": "constant", "data_seed": 0, "seed": 0,
    }  # fmt: skip
    return TrainingArguments(**{**defaults, **fields})


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def base_of(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"optim": "adamw_torch_fused"},
        {"optim": "adamw_8bit"},
    ],
    ids=["plain", "accumulation", "checkpointing", "reentrant", "compile", "fused", "8bit"],
)
def test_trainer(fields: dict[str, Any], tmp_path: Path) -> None:
    model = llama()
    if "gradient_checkpointing" in fields:
        model.enable_input_require_grads()  # reentrant checkpointing passes no gradient to blocks without it
    attachment = attach(model, "lora")
    before, steps = base_of(model), 4
    each_step = examples(2 * fields.get("gradient_accumulation_steps", 1))  # so that losses can be compared
    trainer = Trainer(model, arguments(tmp_path, max_steps=steps, **fields), train_dataset=each_step)
    trainer.train()
    found = losses(trainer)
    assert len(found) == steps
    assert found[-1] < found[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert all(adapter.lora_B.any() for adapter in attachment.adapters.values())


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    found = []
    for fields in ({"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 2}):
        torch.manual_seed(0)
        model = llama()
        attach(model, "lora")
        trainer = Trainer(model, arguments(tmp_path, max_steps=2, **fields), train_dataset=examples(8))
        trainer.train()
        found.append(torch.cat([p.detach().flatten() for p in ll.parameters(model)]))
    assert (found[0] - found[1]).norm() <= 1e-4 * found[0].norm()


def saving(folder: Path, **fields: Any) -> TrainingArguments:
    return arguments(
        folder, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, save_total_limit=3, **fields
    )


class Plain(torch.nn.Module):
    """No library's model, of which a Trainer writes all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.linear(x) - labels).square().mean()}


def test_a_checkpoint_of_a_plain_module_has_the_adapter_beside(tmp_path: Path) -> None:
    model: Any = Plain()
    ll.attach(model, ll.LoRAConfig(r=2, target_roles=()))
    data = [{"x": torch.randn(8), "labels": torch.randn(8)} for _ in range(8)]
    trainer = Trainer(
        model,
        arguments(tmp_path, save_strategy="steps", save_steps=2),
        train_dataset=data,
        callbacks=[AdapterCallback()],
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "last"))
    for folder in ("checkpoint-4", "last"):
        assert "linear.weight" in load_file(tmp_path / folder / "model.safetensors")
        other: Any = Plain()
        ll.load(other, tmp_path / folder / "adapter.safetensors")
        assert all(torch.equal(t, ll.state_dict(model)[name]) for name, t in ll.state_dict(other).items())


def test_a_checkpoint_is_the_adapter(tmp_path: Path) -> None:
    model = llama()
    attach(model, "dora")
    trainer = Trainer(
        model, saving(tmp_path), train_dataset=examples(), eval_dataset=examples(4), callbacks=[AdapterCallback()]
    )
    trainer.save_model(str(tmp_path / "before"))
    assert (tmp_path / "before" / "adapter.safetensors").exists()
    trainer.train()
    checkpoint = tmp_path / "checkpoint-4"
    tensors = load_file(checkpoint / "model.safetensors")
    assert tensors
    assert all(".lora_lite.default." in name for name in tensors)
    assert (checkpoint / "model.safetensors").stat().st_size < 0.5 * sum(p.nbytes for p in model.parameters())
    other: Any = llama()
    ll.load(other, checkpoint / "adapter.safetensors")
    with torch.no_grad():
        assert torch.equal(other(token_ids()).logits, model.eval()(token_ids()).logits)
    trainer.save_model(str(tmp_path / "last"))  # as the last line of every script has it
    assert load_file(tmp_path / "last" / "model.safetensors").keys() == tensors.keys()
    again: Any = llama()
    ll.load(again, tmp_path / "last" / "adapter.safetensors")
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)
    gathered = model.state_dict()  # as a trainer has it of a sharded model, on one process
    model.save_pretrained(tmp_path / "gathered", state_dict=dict(gathered))
    stored = load_file(tmp_path / "gathered" / "adapter.safetensors")
    assert stored.keys() == ll.state_dict(model).keys()
    assert all(torch.equal(stored[name], t) for name, t in ll.state_dict(model).items())
    gathered.pop(next(name for name in gathered if ".lora_lite." in name))
    with pytest.raises(ll.CheckpointError, match=r"lacks .*lora_lite"):
        model.save_pretrained(tmp_path / "lacking", state_dict=gathered)
    copied = copy.deepcopy(model)
    randomize(copied)
    copied.save_pretrained(tmp_path / "copy")
    saved = load_file(tmp_path / "copy" / "adapter.safetensors")
    assert all(torch.equal(saved[name], t) for name, t in ll.state_dict(copied).items()), "the copy's own"
    ll.detach(model)
    model.save_pretrained(tmp_path / "base")
    assert "save_pretrained" not in vars(model)
    assert not (tmp_path / "base" / "adapter.safetensors").exists()
    assert len(load_file(tmp_path / "base" / "model.safetensors")) == len(list(model.parameters()))


NAMES = ["run/1", "/", "../up", "a\\b", "nul\0l", "100%", "run%2F1", "é" * 150, "n" * 1000, "n" * 1001]


def test_files_of_several_adapters_stay_in_their_checkpoint(tmp_path: Path) -> None:
    """Whatever their names are, each has a file of its own, beside that of the model's weights."""
    names = [name.replace(".", "") for name in NAMES] + [str(tmp_path / "outside" / "x"), "model", "adapter_model", "b"]
    (tmp_path / "outside").mkdir()
    model: Any = llama()
    for name in names:
        ll.attach(model, ll.LoRAConfig(r=2, target_names=("layers.0.*q_proj",)), name=name)
    for name in names:
        randomize(ll.attachment.require_attachment(model, name).adapters["model.layers.0.self_attn.q_proj"], len(name))
    run = Trainer(model, saving(tmp_path / "run"), train_dataset=examples(), eval_dataset=examples(4))
    run.add_callback(AdapterCallback())
    run.train()
    found = sorted(tmp_path.glob("run/checkpoint-2/*.safetensors"))
    assert len(found) == len(names) + 1
    assert not list((tmp_path / "outside").iterdir())
    run.save_model(str(tmp_path / "last"))
    assert {path.name for path in tmp_path.glob("last/*.safetensors")} == {path.name for path in found}
    stored = {path.name: load_file(path) for path in tmp_path.glob("last/*.safetensors") if path.stem != "model"}
    for name in names:
        own = ll.state_dict(model, name)
        assert sum(all(torch.equal(each[key], t) for key, t in own.items()) for each in stored.values()) == 1
    assert {"run%2F1.safetensors", "b.safetensors", "adapter_model.safetensors"} < stored.keys()


def test_resumes(tmp_path: Path) -> None:
    """Two steps, then two more from the checkpoint, are four steps."""
    found = []
    for resumed in (False, True):
        torch.manual_seed(0)
        model = llama()
        attach(model, "lora")
        randomize(model, by=0.1)
        folder = tmp_path / str(resumed)
        for steps in (2, 4) if resumed else (4,):
            if resumed and steps == 4:
                randomize(model, seed=9)  # lost, unless the checkpoint brings it back
            trainer = Trainer(
                model, saving(folder, max_steps=steps), train_dataset=examples(), eval_dataset=examples(4),
                callbacks=[AdapterCallback()],
            )  # fmt: skip
            trainer.train(resume_from_checkpoint=resumed and steps == 4)
        found.append(torch.cat([p.detach().flatten() for p in ll.parameters(model)]))
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()


def test_load_best_model_at_end(tmp_path: Path) -> None:
    """Where the highest loss counts as the best, so that it is not the last checkpoint's."""
    model = llama()
    attach(model, "lora")
    trainer = Trainer(
        model, saving(tmp_path, load_best_model_at_end=True, greater_is_better=True, max_steps=6),
        train_dataset=examples(), eval_dataset=examples(4), callbacks=[AdapterCallback()],
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    history = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert history[-1] < max(history)
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["global_step"] == 2 * (history.index(max(history)) + 1)
    for name, t in load_file(best / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], t), name


def vit() -> Any:
    """Its `save_pretrained` writes names that it had once: vit.encoder.layer.0 for vit.layers.0."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    images: dict[str, Any] = {"num_attention_heads": 4, "image_size": 8, "patch_size": 4}
    return build(transformers.ViTForImageClassification, transformers.ViTConfig(**sizes, **images))


def test_checkpoints_have_the_models_own_names(tmp_path: Path) -> None:
    """Also where `save_pretrained` gives a base the names of older models: nothing of the adapter is dropped."""
    generator = torch.Generator().manual_seed(0)
    data = [{"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": i % 2} for i in range(8)]

    def trained(model: Any, folder: str, resume: bool = False, **fields: Any) -> Trainer:
        made = saving(tmp_path / folder, learning_rate=3e-2, greater_is_better=True, **fields)
        trainer = Trainer(model, made, train_dataset=data, eval_dataset=data, callbacks=[AdapterCallback()])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def adapted() -> Any:
        model = vit()
        ll.attach(model, ll.LoRAConfig(r=4, modules_to_save=(r"layers\.1\.layernorm_after",)))
        return model

    def assert_is(model: Any, checkpoint: Path) -> None:
        other = vit()
        ll.load(other, checkpoint / "adapter.safetensors")
        mine = ll.state_dict(model)
        assert all(torch.equal(mine[name], t) for name, t in ll.state_dict(other).items())

    model, checkpoint = adapted(), tmp_path / "a" / "checkpoint-4"
    trained(model, "a")
    assert load_file(checkpoint / "model.safetensors").keys() == own_tensors(model).keys()
    model = adapted()
    trained(model, "a", resume=True)  # nothing is left to do: the model is the checkpoint's
    assert_is(model, checkpoint)
    model = adapted()
    best = trained(model, "b", load_best_model_at_end=True, max_steps=6).state.best_model_checkpoint
    assert_is(model, Path(best))

    # A checkpoint as earlier versions wrote it, with the names of older models, is refused, and can be written anew.
    type(model).save_pretrained(model, checkpoint, state_dict=own_tensors(model))
    assert load_file(checkpoint / "model.safetensors").keys() != own_tensors(model).keys()
    model = adapted()
    start = {name: t.clone() for name, t in ll.state_dict(model).items()}
    with pytest.raises(ll.CheckpointError, match=r"none: vit\.encoder\.layer.*adapter\.safetensors"):
        trained(model, "a", resume=True)
    assert all(torch.equal(t, start[name]) for name, t in ll.state_dict(model).items())
    fresh = vit()
    ll.load(fresh, checkpoint / "adapter.safetensors")
    Trainer(fresh, arguments(tmp_path / "a"), callbacks=[AdapterCallback()]).save_model(str(checkpoint))
    trained(model, "a", resume=True)
    assert_is(model, checkpoint)
    ll.detach(model)
    model.load_state_dict(vit().state_dict())
    assert "load_state_dict" not in vars(model)


def test_callback_needs_an_adapter(tmp_path: Path) -> None:
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=examples(), callbacks=[AdapterCallback()])
    with pytest.raises(ll.AttachError, match="no adapter is attached"):
        trainer.train()


@pytest.mark.parametrize("variant", ["lora", "dora", "hra"])
def test_accelerate(variant: str, tmp_path: Path) -> None:
    from accelerate import Accelerator

    model: Any = llama()
    attach(model, variant)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(ll.parameters(model), lr=1e-2 if variant != "hra" else 1e-3)
    loader = torch.utils.data.DataLoader(token_ids(8, 12), batch_size=2)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    seen = []
    for _ in range(3):
        for ids in loader:
            with accelerator.accumulate(wrapped):
                loss = wrapped(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                seen.append(loss.item())
    assert sum(seen[-4:]) < sum(seen[:4])
    ll.save(accelerator.unwrap_model(wrapped), tmp_path / "adapter.safetensors")


# ---- QLoRA ----

quantized = load_tests("test_quantized")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_quantised_base_in_a_trainer(kind: str, base_folder: Path, tmp_path: Path) -> None:
    """Trains, saves the adapter alone, resumes to the bit, goes back to the best; and detach leaves no trace."""
    found = []
    for resumed in (False, True):
        model = quantized.quantised(base_folder, kind)
        quantizer = model.hf_quantizer
        torch.manual_seed(0)
        attach(model, "lora")
        randomize(model, by=0.1)
        folder = tmp_path / str(resumed)
        for steps in (2, 4) if resumed else (4,):
            if resumed and steps == 4:
                randomize(model, seed=9)
            trainer = Trainer(
                model, saving(folder, max_steps=steps, load_best_model_at_end=not resumed, greater_is_better=True),
                train_dataset=examples(), eval_dataset=examples(4), callbacks=[AdapterCallback()],
            )  # fmt: skip
            trainer.train(resume_from_checkpoint=resumed and steps == 4)
        if not resumed:
            best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
            assert all(torch.equal(model.state_dict()[name], t) for name, t in best.items())
        last = load_file(folder / "checkpoint-4" / "model.safetensors")
        assert last
        assert all(".lora_lite." in name for name in last)
        found.append(last)
        ll.load(quantized.quantised(base_folder, kind), folder / "checkpoint-4" / "adapter.safetensors")
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], t) for name, t in found[1].items())

    for twin in (copy.deepcopy(model), model):
        assert twin.hf_quantizer.is_qat_trainable
        ll.detach(twin)
        assert type(twin.hf_quantizer) is type(quantizer)
    assert model.hf_quantizer is quantizer
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments(tmp_path), train_dataset=examples())
