"""Run by torchrun, two processes on gloo: DeepSpeed trains two steps on halves of a batch, at each stage of ZeRO.

Argument: a folder with cases.json, a list of [how the model is adapted, a variant, the stage, its own folder]. The
adapter is saved by `ll.save`, or by the Trainer of the last case: accelerate takes DeepSpeed's plugin once a process.
"""

import contextlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import deepspeed  # type: ignore[import-not-found]
import environment  # noqa: F401  (before models, which imports transformers)
import torch
import torch.distributed as dist
from models import attach, llama, load_tests, randomize, token_ids
from transformers import Trainer, TrainingArguments

import lora_lite as ll
from lora_lite.trainer import AdapterCallback

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled


def config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True,
        },
    }  # fmt: skip


def main(kind: str, variant: str, stage: int, folder: Path) -> None:
    model: Any = llama()
    if kind == "recipe":
        run_recipe(model, stage, folder)
        return
    if "partitioned, then" in kind:
        deepspeed.zero.Init(module=model, config_dict_or_path=config(stage))
    if "loaded" in kind:
        ll.load(model, folder / "start.safetensors")
    else:
        # What is drawn on the first process counts.
        torch.manual_seed(dist.get_rank() if kind == "partitioned, then attached" else 0)
        attach(model, variant)
    if kind in ("attached", "trainer"):
        randomize(model, by=0.2)
    if kind == "trainer":
        train_by_trainer(model, stage, folder)
        return
    optimizer = torch.optim.SGD(ll.parameters(model), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(stage))
    train(engine)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="save: ")  # shards of the base have not changed
        ll.save(engine, folder / "adapter.safetensors")
    assert (folder / "adapter.safetensors").exists()


def train(engine: Any) -> None:
    mine = token_ids(4, 12)[2 * dist.get_rank() :][:2]
    for _ in range(2):
        engine.backward(engine(input_ids=mine, labels=mine).loss)
        engine.step()


def run_recipe(model: Any, stage: int, folder: Path) -> None:
    """That of docs/integrations.md."""
    given = {"ll": ll, "torch": torch, "deepspeed": deepspeed, "model": model, "config": config(stage), "train": train}
    with contextlib.chdir(folder):
        exec(load_tests("test_recipes").recipes()["DeepSpeed"], given)


def train_by_trainer(model: Any, stage: int, folder: Path) -> None:
    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[], save_strategy="steps",
        save_steps=2, disable_tqdm=True, seed=0, max_grad_norm=0.0, deepspeed=config(stage),
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in token_ids(4, 12)]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[AdapterCallback()])
    trainer.train()
    ll.save(trainer.model, folder / "adapter.safetensors")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for kind, variant, stage, folder in json.loads((Path(sys.argv[1]) / "cases.json").read_text()):
        print("case:", kind, variant, stage, file=sys.stderr)
        main(kind, variant, stage, Path(folder))
    dist.destroy_process_group()
