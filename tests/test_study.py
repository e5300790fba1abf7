"""The study of all methods: what was stopped goes on, the sweep ends at the best rate, and the table says what ran."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import environment  # noqa: F401  (before transformers)
import finetune
import machine
import pytest
import study
import tasks
import torch
from tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _settled() -> Iterator[None]:
    """A study takes one thread."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    study.loaded.cache_clear()


def settings(tiny: Path, results: Path, **options: Any) -> study.Settings:
    common: dict[str, Any] = {"steps": 3, "batch_size": 2, "eval_problems": 4, "sweep_problems": 4, "seeds": (0, 1)}
    return study.Settings(model=str(tiny), results=results, dtype="float32", **common | options)


@pytest.mark.parametrize(("start", "best"), [(1e-3, 1e-3), (1e-3, 1e-2), (1e-2, 3e-5), (1e-6, 1e-6), (1.0, 3.0)])
def test_the_sweep_walks_to_the_best_rate(start: float, best: float) -> None:
    losses: dict[float, float] = {}
    while (rate := study.next_rate(losses, start)) is not None:
        losses[rate] = abs(math.log(rate / best))
    assert min(losses, key=losses.__getitem__) == best
    assert len(losses) <= 3 + abs(study.LADDER.index(start) - study.LADDER.index(best))


def test_a_rate_is_chosen_when_its_neighbours_are_known(tmp_path: Path) -> None:
    losses = {1e-3: 0.5, 3e-3: 0.3, 1e-2: math.nan}
    assert study.chosen_rate(tmp_path, "lora") is None
    for lr, loss in losses.items():
        assert study.chosen_rate(tmp_path, "lora") is None
        path = tmp_path / "sweep" / f"lora-{lr:g}.json"
        machine.write(path, {"settings": {"lr": lr}, "after": {"loss": loss}})
    assert study.sweep_losses(tmp_path, "lora") == {1e-3: 0.5, 3e-3: 0.3, 1e-2: math.inf}
    assert study.chosen_rate(tmp_path, "lora") == study.chosen_rate(tmp_path, study.PEFT) == 3e-3


def test_the_sweeps_problems_are_none_of_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    table = tasks.asked(60, 0) | tasks.asked(60, 1)
    draw, drawn = tasks._draw, []

    def recorded(*arguments: Any) -> Any:
        drawn.append(draw(*arguments))
        return drawn[-1]

    monkeypatch.setattr(tasks, "_draw", recorded)
    tasks.gsm_symbolic(120, 60, 100, table)
    test, train = ({tasks._numbers(*each) for each in part} for part in drawn)
    assert len(test) > 30
    assert len(train) > 60
    assert not table & (test | train)
    assert not test & train


def test_a_stopped_study_goes_on(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the run that was stopped. What is finished is not loaded anew, and another rate is another run."""
    s = settings(tiny, tmp_path, methods=("lora", study.PEFT))
    train, calls = study.train, 0

    def stopped(*arguments: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return train(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(study, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            study.main(s)
    finished = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert len(finished) == 2
    study.main(s)
    assert all(path.read_bytes() == content for path, content in finished.items())
    names = {path.stem for path in (tmp_path / "table").iterdir()}
    assert names == {f"{method}-{seed}" for method in ("base", "lora", study.PEFT) for seed in (0, 1)}
    assert {path.suffix for path in tmp_path.rglob("*-*")} == {".json"}

    found = {path.stem: machine.read(path) for path in (tmp_path / "table").iterdir()}
    rates = {run["settings"]["lr"] for name, run in found.items() if "lora" in name}
    assert rates == {study.chosen_rate(tmp_path, "lora")}
    for seed in (0, 1):
        ours, theirs = found[f"lora-{seed}"], found[f"{study.PEFT}-{seed}"]
        assert ours["trainable_parameters"] == theirs["trainable_parameters"]
        assert ours["training"]["losses"] == pytest.approx(theirs["training"]["losses"], rel=1e-4)
        assert ours["after"]["loss"] < found[f"base-{seed}"]["after"]["loss"]
    assert found["lora-0"]["training"]["losses"] != found["lora-1"]["training"]["losses"]

    def never(*_: Any) -> None:
        raise AssertionError("everything was there")

    with monkeypatch.context() as patch:
        patch.setattr(study, "loaded", never)
        study.main(s)
        path = tmp_path / "table" / "lora-1.json"
        path.write_text(json.dumps(found["lora-1"] | {"settings": found["lora-1"]["settings"] | {"lr": 0.5}}))
        with pytest.raises(AssertionError, match="everything"):
            study.main(s)


def test_a_table_waits_for_its_sweep(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="its sweep is not finished"):
        study.main(settings(tiny, tmp_path, methods=("ia3",), parts=("table",)))


def test_the_defaults_are_what_the_sweep_chose() -> None:
    for method, defaults in finetune.METHODS.items():
        assert study.chosen_rate(machine.RESULTS / "study", method) in (None, defaults.lr)
