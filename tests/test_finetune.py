"""bench/training/finetune.py and what it stands on: scoring, masking, data, and a whole run with a tiny model."""

import copy
import functools
import json
import signal
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import bnb_smoke
import finetune
import pytest
import qwen_probe
import tasks
import torch
from safetensors.torch import load_file
from tiny_model import save_tiny_model

import lora_lite as ll


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So 3 + 4 = 7.\n#### 7", "7"),
        ("#### 1,234", "1234"),
        ("#### -12", "-12"),
        ("#### $3.50 a day", "3.50"),
        ("#### 96.0", "96"),
        ("#### 5\nQuestion: 9 apples\n#### 8", "5"),  # what follows the answer is not the answer
        ("#### 110\nThe answer is: 110", "110"),
        ("He has 10-7=3 left.", "3"),
        ("10-7", "7"),  # a minus between numbers is no sign
        ("12, 13 and 14.", "14"),
        ("The answer is 2,500,000.", "2500000"),
        ("It was 42. #### none", "42"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_answer_is_the_number_after_the_mark_or_the_last(text: str, number: str | None) -> None:
    assert tasks.answer_number(text) == (None if number is None else Decimal(number))


def test_exact_match_compares_numbers() -> None:
    problem = tasks.Problem("?", "so\n#### 1,000")
    assert tasks.correct("it is 1000.0", problem)
    assert not tasks.correct("#### 100", problem)
    assert not tasks.correct("no idea", problem)


def test_only_answers_have_labels() -> None:
    batch = tasks.collate([([1, 2, 3], [4, 5]), ([6], [7])], pad=0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 4, 5], [-100, 7, -100, -100, -100]]


def test_prompts_end_together() -> None:
    batch = tasks.collate_prompts([[1, 2, 3], [6]], pad=0)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [0, 0, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_an_example_is_the_prompt_and_an_answer_that_ends(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    task = tasks.Task("Q: {question}\nA:", [], [], [], max_tokens=20, max_new_tokens=1)
    prompt, answer = tasks.encode(tokenizer, task, tasks.Problem("{1}?", "2"))  # braces are the question's own
    assert tokenizer.decode(prompt) == "Q: {1}?\nA:"
    assert tokenizer.decode(answer) == " 2<end>"
    prompt, answer = tasks.encode(tokenizer, task, tasks.Problem("1?", "2" * 50))
    assert len(prompt) + len(answer) == 20


def test_no_test_problem_is_trained_on_even_with_other_words() -> None:
    task = tasks.gsm_symbolic(train=300, test=60, seed=0)
    assert (len(task.train), len(task.test)) == (300, 60)
    assert not {p.question for p in task.train} & {p.question for p in task.test}
    assert all(tasks.answer_number(p.solution) is not None for p in (*task.train, *task.test))
    assert tasks.gsm_symbolic(300, 60, 0) == task
    assert tasks.gsm_symbolic(300, 60, 1).test != task.test
    assert list(tasks.gsm_symbolic(600, 60, 0).train[:300]) == list(task.train)  # more steps go on with more problems


def test_metamath_keeps_test_and_held_out_questions_from_training(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = {
        "meta-math/MetaMathQA": [{"query": f"q{i % 400}", "response": f"#### {i}"} for i in range(500)],
        "openai/gsm8k": [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(9)],
    }

    def load_dataset(name: str, *_: str, split: str) -> Any:
        return datasets.Dataset.from_list(rows[name])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = tasks.metamath(train=200, test=5, seed=0)
    questions = {name: {p.question for p in getattr(task, name)} for name in ("train", "held_out", "test")}
    assert questions["test"] == {f"q{i}" for i in range(5)}
    assert len(task.held_out) == 64
    assert 100 < len(task.train) <= 200
    assert not questions["train"] & (questions["held_out"] | questions["test"])
    assert not questions["held_out"] & questions["test"]
    assert task.prompt.format(question="Why?") == "Question: Why? Think step by step.\nAnswer:"


def test_what_the_hub_did_not_give_is_named() -> None:
    for settings in (finetune.Settings(model="nobody/nothing"), finetune.Settings(data="metamath")):
        with pytest.raises(SystemExit, match=r"Could not load[\s\S]*--data gsm_symbolic"):
            finetune.run(settings)


def test_every_variant_has_defaults_and_options_win() -> None:
    for variant in ll.REGISTRY:
        for data in finetune.tasks.TASKS:
            s = finetune.Settings(variant=variant, data=data)
            assert s.lr > 0
            assert s.adapter().variant == variant
    original = finetune.Settings(data="metamath")
    assert (original.steps, original.batch_size, original.r, original.lr) == (5000, 4, 32, 1e-4)
    s = finetune.Settings(variant="antipasto", r=8, steps=7)
    assert (s.adapter().r, s.steps) == (8, 7)
    assert finetune.Settings(variant="ia3").adapter() == ll.IA3Config()
    assert finetune.Settings(variant="hra", alpha=5.0).adapter().idle == {"alpha": 5.0}, "attach says so"
    assert [finetune.Settings(variant=v).adapter().alpha for v in ("lora", "pissa")] == [32.0, 16.0]


def test_the_learning_rate_rises_and_falls() -> None:
    factors = [finetune.schedule(step, 40) for step in range(40)]
    assert factors[:2] == [0.5, 1.0]
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert 0 < factors[-1] < 0.01
    assert finetune.schedule(0, 1) == 1.0


def test_the_loss_is_the_models_own(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager")
    batch = tasks.collate([([1, 2, 3], [4, 5, 6, 7]), ([8], [9, 10])], pad=0)
    torch.testing.assert_close(finetune.answer_loss(model, batch), model(**batch).loss)


def settings(tiny: Path, folder: Path, **options: Any) -> Any:
    common: dict[str, Any] = {"steps": 6, "batch_size": 2, "eval_problems": 2, "dtype": "float32"}
    return finetune.Settings(model=str(tiny), runs=folder / "runs", results=folder / "results", **common | options)


def test_a_stopped_and_resumed_run_is_the_straight_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = "eva"  # it looks at data when it is attached, and not when it is resumed
    straight = settings(tiny, tmp_path / "straight", variant=variant)
    result = finetune.run(straight)
    assert len(result["losses"]) == 6
    assert result["reloaded_max_abs_logit_difference"] == 0
    assert result["peak_memory_bytes"] > 0
    assert result["before"]["loss"] != result["after"]["loss"]
    written = json.loads((straight.results / f"{straight.name}.json").read_text())
    assert {"machine", "versions", "commit", "command", "settings", "losses"} <= written.keys()
    assert written["kind"] == "timed"
    assert (straight.folder / "loss.png").stat().st_size > 1000

    stopped = settings(tiny, tmp_path / "stopped", variant=variant)
    in_training = finetune.train
    loss, calls = finetune.answer_loss, 0
    handler = signal.getsignal(signal.SIGINT)

    def with_interrupt(*arguments: Any) -> Any:
        def counted(*inner: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                signal.raise_signal(signal.SIGINT)
            return loss(*inner)

        with monkeypatch.context() as patch:
            patch.setattr(finetune, "answer_loss", counted)
            return in_training(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "train", with_interrupt)
        with pytest.raises(SystemExit) as stop:
            finetune.run(stopped)
    assert stop.value.code == 130
    assert calls == 3  # the step in which Ctrl-C came was finished, and was the last
    assert signal.getsignal(signal.SIGINT) is handler  # a shell's background job ignores the signal

    with pytest.raises(SystemExit, match="lr was"):
        finetune.run(settings(tiny, tmp_path / "stopped", variant=variant, lr=0.5, resume=True))

    def no_pickle(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.load reads pickles")

    monkeypatch.setattr(torch, "load", no_pickle)
    resumed = finetune.run(settings(tiny, tmp_path / "stopped", variant=variant, resume=True))
    assert resumed["losses"] == result["losses"]
    assert resumed["after"]["loss"] == result["after"]["loss"]
    mine, theirs = (load_file(s.folder / "adapter.safetensors") for s in (straight, stopped))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_mixture_on_disk(tiny: Path, tmp_path: Path) -> None:
    """Its experts train by name, and a run's adapter loads into the model."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path / "mixture"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    names = ("q_proj$", r"experts\.(gate_up|down)_proj$")
    result = finetune.run(settings(folder, tmp_path, variant="lora", target_names=names, lr=1e-2))
    assert result["reloaded_max_abs_logit_difference"] == 0
    assert result["after"]["loss"] < result["before"]["loss"]
    (adapter,) = tmp_path.glob("runs/*/adapter.safetensors")
    shapes = {name.partition("layers.0.")[2]: tuple(t.shape) for name, t in load_file(adapter).items()}
    assert shapes["mlp.experts.gate_up_proj.lora_A"][::2] == (4, 32)


def test_nothing_to_resume_is_said(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="Nothing to resume"):
        finetune.run(settings(tiny, tmp_path, resume=True))


def test_probe_sees_all_five_checks_pass() -> None:
    s = qwen_probe.Settings(random=True, dtype="float32", r=4)
    model, which = qwen_probe.build(s)
    assert "random weights" in which
    ids = torch.randint(0, 4096, (2, 8))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    row = qwen_probe.probe("lora", model, batch, s)
    assert row["checks"] == dict.fromkeys(qwen_probe.CHECKS, True)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_run_on_a_quantised_base(tiny: Path, tmp_path: Path, kind: str) -> None:
    result = finetune.run(
        finetune.Settings(
            variant="dora", model=str(tiny), quantize=kind, dtype="float32", steps=2, batch_size=2, eval_problems=2,
            r=4, runs=tmp_path, results=tmp_path, device="cpu",
        )
    )  # fmt: skip
    assert result["settings"]["quantize"] == kind
    (written,) = tmp_path.glob("*.json")
    assert f"-{kind}" in written.name
    assert (tmp_path / written.stem / "adapter.safetensors").exists()


@pytest.mark.slow
def test_quantised_bases_smoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A short form of `just bnb-smoke`; and a failing check is seen."""
    load = functools.cache(bnb_smoke.pretrained.load)
    monkeypatch.setattr(bnb_smoke.pretrained, "load", lambda *args: copy.deepcopy(load(*args)))
    assert (
        bnb_smoke.main(bnb_smoke.Settings(variants=("lora", "dora", "ia3", "antipasto", "road"), layers=1, steps=4))
        == 0
    )
    assert capsys.readouterr().out.count("8bit") == 5
    assert bnb_smoke.main(bnb_smoke.Settings(variants=("lora",), kinds=("8bit",), layers=1, steps=0)) == 1
