"""Trainers of other libraries: TRL, sentence-transformers, Lightning, Fabric, accelerate's states, DeepSpeed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import transformers
from datasets import Dataset
from models import (
    SIZES,
    alone,
    assert_close,
    attach,
    bert,
    build,
    llama,
    load_tests,
    logits,
    qwen3,
    randomize,
    rel_error,
    token_ids,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

import lora_lite as ll
from lora_lite.checkpoint import require_alike
from lora_lite.trainer import AdapterCallback, Merged, Reference, set_reference

quantized = load_tests("test_quantized")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def words(count: int, seed: int) -> str:
    return " ".join(f"w{i}" for i in token_ids(1, count, seed=seed, vocab=57)[0].tolist())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    names = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(57))]
    whole_words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    whole_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=whole_words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token=None
    )


def arguments(kind: Any, folder: Path, **fields: Any) -> Any:
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "use_cpu": True, "bf16": False, "report_to": [], "logging_steps": 1, "save_strategy": "no", "seed": 0,
        "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return kind(**{**defaults, **fields})


def seen(trainer: Any, *names: str) -> list[list[float]]:
    """What it logged in each step of training."""
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]


def trained(variant: str = "lora") -> Any:
    """A model whose adapter has left its start."""
    torch.manual_seed(0)
    model = llama()
    attach(model, variant)
    randomize(model, by=0.3)
    return model


# ---- TRL: supervised ----

TEXTS = [{"text": words(6 + i % 5, i)} for i in range(16)]
SUPERVISED: dict[str, dict[str, Any]] = {
    "plain": {},
    "packing": {"packing": True},
    "padding-free": {"padding_free": True, "max_length": None},
    "checkpointing": {"gradient_checkpointing": True},
}


def checkpointing(model: Any, folder: Path, steps: int) -> Any:
    """A Trainer with a checkpoint after each step."""
    rows = [torch.tensor([3 + i, 4, 5, 6]) for i in range(4)]
    args = arguments(transformers.TrainingArguments, folder, max_steps=steps, save_strategy="steps", save_steps=1)
    data = [{"input_ids": row, "labels": row} for row in rows]
    return transformers.Trainer(model, args, train_dataset=data, callbacks=[AdapterCallback()])


@pytest.mark.filterwarnings("ignore")
def test_resumed_as_another_adapter(tmp_path: Path) -> None:
    """The same tensors, of which another method or another scale makes something else."""

    def trainer(cfg: Any, steps: int) -> Any:
        model = llama()
        ll.attach(model, cfg)
        return checkpointing(model, tmp_path, steps)

    trainer(ll.LoRAConfig(r=4, alpha=4), 1).train()
    resume = {"resume_from_checkpoint": str(tmp_path / "checkpoint-1")}
    for cfg, message in (
        (ll.LoRAConfig(r=4, alpha=64), r"q_proj has alpha=4 there, and alpha=64 here"),
        (ll.LoRAConfig(r=4, alpha=4, rslora=True), r"q_proj has rslora=False there, and rslora=True here"),
        (ll.LoRAConfig(r=2, alpha=4), r"q_proj has r=4 there, and r=2 here"),
        (ll.LoRAConfig(r=4, alpha=4, layers=(0,)), r"model\.layers\.1\.\S+; .* is adapted there alone"),
        (ll.DoRAConfig(r=4, alpha=4), "it is of lora, and dora is attached"),
    ):
        with pytest.raises(ll.CheckpointError, match=message):
            trainer(cfg, 2).train(**resume)
    trainer(ll.LoRAConfig(r=4, alpha=4, dropout=0.1), 2).train(**resume)
    with pytest.raises(ll.AttachError, match="no adapter is attached"):
        checkpointing(llama(), tmp_path, 2).train(**resume)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (ll.RoadConfig(group_size=4), ll.RoadConfig(group_size=8), "group_size=4 there, and group_size=8 here"),
        (ll.RoadConfig(group_size=8), ll.RoadConfig(group_size=8, kind=2), "kind=1 there, and kind=2 here"),
        (ll.AntiPaSTOConfig(r=8), ll.AntiPaSTOConfig(r=8, rotate_basis="U"), "rotate_basis='V' there"),
        (ll.AntiPaSTOConfig(r=8), ll.AntiPaSTOConfig(r=8, max_rotation_angle=1.0), "max_rotation_angle=0.5 there"),
        (ll.AntiPaSTOConfig(r=8), ll.AntiPaSTOConfig(r=8, max_rotation_angle=0.499), "max_rotation_angle=0.5 there"),
        (ll.AntiPaSTOConfig(r=8), ll.AntiPaSTOConfig(r=8, svd="exact"), ""),
        (ll.DeLoRAConfig(r=4, lambda0=2.0), ll.DeLoRAConfig(r=4), ""),
    ],
)
def test_resumed_with_another_config(before: Any, now: Any, message: str, tmp_path: Path) -> None:
    """Whatever makes something else of the tensors; a start is over."""
    model = llama()
    ll.attach(model, before)
    randomize(model, by=1.0)
    want = model(token_ids()).logits
    ll.save(model, tmp_path / "adapter.safetensors")
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    ll.detach(model)
    attachment = ll.attach(model, now)
    if message:
        with pytest.raises(ll.CheckpointError, match=message):
            require_alike(model, attachment, tmp_path / "adapter.safetensors")
        return
    require_alike(model, attachment, tmp_path / "adapter.safetensors")
    model.load_state_dict(weights)
    assert torch.equal(model(token_ids()).logits, want)


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_trains_beside_the_adapter_goes_back_to_the_best_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
            num_labels=2, pad_token_id=0,
        )
    )  # fmt: skip
    ll.attach(model, ll.LoRAConfig(r=2))
    model.score.weight.requires_grad_()
    data = [{"input_ids": torch.randint(1, 32, (6,)), "labels": torch.tensor(i % 2)} for i in range(8)]
    args = arguments(
        transformers.TrainingArguments, tmp_path, max_steps=4, learning_rate=0.5, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[AdapterCallback()])
    trainer.train()
    losses = [each["eval_loss"] for each in trainer.state.log_history if "eval_loss" in each]
    assert min(losses) < losses[-1], "the last is the best, which shows nothing"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_resumed_under_another_name(tmp_path: Path) -> None:
    """The remedy is to attach under that of the checkpoint."""

    def trainer(steps: int, *names: str) -> Any:
        model = llama()
        for name in names:
            ll.attach(model, ll.LoRAConfig(r=4), name=name)
        return checkpointing(model, tmp_path, steps)

    trainer(1, "a").train()
    resume = {"resume_from_checkpoint": str(tmp_path / "checkpoint-1")}
    with pytest.raises(ll.CheckpointError, match=r"of adapters named a, and mine is attached here; .* name='a'"):
        trainer(2, "mine").train(**resume)
    with pytest.raises(ll.CheckpointError, match="is of one adapter, and a, b are attached here; detach the others"):
        trainer(2, "a", "b").train(**resume)
    trainer(2, "a").train(**resume)
    trainer(1, "a", "b").train()
    with pytest.raises(ll.CheckpointError, match=r"of the adapters a, b, and b, a are attached here; .*in this order"):
        trainer(2, "b", "a").train(**resume)
    trainer(2, "a", "b").train(**resume)


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_goes_on_without_adapters(tmp_path: Path) -> None:
    """Once they are detached, and the callback is gone."""
    model = llama()
    ll.attach(model, ll.LoRAConfig(r=2))
    trainer = checkpointing(model, tmp_path, 1)
    trainer.train()
    ll.detach(model)
    trainer.remove_callback(AdapterCallback)
    model.requires_grad_(True)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_layers_share_is_in_a_checkpoint(tmp_path: Path) -> None:
    """Of a method of one's own; a checkpoint has one for each."""

    def trainer(steps: int) -> Any:
        model = llama()
        attachment = ll.attach(model, ll.LoRAConfig(r=4, target_names=("q_proj",)))
        first, *others = attachment.adapters.values()
        for other in others:
            other.lora_A = first.lora_A
        return checkpointing(model, tmp_path, steps)

    through = trainer(2)
    through.train()
    again = trainer(2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for a, b in zip(ll.parameters(through.model), ll.parameters(again.model), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [*SUPERVISED, "4bit"])
def test_sft(kind: str, base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Trains, saves the adapter alone, resumes to the bit, goes back to the best."""
    from trl import SFTConfig, SFTTrainer

    found = []
    for resumed in (False, True):
        torch.manual_seed(0)
        model = quantized.quantised(base_folder, "4bit") if kind == "4bit" else llama()
        attach(model, "lora")
        randomize(model, by=0.1)
        folder = tmp_path / str(resumed)
        for steps in (2, 4) if resumed else (4,):
            if resumed and steps == 4:
                randomize(model, seed=9)  # lost, unless the checkpoint brings it back
            args = arguments(
                SFTConfig, folder, max_steps=steps, save_strategy="steps", save_steps=2, eval_strategy="steps",
                eval_steps=2, load_best_model_at_end=not resumed, metric_for_best_model="loss", greater_is_better=True,
                **{"max_length": 16, **SUPERVISED.get(kind, {})},
            )  # fmt: skip
            data = Dataset.from_list(TEXTS)
            trainer = SFTTrainer(
                model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer,
                callbacks=[AdapterCallback(model)],
            )  # fmt: skip
            trainer.train(resume_from_checkpoint=resumed and steps == 4)
        assert all(p.dtype is torch.float32 for p in ll.parameters(model))
        if not resumed:
            best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
            assert all(torch.equal(model.state_dict()[name], t) for name, t in best.items())
        found.append(load_file(folder / "checkpoint-4" / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], t) for name, t in found[1].items())
    assert all(".lora_lite." in name for name in found[0])
    ll.detach(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["pissa", "dora"])
def test_trl_rounds_no_adapter(variant: str, base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """On a 4-bit base TRL makes bfloat16 of all that trains. Taken back to the bit, or said."""
    from trl import SFTConfig, SFTTrainer

    for given in (True, False):
        model = quantized.quantised(base_folder, "4bit")
        attach(model, variant)
        before, start = logits(model), {name: t.clone() for name, t in ll.state_dict(model).items()}
        trainer = SFTTrainer(
            model.train(), args=arguments(SFTConfig, tmp_path, max_steps=1), train_dataset=Dataset.from_list(TEXTS),
            processing_class=tokenizer, callbacks=[AdapterCallback(model if given else None)],
        )  # fmt: skip
        if given:
            assert all(torch.equal(t, start[name]) for name, t in ll.state_dict(model).items())
            assert torch.equal(logits(model), before)
            trainer.train()
        else:
            assert all(p.dtype is torch.bfloat16 for p in ll.parameters(model))
            with pytest.warns(UserWarning, match=r"another dtype.*q_proj ×2.*AdapterCallback\(model\)"):
                trainer.train()


def test_dtypes_by_to_are_no_news() -> None:
    """What `to` converts is not said; neither is what `to` converts after something else has."""
    model: Any = llama()
    adapter = next(iter(attach(model, "dora").adapters.values()))
    model.to(torch.bfloat16).float()
    assert not adapter.recast
    model.to(torch.bfloat16)
    assert not adapter.recast
    adapter.lora_A.data = adapter.lora_A.data.float()
    assert adapter.recast


# ---- TRL: preferences ----

PAIRS = [
    {"prompt": words(3, i), "chosen": " " + words(4, 100 + i), "rejected": " " + words(4, 200 + i)} for i in range(8)
]
JUDGED = [{"prompt": words(3, i), "completion": " " + words(4, 100 + i), "label": i % 2 == 0} for i in range(8)]
PROMPTS = [{"prompt": words(3, i)} for i in range(8)]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_reference_without_a_second_base(kind: str, bf16: bool, tokenizer: Any, tmp_path: Path) -> None:
    """The losses and rewards of each step are those with a second base, to the bit."""
    import trl

    config, trainer_class = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    found = []
    for own_base in (True, False):
        model = trained()
        args = arguments(config, tmp_path, max_steps=3, max_length=16, bf16=bf16)
        trainer = trainer_class(
            model, ref_model=llama() if own_base else Reference(model), args=args, processing_class=tokenizer,
            train_dataset=Dataset.from_list(PAIRS if kind == "DPO" else JUDGED), callbacks=[AdapterCallback()],
        )  # fmt: skip
        trainer.train()
        found.append(seen(trainer, "loss", "rewards/chosen", "rewards/rejected"))
    assert len(found[0]) == 3
    assert found[0] == found[1]
    assert all(abs(chosen) > 1e-3 for _, chosen, _ in found[0])


def test_reference_log_probabilities_computed_before(tokenizer: Any, tmp_path: Path) -> None:
    """Those of the base; and none that TRL has kept of another base."""
    from trl import DPOConfig, DPOTrainer

    data, found = Dataset.from_list(PAIRS), {}
    for seed in (0, 1):
        for before in (True, False):
            torch.manual_seed(0)
            model = llama(seed)
            attach(model, "lora")
            randomize(model, by=0.3)
            args = arguments(DPOConfig, tmp_path, max_steps=2, max_length=16, precompute_ref_log_probs=before)
            trainer = DPOTrainer(
                model, ref_model=Reference(model), args=args, train_dataset=data, processing_class=tokenizer
            )
            trainer.train()
            found[seed, before] = seen(trainer, "loss", "rewards/chosen")
        assert torch.tensor(found[seed, True]).allclose(torch.tensor(found[seed, False]), atol=1e-5)
    assert found[0, True] != found[1, True]


def test_a_reference_is_never_moved(tokenizer: Any, tmp_path: Path) -> None:
    """TRL would write a moving average into it: into the base."""
    from trl import DPOConfig, DPOTrainer

    model = trained()
    base = {name: p.clone() for name, p in model.named_parameters()}
    args = arguments(DPOConfig, tmp_path, max_steps=2, max_length=16, sync_ref_model=True, ref_model_sync_steps=1)
    trainer = DPOTrainer(
        model, ref_model=Reference(model), args=args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer
    )
    trainer.add_callback(AdapterCallback())
    with pytest.raises(ll.AttachError, match=r"sync_ref_model=True moves a reference's weights.*set it to False"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if not p.requires_grad)
    ll.detach(model)
    with pytest.raises(ll.AttachError, match="no adapter is attached"):
        trainer.ref_model(token_ids())


def test_a_reference_with_another_adapter() -> None:
    """A frozen one of supervised training belongs to it, and the one that is trained does not."""
    model = trained()
    supervised = model(token_ids()).logits
    ll.attach(model, ll.LoRAConfig(r=2), name="dpo")
    for p in ll.parameters(model, name="dpo"):
        nn.init.normal_(p, std=0.2)
    want = Reference(model, "dpo")(token_ids()).logits
    assert torch.equal(want, supervised)
    assert not torch.equal(Reference(model)(token_ids()).logits, want)
    assert not torch.equal(model(token_ids()).logits, want)
    with pytest.raises(ll.AttachError, match="sft"):
        Reference(model, "sft")


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion) % 7) for completion in completions]


def online(kind: str, model: Any, tokenizer: Any, folder: Path, **fields: Any) -> Any:
    import trl

    args = arguments(
        getattr(trl, f"{kind}Config"), folder, max_steps=3, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=5, **fields,
    )  # fmt: skip
    return getattr(trl, f"{kind}Trainer")(
        model, reward_funcs=lengths, args=args, train_dataset=Dataset.from_list(PROMPTS), processing_class=tokenizer,
        callbacks=[AdapterCallback()],
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_kl_without_a_second_base(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    """Completions, losses and KL divergences of each step are those with a second base."""
    found = []
    for own_base in (True, False):
        model = trained()
        if own_base:
            llama().save_pretrained(tmp_path / "base")  # type: ignore[operator]
            model.config._name_or_path = str(tmp_path / "base")
        trainer = online(kind, model, tokenizer, tmp_path, beta=0.04 if own_base else 0.0)
        if not own_base:
            set_reference(trainer, 0.04)
        trainer.train()
        found.append(seen(trainer, "loss", "kl", "reward"))
    assert len(found[0]) == 3
    assert torch.tensor(found[0]).allclose(torch.tensor(found[1]), rtol=1e-5)
    assert all(kl > 1e-3 for _, kl, _ in found[0])


def test_set_reference_refuses(tokenizer: Any, tmp_path: Path) -> None:
    """A trainer that has a reference, that knows none, and no beta."""
    trainer = online("GRPO", trained(), tokenizer, tmp_path, beta=0.0)
    with pytest.raises(ValueError, match="above 0"):
        set_reference(trainer, 0.0)
    set_reference(trainer, 0.04)
    for other in (trainer, SimpleNamespace(beta=0.0), SimpleNamespace(ref_model=None)):
        with pytest.raises(ValueError, match="beta=0"):
            set_reference(other, 0.04)


class Engine:
    """Stands for vLLM's LLM: generates with a plain model of the weights that it was sent last."""

    sent: ClassVar[list[dict[str, torch.Tensor]]] = []

    def __init__(self, **_: Any) -> None:
        runner = SimpleNamespace(model=self)
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=64),
            model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner)),
        )
        self.sent.append({})

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        self.sent[-1].update({name: t.clone() for name, t in named})

    def reset_prefix_cache(self) -> None:
        self.sent.append({})

    def generate(self, prompts: list[dict[str, Any]], **_: Any) -> list[Any]:
        plain: Any = llama()
        plain.load_state_dict(self.sent[-2])
        return [self.answer(plain, prompt["prompt_token_ids"]) for prompt in prompts]

    @staticmethod
    @torch.no_grad()
    def answer(plain: Any, prompt: list[int]) -> Any:
        given = torch.tensor([prompt])
        ids = plain.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=5, do_sample=True)
        scores = plain(ids).logits[0].log_softmax(-1)[len(prompt) - 1 :]
        tokens = ids[0, len(prompt) :].tolist()
        found = [{t: SimpleNamespace(logprob=scores[i, t].item(), rank=1)} for i, t in enumerate(tokens)]
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[SimpleNamespace(token_ids=tokens, logprobs=found)])


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Engine]]:
    from trl.generation import vllm_generation

    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", Engine, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", dict, raising=False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # TRL sets them
        monkeypatch.setenv(name, os.environ.get(name, "0"))
        monkeypatch.delenv(name)
    Engine.sent = []
    return Engine


@pytest.mark.parametrize("variant", ["lora", "hra"])
def test_an_inference_engine_gets_merged_weights(
    variant: str, engine: type[Engine], tokenizer: Any, tmp_path: Path
) -> None:
    """All of a plain model's parameters and nothing else, anew in each step: what it generates has the policy's own
    probabilities, as TRL measures them."""
    model = trained(variant)
    trainer = online("GRPO", model, tokenizer, tmp_path, use_vllm=True, vllm_mode="colocate")
    trainer.train()
    *sent, last = engine.sent
    assert len(sent) == 3
    assert not last
    plain: Any = llama()
    for weights in sent:
        assert list(weights) == [name for name, _ in plain.named_parameters()]
    assert any(not torch.equal(sent[0][name], t) for name, t in sent[1].items())
    ratios = seen(trainer, "sampling/importance_sampling_ratio/min", "sampling/importance_sampling_ratio/max")
    assert torch.tensor(ratios).allclose(torch.ones(3, 2), atol=1e-4)
    plain.load_state_dict(dict(Merged(model).named_parameters()))
    assert_close(logits(plain), logits(model), 1e-5)


def test_merged_parameters(base_folder: Path) -> None:
    """Tied ones once; a quantised base's dense; an adapted head that is tied has no place."""
    tied: Any = qwen3()
    attach(tied, "lora")
    randomize(tied)
    assert [name for name, _ in Merged(tied).named_parameters()] == [name for name, _ in qwen3().named_parameters()]
    model = quantized.quantised(base_folder, "4bit")
    attach(model, "dora")
    randomize(model)
    found, whole = dict(Merged(model).named_parameters()), ll.merged_state_dict(model)
    assert list(found) == [name for name, _ in llama(**quantized.SIZES).named_parameters()]
    assert all(torch.equal(t, whole[name]) for name, t in found.items())
    ll.detach(tied)
    ll.attach(tied, ll.LoRAConfig(r=4, target_names=("lm_head",)))
    with pytest.raises(ll.AttachError, match="tied"):
        Merged(tied).named_parameters()


def test_reward_model(tokenizer: Any, tmp_path: Path) -> None:
    """The new head trains in full beside the adapter, and both are in the checkpoint."""
    from trl import RewardConfig, RewardTrainer

    sizes = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, num_labels=1)
    model: Any = build(transformers.LlamaForSequenceClassification, sizes)
    head = model.score.weight.detach().clone()
    ll.attach(model, ll.LoRAConfig(r=4, modules_to_save=("score",)))
    args = arguments(RewardConfig, tmp_path, max_steps=6, save_strategy="steps", save_steps=6, max_length=16)
    data = Dataset.from_list(PAIRS[:2])
    trainer = RewardTrainer(
        model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[AdapterCallback(model)]
    )
    trainer.train()
    losses = seen(trainer, "loss")
    assert losses[-1][0] < losses[0][0] / 2
    other: Any = build(transformers.LlamaForSequenceClassification, sizes)
    ll.load(other, tmp_path / "checkpoint-6" / "adapter.safetensors")
    assert torch.equal(logits(other), logits(model))
    ll.detach(model)
    assert torch.equal(model.score.weight, head)


# ---- sentence-transformers ----


def sentences(folder: Path, tokenizer: Any) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    if not folder.exists():
        encoder: Any = bert()
        encoder.bert.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    modules = [Transformer(str(folder)), Pooling(SIZES["hidden_size"])]
    model = SentenceTransformer(modules=modules, device="cpu")
    ll.attach(model, ll.LoRAConfig(r=4, exclude_names=("pooler",)))
    return model


def test_sentence_transformers(tokenizer: Any, tmp_path: Path) -> None:
    """Saves the adapter alone, resumes to the bit, goes back to the best; detach gives the model's own saving back."""
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    data = Dataset.from_list([{"anchor": words(4, i), "positive": words(4, 100 + i)} for i in range(8)])
    found = []
    for resumed in (False, True):
        torch.manual_seed(0)
        model = sentences(tmp_path / "encoder", tokenizer)
        randomize(model, by=0.1)
        folder = tmp_path / str(resumed)
        for steps in (2, 4) if resumed else (4,):
            if resumed and steps == 4:
                randomize(model, seed=9)
            args = arguments(
                SentenceTransformerTrainingArguments, folder, max_steps=steps, per_device_train_batch_size=4,
                save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
                load_best_model_at_end=not resumed, metric_for_best_model="loss", greater_is_better=True,
            )  # fmt: skip
            trainer = SentenceTransformerTrainer(
                model, args, train_dataset=data, eval_dataset=data, loss=MultipleNegativesRankingLoss(model),
                callbacks=[AdapterCallback()],
            )  # fmt: skip
            trainer.train(resume_from_checkpoint=resumed and steps == 4)
        found.append(load_file(folder / "checkpoint-4" / "model.safetensors"))
        if not resumed:
            assert trainer.state.best_model_checkpoint.endswith("-2")
            best = load_file(folder / "checkpoint-2" / "model.safetensors")
            assert all(torch.equal(model.state_dict()[name], t) for name, t in best.items())
    assert found[0]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], t) for name, t in found[1].items())
    assert all(".lora_lite." in name for name in found[0])
    trainer.save_model(str(tmp_path / "last"))
    other = sentences(tmp_path / "encoder", tokenizer)
    ll.detach(other)
    plain = other.encode(words(5, 7))
    ll.load(other, tmp_path / "last" / "adapter.safetensors")
    adapted = model.encode(words(5, 7))
    assert (other.encode(words(5, 7)) == adapted).all()
    assert rel_error(torch.tensor(adapted), torch.tensor(plain)) > 1e-3
    ll.attach(other, ll.LoRAConfig(r=2, exclude_names=("pooler",)), name="second")
    trainer = SentenceTransformerTrainer(
        other, args, train_dataset=data, eval_dataset=data, loss=MultipleNegativesRankingLoss(other),
        callbacks=[AdapterCallback()],
    )  # fmt: skip
    with pytest.raises(ll.CheckpointError, match=r"is of one adapter, and default, second are attached here"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    ll.detach(model)
    model.save_pretrained(str(tmp_path / "base"))
    assert (tmp_path / "base" / "modules.json").exists()
    assert not (tmp_path / "base" / "adapter.safetensors").exists()


# ---- Lightning, Fabric, accelerate ----


def test_lightning(tmp_path: Path) -> None:
    """The recipe: checkpoints hold the adapter alone, and training resumes from them to the bit."""
    import lightning

    class Tuned(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = trained("dora")
            self.strict_loading = False

        def training_step(self, ids: torch.Tensor, _: int) -> torch.Tensor:
            return self.model(input_ids=ids, labels=ids).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(ll.parameters(self.model), lr=1e-2)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = ll.state_dict(self.model)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            ll.load_state_dict(self.model, checkpoint["state_dict"])

    def fit(tuned: Tuned, steps: int, from_: Path | None = None) -> lightning.Trainer:
        trainer = lightning.Trainer(
            max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(tuned, DataLoader(token_ids(2, 12), batch_size=2), ckpt_path=from_, weights_only=True)
        return trainer

    whole, first, rest = Tuned(), Tuned(), Tuned()
    fit(whole, 4)
    fit(first, 2).save_checkpoint(tmp_path / "two.ckpt")
    stored = torch.load(tmp_path / "two.ckpt", weights_only=True)["state_dict"]
    assert stored.keys() == ll.state_dict(first.model).keys()
    randomize(rest.model, seed=9)
    fit(rest, 4, tmp_path / "two.ckpt")
    for name, t in ll.state_dict(whole.model).items():
        assert torch.equal(ll.state_dict(rest.model)[name], t)
    ll.detach(rest.model)
    ll.attach(rest.model, ll.LoRAConfig(r=2))
    with pytest.raises(ll.CheckpointError, match="not those of what is attached"):
        fit(rest, 6, tmp_path / "two.ckpt")


def stepping(model: Any, optimizer: Any, library: Any) -> Callable[[], float]:
    """A training step on the same tokens each time, with the library's own backward."""
    ids = token_ids()

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        library.backward(loss)
        optimizer.step()
        return loss.item()

    return step


def test_fabric(tmp_path: Path) -> None:
    """Everything through Fabric's wrapper, detach too; a checkpoint of the adapter alone."""
    import lightning

    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = trained()
    wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(ll.parameters(model), lr=1e-2))
    step = stepping(wrapped, optimizer, fabric)
    step()
    fabric.save(tmp_path / "fabric.ckpt", {"adapter": ll.state_dict(wrapped), "optimizer": optimizer})
    ll.save(wrapped, tmp_path / "adapter.safetensors")
    losses = [step(), step()]
    randomize(model, seed=9)
    state: dict[str, Any] = {"adapter": None, "optimizer": optimizer}
    fabric.load(tmp_path / "fabric.ckpt", state)
    ll.load_state_dict(wrapped, state["adapter"])
    assert [step(), step()] == losses
    assert losses[1] < losses[0]
    ll.detach(wrapped)
    assert torch.equal(logits(model), logits(llama()))
    ll.load(wrapped, tmp_path / "adapter.safetensors")
    assert len(ll.state_dict(model)) == 28


@pytest.mark.parametrize("alone", [False, True], ids=["whole", "alone"])
def test_states_of_accelerate(alone: bool, tmp_path: Path) -> None:
    """`save_state` and `load_state` as they are, and by two hooks with the adapter alone."""
    from accelerate import Accelerator

    model, accelerator = trained("dora"), Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(ll.parameters(model), lr=1e-2))

    def saving(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        weights[:] = [ll.state_dict(each) for each in models]

    def loading(models: list[nn.Module], folder: str) -> None:
        ll.load_state_dict(models.pop(), load_file(Path(folder) / "model.safetensors"))

    if alone:
        accelerator.register_save_state_pre_hook(saving)
        accelerator.register_load_state_pre_hook(loading)

    step = stepping(wrapped, optimizer, accelerator)
    step()
    accelerator.save_state(str(tmp_path))
    losses = [step(), step()]
    randomize(model, seed=9)
    accelerator.load_state(str(tmp_path))
    assert [step(), step()] == losses
    held = load_file(tmp_path / "model.safetensors")
    assert (held.keys() == ll.state_dict(model).keys()) == alone


def test_load_state_dict_is_strict() -> None:
    model = trained()
    tensors = {name: t.clone() for name, t in ll.state_dict(model).items()}
    name = next(iter(tensors))
    for wrong in (
        {key: t for key, t in tensors.items() if key != name},
        {**tensors, "another": tensors[name]},
        {**tensors, name: tensors[name][:1]},
    ):
        with pytest.raises(ll.CheckpointError, match=f"load_state_dict: .*({name}|another)"):
            ll.load_state_dict(model, {key: torch.zeros_like(t) for key, t in wrong.items()})
        assert all(torch.equal(t, tensors[key]) for key, t in ll.state_dict(model).items())


# ---- DeepSpeed ----

ZERO = [
    ("attached", "lora", 1),
    ("attached", "dora", 2),
    ("attached", "hra", 3),
    ("partitioned, then attached", "hra", 3),
    ("partitioned, then attached", "pissa", 3),
    ("partitioned, then loaded", "delora", 3),
    ("recipe", "lora", 3),
    ("trainer", "dora", 3),
]


def test_deepspeed(tmp_path: Path) -> None:
    """ZeRO-1, -2 and -3 on two processes: the adapter that one process trains, in one complete file; and a Trainer's
    checkpoint, which one process writes from what DeepSpeed has gathered."""
    cases = []
    for i, (kind, variant, stage) in enumerate(ZERO):
        folder = tmp_path / str(i)
        folder.mkdir()
        model = adapted(variant, start=kind == "partitioned, then attached")
        ll.save(model, folder / "start.safetensors")
        cases.append((kind, variant, stage, str(folder)))
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).parent / "support" / "deepspeed_processes.py"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    # ./dev installs it apart, where transformers does not find it: it would import it each time it saves a model.
    paths = os.pathsep.join([str(Path(sys.prefix) / "deepspeed"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*torchrun, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for kind, variant, _, name in cases:
        folder, ids, other = Path(name), token_ids(4, 12), llama()
        ll.load(other, folder / "adapter.safetensors")
        if kind == "recipe":
            assert not torch.allclose(logits(other), logits(llama()), atol=1e-4)
            continue
        if kind == "trainer":
            tensors, checkpoint = load_file(folder / "adapter.safetensors"), folder / "checkpoint-2"
            stored = load_file(checkpoint / "adapter.safetensors")
            assert stored.keys() == tensors.keys()
            assert all(torch.equal(stored[key], t) for key, t in tensors.items())
            assert all(".lora_lite." in key for key in load_file(checkpoint / "model.safetensors"))
            continue
        model = alone(adapted(variant, start=kind == "partitioned, then attached"))  # in ZeRO-3 they are
        optimizer = torch.optim.SGD(ll.parameters(model), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        assert_close(logits(other), logits(model), 1e-5, f"{kind} {variant}")


def adapted(variant: str, start: bool) -> Any:
    torch.manual_seed(0)
    model = llama()
    attach(model, variant)
    if not start:
        randomize(model, by=0.2)
    return model
