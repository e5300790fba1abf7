"""The recipes of docs/integrations.md, run as they stand: what they leave to the reader, such as a model, is given."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import attach, llama, load_tests, randomize, token_ids

import lora_lite as ll

trainers, frameworks = load_tests("test_trainers"), load_tests("test_frameworks")
tokenizer = trainers.tokenizer
DOCUMENT = Path(__file__).parents[1] / "docs/integrations.md"


def recipes() -> dict[str, str]:
    """Each Python block by the heading above it."""
    found: dict[str, str] = {}
    parts = re.compile(r"^##+ (.*?)$|^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
    heading = ""
    for title, block in parts.findall(DOCUMENT.read_text(encoding="utf-8")):
        heading = title or heading
        if block:
            assert heading not in found
            found[heading] = block
    return found


def acts(model: Any) -> bool:
    """Whether the adapter changes what the model computes."""
    ids = token_ids()
    with torch.no_grad():
        adapted = model(ids).logits
        with ll.disabled(model):
            return not torch.allclose(model(ids).logits, adapted, atol=1e-4)


def test_a_trainer(tmp_path: Path, run: Callable[..., Any]) -> None:
    model = llama()
    arguments = frameworks.arguments(tmp_path, save_strategy="steps", save_steps=4)
    run("A Trainer", model=model, data=frameworks.examples(), arguments=arguments, Trainer=frameworks.Trainer)
    assert acts(model)
    trained = model(token_ids()).logits
    ll.detach(model)
    ll.load(model, tmp_path / "checkpoint-4" / "adapter.safetensors")
    assert torch.equal(model(token_ids()).logits, trained)


@pytest.mark.filterwarnings("ignore")
def test_trl(tmp_path: Path, tokenizer: Any, run: Callable[..., Any]) -> None:
    import trl

    folder = tmp_path / "base"
    llama().save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)  # which the trainers look up by the model's name
    model = llama()
    attach(model, "lora")
    model.config._name_or_path = str(folder)
    few: dict[str, Any] = {"max_steps": 2, "max_length": 16}
    given = run(
        "TRL",
        model=model,
        SFTConfig=partial(trainers.arguments, trl.SFTConfig, tmp_path, **few),
        DPOConfig=partial(trainers.arguments, trl.DPOConfig, tmp_path, **few),
        GRPOConfig=partial(
            trainers.arguments, trl.GRPOConfig, tmp_path, max_steps=2, per_device_train_batch_size=4,
            num_generations=4, max_completion_length=5,
        ),
        **{name: getattr(trl, name) for name in ("SFTTrainer", "DPOTrainer", "GRPOTrainer")},
        data=trainers.Dataset.from_list(trainers.TEXTS),
        pairs=trainers.Dataset.from_list(trainers.PAIRS),
        prompts=trainers.Dataset.from_list(trainers.PROMPTS),
        reward=trainers.lengths,
    )  # fmt: skip
    assert acts(model)
    assert [kl > 0 for (kl,) in trainers.seen(given["trainer"], "kl")] == [True, True]


def test_several_adapters(run: Callable[..., Any]) -> None:
    model = llama()
    attach(model, "lora")
    randomize(model)
    ll.save(model, "poetry.safetensors")
    ll.detach(model)
    run("Several adapters", model=model)
    assert Path("maths.safetensors").exists()
    randomize(model)
    ll.use(model, "maths", "kv", "ff")
    assert acts(model)


def test_weights_that_stay_as_they_are(run: Callable[..., Any]) -> None:
    model: Any = llama()
    attach(model, "dora")
    optimizer = torch.optim.SGD(ll.parameters(model), lr=0.1)
    batches = [{"input_ids": ids, "labels": ids} for ids in token_ids(4, 12).split(2)]
    run(
        "Weights that stay as they are",
        model=model, optimizer=optimizer, batches=batches, inputs={"input_ids": token_ids(1, 5), "max_new_tokens": 3},
    )  # fmt: skip
    assert acts(model)


def test_every_recipe_is_run() -> None:
    """DeepSpeed's by test_trainers.py, on two processes."""
    here = Path(__file__).read_text(encoding="utf-8")
    there = (Path(__file__).parent / "support/deepspeed_processes.py").read_text(encoding="utf-8")
    assert len(recipes()) >= 5
    assert all(f'"{heading}"' in (there if heading == "DeepSpeed" else here) for heading in recipes())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs a recipe in an empty folder, and returns what it has then."""
    monkeypatch.chdir(tmp_path)

    def go(heading: str, **given: Any) -> dict[str, Any]:
        namespace = {"ll": ll, "torch": torch, **given}
        exec(compile(recipes()[heading], f"{DOCUMENT.name}: {heading}", "exec"), namespace)
        return namespace

    return go
