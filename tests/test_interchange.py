"""Adapters to PEFT's files and back: the same logits on either side, and clear refusals."""

import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

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
    gpt2,
    llama,
    load_tests,
    qwen3,
    qwen3_moe,
    randomize,
    snapshot,
    token_ids,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import ZOO, of

import lora_lite as ll
from lora_lite.targets import find_targets

against_peft = load_tests("test_peft")
TOLERANCE = 1e-5
ROLES: dict[str, Any] = {"target_roles": ()}
MODELS = {"llama": llama, "qwen3": qwen3}
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
EACH_MODEL = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="peft")
        yield


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(token_ids()).logits


def trained(model: Any, variant: str, **fields: Any) -> Any:
    """A model whose adapter has moved and does something."""
    base = logits(model)
    attach(model, variant, calibration_batches(), **{"block_size": 4, **fields} if variant == "antipasto" else fields)
    randomize(model, by=0.3)
    assert (logits(model) - base).norm() > 0.02 * base.norm()
    return model


def read_by_peft(model: nn.Module, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(model, folder).eval()


def saved_by_peft(model: Any, config: Any, folder: Path) -> Any:
    """PEFT's own model with random weights, and its files."""
    theirs = peft.get_peft_model(model, config).eval()
    randomize(theirs, by=0.3)
    theirs.save_pretrained(folder)
    return theirs


@EACH_MODEL
@EACH_VARIANT
def test_export(variant: str, make: Any, tmp_path: Path) -> None:
    ours = trained(make(), variant)
    before = snapshot(ours)
    ll.export_peft(ours, tmp_path)
    assert_same(ours, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert_close(logits(read_by_peft(make(), tmp_path)), logits(ours), TOLERANCE)


@EACH_MODEL
@EACH_VARIANT
def test_there_and_back(variant: str, make: Any, tmp_path: Path) -> None:
    """What leaves as a LoRA comes back as one."""
    ours = trained(make(), variant)
    ll.export_peft(ours, tmp_path)
    again = make()
    attachment = ll.import_peft(again, tmp_path)
    as_lora = variant in ("lora", "eva", "pissa", "antipasto")
    assert attachment.cfg.variant == ("lora" if as_lora else variant)
    assert_close(logits(again), logits(ours), TOLERANCE)
    ll.save(again, tmp_path / "ours.safetensors")
    ll.detach(again)
    ll.load(again, tmp_path / "ours.safetensors")
    assert_close(logits(again), logits(ours), TOLERANCE)


@EACH_MODEL
@pytest.mark.parametrize("variant", against_peft.NAMES)
def test_import(variant: str, make: Any, tmp_path: Path) -> None:
    """Adapters that PEFT made: logits, and gradients of what is trained on."""
    targets = ["q_proj", "down_proj"]
    theirs = saved_by_peft(make(), against_peft.peft_config(variant, targets), tmp_path)
    ours = make()
    attachment = ll.import_peft(ours, tmp_path)
    assert attachment.cfg.variant == variant
    assert len(attachment.targets) == 4
    assert_close(logits(ours), logits(theirs), TOLERANCE)


@pytest.mark.parametrize("kind", [1, 2, 4])
def test_kinds_of_road(kind: Any, tmp_path: Path) -> None:
    config = peft.RoadConfig(variant=f"road_{kind}", group_size=8, target_modules=["q_proj", "down_proj"])
    theirs = saved_by_peft(llama(), config, tmp_path / "theirs")
    ours: Any = llama()
    cfg: Any = ll.import_peft(ours, tmp_path / "theirs").cfg  # type: ignore[union-attr]
    assert (cfg.kind, cfg.group_size) == (kind, 8)
    assert_close(logits(ours), logits(theirs), TOLERANCE)
    ll.export_peft(ours, tmp_path / "ours")
    assert_close(logits(read_by_peft(llama(), tmp_path / "ours")), logits(theirs), TOLERANCE)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_patterns(rslora: bool, dora: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "down_proj"], use_rslora=rslora, use_dora=dora,
        rank_pattern={"q_proj": 8, "^model.layers.1.self_attn.k_proj": 2}, alpha_pattern={"layers.0.mlp.down_proj": 20},
    )  # fmt: skip
    theirs = saved_by_peft(llama(), config, tmp_path / "theirs")
    ours = llama()
    attachment = ll.import_peft(ours, tmp_path / "theirs")
    ranks = {name: adapter.cfg.r for name, adapter in attachment.adapters.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 8
    assert ranks["model.layers.0.self_attn.k_proj"] == 4
    assert ranks["model.layers.1.self_attn.k_proj"] == 2
    assert_close(logits(ours), logits(theirs), TOLERANCE)
    ll.export_peft(ours, tmp_path / "ours")
    assert_close(logits(read_by_peft(llama(), tmp_path / "ours")), logits(theirs), TOLERANCE)


def agrees(make: Callable[[], Any], config: Any, folder: Path) -> Any:
    """The model with what PEFT's model of random tensors saved: it computes what PEFT makes of the file."""
    saved_by_peft(make(), config, folder)
    return read_by_both(make, folder)


def read_by_both(make: Callable[[], Any], folder: Path) -> Any:
    theirs, ours = read_by_peft(make(), folder), make()
    want = output(theirs)
    assert (want - output(ours)).norm() > 0.01 * want.norm()
    ll.import_peft(ours, folder)
    assert_close(output(ours), want, TOLERANCE)
    return ours


@torch.no_grad()
def output(model: Any) -> Tensor:
    return torch.cat([t.flatten() for t in model(input_ids=token_ids()).values() if isinstance(t, Tensor)])


STARTS: list[Any] = ["gaussian", "Gaussian", "orthogonal", "MICA", "eva", False]


@pytest.mark.parametrize(("start", "dora"), [("mica", False), *((start, dora) for start in STARTS for dora in (0, 1))])
def test_starts_that_leave_the_base_alone(start: Any, dora: bool, tmp_path: Path) -> None:
    fields: Any = {"init_lora_weights": start, "use_dora": bool(dora)}
    agrees(llama, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], **fields), tmp_path)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("start", "dora"), [("olora", False), ("OLoRA", False), ("olora", True), ("pissa", True), ("pissa_niter_4", True)]
)
def test_starts_that_change_the_base(start: Any, dora: bool, rslora: bool, tmp_path: Path) -> None:
    refused(a_lora(tmp_path, init_lora_weights=start, use_dora=dora, use_rslora=rslora), f"weights='{start}'.*merge it")


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga", "PiSSA", "EVA", "of a later version"])
def test_starts_that_may_have_changed_the_base(start: str, tmp_path: Path) -> None:
    """Those that need more than a config, and names that PEFT refuses or does not know yet."""
    refused(with_config(a_lora(tmp_path), init_lora_weights=start), f"changed the base.*init_lora_weights='{start}'")


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_pissa_beside_an_embedding(tied: bool, rslora: bool, tmp_path: Path) -> None:
    """PEFT starts embeddings the ordinary way, and leaves their rows as they are."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=["q_proj", "embed_tokens"], use_rslora=rslora
    )
    ours = agrees(lambda: llama(tie_word_embeddings=tied), config, tmp_path / "theirs")
    want = logits(ours)
    ll.save(ours, tmp_path / "file")
    ll.export_peft(ours, tmp_path / "ours")
    ll.detach(ours)
    ll.load(ours, tmp_path / "file")
    assert_close(logits(ours), want, TOLERANCE)
    assert_close(logits(read_by_peft(llama(tie_word_embeddings=tied), tmp_path / "ours")), want, TOLERANCE)


def test_pissa_on_a_head(tmp_path: Path) -> None:
    """PEFT saves what is left of its weight; where an embedding is tied to it, that has changed too."""
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=["q_proj", "lm_head"])
    agrees(llama, config, tmp_path / "untied")
    tied = llama(tie_word_embeddings=True)
    saved_by_peft(tied, config, tmp_path / "tied")
    with pytest.raises(ll.CheckpointError, match=r"PEFT changed model\.embed_tokens\.weight and lm_head.weight, which"):
        ll.import_peft(llama(tie_word_embeddings=True), tmp_path / "tied")


KEYS = [
    r"^model.layers.0|v_proj",
    r"^model\.layers\.1\.self_attn\.q_proj|down_proj",
    r"self_attn.q_proj|^down_proj",
    r"(layers)\.0.*\.(q|down)_proj",
    r"q_proj$|^model.layers.1.mlp.down_proj$",
    r"self_a(t)\3n.q_proj|layers.0.mlp.down_proj",
    r"_proj",
]


@pytest.mark.parametrize("key", KEYS)
def test_keys_of_patterns(key: str, tmp_path: Path) -> None:
    """PEFT's own reading of an expression, of which ^, $ and | are parts; and of what we write of it."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={key: 2},
        alpha_pattern={key: 60, "v_proj": 7},
    )  # fmt: skip
    ours = agrees(llama, config, tmp_path / "theirs")
    ll.export_peft(ours, tmp_path / "ours")
    assert_close(logits(read_by_peft(llama(), tmp_path / "ours")), logits(ours), TOLERANCE)


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (peft.LoraConfig(target_modules=["q_proj", "down_proj"]), ()),
        (peft.LoraConfig(target_modules=["q_proj"], use_rslora=True), ("use_rslora",)),
        (peft.LoraConfig(target_modules=["q_proj"], alpha_pattern={"q_proj": 60}), ("alpha_pattern",)),
        (peft.LoraConfig(target_modules=["q_proj"], rank_pattern={"q_proj": 3}), ("rank_pattern",)),
        (peft.LoraConfig(target_modules=["q_proj"], use_dora=True), ("use_dora",)),
        (peft.DeloraConfig(target_modules=["q_proj"]), ()),
        (peft.HRAConfig(target_modules=["q_proj"]), ()),
        (peft.RoadConfig(target_modules=["q_proj"]), ()),
        (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), ("feedforward_modules",)),
    ],
)
def test_fields_that_a_file_does_not_have(config: Any, kept: tuple[str, ...], tmp_path: Path) -> None:
    """A config of some fields alone is read with PEFT's defaults."""

    def make() -> Any:
        return llama(hidden_size=64, intermediate_size=128, num_attention_heads=1, num_key_value_heads=1)

    saved_by_peft(make(), config, tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({name: fields[name] for name in ("peft_type", "target_modules", *kept)}))
    read_by_both(make, tmp_path)


CLASSIFIER: dict[str, Any] = {**SIZES, "pad_token_id": 0}
CLASSIFIERS: dict[str, tuple[str, str, str, list[str]]] = {
    "llama": ("LlamaForSequenceClassification", "LlamaConfig", "SEQ_CLS", ["q_proj", "v_proj"]),
    "bert": ("BertForSequenceClassification", "BertConfig", "SEQ_CLS", ["query", "dense"]),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", "SEQ_CLS", ["query", "dense"]),
    "tokens": ("BertForTokenClassification", "BertConfig", "TOKEN_CLS", ["query"]),
    "answers": ("BertForQuestionAnswering", "BertConfig", "QUESTION_ANS", ["query"]),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_heads_of_a_task(kind: str, old: bool, tmp_path: Path) -> None:
    """PEFT lists heads under all of their usual names, of which a model has one. Its earlier versions listed none."""
    model, config, task, targets = CLASSIFIERS[kind]
    make = of(model, config, **{**CLASSIFIER, "num_labels": 2 if task == "QUESTION_ANS" else 3})
    saved_by_peft(make(), peft.LoraConfig(r=4, task_type=task, target_modules=targets), tmp_path)  # type: ignore[arg-type]
    if old:
        with_config(tmp_path, modules_to_save=None)
    ours: Any = read_by_both(make, tmp_path)
    (attachment,) = ll.attachment.attachments(ours)
    assert attachment.whole.names
    path = tmp_path / "adapter_model.safetensors"
    other = "classifier" if kind == "llama" else "score"
    save_file({**load_file(path), f"base_model.model.{other}.weight": torch.ones(3)}, path)
    if task != "QUESTION_ANS":
        with pytest.raises(ll.CheckpointError, match=r"the model has no module (score|classifier), which"):
            ll.import_peft(make(), tmp_path)


@pytest.mark.parametrize(
    ("targets", "in_full"),
    [
        (["q_proj", "down_proj"], ["mlp"]),
        (r".*proj|lm_head", ["lm_head"]),
        ("all-linear", ["mlp", "lm_head"]),
        (["q_proj", "embed_tokens"], ["embed_tokens"]),
        (["q_proj"], ["layers.1"]),
    ],
)
def test_targets_within_modules_that_train_in_full(targets: Any, in_full: list[str], tmp_path: Path) -> None:
    agrees(llama, peft.LoraConfig(r=4, target_modules=targets, modules_to_save=in_full), tmp_path)


def test_tensors_of_layers_that_train_in_full(tmp_path: Path) -> None:
    """PEFT would pass over them, with a warning."""
    folder = a_lora(tmp_path, modules_to_save=["norm"])
    path = folder / "adapter_model.safetensors"
    q = {key: t for key, t in load_file(path).items() if ".layers.0." in key}
    save_file({**load_file(path), **{key.replace("q_proj", "norm.q_proj"): t for key, t in q.items()}}, path)
    refused(folder, r"its target_modules, .*, do not match model\.layers\.0\.self_attn\.norm\.q_proj")


@pytest.mark.parametrize("fields", [{}, {"layers_pattern": "layers"}, {"layers_pattern": ["h", "layers"]}])
@pytest.mark.parametrize("blocks", [1, [0], [0, 1], []])
def test_some_blocks(blocks: Any, fields: Any, tmp_path: Path) -> None:
    agrees(llama, peft.LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=blocks, **fields), tmp_path)


def test_what_an_embedding_can_t_take(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], use_dora=True)
    saved_by_peft(llama(), config, tmp_path / "dora")
    refused(tmp_path / "dora", r"^import_peft: .*dora: model\.embed_tokens: lora-lite has no dora on an embedding")


def test_dropout_beside_an_embedding(tmp_path: Path) -> None:
    """PEFT applies none to embeddings, and so do files of ours, while `attach` refuses to leave them out in silence."""
    fields: Any = {"target_modules": ["q_proj", "embed_tokens"], "lora_dropout": 0.5}
    ours = agrees(llama, peft.LoraConfig(r=4, **fields), tmp_path / "theirs")
    (attachment,) = ll.attachment.attachments(ours)
    ours.train()
    ids, embed = token_ids(), ours.model.embed_tokens
    assert torch.equal(embed(ids), embed(ids))
    assert not torch.equal(logits(ours), logits(ours))
    ll.save(ours, tmp_path / "file")
    ll.export_peft(ours, tmp_path / "ours")
    want = output(ours.eval())
    assert_close(output(read_by_both(llama, tmp_path / "ours")), want, TOLERANCE)
    ll.detach(ours)
    assert ll.load(ours, tmp_path / "file").cfg == attachment.cfg
    assert_close(output(ours), want, TOLERANCE)
    with pytest.raises(ll.AttachError, match=r"model\.embed_tokens .*dropout=0.5 leaves elements"):
        ll.attach(llama(), attachment.cfg)


ABOVE: dict[str, tuple[Any, str, int]] = {
    "lora": (peft.LoraConfig(r=8), r"score \(32 → 3\)", 3),
    "dora": (peft.LoraConfig(r=8, use_dora=True), r"score \(32 → 3\)", 3),
    "delora": (peft.DeloraConfig(r=8), r"score \(32 → 3\)", 3),
    "hra": (peft.HRAConfig(r=40), r"q_proj \(32 → 32\)", 32),
}


@pytest.mark.parametrize("variant", ABOVE)
def test_a_rank_above_a_layer_s_width(variant: str, tmp_path: Path) -> None:
    """The formula holds at any rank. `attach` leaves such layers out, or refuses them by name."""
    make = of("LlamaForSequenceClassification", "LlamaConfig", **CLASSIFIER, num_labels=3)
    config, layer, width = ABOVE[variant]
    config.target_modules = ["q_proj", "score"]
    ours = agrees(make, config, tmp_path / "theirs")
    want, (attachment,) = output(ours), ll.attachment.attachments(ours)
    ll.save(ours, tmp_path / "file")
    ll.export_peft(ours, tmp_path / "ours")
    assert_close(output(read_by_both(make, tmp_path / "ours")), want, TOLERANCE)
    ll.detach(ours)
    ll.load(ours, tmp_path / "file")
    assert_close(output(ours), want, TOLERANCE)
    with pytest.raises(ll.AttachError, match=rf"{layer}: r=\d+ is larger than the layer allows; use r ≤ {width}"):
        ll.attach(make(), attachment.cfg)
    if variant != "hra":
        assert "score" not in attach(make(), variant, r=8, exclude_names=()).adapters


def test_an_odd_number_of_reflections(tmp_path: Path) -> None:
    """Of them none starts as the base model, and a trained one is as good as any."""
    ours = agrees(llama, peft.HRAConfig(r=3, target_modules=["q_proj"]), tmp_path / "theirs")
    want, (attachment,) = output(ours), ll.attachment.attachments(ours)
    ll.save(ours, tmp_path / "file")
    ll.export_peft(ours, tmp_path / "ours")
    assert_close(output(read_by_both(llama, tmp_path / "ours")), want, TOLERANCE)
    ll.detach(ours)
    ll.load(ours, tmp_path / "file")
    assert_close(output(ours), want, TOLERANCE)
    with pytest.raises(ll.AttachError, match=r"q_proj .*r must be even: .*got 3"):
        ll.attach(llama(), attachment.cfg)


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_of_a_rank_above_a_layer_s_width(rslora: bool, tmp_path: Path) -> None:
    """PEFT takes all triplets that there are, under the scale of the rank that was asked for."""
    fields: Any = {"target_modules": ["q_proj", "k_proj", "embed_tokens"], "alpha_pattern": {"layers.1.*k_proj": 9}}
    config = peft.LoraConfig(r=40, lora_alpha=6, init_lora_weights="pissa", use_rslora=rslora, **fields)
    ours = agrees(lambda: llama(num_key_value_heads=2), config, tmp_path / "theirs")
    want, (attachment,) = output(ours), ll.attachment.attachments(ours)
    assert {a.cfg.r for n, a in attachment.adapters.items() if "proj" in n} == {16, 32}
    ll.save(ours, tmp_path / "file")
    ll.export_peft(ours, tmp_path / "ours")
    assert_close(output(read_by_both(lambda: llama(num_key_value_heads=2), tmp_path / "ours")), want, TOLERANCE)
    ll.detach(ours)
    ll.load(ours, tmp_path / "file")
    assert_close(output(ours), want, TOLERANCE)
    with pytest.raises(ll.AttachError, match=r"k_proj \(32 → 16\): r=20 is larger than the layer allows; use r ≤ 16"):
        ll.attach(llama(num_key_value_heads=2), ll.PiSSAConfig(r=20, target_names=("k_proj",)))
    tensors = load_file(file := tmp_path / "theirs" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
    save_file({**tensors, key: torch.ones(40, 32)}, file)
    with pytest.raises(ll.CheckpointError, match=r"k_proj\.lora_A has shape \(40, 32\), not \(16, 32\)"):
        ll.import_peft(llama(num_key_value_heads=2), tmp_path / "theirs")


def test_pissa_of_twice_a_layer_s_width(tmp_path: Path) -> None:
    """It leaves as a LoRA of twice its rank."""
    make = of("LlamaForSequenceClassification", "LlamaConfig", **CLASSIFIER, num_labels=3)
    ours = make()
    attach(ours, "pissa", r=3, target_names=("score", "q_proj"))
    randomize(ours)
    ll.export_peft(ours, tmp_path)
    assert_close(output(read_by_both(make, tmp_path)), output(ours), TOLERANCE)


@pytest.mark.parametrize("config", [peft.LoHaConfig, peft.LoKrConfig, peft.OFTConfig, peft.VeraConfig, peft.BOFTConfig])
def test_other_methods_are_named(config: Any, tmp_path: Path) -> None:
    saved_by_peft(llama(), config(target_modules=["q_proj"]), tmp_path)
    refused(tmp_path, rf"its peft_type is '{config().peft_type.value}'; lora-lite takes LORA, DELORA")


def test_a_router_among_the_parameters(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["gate.weight"])
    saved_by_peft(qwen3_moe(), config, tmp_path)
    with pytest.raises(ll.CheckpointError, match=r"target_parameters name gate\.weight, and lora-lite adapts stacked"):
        ll.import_peft(qwen3_moe(), tmp_path)


def test_an_embedding_among_the_parameters(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["embed_tokens.weight"])
    saved_by_peft(llama(), config, tmp_path)
    refused(tmp_path, r"target_parameters name embed_tokens\.weight, and lora-lite adapts stacked experts and linear")


OTHER_KINDS = {
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 8, 2), nn.Flatten(), nn.Linear(8, 4)), ["0"], r"0 \(Conv2d\)"),
    "attention": (
        lambda: nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)}),
        ["attn", "fc"],
        r"attn \(MultiheadAttention\)",
    ),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_layers_are_named(kind: str, tmp_path: Path) -> None:
    make, names, what = OTHER_KINDS[kind]
    saved_by_peft(make(), peft.LoraConfig(r=2, target_modules=names), tmp_path)
    with pytest.raises(ll.CheckpointError, match=rf"it adapts {what}, and lora-lite adapts linear layers"):
        ll.import_peft(make(), tmp_path)


@pytest.mark.parametrize(
    ("fields", "tied", "message"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, True, "puts an embedding's adapter on lm_head too"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
            False,
            r"makes lm_head\.weight one with an embedding .* this model has them apart; tie them first",
        ),
    ],
)
def test_ties_that_peft_keeps(fields: Any, tied: bool, message: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, ensure_weight_tying=True, **fields)
    saved_by_peft(llama(tie_word_embeddings=True), config, tmp_path)
    with pytest.raises(ll.CheckpointError, match=f"its ensure_weight_tying {message}"):
        ll.import_peft(llama(tie_word_embeddings=tied), tmp_path)


def test_a_module_in_full_whose_tie_peft_keeps(tmp_path: Path) -> None:
    fields: Any = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    agrees(lambda: llama(tie_word_embeddings=True), peft.LoraConfig(r=4, **fields), tmp_path)


class Net(nn.Module):
    """Layers whose names end alike, `fc` in a part's midst too, and a block and a layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.fc, self.ffc, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
            self.block = nn.ModuleDict({"fc": nn.Linear(8, 8), "last_norm": nn.LayerNorm(8)})
            self.again, self.one, self.two = self.block, (one := nn.Linear(8, 8)), one

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = torch.sin(input_ids[:, :8].float())
        x = self.again["fc"](self.block["last_norm"](self.block["fc"](x).relu()))
        return {"out": self.two(self.one(self.norm(self.ffc(self.fc(x).relu())).relu()))}


@pytest.mark.parametrize("variant", ["lora", "dora", "delora", "hra", "road"])
def test_names_that_end_alike(variant: str, tmp_path: Path) -> None:
    model = Net()
    attach(model, variant, target_names=("^fc$",))
    randomize(model)
    ll.export_peft(model, tmp_path)
    ours = read_by_both(Net, tmp_path)
    assert_close(output(ours), output(model), TOLERANCE)
    (attachment,) = ll.attachment.attachments(ours)
    assert [target.name for target in find_targets(Net(), attachment.cfg)] == ["fc"]


@pytest.mark.parametrize("outputs", [("^ffc$",), ("^block.fc$",)])
def test_ia3_on_names_that_end_alike(outputs: tuple[str, ...], tmp_path: Path) -> None:
    model = Net()
    attach(model, "ia3_ff", target_names=("^fc$",))
    ll.attach(model, ll.IA3Config(target_names=outputs), name="out")
    randomize(model)
    ll.export_peft(model, tmp_path, name=("default", "out"))
    ours = read_by_both(Net, tmp_path)
    assert_close(output(ours), output(model), TOLERANCE)
    for each in ll.attachment.attachments(ours):
        assert {target.name for target in find_targets(Net(), each.cfg)} == set(each.adapters)


def test_modules_in_full_that_end_alike(tmp_path: Path) -> None:
    model = Net()
    attach(model, "lora", target_names=("^fc$",), modules_to_save=("^norm$",))
    with pytest.raises(ll.AttachError, match=r"block\.last_norm ends as .* name both in modules_to_save"):
        ll.export_peft(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    ll.detach(model)
    attach(model, "lora", target_names=("^fc$",), modules_to_save=("norm$",))
    randomize(model)
    ll.export_peft(model, tmp_path)
    assert_close(output(read_by_both(Net, tmp_path)), output(model), TOLERANCE)


def test_parameters_that_end_alike(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            first, second = (layer.mlp for layer in qwen3_moe().model.layers)
            self.mlp, self.block = first, nn.ModuleDict({"mlp": second})

    model = Two()
    attach(model, "lora", target_names=(r"^mlp\.experts",))
    with pytest.raises(ll.AttachError, match=r"block\.mlp\.experts\.down_proj ends as an adapted parameter is named"):
        ll.export_peft(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_layer_in_two_places(tmp_path: Path) -> None:
    """PEFT adapts it in the first. A block in two places has layers in one each."""
    model = Net()
    attach(model, "lora", target_names=("^one$",))
    with pytest.raises(ll.AttachError, match="one and two are one layer, and PEFT would adapt it in its first place"):
        ll.export_peft(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    saved_by_peft(Net(), peft.LoraConfig(r=4, target_modules=["one"]), tmp_path / "one")
    model = Net()
    before = snapshot(model)
    with pytest.raises(ll.CheckpointError, match="one and two are one layer, in whose first place alone PEFT's"):
        ll.import_peft(model, tmp_path / "one")
    assert_same(model, before)
    agrees(Net, peft.LoraConfig(r=4, target_modules=["block.fc"]), tmp_path / "block")
    attach(model, "lora", target_names=(r"^block\.fc",))
    randomize(model)
    ll.export_peft(model, tmp_path / "ours")
    assert_close(output(read_by_both(Net, tmp_path / "ours")), output(model), TOLERANCE)


def test_a_model_that_is_a_layer(tmp_path: Path) -> None:
    for model, fields in ((nn.Linear(8, 8), {}), (qwen3_moe().model.layers[0].mlp.experts, {"target_names": ("",)})):
        attach(model, "lora", **{"target_roles": (), **fields})
        with pytest.raises(ll.AttachError, match="PEFT adapts what is in a model, and not the model itself"):
            ll.export_peft(model, tmp_path / "none")
        assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("variant", ["lora", "pissa", "dora", "ia3", "ia3_ff", "antipasto", "road"])
def test_on_a_4bit_base(variant: str, tmp_path: Path) -> None:
    """PEFT's HRA and DeLoRA take the stored bytes for the weight, and are left out."""
    base: Any = llama(hidden_size=64, intermediate_size=128)
    base.save_pretrained(tmp_path / "base")

    def quantised() -> Any:
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, dtype=torch.float32
        ).train()

    ours = trained(quantised(), variant)
    ll.export_peft(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(quantised(), tmp_path / "adapter").train()
    assert_close(logits(theirs), logits(ours), TOLERANCE)
    again = quantised()
    ll.import_peft(again, tmp_path / "adapter")
    assert_close(logits(again), logits(ours), TOLERANCE)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("variant", ["hra", "delora"])
def test_pefts_hra_and_delora_know_no_quantised_base(variant: str, bits: str, tmp_path: Path) -> None:
    """On the dense base they compute what they were given; on this one something else, or nothing."""
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    options = transformers.BitsAndBytesConfig(**{bits: True})
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=options, dtype=torch.float32, device_map="cpu"
    )
    ours = trained(base.train(), variant, target_names=("q_proj$",))
    with pytest.warns(UserWarning, match=rf"PEFT's {variant} takes .* codes .* of model\.layers\.0.self_attn\.q_proj"):
        ll.export_peft(ours, tmp_path / "adapter")


def test_a_method_of_ones_own_leaves_as_lora(tmp_path: Path) -> None:
    class Halves(ll.REGISTRY["lora"]):
        """LoRA, half as strong."""

        @staticmethod
        def primitive(p: Any, layer: Any, cfg: Any) -> Any:
            return ll.LowRankAdd(p.lora_A, p.lora_B, cfg.scale / 2)

    ours = trained(llama(), "lora")
    for adapter in ll.attachment.require_attachment(ours).adapters.values():
        adapter.variant = Halves
    ll.export_peft(ours, tmp_path)
    assert_close(logits(read_by_peft(llama(), tmp_path)), logits(ours), TOLERANCE)


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(folder: Path, match: str) -> None:
    model = llama()
    before = snapshot(model)
    with pytest.raises(ll.CheckpointError, match=match):
        ll.import_peft(model, folder)
    assert_same(model, before)


def a_lora(folder: Path, **fields: Any) -> Path:
    saved_by_peft(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], **fields), folder)
    return folder


def with_config(folder: Path, **fields: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def test_refuses_what_it_does_not_compute(tmp_path: Path) -> None:
    biased = a_lora(tmp_path / "b", bias="lora_only")
    assert isinstance(ll.import_peft(llama(), biased), ll.Attachment)  # of a model without biases
    with pytest.raises(ll.CheckpointError, match="bias='lora_only'"):
        ll.import_peft(llama(attention_bias=True), biased)  # whose own the file has lost
    tensors = load_file(biased / "adapter_model.safetensors")
    save_file({**tensors, "base_model.model.model.norm.bias": torch.ones(32)}, biased / "adapter_model.safetensors")
    refused(biased, r"bias='lora_only'; merge it with PEFT \(merge_and_unload\)")
    refused(a_lora(tmp_path / "c", lora_bias=True), "lora_bias=True")
    refused(with_config(a_lora(tmp_path / "d"), use_qalora=True), "use_qalora=True")
    refused(with_config(a_lora(tmp_path / "e"), peft_type="VERA"), "peft_type is 'VERA'")
    refused(with_config(a_lora(tmp_path / "f"), init_lora_weights="pissa_niter_4"), "changed the base weights")
    refused(with_config(a_lora(tmp_path / "g"), r="many"), r"LoRAConfig\.r must be")
    road = peft.RoadConfig(group_size=4, target_modules=["q_proj"])
    saved_by_peft(llama(), road, tmp_path / "h")
    refused(with_config(tmp_path / "h", variant="road_3"), r"RoadConfig\.kind must be one of \(1, 2, 4\)")
    refused(with_config(tmp_path / "h", variant="road_1", group_size=6), "group_size=6 does not divide")


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("target_modules", "(", "a list of names or a regular expression"),
        ("exclude_modules", 3, "a list of names or a regular expression"),
        ("modules_to_save", [3], "a list of names, read as regular expressions"),
        ("modules_to_save", ["("], "a list of names, read as regular expressions"),
        ("target_parameters", "q_proj.weight", "a list of names"),
        ("rank_pattern", {"(": 4}, "a dict of regular expressions"),
        ("alpha_pattern", ["q_proj"], "a dict of regular expressions"),
        ("lora_dropout", "0.1", "a number"),
        ("layers_to_transform", [0.5], "an index or a list of indices"),
        ("layers_pattern", ["("], "a regular expression or a list of them"),
    ],
)
def test_refuses_fields_of_another_kind(field: str, value: Any, wanted: str, tmp_path: Path) -> None:
    refused(
        with_config(a_lora(tmp_path), **{field: value}),
        rf"its {field} must be {wanted}; it is {re.escape(repr(value))}",
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("save_base", [True, False])
def test_embeddings(tied: bool, save_base: bool, tmp_path: Path) -> None:
    """LoRA on an embedding as PEFT saves it, with the base's own embedding beside it or without, and back."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens", "q_proj"])
    theirs = peft.get_peft_model(llama(tie_word_embeddings=tied), config).eval()
    randomize(theirs, by=0.3)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=save_base)
    want, ours = logits(theirs), llama(tie_word_embeddings=tied)
    ll.import_peft(ours, tmp_path / "theirs")
    assert_close(logits(ours), want, TOLERANCE)
    ll.export_peft(ours, tmp_path / "ours")
    assert_close(logits(read_by_peft(llama(tie_word_embeddings=tied), tmp_path / "ours")), want, TOLERANCE)
    again = llama(tie_word_embeddings=tied)
    ll.import_peft(again, tmp_path / "ours")
    assert_close(logits(again), want, TOLERANCE)
    if save_base:
        other = llama(seed=1, tie_word_embeddings=tied)
        with pytest.raises(ll.CheckpointError, match=r"its base has another model\.embed_tokens than this model"):
            ll.import_peft(other, tmp_path / "theirs")


def test_refuses_modules_that_are_no_linears(tmp_path: Path) -> None:
    a_lora(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.model.conv.lora_A.default": torch.ones(2, 2)}, path)
    refused(tmp_path, r"can't take .*conv\.lora_A\.default")


@pytest.mark.parametrize("modules", [["k_proj", "v_proj", "down_proj"], None])
def test_ia3_of_both_kinds(modules: list[str] | None, tmp_path: Path) -> None:
    """PEFT's usual IA3 scales keys, values and the feed-forward block's inner activations: two adapters here, which go
    back into one file."""
    config = peft.IA3Config(target_modules=modules, feedforward_modules=["down_proj"] if modules else None)
    want = logits(saved_by_peft(llama(), config, tmp_path / "theirs"))
    model: Any = llama()
    attached: Any = ll.import_peft(model, tmp_path / "theirs", name="ia")
    assert {name: each.cfg.variant for name, each in attached.items()} == {"ia": "ia3", "ia_ff": "ia3_ff"}
    assert_close(logits(model), want, TOLERANCE)
    for name, each in attached.items():
        assert {t.name for t in ll.targets.find_targets(llama(), each.cfg)} == set(each.adapters), name
        ll.save(model, tmp_path / name, name=name)
    ll.export_peft(model, tmp_path / "ours", name=("ia", "ia_ff"))
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    assert_close(logits(again), want, TOLERANCE)
    ours, theirs = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], t) for name, t in theirs.items())
    ll.detach(model)
    for name in attached:
        ll.load(model, tmp_path / name, name=name)
    assert_close(logits(model), want, TOLERANCE)


def test_ia3_of_both_kinds_or_none(tmp_path: Path) -> None:
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    saved_by_peft(llama(), config, tmp_path)
    model = llama()
    ll.attach(model, ll.LoRAConfig(r=4), name="ia_ff")
    before = snapshot(model)
    with pytest.raises(ll.AttachError, match="named 'ia_ff' is attached"):
        ll.import_peft(model, tmp_path, name="ia")
    assert_same(model, before)
    ll.attach(model, ll.IA3Config(), name="kv")
    for names, layers in ((("ia_ff", "kv"), "ia_ff, kv"), (("kv", "kv"), "kv, kv")):
        with pytest.raises(ll.AttachError, match=rf"{layers}: a PEFT file holds several adapters only if"):
            ll.export_peft(model, tmp_path / "out", name=names)
    assert not (tmp_path / "out").exists()


def test_refuses_another_model(tmp_path: Path) -> None:
    saved_by_peft(llama(num_hidden_layers=3), peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "deeper")
    refused(tmp_path / "deeper", r"no linear layer model\.layers\.2\.self_attn\.q_proj")
    wider = llama(hidden_size=64)
    saved_by_peft(wider, peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "wider")
    refused(tmp_path / "wider", r"has shape \(4, 64\), not \(4, 32\)")


def test_refuses_damaged_files(tmp_path: Path) -> None:
    refused(tmp_path / "missing", r"no adapter_config\.json: there is no such folder, and nothing is fetched")
    a_lora(tmp_path / "above" / "default")
    refused(tmp_path / "above", r"it has no adapter_config\.json; is .*above/default meant\?")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "it is a file; name the folder")
    folder = a_lora(tmp_path / "truncated")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused(folder, "not a readable safetensors file")
    folder = a_lora(tmp_path / "incomplete")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight")
    save_file(tensors, folder / "adapter_model.safetensors")
    refused(folder, r"q_proj\.lora_B is missing")
    folder = a_lora(tmp_path / "pickled")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, "pickle")
    file = a_lora(tmp_path / "crafted") / "adapter_config.json"
    config = json.loads(file.read_text())
    for text, why in {
        "[]": "adapter_config.json is not readable",
        '{"a":' * 100_000: "adapter_config.json is not readable",
        json.dumps({**config, "peft_type": []}): "its peft_type must be a name",
        json.dumps({**config, "lora_dropout": 10**400}): "its lora_dropout must be a number",
        json.dumps({**config, "r": 10**20}): r"r must be a whole number below",
    }.items():
        file.write_text(text)
        refused(file.parent, why)


SHAPES = [(), (0,), (1,), (32,), (0, 0), (1, 0), (2, 3, 4), (1, 1, 2, 2)]


@pytest.mark.parametrize("variant", [*VARIANTS, "experts"])
def test_tensors_of_any_shape(variant: str, tmp_path: Path) -> None:
    """A damaged file's are taken, where they have all numbers and no other order, or refused."""
    make = qwen3_moe if variant == "experts" else llama
    names = {"ia3_ff": "down_proj$", "experts": r"experts\.(gate_up|down)_proj$"}
    model = make()
    attach(model, "lora" if variant == "experts" else variant, target_names=(names.get(variant, "q_proj$"),))
    ll.export_peft(model, tmp_path)
    tensors = load_file(file := tmp_path / "adapter_model.safetensors")
    for key in [key for key in tensors if "layers.0" in key]:
        for shape in SHAPES:
            save_file({**tensors, key: torch.ones(shape)}, file)
            if torch.ones(shape).squeeze().shape == tensors[key].squeeze().shape:
                ll.import_peft(make(), tmp_path)
                continue
            with pytest.raises(ll.CheckpointError):
                ll.import_peft(make(), tmp_path)


def test_export_leaves_a_pair_or_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors beside an earlier config would load, with the wrong alpha."""
    folder, model = a_lora(tmp_path / "earlier"), llama()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    attach(model, "lora", alpha=50.0)

    def fail(*args: Any) -> None:
        raise OSError("disk gone")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", fail)
        with pytest.raises(ll.CheckpointError, match=r"export_peft: can't write .*earlier: disk gone"):
            ll.export_peft(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_export_refuses(tmp_path: Path) -> None:
    with pytest.raises(ll.AttachError, match="no adapter is attached"):
        ll.export_peft(llama(), tmp_path)
    model = llama()
    attach(model, "hra", rank_pattern={"q_proj": 2})
    with pytest.raises(ll.AttachError, match="one r for all layers"):
        ll.export_peft(model, tmp_path)
    model = llama()
    attach(model, "lora")
    (tmp_path / "file").write_text("")
    with pytest.raises(ll.CheckpointError, match="can't write"):
        ll.export_peft(model, tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("variant", VARIANTS)
def test_conv1d(variant: str, tmp_path: Path) -> None:
    """PEFT has some methods there, and what it has not is refused."""
    model = gpt2()
    attach(model, variant, calibration_batches(), target_names=("c_attn$", "c_fc$"))
    randomize(model, by=0.3)
    if variant in ("hra", "delora", "road"):
        with pytest.raises(ll.AttachError, match=rf"h\.0\.attn\.c_attn: PEFT has no {variant} on a Conv1D; .*save\("):
            ll.export_peft(model, tmp_path / "none")
        assert not (tmp_path / "none").exists()
        return
    ll.export_peft(model, tmp_path)
    assert_close(logits(read_by_peft(gpt2(), tmp_path)), logits(model), TOLERANCE)


def test_mambas(tmp_path: Path) -> None:
    """PEFT refuses a LoRA on their out_proj, and takes the rest, and other methods there."""
    make = ZOO["mamba"][0]
    model = make()
    attach(model, "lora")
    with pytest.raises(ll.AttachError, match=r"0\.mixer\.out_proj: PEFT takes no out_proj of a Mamba.*exclude_names"):
        ll.export_peft(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    ll.export_peft(model, tmp_path / "vllm", for_="vllm")
    for variant, fields in (("lora", {"exclude_names": ("out_proj", "lm_head")}), ("hra", {})):
        ll.detach(model)
        attach(model, variant, **fields)
        randomize(model, by=0.3)
        ll.export_peft(model, tmp_path / variant)
        assert_close(logits(read_by_peft(make(), tmp_path / variant)), logits(model), TOLERANCE)


def test_import_on_an_attached_model(tmp_path: Path) -> None:
    a_lora(tmp_path)
    model = llama()
    attach(model, "lora")
    with pytest.raises(ll.AttachError, match="attached to this model already"):
        ll.import_peft(model, tmp_path)


@pytest.mark.parametrize("variant", ["lora", "pissa", "dora", "antipasto"])
@pytest.mark.parametrize("reader", ["peft", "vllm", "llama.cpp"])
def test_uniform_files(variant: str, reader: Any, tmp_path: Path) -> None:
    """One rank and one alpha for all: a reader that knows no patterns computes the same, and PEFT does."""
    model: Any = llama()
    fields = {"rank_pattern": {"q_proj": 2 if variant != "antipasto" else 8}}
    fields |= {"alpha_pattern": {r"1\.mlp": 11.0}, "rslora": True} if variant != "antipasto" else {}
    attach(model, variant, **fields)
    randomize(model, by=0.3)
    if variant == "dora" and reader != "peft":
        with pytest.raises(ll.AttachError, match=rf"for_='{reader}'.*takes LoRA, and dora is none.*save_merged"):
            ll.export_peft(model, tmp_path / "none", for_=reader)
        assert not (tmp_path / "none").exists()
        return
    ll.export_peft(model, tmp_path, uniform=reader == "peft", for_=reader)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["rank_pattern"] == written["alpha_pattern"] == {}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {len(t) for name, t in tensors.items() if name.endswith("lora_A.weight")} == {written["r"]}
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    with torch.no_grad():
        assert_close(theirs(token_ids()).logits, model(token_ids()).logits, 1e-5)
        if variant != "dora":
            plain: Any = llama()
            for name, layer in plain.named_modules():
                A = tensors.get(f"base_model.model.{name}.lora_A.weight")
                if A is not None:
                    B = tensors[f"base_model.model.{name}.lora_B.weight"]
                    ranks = {"llama.cpp": len(A)}  # of the tensor; the others take the config's
                    layer.weight += written["lora_alpha"] / ranks.get(reader, written["r"]) * B @ A
            assert_close(plain(token_ids()).logits, model(token_ids()).logits, 1e-5)


@EACH_VARIANT
def test_every_file_says_r_and_alpha(variant: str, tmp_path: Path) -> None:
    """Readers ask for them before they look at what the file holds."""
    ll.export_peft(trained(llama(), variant), tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert isinstance(written["r"], int)
    assert isinstance(written["lora_alpha"], int | float)
    assert written["target_modules"]


@pytest.mark.parametrize(
    ("reader", "variant", "fields", "what"),
    [
        ("vllm", "ia3", {}, "takes LoRA, and ia3 is none"),
        ("llama.cpp", "hra", {}, "takes LoRA, and hra is none"),
        ("vllm", "road", {}, "takes LoRA, and road is none"),
        ("llama.cpp", "road", {}, "takes LoRA, and road is none"),
        ("vllm", "lora", {"modules_to_save": (r"\.norm$",)}, r"vLLM takes no modules .* model\.norm\.weight"),
        ("vllm", "lora", {"r": 600}, "its rank is 600, and vLLM's largest is 512"),
        (
            "llama.cpp",
            "lora",
            {"modules_to_save": ("embed_tokens",)},
            r"norms beside a LoRA .* model\.embed_tokens\.weight",
        ),
        ("llama.cpp", "lora", {"target_names": ("embed_tokens",)}, r"model\.embed_tokens: .* the other way round"),
        (
            "llama.cpp",
            "lora",
            {"target_names": ("lm_head",)},
            "lm_head: llama.cpp keeps no head that is tied to the embedding",
        ),
    ],
)
def test_what_a_server_would_refuse(reader: Any, variant: str, fields: Any, what: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 640, "intermediate_size": 640, "head_dim": 320} if fields.get("r") else {}
    model = llama(tie_word_embeddings=True, **sizes)
    attach(model, variant, **fields)
    with pytest.raises(ll.AttachError, match=f"{what}; write merged weights"):
        ll.export_peft(model, tmp_path / "none", for_=reader)
    assert not (tmp_path / "none").exists()
    if fields == {"modules_to_save": (r"\.norm$",)}:
        ll.export_peft(model, tmp_path, for_="llama.cpp")
        return
    ll.export_peft(model, tmp_path)
    with pytest.raises(ValueError, match=r"for_ must be one of 'peft', 'vllm', 'llama.cpp'; got 'ollama'"):
        ll.export_peft(model, tmp_path, for_="ollama")  # type: ignore[arg-type]


# ---- layers that have moved ------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A model whose layers have other names: model.layers has become model.language_model.layers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision = nn.Linear(32, 32)  # not the same names
        self.model = nn.ModuleDict({"language_model": model.model})
        self.lm_head, self.config = model.lm_head, model.config

    def forward(self, ids: Tensor) -> Any:
        hidden = self.model["language_model"](input_ids=ids).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(hidden))


MOVED = {"model.layers": "model.language_model.layers"}
PATTERNS = {
    "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 2},
    "alpha_pattern": {r"^model\.layers\.1": 40.0},
}


@pytest.mark.parametrize("form", ["ours", "peft"])
def test_layers_that_have_moved(form: str, tmp_path: Path) -> None:
    """Ranks and alphas by the old names stay with their layers, also in the files written afterwards."""
    ours = trained(llama(), "lora", **PATTERNS)
    path = tmp_path / "adapter.safetensors" if form == "ours" else tmp_path
    (ll.save if form == "ours" else ll.export_peft)(ours, path)
    read: Any = ll.load if form == "ours" else ll.import_peft
    other = Wrapped(llama())
    before = snapshot(other)
    with pytest.raises(
        ll.CheckpointError, match=rf"have other names here, pass prefix_map={MOVED}".replace("{", r"\{")
    ):
        read(other, path)
    with pytest.raises(ll.CheckpointError, match="prefix_map: 'layers' begins none of its names"):
        read(other, path, prefix_map={"layers": "model"})
    assert_same(other, before)
    attachment = read(other, path, prefix_map=MOVED)
    assert_close(logits(other), logits(ours), 1e-6)
    assert all(name.startswith("model.language_model.layers") for name in attachment.adapters)
    ll.save(other, tmp_path / "again")
    ll.export_peft(other, tmp_path / "peft")
    for again, file in ((ll.load, "again"), (ll.import_peft, "peft")):
        fresh = Wrapped(llama())
        again(fresh, tmp_path / file)
        assert_close(logits(fresh), logits(ours), 1e-6)


def vision_language() -> Any:
    """With a vision tower whose layers are called as those of the language model, which is `llama`."""
    text = {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "pad_token_id": 0}
    vision = {"hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 16}
    made = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=60)
    model: Any = build(transformers.LlavaForConditionalGeneration, made)
    model.model.language_model, model.lm_head = (small := cast(Any, llama())).model, small.lm_head
    return model


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.(q|v)_proj"], ids=str)
@pytest.mark.parametrize("in_full", [None, ["mlp"]], ids=str)
def test_a_language_model_s_adapter_in_a_larger_model(in_full: Any, targets: Any, tmp_path: Path) -> None:
    """The map says what the file is of: its target_modules match layers of the vision tower too."""
    config = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=in_full)
    theirs = saved_by_peft(llama(), config, tmp_path)
    large = vision_language()
    before = snapshot(large)
    if not in_full:
        with pytest.raises(ll.CheckpointError, match=rf"pass prefix_map={MOVED}".replace("{", r"\{")):
            ll.import_peft(large, tmp_path)
    assert_same(large, before)
    attachment: Any = ll.import_peft(large, tmp_path, prefix_map={"model": "model.language_model"})
    assert_close(logits(large), logits(theirs), TOLERANCE)
    assert all(name.startswith("model.language_model.") for name in (*attachment.adapters, *attachment.whole.names))
    ll.export_peft(large, tmp_path / "ours")
    again = vision_language()
    ll.import_peft(again, tmp_path / "ours")
    assert_close(logits(again), logits(theirs), TOLERANCE)


def test_modules_that_have_moved(tmp_path: Path) -> None:
    """Modules that train in full, too; several beginnings at once, and a target_modules that is an expression."""
    config = peft.LoraConfig(
        r=4, target_modules=r"model\.layers\.\d+\.self_attn\.q_proj", modules_to_save=["model.norm"]
    )
    theirs = saved_by_peft(llama(), config, tmp_path)
    prefixes = {**MOVED, "model.norm": "model.language_model.norm"}
    other = Wrapped(llama())
    with pytest.raises(ll.CheckpointError, match=r"pass prefix_map=\{'model.norm': 'model.language_model.norm'\}"):
        ll.import_peft(other, tmp_path, prefix_map=MOVED)
    ll.import_peft(other, tmp_path, prefix_map=prefixes)
    assert_close(logits(other), logits(theirs), 1e-5)
    ll.save(other, tmp_path / "ours")
    back: Any = llama()
    ll.load(back, tmp_path / "ours", prefix_map={new: old for old, new in prefixes.items()})
    assert_close(logits(back), logits(theirs), 1e-5)


def test_blocks_that_change_places_take_their_patterns_along(tmp_path: Path) -> None:
    """What a file says of a layer is under the name that the layer has when it is written."""
    ours: Any = llama()
    attach(ours, "lora", alpha_pattern={r"layers\.1\.": 50.0}, rank_pattern={r"layers\.0\..*q_proj": 2})
    randomize(ours, by=0.3)
    ours.model.layers = nn.ModuleList(reversed(ours.model.layers))
    want = logits(ours)
    ll.save(ours, tmp_path / "file")
    ll.detach(ours)
    ll.load(ours, tmp_path / "file")
    assert_close(logits(ours), want, 1e-6)


def test_a_layer_in_a_plain_list(tmp_path: Path) -> None:
    """PEFT puts its own in the layer's place, and the forward takes the bare one from the list."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.steps = [self.fc]

        def forward(self, x: Tensor) -> Tensor:
            return self.steps[0](x)

    model = Listed()
    ll.attach(model, ll.LoRAConfig(r=2, target_roles=()))
    with pytest.raises(ll.AttachError, match=r"fc and steps\[0\] are one layer, and PEFT would adapt it in its first"):
        ll.export_peft(model, tmp_path / "peft")
