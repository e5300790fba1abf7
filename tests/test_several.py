"""Several adapters on one model: each by itself, all at once, one after another, and stacked as IA³'s paper has it."""

import contextlib
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
    load_tests,
    logits,
    qwen3_moe,
    randomize,
    snapshot,
    token_ids,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_lite as ll

against_peft = load_tests("test_peft")


def alone(variant: str, seed: int, **fields: Any) -> Any:
    """A model with a trained adapter."""
    model = llama()
    attach(model, variant, calibration_batches(), **fields)
    randomize(model, seed=seed, by=0.3)
    return model


def files(folder: Path) -> dict[str, tuple[Path, Tensor]]:
    """For each variant a saved adapter and what the model computes with it alone."""
    found = {}
    for seed, variant in enumerate(VARIANTS):
        model = alone(variant, seed, **({"block_size": 2} if variant == "antipasto" else {}))
        ll.save(model, folder / variant)
        found[variant] = (folder / variant, logits(model))
    return found


def test_a_switchboard_of_all_nine(tmp_path: Path) -> None:
    model = llama()
    base, before = logits(model), snapshot(model)
    saved = files(tmp_path)
    for variant, (path, _) in saved.items():
        ll.load(model, path, name=variant)
    everything = logits(model)
    assert all((everything - want).norm() > 0 for _, want in saved.values())
    for variant, (path, want) in saved.items():
        ll.use(model, variant)
        assert torch.equal(logits(model), want), variant
        ll.save(model, tmp_path / "again", name=variant)
        assert load_file(tmp_path / "again").keys() == load_file(path).keys()
        for key, t in load_file(path).items():
            assert torch.equal(load_file(tmp_path / "again")[key], t), key
    with ll.disabled(model):
        assert torch.equal(logits(model), base)
    ll.use(model, *VARIANTS)
    assert torch.equal(logits(model), everything)
    for variant in reversed(VARIANTS[1:]):
        ll.detach(model, variant)
    assert torch.equal(logits(model), saved["lora"][1])
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".lora_lite." not in name)
    ll.detach(model)
    assert_same(model, before)


def test_two_loras_add_up() -> None:
    layer = nn.Linear(12, 10)
    x = torch.randn(5, 12)
    base = layer(x)
    for i, name in enumerate(("a", "b")):
        ll.attach(layer, config("lora", target_roles=()), name=name)
        randomize(layer, seed=i)
    changes = []
    for name in ("a", "b"):
        ll.use(layer, name)
        changes.append(layer(x) - base)
    ll.use(layer, "a", "b")
    assert_close(layer(x) - base, changes[0] + changes[1], 1e-5)


def test_one_of_two_is_disabled_for_a_while() -> None:
    model = llama()
    alone = {}
    for i, name in enumerate(("a", "b")):
        ll.attach(model, config("lora"), name=name)
        randomize(model, seed=i)
    for name in ("a", "b"):
        ll.use(model, name)
        alone[name] = logits(model)
    ll.use(model, "a", "b")
    both = logits(model)
    with ll.disabled(model, "a"):
        assert torch.equal(logits(model), alone["b"])
        with ll.disabled(model):
            base = logits(model)
        assert torch.equal(logits(model), alone["b"])
    assert torch.equal(logits(model), both)

    ll.use(model, ["a", "b"])
    with ll.disabled(model, "a"):
        assert_close(logits(model), torch.stack([base[0], alone["b"][1]]), 1e-5)
    assert_close(logits(model), torch.stack([alone["a"][0], alone["b"][1]]), 1e-5)

    with pytest.raises(ll.AttachError, match="no adapter is attached under the name 'c'"), ll.disabled(model, "c"):
        pass
    assert_close(logits(model), torch.stack([alone["a"][0], alone["b"][1]]), 1e-5)


def test_order_on_one_layer() -> None:
    """IA3 after LoRA scales the sum; a HRA before a LoRA turns its input."""
    layer = nn.Linear(12, 10)
    x = torch.randn(5, 12)
    ll.attach(layer, config("hra", target_roles=()), name="turn")
    ll.attach(layer, config("lora", target_roles=()), name="add")
    ll.attach(layer, config("ia3", target_names=()), name="gain")
    randomize(layer)
    own = {each.name: next(iter(each.adapters.values())) for each in ll.attachment.attachments(layer)}
    turn = own["turn"].variant.primitive(own["turn"], layer, own["turn"].cfg)
    turned = x + (x @ turn.A.t()) @ turn.B.t()
    add = own["add"]
    want = own["gain"].lora_g * (
        turned @ layer.weight.t() + layer.bias + add.cfg.scale * turned @ add.lora_A.t() @ add.lora_B.t()
    )
    assert_close(layer(x), want, 1e-5)


def test_only_what_is_used_learns() -> None:
    model = llama()
    for name in ("a", "b"):
        ll.attach(model, config("lora"), name=name)
    randomize(model)
    ll.use(model, "b")
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad is None for p in ll.parameters(model, "a"))
    assert all(p.grad is not None and p.grad.any() for p in ll.parameters(model, "b"))
    assert len(ll.parameters(model)) == len(ll.parameters(model, "a")) + len(ll.parameters(model, "b"))
    assert all(row.grad_norm is None for row in ll.diagnose(model, "a").rows)
    assert all(row.grad_norm for row in ll.diagnose(model, "b").rows)


def test_verify_takes_one_at_a_time() -> None:
    model = llama()
    for name in ("a", "b"):
        ll.attach(model, config("dora"), name=name)
    randomize(model, by=0.2)
    want = logits(model)
    for name in ("a", "b"):
        assert ll.verify(model, {"input_ids": token_ids(), "labels": token_ids()}, name=name)
    assert torch.equal(logits(model), want)


def test_ia3_of_the_paper_in_one_call() -> None:
    """Keys, values and the feed-forward block's output at once, against PEFT's."""
    ours, theirs = llama(), llama()
    attached = ll.attach(ours, {"kv": ll.IA3Config(), "ff": ll.IA3FFConfig()})
    assert list(attached) == ["kv", "ff"]
    names = [name for each in attached.values() for name in each.adapters]
    feedforward = list(attached["ff"].adapters)
    theirs = peft.get_peft_model(theirs, peft.IA3Config(target_modules=names, feedforward_modules=feedforward)).eval()
    randomize(ours)
    pairs = []
    for attachment in attached.values():
        for layer, adapter in attachment.adapters.items():
            its = theirs.base_model.model.get_submodule(layer).ia3_l.default
            its.data.copy_(adapter.lora_g.view(its.shape))
            pairs.append((layer, adapter.lora_g, its))
    got, want = against_peft.logits_and_gradients(ours), against_peft.logits_and_gradients(theirs)
    assert_close(got[0], want[0], 1e-5, "logits")
    assert_close(got[1], want[1], 1e-5, "gradient of the embeddings")
    for layer, mine, its in pairs:
        assert_close(mine.grad, its.grad.view(mine.shape), 1e-5, layer)


def test_all_of_a_dict_or_none() -> None:
    model = llama()
    before = snapshot(model)
    with pytest.raises(ll.AttachError, match="larger than the layer allows"):
        ll.attach(model, {"a": ll.LoRAConfig(r=4), "b": ll.LoRAConfig(r=1000)})
    assert_same(model, before)


def test_base_flags_come_back_after_the_last() -> None:
    model: Any = llama()
    model.lm_head.weight.requires_grad_(False)
    before = snapshot(model)
    for name in ("a", "b"):
        ll.attach(model, config("lora"), name=name)
    ll.detach(model, "a")  # the first, which saw the flags
    ll.detach(model, "b")
    assert_same(model, before)


def test_names() -> None:
    model = llama()
    ll.attach(model, config("lora"), name="a")
    before = snapshot(model)
    with pytest.raises(ll.AttachError, match=r"named 'a' is attached to this model already.*another name"):
        ll.attach(model, config("lora"), name="a")
    for name in ("", "a.b", "keys", "before", "rows", "off", "name", "\ud800", 3):
        with pytest.raises(ValueError, match="can't be an adapter's name"):
            ll.attach(model, config("lora"), name=name)  # type: ignore[call-overload]
    assert_same(model, before)
    ll.attach(model, config("ia3"), name="b")
    for call in (ll.state_dict, ll.verify, ll.diagnose, ll.save, ll.export_peft):
        rest = (token_ids(),) if call is ll.verify else ("somewhere",) if call in (ll.save, ll.export_peft) else ()
        with pytest.raises(ll.AttachError, match=r"several adapters are attached \(a, b\); say which with name="):
            call(model, *rest)
    for wrong in (lambda: ll.use(model, "c"), lambda: ll.detach(model, "c"), lambda: ll.parameters(model, "c")):
        with pytest.raises(ll.AttachError, match="under the name 'c'; there are a, b"):
            wrong()
    with pytest.raises(ValueError, match="name at least one"):
        ll.use(model)
    with pytest.raises(ValueError, match="got None"):
        ll.use(model, None)  # type: ignore[arg-type]
    for names in (("a", None), (["a"], [None]), ("a", ["b"])):
        with pytest.raises(ValueError, match="use: a name is a string; got"):
            ll.use(model, *names)


# ---- a different adapter for each entry of a batch -------------------------------------------------------------------

ROWS = ["a", "b", None, "a"]


def of_two(variant: str, **fields: Any) -> Any:
    """A model with two adapters of one variant, of ranks of their own where they have one."""
    model = llama()
    fields |= {"block_size": 2} if variant == "antipasto" else {}
    batches = calibration_batches() if variant == "eva" else None
    for name, r in {"a": 4, "b": 6}.items():
        ll.attach(model, config(variant, **{**fields, "r": r}), name=name, calibration_data=batches)
        ll.use(model, name)
    ll.use(model, "a", "b")
    randomize(model, seed=3, by=0.3)
    return model


def row_by_row(model: Any, ids: Tensor) -> Tensor:
    """Logits with one adapter at a time, put together; with gradients."""
    found = []
    for i, name in enumerate(ROWS):
        if name is None:
            with ll.disabled(model):
                found.append(model(ids[i : i + 1]).logits)
        else:
            ll.use(model, name)
            found.append(model(ids[i : i + 1]).logits)
    return torch.cat(found)


def together_and_alone(model: Any, ids: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Logits of all rows at once and row by row, and the gradients of both. The rows stay in use."""
    want = row_by_row(model, ids)
    direction = torch.randn_like(want)
    of_want = torch.autograd.grad((want * direction).sum(), ll.parameters(model))
    ll.use(model, ROWS)
    got = model(ids).logits
    return got, want, torch.autograd.grad((got * direction).sum(), ll.parameters(model)), of_want


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_for_each_row(variant: str) -> None:
    model, ids = of_two(variant), token_ids(4)
    got, want, of_got, of_want = together_and_alone(model, ids)
    assert_close(got, want, 1e-5)
    mine, its = (torch.cat([grad.flatten() for grad in grads]) for grads in (of_got, of_want))
    assert_close(mine, its, 1e-5, "gradients")
    with ll.disabled(model):
        assert not torch.equal(model(ids).logits, got)
    assert torch.equal(model(ids).logits, got)  # as before the context
    ll.use(model, "b")
    assert_close(model(ids[1:2]).logits, want[1:2], 1e-5)


def test_mixed_methods_by_row() -> None:
    """Low-rank sums beside what is none: LoRA for one entry, DoRA and HRA for others."""
    model = llama()
    for name, variant in (("a", "lora"), ("b", "dora"), ("c", "hra")):
        ll.attach(model, config(variant), name=name)
    randomize(model, by=0.3)
    ids, names = token_ids(3), ["c", "a", "b"]
    want = []
    for i, name in enumerate(names):
        ll.use(model, name)
        want.append(logits_of(model, ids[i : i + 1]))
    ll.use(model, names)
    assert_close(logits_of(model, ids), torch.cat(want), 1e-5)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits


def test_low_rank_sums_run_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    shrink = ll.reference.shrink
    monkeypatch.setattr(ll.reference, "shrink", lambda x, A, *rest: calls.append(A.shape) or shrink(x, A, *rest))
    layer = nn.Linear(12, 10)
    for name in ("a", "b", "c"):
        ll.attach(layer, config("lora", target_roles=()), name=name)
    randomize(layer)
    ll.use(layer, ["a", "c", "b"])
    layer(torch.randn(3, 5, 12))
    assert calls == [(3, 4, 12)]


def three_methods(model: Any) -> Any:
    """LoRA, DoRA and HRA on everything, under the names a, b and c."""
    for name, variant in (("a", "lora"), ("b", "dora"), ("c", "hra")):
        ll.attach(model, config(variant, target_roles=()), name=name)
    randomize(model, by=0.3)
    return model


@pytest.mark.parametrize("methods", ["sums", "mixed"])
def test_packed_sequences(methods: str) -> None:
    """Runs of any length in one row, an empty one and one without an adapter among them."""
    model: Any = nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 7))
    if methods == "mixed":
        three_methods(model)
    else:
        for i, name in enumerate(("a", "b", "c")):
            ll.attach(model, config("lora", r=i + 2, target_roles=()), name=name)
        randomize(model, by=0.3)
    names, lengths = ["c", "a", None, "b", "a"], [4, 1, 3, 0, 5]
    x = torch.randn(1, 13, 12)
    want = []
    for name, part in zip(names, x.split(lengths, 1), strict=True):
        if name is None:
            with ll.disabled(model):
                want.append(model(part))
        else:
            ll.use(model, name)
            want.append(model(part))
    wanted, dy = torch.cat(want, 1), torch.randn(1, 13, 7)
    grads = torch.autograd.grad(wanted, ll.parameters(model), dy, allow_unused=True)
    ll.use(model, names, lengths=lengths)
    for view in (x, x[0]):
        got = model(view)
        assert_close(got.view(1, 13, 7), wanted, 1e-5)
    mine = torch.autograd.grad(got, ll.parameters(model), dy[0], allow_unused=True)
    for i, theirs in zip(mine, grads, strict=True):
        if theirs is not None and theirs.norm() > 0:
            assert_close(i, theirs, 1e-5)
        else:
            assert i is None or not i.any()
    with pytest.raises(ValueError, match="lengths add up to 13 tokens, and 0 got 12"):
        model(x[:, 1:])


@pytest.mark.parametrize("methods", ["sums", "mixed"])
def test_a_batch_on_the_second_dimension(methods: str) -> None:
    model: Any = nn.Sequential(nn.Linear(12, 10))
    three_methods(model)
    names = ["a", None, "a"] if methods == "sums" else ["c", "a", "b"]
    x = torch.randn(5, 3, 12)
    want = []
    for i, name in enumerate(names):
        ll.use(model, name or "a")
        with ll.disabled(model) if name is None else contextlib.nullcontext():
            want.append(model(x[:, i]))
    ll.use(model, names, batch_dim=1)
    assert_close(model(x), torch.stack(want, 1), 1e-5)
    with pytest.raises(ValueError, match="3 entries, and a layer got 5"):
        model(x.transpose(0, 1))
    with pytest.raises(ValueError, match=r"0 got an input of shape \(3, 12\), whose dimension 1 counts no entries"):
        model(x[0])
    ll.use(model, names)
    with pytest.raises(ValueError, match=r"shape \(12,\), whose dimension 0 counts no entries"):
        model(x[0, 0])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams_take_their_entry_s_adapter(options: dict[str, int]) -> None:
    """Each entry generates what it does alone; outside of `generate` a multiple of the entries is an error."""
    model: Any = three_methods(llama())
    ids, names = token_ids(3, 6), ["b", "a", "c"]
    more: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    want = []
    for i, name in enumerate(names):
        ll.use(model, name)
        want.append(model.generate(ids[i : i + 1], **more))
    ll.use(model, names)
    assert torch.equal(model.generate(ids, **more), torch.cat(want))
    with pytest.raises(ValueError, match="adapters of 3 entries, and a layer got 6"):
        model(ids.repeat_interleave(2, 0))


def seq2seq(kind: str) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 56, "decoder_ffn_dim": 56, "max_position_embeddings": 64,
    }  # fmt: skip
    if kind == "bart":
        return build(transformers.BartForConditionalGeneration, transformers.BartConfig(**sizes))
    return build(transformers.LEDForConditionalGeneration, transformers.LEDConfig(**sizes, attention_window=4))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_an_encoder_runs_before_there_are_beams(options: dict[str, int]) -> None:
    model: Any = three_methods(seq2seq("bart"))
    ids, names = token_ids(3, 6), ["b", "a", "c"]
    more: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **options}
    want = []
    for i, name in enumerate(names):
        ll.use(model, name)
        want.append(model.generate(ids[i : i + 1], **more))
    ll.use(model, names)
    assert torch.equal(model.generate(ids, **more), torch.cat(want))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("images", [4, 8])
def test_images_are_no_beams(images: int, options: dict[str, int]) -> None:
    """While `generate` runs too, a vision tower that counts another number than the entries is refused by name."""
    text: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1, "num_attention_heads": 4}
    made = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4, "vision_use_head": False},
        image_token_id=5, mm_tokens_per_image=4,
    )  # fmt: skip
    model: Any = build(transformers.Gemma3ForConditionalGeneration, made)
    for name in "ab":
        ll.attach(model, config("lora", exclude_names=("head", "embed")), name=name)
    ids = token_ids(2, 40)
    ids[ids == 5] = 6
    ids[0, : 4 * (images - 1)] = ids[1, :4] = 5  # of the first entry all images but one
    batch = {"input_ids": ids, "pixel_values": torch.randn(images, 3, 8, 8), "token_type_ids": (ids == 5).long()}
    ll.use(model, "a")
    model.generate(**batch, max_new_tokens=1)
    ll.use(model, ["a", "b"])
    with pytest.raises(ValueError, match=r"adapters of 2 entries.* a layer got \d+ \(model\.vision_tower\..*q_proj\)"):
        model.generate(**batch, max_new_tokens=1, **options)


def test_an_encoder_that_puts_the_sequence_first() -> None:
    model = three_methods(seq2seq("led"))
    ll.use(model, ["b", "a"])
    with pytest.raises(ValueError, match=r"a layer got 16 \(led\.encoder\.layers\.0\..*query\)"):
        model.generate(token_ids(2, 16), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("methods", [("lora", "lora"), ("hra", "dora")], ids=str)
def test_rows_sent_to_experts(methods: tuple[str, str]) -> None:
    """By entry of the batch, and by tokens of the experts' own input."""
    model: Any = qwen3_moe()
    for i, variant in enumerate(methods):
        names = {"target_names": ("q_proj$", r"\.experts\.")} if i else {"target_names": (r"\.experts\.",), "r": 2}
        ll.attach(model, config(variant, **names), name="ab"[i])
    randomize(model, by=0.3)
    ids = token_ids(4)
    got, want, of_got, of_want = together_and_alone(model, ids)
    assert_close(got, want, 1e-5)
    for mine, theirs in zip(of_got, of_want, strict=True):
        assert_close(mine, theirs, 1e-4)
    ll.use(model, ROWS, lengths=[17] * 4)
    assert_close(model(ids).logits, want, 1e-5)
    with pytest.raises(ValueError, match=r"a stand on experts alone, .* give lengths="):
        ll.use(model, ["a", None])


def test_rows_must_fit_the_batch() -> None:
    model = of_two("lora")
    ll.use(model, ROWS)
    with pytest.raises(ValueError, match="adapters of 4 entries, and a layer got 3"):
        model(token_ids(3))
    with pytest.raises(ll.AttachError, match="under the name 'c'"):
        ll.use(model, ["a", "c"])
    for names, options, message in (
        ([], {}, "name at least one"),
        (["a"], {"lengths": [3, 4]}, "lengths must hold a number of tokens for each of 1 names"),
        (["a"], {"lengths": [-3]}, "lengths must hold"),
        (["a"], {"lengths": [3], "batch_dim": 1}, "leave batch_dim out"),
        (["a"], {"batch_dim": 2}, "batch_dim must be 0 or 1; got 2"),
        ("a", {"lengths": [3]}, "belong to a list of names"),
        (["a"], {"lengths": 5}, "lengths must hold a number of tokens for each of 1 names; got 5"),
        (["a"], {"lengths": [None]}, "lengths must hold"),
        (["a"], {"lengths": [2.0]}, "lengths must hold"),
        ([5], {}, "a name is a string, or None for no adapter; got 5"),
        ([["a"]], {}, "a name is a string, or None"),
    ):
        with pytest.raises(ValueError, match=message):
            ll.use(model, names, **options)


@pytest.mark.parametrize("rows", [False, True])
def test_what_is_attached_later_acts_too(rows: bool) -> None:
    """On every entry of a batch; and under a name that was used before and switched off meanwhile."""
    layer = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 12))
    everything: dict[str, Any] = {"target_roles": ()}
    for i, name in enumerate(("a", "b")):
        ll.attach(layer, config("lora", **everything), name=name)
        randomize(layer, seed=i)
    ll.attach(layer, config("lora", target_names=("^0$",)), name="c")
    ll.use(layer, *([["a", "b"]] if rows else ["a"]))
    ll.detach(layer, "c")
    x = torch.randn(2, 3, 12)
    want = layer(x)
    ll.attach(layer, config("ia3", target_names=("^1$",)), name="c")
    gain = layer[1].lora_lite["c"].lora_g
    with torch.no_grad():
        gain.fill_(3.0)
    assert_close(layer(x), 3 * want, 1e-5)


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"num_return_sequences": 2}, {"num_beams": 3, "num_return_sequences": 2}], ids=str
)
def test_whisper_repeats_its_features_before_the_encoder(options: dict[str, int]) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 61, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 56, "decoder_ffn_dim": 56, "max_source_positions": 20,
        "max_target_positions": 24, "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None,
    }  # fmt: skip
    made = build(transformers.WhisperForConditionalGeneration, transformers.WhisperConfig(**sizes))
    model, features, names = three_methods(made), torch.randn(3, 8, 40), ["b", "a", "c"]
    more: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": "num_beams" not in options}

    def generated(features: Tensor) -> Tensor:
        torch.manual_seed(0)
        return model.generate(features, top_k=1, **more, **options)

    want = []
    for i, name in enumerate(names):
        ll.use(model, name)
        want.append(generated(features[i : i + 1]))
    ll.use(model, names)
    assert torch.equal(generated(features), torch.cat(want))


@pytest.mark.parametrize("methods", [("lora", "lora"), ("hra", "dora")], ids=str)
def test_entries_without_a_token(methods: tuple[str, str]) -> None:
    model: Any = qwen3_moe()
    for name, variant in zip("ab", methods, strict=True):
        ll.attach(model, config(variant, target_names=("q_proj$", r"\.experts\.")), name=name)
    randomize(model, by=0.3)
    block, x = model.model.layers[0], torch.randn(2, 0, 32)
    options: list[dict[str, Any]] = [{}, {"batch_dim": 1}, {"lengths": [0, 0]}]
    for each in options:
        ll.use(model, ["a", "b"], **each)
        batch = x.transpose(0, 1) if "batch_dim" in each else x
        assert block.self_attn.q_proj(batch).shape == (*batch.shape[:2], 32)
        if "batch_dim" not in each:
            assert block.mlp(batch).shape == batch.shape


def test_a_name_that_is_attached_again_acts_on_all_entries() -> None:
    """Also on the layers that another adapter has kept, whose entries `use` had named for the one that was detached."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("0", "1")), name="a")
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("0",)), name="b")
    ll.use(model, ["a", "b", None])
    with pytest.warns(UserWarning, match="have no adapter now"):
        ll.detach(model, "a")
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("0", "1")), name="a")
    randomize(model)
    x = torch.randn(3, 8)
    with ll.disabled(model, "b"):
        found = model(x)
    ll.detach(model, "b")
    ll.use(model, "a")
    assert_close(found, model(x), 1e-6)


def test_names_of_a_dict_are_its_keys() -> None:
    with pytest.raises(ll.AttachError, match="name='c' is for one config"):
        ll.attach(nn.Linear(8, 8), {"a": ll.LoRAConfig(r=2)}, name="c")  # type: ignore[call-overload]


@pytest.mark.parametrize("second", ["lora", "hra"])
def test_programs_of_entries(second: str) -> None:
    """`torch.export`, not strict, with a length that changes; a trace as the first call, which is made twice."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    for name, variant in (("a", "lora"), ("b", second)):
        ll.attach(model, config(variant, target_roles=()), name=name)
    randomize(model)
    ll.use(model, ["a", "b", None])
    x, longer = torch.randn(3, 5, 16), torch.randn(3, 9, 16)
    program = torch.jit.trace(model, (x,))
    assert_close(program(longer), model(longer), 1e-6)
    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({1: length},), strict=False).module()
    assert_close(exported(longer), model(longer), 1e-6)


def test_contexts_that_overlap() -> None:
    """Two requests of a server, each in `disabled`: the first to enter is the first to leave."""
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    base = model(x)
    for name in ("a", "b"):
        ll.attach(model, ll.LoRAConfig(r=2), name=name)
    randomize(model)
    both = model(x)
    with ll.disabled(model, "b"):
        of_a = model(x)
    for names in ((None, None), ("a", None), (None, "a")):
        first, second = (ll.disabled(model, name) for name in names)
        first.__enter__()
        second.__enter__()
        within = model(x)
        first.__exit__(None, None, None)
        assert torch.equal(model(x), within), "as the one that is left wants it"
        second.__exit__(None, None, None)
        assert torch.equal(model(x), both)
    assert not torch.equal(base, of_a)
    first, second = ll.disabled(model), ll.disabled(model)
    first.__enter__()
    ll.use(model, "a")
    second.__enter__()
    assert torch.equal(model(x), base)
    second.__exit__(None, None, None)
    assert torch.equal(model(x), of_a)
    first.__exit__(None, None, None)
    assert torch.equal(model(x), both)


def test_whoever_sorts_what_it_is_given() -> None:
    """Entries would get each other's adapters."""
    from transformers.pipelines import base, pt_utils

    from lora_lite.rows import _OF_CHUNKS

    assert {base.ChunkPipeline.run_single.__qualname__, pt_utils.PipelinePackIterator.__next__.__qualname__} == set(
        _OF_CHUNKS
    )
    model: Any = nn.Sequential(nn.Linear(8, 8))
    for name in ("a", "b"):
        ll.attach(model, ll.LoRAConfig(r=2), name=name)
    ll.use(model, ["a", "b"])
    given = {"__name__": "sentence_transformers.base", "model": model}
    exec("def encode(x): return model(x)", given)
    encode: Any = given["encode"]
    with pytest.raises(ValueError, match=r"sentence_transformers\.base\.encode sorts or splits"):
        encode(torch.randn(2, 8))
    ll.use(model, ["a", "a"])
    encode(torch.randn(2, 8))


@pytest.mark.parametrize("kind", [ll.LoRAConfig, ll.DoRAConfig, ll.RoadConfig])
def test_a_pre_hook_that_changes_what_entries_get(kind: Any) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 3, 8)
    ll.attach(model, ll.LoRAConfig(r=2), name="a")
    ll.attach(model, kind(**{"group_size": 4} if kind is ll.RoadConfig else {"r": 2}), name="b")
    randomize(model)
    ll.use(model, ["a", "b"])
    want = model(2 * x)
    model[0].register_forward_pre_hook(lambda layer, args: (2 * args[0],))
    assert_close(model(x), want, 1e-6)


def test_contexts_know_what_has_been_detached() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    for name in ("a", "b"):
        ll.attach(model, ll.LoRAConfig(r=2), name=name)
    ll.use(model, ["a", "b"])
    with ll.disabled(model), pytest.warns(UserWarning, match="what is left .a. does not act"):
        ll.detach(model, "b")
    ll.attach(model, ll.LoRAConfig(r=2), name="b")
    randomize(model)
    assert model[0].lora_lite.rows.names == ("a", None)  # type: ignore[union-attr]
    model(x)
    ll.use(model, "a")
    with ll.disabled(model, "a"):
        ll.detach(model, "b")
        ll.attach(model, ll.LoRAConfig(r=2), name="b")
    assert ll.attachment.require_attachment(model, "b").acts
