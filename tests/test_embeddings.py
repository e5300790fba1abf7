"""Low-rank sums on nn.Embedding: against PEFT's, against the formula, and through all that an adapter lives through."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models import (
    VOCAB,
    assert_close,
    assert_same,
    attach,
    bert,
    calibration_batches,
    config,
    gemma3,
    gpt2,
    llama,
    logits,
    only_adapter,
    randomize,
    snapshot,
    start_tolerance,
    token_ids,
)
from torch import Tensor, nn

import lora_lite as ll

EMBED = "model.embed_tokens"
NAMES = (r"embed_tokens$", r"q_proj$")
METHODS = ("lora", "pissa", "antipasto")
MODELS: dict[str, Callable[[], nn.Module]] = {
    "untied": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "scaled": gemma3,
}


def adapted(make: Callable[[], nn.Module] = llama, variant: str = "lora", **fields: Any) -> Any:
    """A model with the embedding and the queries adapted, away from the start, the same on every call."""
    model = make()
    torch.manual_seed(0)
    attach(model, variant, **{"target_names": NAMES, **fields})
    randomize(model, by=0.3)
    return model


def loss(model: Any) -> Tensor:
    """On tokens of which some are padding."""
    ids = token_ids()
    ids[0, :5] = 0
    return model(input_ids=ids, labels=ids).loss


# ---- which are chosen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ({}, []),
        ({"target_roles": ()}, []),
        ({"target_roles": (), "exclude_names": ()}, []),
        ({"target_roles": ("embedding",)}, ["wte", "wpe"]),
        ({"target_roles": ("reader", "embedding")}, ["wte", "wpe"]),
        ({"target_roles": ("embedding",), "exclude_names": ("wpe",)}, ["wte"]),
        ({"target_names": ("wte$",)}, ["wte"]),
        ({"target_names": (r"(wte|c_attn)$",)}, ["wte"]),
        ({"target_names": ("w.e",)}, ["wte", "wpe"]),
        ({"target_names": (".*",)}, []),
        ({"target_names": ("transformer",)}, []),
        ({"target_names": (".*", "wte")}, ["wte"]),
        ({"target_names": (r"^(?!.*c_proj)",)}, []),
    ],
    ids=str,
)
def test_chosen_where_meant(fields: dict[str, Any], chosen: list[str]) -> None:
    attachment = ll.attach(gpt2(), ll.LoRAConfig(r=4, **fields))
    embeddings = [target for target in attachment.targets if isinstance(target.layer, nn.Embedding)]
    assert [target.name.rpartition(".")[2] for target in embeddings] == chosen
    assert {target.role for target in embeddings} <= {"embedding"}
    said = {each.kind: each.why for each in attachment.left_out}
    for name in ("transformer.wte", "transformer.wpe"):
        assert (name in said) == (name.rpartition(".")[2] not in chosen)


def test_why_it_is_left_out_is_said() -> None:
    text = ll.attach(llama(), ll.LoRAConfig(r=4, target_names=(".*",))).summary()
    assert "model.embed_tokens ×1 (9.3 %): an embedding, which target_roles or target_names must name" in text


def test_the_default_exclusions_spare_what_a_role_asks_for_and_others_do_not() -> None:
    assert EMBED in ll.attach(llama(), ll.LoRAConfig(r=4, target_roles=("embedding",))).adapters
    with pytest.raises(ll.AttachError, match=r"no layer matches (.|\n)*embed_tokens \(embedding\) ×1"):
        ll.attach(llama(), ll.LoRAConfig(r=4, target_roles=("embedding",), exclude_names=("embed",)))
    with pytest.raises(ll.AttachError, match=r"'embed_tokens\$' of "):
        ll.attach(llama(), ll.LoRAConfig(r=4, target_names=NAMES, layers=(0,)))
    with pytest.raises(ll.AttachError, match=r"token_type_embeddings \(2 → 32\): r=4 is larger"):
        ll.attach(bert(), ll.LoRAConfig(r=4, target_names=(r"_embeddings$",)))
    assert len(ll.attach(bert(), ll.LoRAConfig(r=4, target_roles=("embedding",))).targets) == 2


# ---- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_pefts_outputs_and_gradients(make: Callable[[], nn.Module]) -> None:
    ours, theirs = make(), make()
    attachment = ll.attach(ours, ll.LoRAConfig(r=4, alpha=6, target_names=NAMES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            theirs,  # type: ignore[arg-type]
            peft.LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens", "q_proj"]),
        ).eval()
    randomize(ours)
    pairs = []
    for layer, adapter in attachment.adapters.items():
        wrapped: Any = theirs.base_model.model.get_submodule(layer)
        for side in "AB":
            p = getattr(wrapped, f"lora_embedding_{side}" if layer == EMBED else f"lora_{side}")["default"]
            pairs.append((getattr(adapter, f"lora_{side}"), p if layer == EMBED else p.weight))
    with torch.no_grad():
        for mine, its in pairs:
            its.copy_(mine)
    assert_close(logits(ours), logits(theirs), 1e-5)
    for model in (ours, theirs):
        loss(model).backward()
    for mine, its in pairs:
        assert mine.grad is not None
        assert its.grad is not None
        assert_close(mine.grad, its.grad, 1e-5)
    A: Any = pairs[0][0]
    assert not A.grad[:, 0].any(), "padding"


@pytest.mark.parametrize("variant", METHODS)
@pytest.mark.parametrize("shape", [(7,), (2, 5), (1, 0), ()], ids=str)
def test_formula(variant: str, shape: tuple[int, ...]) -> None:
    """E[ids] + ΔW[:, ids]ᵀ in float64, and the gradients of ΔW's factors through one-hot rows."""
    model = nn.Sequential(nn.Embedding(20, 12, padding_idx=3, dtype=torch.float64))
    attach(model, variant, dtype=torch.float64, target_names=("0",))
    randomize(model)
    ids, E, adapter = torch.randint(20, shape), model[0].weight, only_adapter(model)
    dy = torch.randn(*shape, 12, dtype=torch.float64)
    trainable = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
    y = model(ids)
    got = torch.autograd.grad(y, list(trainable.values()), dy)

    delta = {
        "lora": lambda p: 1.5 * p.lora_B @ p.lora_A,
        "pissa": lambda p: 1.5 * (p.lora_B @ p.lora_A - p.lora_B0 @ p.lora_A0),
        "antipasto": lambda p: (
            p.lora_U @ torch.diag(p.lora_S + p.lora_delta_s) @ turned(p) - p.lora_U * p.lora_S @ p.lora_Vh
        ),
    }[variant](adapter)
    one_hot = nn.functional.one_hot(ids, 20).to(torch.float64)
    want = E[ids] + one_hot @ delta.mT
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    if variant == "lora":  # the padding's id trains B, and not its column of A
        h = (one_hot @ adapter.lora_A.mT).detach()
        not_padding = one_hot * (ids != 3)[..., None]
        dA = 1.5 * ((dy @ adapter.lora_B).reshape(-1, 4).mT @ not_padding.reshape(-1, 20))
        dB = 1.5 * (dy.reshape(-1, 12).mT @ h.reshape(-1, 4))
        for mine, its in zip(got, (dA, dB), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)


def turned(p: Any) -> Tensor:
    """R Vᵀ of AntiPaSTO, block by block: the Cayley map of a bounded skew matrix, θ = 0.5."""
    bound, rows = 2 * torch.tan(torch.tensor(0.25, dtype=torch.float64)), []
    for block, upper in enumerate(p.lora_rot_T):
        X = torch.zeros(4, 4, dtype=torch.float64)
        X[tuple(torch.triu_indices(4, 4, 1))] = upper.double()
        X = bound * torch.tanh((X - X.mT) / 2 / bound) / 2
        rows.append(
            torch.linalg.inv(torch.eye(4).double() - X) @ (torch.eye(4) + X) @ p.lora_Vh[4 * block : 4 * block + 4]
        )
    return torch.cat(rows)


def test_a_method_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_lite.variant.REGISTRY", dict(ll.REGISTRY))

    class MineConfig(ll.AdapterConfig):
        variant = "mine"

    class Mine(ll.Variant):
        name, config = "mine", MineConfig

        @staticmethod
        def param_specs(in_features: int, out_features: int, cfg: Any) -> dict[str, ll.ParamSpec]:
            return {
                "lora_A": ll.ParamSpec((cfg.r, in_features), init="near_one"),
                "lora_v": ll.ParamSpec((out_features,), init="zeros"),
            }

        @staticmethod
        def primitive(p: Any, layer: nn.Module, cfg: Any) -> ll.LowRankAdd:
            return ll.LowRankAdd(p.lora_A.tanh(), p.lora_v[:, None].expand(-1, cfg.r))

    ll.register(Mine)
    model = nn.Sequential(nn.Embedding(9, 6))
    ids = torch.tensor([[1, 8, 1]])
    base = model(ids)
    ll.attach(model, MineConfig(r=2, target_names=("0",)))
    assert torch.equal(model(ids), base)
    randomize(model)
    p = only_adapter(model)
    torch.testing.assert_close(model(ids), base + p.lora_A.tanh().sum(0)[ids][..., None] * p.lora_v)


# ---- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("variant", METHODS)
def test_start_is_the_base_and_detach_gives_it_back(make: Callable[[], nn.Module], variant: str) -> None:
    model = make()
    before, base = snapshot(model), logits(model)
    attach(model, variant, target_names=NAMES)
    assert_close(logits(model), base, start_tolerance(variant, 1e-6))
    if variant == "lora":
        assert torch.equal(logits(model), base)
    randomize(model)
    assert not torch.allclose(logits(model), base, atol=1e-3)
    with ll.disabled(model):
        assert torch.equal(logits(model), base)
    ll.detach(model)
    assert_same(model, before)


def test_ids_that_training_never_shows_keep_their_rows() -> None:
    """And the start is not as small as a fan-in of the whole vocabulary would make it."""
    model = nn.Sequential(nn.Embedding(5000, 12, padding_idx=7))
    everything = torch.arange(5000)
    base = model(everything)
    ll.attach(model, ll.LoRAConfig(r=4, target_names=("0",)))
    assert only_adapter(model).lora_B.std().item() == pytest.approx(1, abs=0.3)
    optimizer = torch.optim.SGD(ll.parameters(model), lr=0.1)
    seen = torch.tensor([7, 40, 41, 99])
    for _ in range(3):
        model(seen).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = (model(everything) != base).any(1).nonzero().flatten().tolist()
    assert changed == [40, 41, 99], "nor does the padding's"


# ---- what can't be, by name ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["dora", "delora", "hra", "ia3", "ia3_ff", "eva", "antipasto", "road"])
def test_other_methods_are_refused(variant: str) -> None:
    model = llama()
    before = snapshot(model)
    message = rf"{EMBED} \(61 → 32\): {variant} .*give the embedding a config of its own.*exclude_names"
    by_role = {"target_names": ("_(proj|tokens)",), "target_roles": ("reader", "embedding")}
    for fields in ({"target_names": NAMES}, by_role):
        with pytest.raises(ll.AttachError, match=message):
            ll.attach(model, config(variant, **fields), calibration_data=calibration_batches())
        assert_same(model, before)
    attachment = attach(model, variant, target_names=(".*",), exclude_names=("lm_head",))  # which names none
    assert EMBED not in attachment.adapters


def test_dropout_is_refused() -> None:
    with pytest.raises(ll.AttachError, match=rf"{EMBED} .*dropout=0.1 .*an id has none; use dropout=0"):
        ll.attach(llama(), ll.LoRAConfig(r=4, dropout=0.1, target_names=NAMES))
    ll.attach(llama(), ll.LoRAConfig(r=4, dropout=0.1, target_names=(".*",)))


class Half(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 0.5


class Scaled(Half):
    embed_scale = 0.5


class Replaced(Scaled):
    """As T5Gemma2's: one id has another row."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return torch.where((input == 9)[..., None], torch.ones_like(y), y)


class ByPosition(nn.Embedding):
    """Rows by where an id stands, and not by the id (Whisper's positions)."""

    def forward(self, input: Tensor) -> Tensor:
        return self.weight[: input.shape[1]]


class Normed(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(input), dim=-1)


def scaled(num_embeddings: int, embedding_dim: int) -> nn.Embedding:
    """Gemma's, whose scale is a buffer."""
    kind: Any = transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding
    return kind(num_embeddings, embedding_dim, 0, embedding_dim**0.5)


class PerFeature(Half):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.embed_scale = torch.rand(6)

    def forward(self, input: Tensor) -> Tensor:
        return nn.Embedding.forward(self, input) * self.embed_scale


def unused(layer: nn.Embedding) -> nn.Embedding:
    layer.embed_scale = 2.0  # type: ignore[assignment]
    return layer


class Shifted(nn.Embedding):
    """As OPT's positions, counted from a mask."""

    def forward(self, attention_mask: Tensor, past: int = 0) -> Tensor:
        return super().forward(attention_mask.cumsum(1) + past)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Embedding(9, 6, max_norm=1.0), "max_norm=1.0 changes the weight at each call"),
        (nn.Embedding(9, 6, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (Half(9, 6), "Half does more than look rows up"),
        (Replaced(10, 6), "Replaced does more"),
        (Shifted(9, 6), "Shifted does more"),
        (PerFeature(9, 6), "PerFeature does more"),
        (unused(nn.Embedding(9, 6)), "Embedding does more"),
        (Normed(9, 6), "Normed does more"),
        (ByPosition(9, 6), "ByPosition does more"),
        (scaled(9, 6).to("meta"), "on the meta device it can't be tried"),
        (nn.Embedding(9, 6).to(torch.float8_e4m3fn), "quantised .*float8_e4m3fn"),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, nn.Module) else None,
)
def test_layers_that_cant_take_one(layer: nn.Module, message: str) -> None:
    model = nn.ModuleDict({"table": layer, "linear": nn.Linear(6, 6)})
    with pytest.raises(ll.AttachError, match=f"table .*{message}"):
        ll.attach(model, ll.LoRAConfig(r=2, target_names=("table",)))
    with pytest.raises(ll.AttachError, match=f"table .*{message}"):
        ll.attach(model, ll.LoRAConfig(r=2, target_roles=("reader", "embedding")))
    other = nn.ModuleDict({**model, "other": nn.Embedding(9, 6)})
    assert list(ll.attach(other, ll.LoRAConfig(r=2, target_roles=("reader", "embedding"))).adapters) == [
        "linear",
        "other",
    ]
    ll.detach(other)
    attachment = ll.attach(model, ll.LoRAConfig(r=2))
    assert list(attachment.adapters) == ["linear"]
    assert any("table" in line and "×1" in line for line in attachment.summary().splitlines())


def test_rows_in_place_of_ids_are_refused() -> None:
    """As Ovis2's table of visual tokens takes them."""

    class Either(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return input @ self.weight if input.is_floating_point() else super().forward(input)

    model = nn.Sequential(Either(9, 6))
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("0",)))
    assert model(torch.tensor([3])).shape == (1, 6)
    with pytest.raises(ll.AttachError, match=r"0: its adapter looks up ids, and it got rows of torch\.float32"):
        model(torch.rand(2, 9))


def test_bitsandbytes_embedding_is_refused() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Embedding4bit(64, 64)
    with pytest.raises(ll.AttachError, match=r"0 \(64 → 64\): its weight is quantised \(Params4bit"):
        ll.attach(nn.Sequential(layer.to("cpu")), ll.LoRAConfig(r=2, target_names=("0",)))


def test_a_scale_in_bfloat16_is_rounded_as_the_base_rounds_it() -> None:
    """So that the merged weight gives what the adapter gives: √96 is 9.798, and in bfloat16 9.8125."""
    layer = scaled(20, 96).bfloat16()
    model, ids = nn.Sequential(layer), torch.arange(20)
    ll.attach(model, ll.LoRAConfig(r=4, target_names=("0",)))
    randomize(model)
    p = only_adapter(model)
    want = (layer.weight.double() + 4 * (p.lora_B @ p.lora_A).double().mT) * 9.8125
    assert_close(model(ids), want, 2**-8)
    layer.weight.data.zero_()
    p.lora_B.data.mul_(0).add_(2.0**-3)
    p.lora_A.data.mul_(0).add_(2.0**-3)
    assert torch.equal(model(ids), torch.full((20, 96), 4 * 4 * 2.0**-6 * 9.8125, dtype=torch.bfloat16))


# ---- several, and rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_several_and_an_adapter_for_each_entry(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model: Any = make()
    for name, r in (("a", 4), ("b", 2)):
        ll.attach(model, ll.LoRAConfig(r=r, alpha=6, target_names=NAMES), name=name)
    randomize(model, by=0.3)
    ids = token_ids(3, 6)
    ids[:, 4:] = 0

    def run(*names: Any, rows: slice = slice(None)) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        ll.use(model, *names)
        out = model(input_ids=ids[rows]).logits
        out.square().sum().backward()
        return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    alone = [run("a", rows=slice(0, 1)), run("b", rows=slice(1, 2)), (model_without(model, ids[2:]), {})]
    together, grads = run(["a", "b", None])
    assert_close(together, torch.cat([out for out, _ in alone]), 1e-5)
    for _, mine in alone[:2]:
        for name, grad in mine.items():
            if ".lora_lite." in name and grad.any():
                assert_close(grads[name], grad, 1e-5, name)
    assert not grads[f"{EMBED}.lora_lite.a.lora_A"][:, 0].any(), "padding"

    ll.use(model, "a", "b")
    ll.save_merged(model, tmp_path)
    assert_close(logits(model), logits(type(model).from_pretrained(tmp_path)), 1e-5)


def model_without(model: Any, ids: Tensor) -> Tensor:
    with ll.disabled(model), torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("packed", [False, True])
def test_entries_on_the_second_dimension_and_packed(packed: bool) -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6))
    for name in ("a", "b"):
        ll.attach(model, ll.LoRAConfig(r=2, target_names=(".",), target_roles=()), name=f"linear_{name}")
        ll.attach(model, ll.LoRAConfig(r=2, target_names=("0",)), name=name)
    randomize(model)
    ids = torch.randint(9, (5, 3)) if not packed else torch.randint(9, (1, 7))
    want = []
    for name, part in zip(("a", "b", None), ids.unbind(1) if not packed else ids.split([3, 4, 0], 1), strict=True):
        ll.use(model, *([name] if name else ["linear_a"]))
        if name is None:
            with ll.disabled(model):
                want.append(model(part))
        else:
            want.append(model(part))
    if packed:
        ll.use(model, ["a", "b", None], lengths=[3, 4, 0])
        torch.testing.assert_close(model(ids), torch.cat(want, 1))
    else:
        ll.use(model, ["a", "b", None], batch_dim=1)
        torch.testing.assert_close(model(ids), torch.stack(want, 1))


def test_positions_that_know_no_batch_are_named() -> None:
    model = gpt2()
    for name in ("a", "b"):
        ll.attach(model, ll.LoRAConfig(r=2, target_names=("wpe",)), name=name)
    ll.use(model, ["a", "b"])
    with pytest.raises(ValueError, match=r"2 entries, and a layer got 1 \(transformer\.wpe\)"):
        model(input_ids=token_ids())


# ---- a life ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("variant", METHODS)
def test_saved_loaded_verified_diagnosed(make: Callable[[], nn.Module], variant: str, tmp_path: Path) -> None:
    model: Any = adapted(make, variant)
    want = logits(model)
    loss(model).backward()
    row = next(row for row in ll.diagnose(model).rows if row.layer == EMBED)
    assert not row.dead
    E, merged = make().state_dict()[f"{EMBED}.weight"], ll.merged_state_dict(model)[f"{EMBED}.weight"]
    assert row.relative_change == pytest.approx(((merged - E).norm() / E.norm()).item(), rel=1e-3)
    assert EMBED in {each.layer for each in ll.verify(model, {"input_ids": token_ids(), "labels": token_ids()})}
    ll.save(model, tmp_path / "adapter.safetensors")
    ll.detach(model)
    again = make()
    attachment = ll.load(again, tmp_path / "adapter.safetensors")
    assert torch.equal(logits(again), want)
    assert f"{EMBED}" in attachment.summary()
    smaller = {"untied": llama, "tied": llama, "scaled": gemma3}
    with pytest.raises(ll.CheckpointError, match=rf"{EMBED} is \[61, 32\] \(in, out\) in the file and \[60, 32\]"):
        ll.load(
            smaller[next(k for k, v in MODELS.items() if v is make)](vocab_size=60), tmp_path / "adapter.safetensors"
        )


def test_verify_sees_a_wrong_output(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    monkeypatch.setattr("lora_lite.site.on_ids", lambda primitive, layer: primitive)
    ll.verify(model, token_ids())  # no scale, no padding: the same
    right = ll.embeddings.on_ids
    wrong = lambda primitive, layer: ll.LowRankAdd(primitive.A, right(primitive, layer).B * 1.01)  # noqa: E731
    monkeypatch.setattr("lora_lite.site.on_ids", wrong)
    with pytest.raises(ll.KernelMismatchError, match=EMBED):
        ll.verify(model, token_ids())


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("variant", METHODS)
def test_merged(make: Callable[[], nn.Module], variant: str, tmp_path: Path) -> None:
    """The head of a tied model stays as it was."""
    model: Any = adapted(make, variant)
    tied = model.config.tie_word_embeddings
    ll.save_merged(model, tmp_path)
    plain: Any = type(model).from_pretrained(tmp_path)
    assert_close(logits(plain), logits(model), 1e-5)
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight)
    assert not plain.config.tie_word_embeddings
    assert model.config.tie_word_embeddings is tied
    if tied:
        with pytest.raises(ll.AttachError, match=rf"{EMBED}.weight and lm_head.weight are tied, and an adapter acts"):
            ll.merging.merged_parameters(model)
    else:
        assert f"{EMBED}.weight" in dict(ll.merging.merged_parameters(model))


def test_another_embedding_leaves_the_tie(tmp_path: Path) -> None:
    model: Any = gpt2()
    ll.attach(model, ll.LoRAConfig(r=4, target_names=("wpe",)))
    randomize(model)
    ll.save_merged(model, tmp_path)
    plain: Any = type(model).from_pretrained(tmp_path)
    assert plain.lm_head.weight is plain.transformer.wte.weight
    assert_close(logits(plain), logits(model), 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    grads = []
    for on in (False, True):
        model: Any = adapted(gemma3).train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss(model).backward()
        grads.append([p.grad for p in ll.parameters(model)])
    for got, want in zip(*grads, strict=True):
        assert_close(got, want, 1e-5)


def test_compile() -> None:
    for make in (llama, gemma3):
        model: Any = adapted(make)
        ids = token_ids()
        embedding = model.get_submodule(EMBED)
        want, wanted = embedding(ids), ll.parameters(model)[:2]
        grads = torch.autograd.grad(want.square().sum(), wanted)
        torch._dynamo.reset()
        got = torch.compile(embedding, fullgraph=True, backend="aot_eager")(ids)
        assert_close(got, want, 1e-6)
        for mine, its in zip(torch.autograd.grad(got.square().sum(), wanted), grads, strict=True):
            assert_close(mine, its, 1e-6)
        ll.attach(model, config("lora", target_names=NAMES), name="other")
        randomize(model, by=0.3)
        ll.use(model, ["other", "default"])
        want = embedding(ids)
        torch._dynamo.reset()
        assert_close(torch.compile(embedding, fullgraph=True, backend="aot_eager")(ids), want, 1e-6)


def test_autocast_and_a_low_precision_base() -> None:
    model = adapted(gemma3)
    want = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=token_ids()).logits
        assert_close(out, want, 5e-2)
        out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ll.parameters(model))
    low = adapted(lambda: gemma3().bfloat16())
    y = low.get_submodule(EMBED)(token_ids())
    assert y.dtype == torch.bfloat16
    assert_close(y, model.get_submodule(EMBED)(token_ids()), 1e-2)


def test_copies_and_conversions() -> None:
    model = adapted(gemma3)
    want = logits(model)
    twin = copy.deepcopy(model)
    randomize(twin, seed=1)
    assert torch.equal(logits(model), want)
    assert not torch.allclose(logits(twin), want, atol=1e-3)
    assert_close(logits(model.double()), want, 1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [VOCAB + 9, VOCAB - 9])
def test_resized_after_attach(tied: bool, size: int, tmp_path: Path) -> None:
    model: Any = adapted(lambda: llama(tie_word_embeddings=tied))
    model.resize_token_embeddings(size)
    message = f"{EMBED}: it has {size} embeddings, and its adapter is for {VOCAB}"
    with pytest.raises(ll.AttachError, match=message):
        model(input_ids=token_ids(vocab=50))
    with pytest.raises(ll.AttachError, match=message):
        ll.merged_state_dict(model)
    with pytest.raises(ll.CheckpointError, match=message):
        ll.save(model, tmp_path / "adapter.safetensors")
    assert not list(tmp_path.iterdir())
    ll.detach(model)
    assert model(input_ids=token_ids(vocab=50)).logits.shape[-1] == size


def test_offloaded() -> None:
    accelerate = pytest.importorskip("accelerate")
    model: Any = adapted(lambda: llama(tie_word_embeddings=True))
    want = logits(model)
    accelerate.cpu_offload(model)
    assert_close(logits(model), want, 1e-6)
    late: Any = gemma3()
    accelerate.cpu_offload(late)
    base = logits(late)
    ll.attach(late, ll.LoRAConfig(r=4, target_names=NAMES))
    assert torch.equal(logits(late), base)
