"""Files: what save writes, what load restores, and that a bad file or path harms neither the model nor the disk."""

import copy
import hashlib
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    VARIANTS,
    assert_close,
    assert_same,
    attach,
    calibration_batches,
    config,
    gpt_neox,
    llama,
    qwen3,
    randomize,
    snapshot,
    token_ids,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_lite as ll

EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
Q0 = "model.layers.0.self_attn.q_proj"
Contents = tuple[dict[str, str], dict[str, Tensor]]


def trained(variant: str = "lora", make: Callable[..., nn.Module] = llama, **fields: Any) -> Any:
    model = make()
    attach(model, variant, **fields)
    randomize(model)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


def read(path: Path) -> Contents:
    with safe_open(path, framework="pt") as file:
        return file.metadata(), load_file(path)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A good LoRA file."""
    path = tmp_path / "adapter.safetensors"
    ll.save(trained(), path)
    return path


def rewrite(path: Path, change: Callable[[dict[str, str], dict[str, Tensor]], Any]) -> None:
    """Write the file again, with its metadata and tensors changed in place."""
    metadata, tensors = read(path)
    change(metadata, tensors)
    save_file(tensors, path, metadata=metadata)


def refused(path: Path, *fragments: str, model: nn.Module | None = None) -> str:
    """load raises a CheckpointError with the path and these fragments, and leaves the model as it was and usable."""
    model = model or llama()
    next(model.parameters()).requires_grad_(False)  # a flag that a half-done load would lose
    before = snapshot(model)
    with pytest.raises(ll.CheckpointError) as raised:
        ll.load(model, path)
    assert_same(model, before)
    for fragment in (str(path), *fragments):
        assert fragment in str(raised.value)
    ll.attach(model, ll.LoRAConfig(r=2))
    return str(raised.value)


# ---- What is written and restored ----


@EACH_VARIANT
def test_round_trip(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits in a fresh model, with no calibration data, no decomposition of a weight, and no random number: an
    adapter that is swapped in leaves sampling as it was."""
    model, path = trained(variant), tmp_path / "adapter.safetensors"
    ll.save(model, path)

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("load decomposes a matrix")

    for name in ("svd", "svdvals", "qr", "eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, forbidden)
    fresh = llama()
    base, state = logits(fresh), torch.get_rng_state()
    attachment = ll.load(fresh, path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(fresh), logits(model))
    assert not torch.allclose(logits(fresh), base, atol=1e-3)
    assert attachment.cfg == config(variant)
    assert type(attachment.cfg) is type(config(variant))
    want = ll.state_dict(model)
    for name, t in ll.state_dict(fresh).items():
        assert torch.equal(t, want[name])
    assert [p.shape for p in ll.parameters(fresh)] == [p.shape for p in ll.parameters(model)]
    fresh(token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in ll.parameters(fresh))
    ll.detach(fresh)
    assert torch.equal(logits(fresh), base)
    assert all(p.requires_grad for p in fresh.parameters())


def test_every_field_of_a_config_comes_back(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "r": 6,
        "alpha": 2.5,
        "dtype": torch.bfloat16,
        "target_roles": ("reader",),
        "target_names": (r"[qk]_proj$",),
        "exclude_names": (r"layers\.0\.self_attn\.k",),
        "layers": (0, 1),
    }
    own = {"block_size": 3, "max_rotation_angle": 0.3, "rotate_basis": "U", "svd": "exact"}
    cfg = ll.AntiPaSTOConfig(**fields, **own)
    model, fresh = llama(), llama()
    ll.attach(model, cfg, calibration_data=calibration_batches())
    randomize(model)
    ll.save(model, tmp_path / "a")
    attachment = ll.load(fresh, tmp_path / "a", backend="reference")
    assert attachment.cfg == cfg
    assert attachment.backend == "reference"
    assert [t.name for t in attachment.targets] == [
        f"model.layers.{n}_proj" for n in ("0.self_attn.q", "1.self_attn.q", "1.self_attn.k")
    ]
    assert torch.equal(logits(fresh), logits(model))


def test_saved_after_more_training_loads_the_latest(tmp_path: Path) -> None:
    path, model = tmp_path / "a", trained()
    ll.save(model, path)
    randomize(model, seed=1)
    ll.save(model, str(path))
    fresh = llama()
    ll.load(fresh, str(path))
    assert torch.equal(logits(fresh), logits(model))
    assert os.listdir(tmp_path) == ["a"]


def test_metadata(saved: Path) -> None:
    metadata, tensors = read(saved)
    shapes = {name.removesuffix(".lora_A"): [t.shape[1], 0] for name, t in tensors.items() if name.endswith("A")}
    for name, t in tensors.items():
        if name.endswith("B"):
            shapes[name.removesuffix(".lora_B")][1] = t.shape[0]
    assert metadata["format"] == "lora-lite"
    assert metadata["format_version"] == "1"
    assert metadata["library_version"] == ll.__version__
    assert metadata["base_model"] == "LlamaForCausalLM"
    assert json.loads(metadata["config"]) == {
        "variant": "lora",
        "r": 4,
        "alpha": 6.0,
        "dtype": "float32",
        "target_roles": ["reader", "writer"],
        "target_names": [],
        "exclude_names": ["lm_head", "embed", r"cls\.predictions"],
        "layers": None,
        "rslora": False,
        "dropout": 0.0,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    assert json.loads(metadata["targets"]) == shapes
    assert len(shapes) == 14
    assert shapes["model.layers.1.mlp.down_proj"] == [56, 32]
    assert metadata["fingerprint"] == hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()


def test_metadata_names_the_base_model(tmp_path: Path) -> None:
    model = trained()
    model.config.name_or_path = "some/model-1b"
    ll.save(model, tmp_path / "a")
    assert read(tmp_path / "a")[0]["base_model"] == "some/model-1b"


def test_a_head_that_was_drawn_anew(tmp_path: Path) -> None:
    """As of a base without one: another is drawn each time. Of the same head in 16 bits nothing is said."""
    from transformers import LlamaForSequenceClassification

    def classifier(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return LlamaForSequenceClassification(llama().config)  # type: ignore[arg-type]

    model = classifier(0)
    ll.attach(model, ll.LoRAConfig(r=4))
    ll.save(model, tmp_path / "a")
    assert json.loads(read(tmp_path / "a")[0]["heads"]).keys() == {"score"}
    with pytest.warns(UserWarning, match=r"^load: score: of another weight than .*modules_to_save"):
        ll.load(classifier(1), tmp_path / "a")
    ll.load(classifier(0).bfloat16(), tmp_path / "a")
    model = classifier(0)
    ll.attach(model, ll.LoRAConfig(r=4, modules_to_save=("score",)))
    ll.save(model, tmp_path / "a")
    ll.load(classifier(1), tmp_path / "a")


def test_dtypes_are_kept(tmp_path: Path) -> None:
    ll.save(trained("dora", dtype=torch.bfloat16), tmp_path / "a")
    dtypes = {name.rpartition(".")[2]: t.dtype for name, t in read(tmp_path / "a")[1].items()}
    assert dtypes == {"lora_A": torch.bfloat16, "lora_B": torch.bfloat16, "lora_m": torch.float32}


def test_compiled_models_use_the_same_names(saved: Path, tmp_path: Path) -> None:
    model, compiled = trained(), tmp_path / "compiled"
    wrapped = torch.compile(model, backend="eager")
    ll.save(wrapped, compiled)
    assert list(ll.state_dict(wrapped)) == list(ll.state_dict(model))
    assert set(read(compiled)[1]) == set(read(saved)[1])
    assert read(compiled)[0] == read(saved)[0]
    plain, wrapped = llama(), torch.compile(llama(), backend="eager")
    for fresh in (plain, wrapped):
        ll.load(fresh, compiled)
        torch.testing.assert_close(logits(fresh), logits(model))


# ---- Writing that fails ----


@pytest.mark.parametrize("error", [OSError("disk gone"), KeyboardInterrupt()], ids=["OSError", "KeyboardInterrupt"])
@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_failure_before_the_rename(
    step: str, error: BaseException, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, model = saved.read_bytes(), trained("pissa")
    adapted = logits(model)

    def fail(*args: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(os, step, fail)
        expected = ll.CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected) as raised:
            ll.save(model, saved)
    if isinstance(error, OSError):
        assert f"{saved}: disk gone" in str(raised.value)
    assert os.listdir(saved.parent) == [saved.name], "the temporary file is left over"
    assert saved.read_bytes() == earlier
    assert torch.equal(logits(model), adapted)
    ll.save(model, saved)
    assert saved.read_bytes() != earlier


def test_process_killed_before_the_rename(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No handler runs in a killed process: only the order of write and rename can save the earlier file."""
    earlier, model = saved.read_bytes(), trained("pissa")
    child = os.fork()
    if child == 0:
        os.replace = lambda *args: os._exit(9)  # type: ignore[assignment]
        try:
            ll.save(model, saved)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert saved.read_bytes() == earlier
    ll.load(llama(), saved)


def test_a_link_stays_and_its_file_is_replaced(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "links").mkdir()
    link, second = tmp_path / "links" / "latest", tmp_path / "links" / "second"
    link.symlink_to(saved)
    second.symlink_to("latest")
    earlier, model = saved.read_bytes(), trained("pissa")

    def fail(*args: Any) -> None:
        raise OSError("disk gone")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(ll.CheckpointError, match="latest: disk gone"):
            ll.save(model, link)
    assert saved.read_bytes() == earlier
    ll.save(model, second)
    assert link.is_symlink()
    assert second.is_symlink()
    assert saved.read_bytes() != earlier
    assert sorted(path.name for path in link.parent.iterdir()) == ["latest", "second"]
    fresh = llama()
    ll.load(fresh, link)
    assert torch.equal(logits(fresh), logits(model))
    ahead = tmp_path / "links" / "ahead"
    ahead.symlink_to(tmp_path / "not_yet")
    ll.save(model, ahead)
    assert ahead.is_symlink()
    assert (tmp_path / "not_yet").is_file()


def unwritable(tmp_path: Path) -> dict[str, Path | str]:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    return {
        "missing folder": tmp_path / "nowhere" / "a",
        "is a folder": tmp_path / "folder",
        "below a file": tmp_path / "file" / "a",
        "too long": tmp_path / ("a" * 300),
        "empty": "",
        "root": "/",
        "null": f"{tmp_path}/a\0b",
    }


@pytest.mark.parametrize("case", ["missing folder", "is a folder", "below a file", "too long", "empty", "root", "null"])
def test_path_that_cannot_be_written(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = unwritable(tmp_path)[case], trained()
    monkeypatch.chdir(tmp_path / "folder")
    adapted, before = logits(model), sorted(tmp_path.rglob("*"))
    with pytest.raises(ll.CheckpointError, match="save: can't write") as raised:
        ll.save(model, path)
    assert str(Path(path)) in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert torch.equal(logits(model), adapted)


@contextmanager
def unprivileged() -> Iterator[None]:
    """As root, who may write anywhere, act as nobody."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_folder_without_write_permission(saved: Path) -> None:
    model = trained("pissa")
    saved.parent.chmod(0o500)
    try:
        with unprivileged(), pytest.raises(ll.CheckpointError, match="Permission denied"):
            ll.save(model, saved)
    finally:
        saved.parent.chmod(0o700)
    ll.load(llama(), saved)


def test_save_with_nothing_attached(tmp_path: Path) -> None:
    with pytest.raises(ll.AttachError, match="no adapter is attached"):
        ll.save(llama(), tmp_path / "a")
    assert not os.listdir(tmp_path)


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "arrays": (lambda t: {name: each.numpy() for name, each in t.items()}, "lora_A is a ndarray, and no tensor"),
    "whole numbers": (
        lambda t: {**t, f"{Q0}.lora_A": t[f"{Q0}.lora_A"].long()},
        "q_proj.lora_A is of torch.int64, which is not as torch.float32 is",
    ),
    "nothing in it": (lambda t: {**t, f"{Q0}.lora_A": None}, "q_proj.lora_A is a NoneType, and no tensor"),
    "no values": (lambda t: {name: each.to("meta") for name, each in t.items()}, "lora_A is on the meta device"),
    "nothing": (lambda t: None, "tensors must be a dict by name; got NoneType"),
    "pairs": (lambda t: list(t.items()), "tensors must be a dict by name; got list"),
}


@pytest.mark.parametrize("case", WRONG)
def test_state_dicts_of_something_else(case: str) -> None:
    change, message = WRONG[case]
    model = trained()
    before = snapshot(model)
    with pytest.raises(ll.CheckpointError, match=f"load_state_dict: .*{message}"):
        ll.load_state_dict(model, change({name: torch.zeros_like(t) for name, t in ll.state_dict(model).items()}))
    assert_same(model, before)


# ---- Files that are no good ----


def test_truncated(saved: Path) -> None:
    whole, model = saved.read_bytes(), llama()
    before = snapshot(model)
    cuts = {0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1, *range(0, len(whole), len(whole) // 40)}
    for cut in sorted(cuts):
        saved.write_bytes(whole[:cut])
        with pytest.raises(ll.CheckpointError, match="truncated") as raised:
            ll.load(model, saved)
        assert str(saved) in str(raised.value)
    assert_same(model, before)
    refused(saved)


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"\xff" * 4096, b"PK\x03\x04" * 99, b"{}"], ids=range(5))
def test_garbage(content: bytes, saved: Path) -> None:
    saved.write_bytes(content)
    refused(saved, "not a readable safetensors file")


def test_trailing_bytes(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"\0" * 64)
    refused(saved, "not a readable safetensors file")


@pytest.mark.parametrize("name", ["nowhere", ".", "a" * 300, "a\0b"])
def test_no_file(name: str, tmp_path: Path) -> None:
    refused(tmp_path / name)
    for read in (ll.import_peft, ll.import_diffusers):
        with pytest.raises(ll.CheckpointError) as raised:
            read(llama(), tmp_path / name)
        assert str(tmp_path / name) in str(raised.value)


FOLDERS: dict[str, Callable[[Any, Path], Any]] = {
    "export_peft": ll.export_peft,
    "export_diffusers": ll.export_diffusers,
    "save_merged": ll.save_merged,
    "save_merged of a plain model": lambda model, folder: ll.save_merged(model.model.layers[0].mlp, folder),
}


def as_they_are(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def for_folders(which: str) -> Any:
    model = llama()
    attach(model.model.layers[0].mlp if which.endswith("plain model") else model, "lora")
    return model


@pytest.mark.parametrize("which", FOLDERS)
@pytest.mark.parametrize("case", ["below a file", "too long", "null", "file"])
def test_folder_that_cannot_be_written(which: str, case: str, tmp_path: Path) -> None:
    path, model = {**unwritable(tmp_path), "file": tmp_path / "file"}[case], for_folders(which)
    before = as_they_are(tmp_path)
    with pytest.raises(ll.CheckpointError, match=f"{which.split()[0]}: can't write") as raised:
        FOLDERS[which](model, Path(path))
    assert str(path) in str(raised.value)
    assert as_they_are(tmp_path) == before


@pytest.mark.parametrize("which", FOLDERS)
def test_full_disk(which: str, tmp_path: Path) -> None:
    """Nothing is written but all: no new folder comes to be, and the files of an earlier one stay, each beside the
    others that it came with."""
    earlier, model = tmp_path / "earlier", for_folders(which)
    FOLDERS[which](model, earlier)
    randomize(model)
    before, (soft, hard) = as_they_are(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    for folder in (earlier, tmp_path / "new"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            with pytest.raises(ll.CheckpointError, match=f"{which.split()[0]}: can't write {folder}"):
                FOLDERS[which](model, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert as_they_are(tmp_path) == before
    FOLDERS[which](model, earlier)
    assert as_they_are(tmp_path).keys() == before.keys()
    assert as_they_are(tmp_path) != before


def test_values_that_are_not_finite_are_said(tmp_path: Path) -> None:
    model = for_folders("save")
    ll.state_dict(model)[f"{Q0}.lora_B"][0] = torch.nan
    for write in (ll.save, ll.export_peft, ll.export_diffusers):
        with pytest.warns(UserWarning, match=rf"{write.__name__}: there is NaN or infinity in {Q0}\.lora_B"):
            write(model, tmp_path / write.__name__)
    ll.attach(model, ll.LoRAConfig(r=4), name="another")
    with pytest.raises(ll.AttachError, match=rf"merged_state_dict: there is NaN or infinity in {Q0}\.lora_B"):
        ll.merged_state_dict(model)


def test_a_folder_for_a_file(saved: Path, tmp_path: Path) -> None:
    refused(saved.parent, f"{saved.parent}: it is a folder; name the file in it ({saved.name})")
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", "it is a folder", "there is no .safetensors")
    ll.export_peft(trained(), tmp_path / "peft")
    refused(tmp_path / "peft", "it is a folder; it holds PEFT's adapter_config.json: call import_peft(model, folder)")


class Trap:
    """Something that runs code when it is unpickled."""

    sprung = False

    def __reduce__(self) -> Any:
        return setattr, (Trap, "sprung", True)


def test_pickle_is_never_opened(tmp_path: Path) -> None:
    path = tmp_path / "adapter.pt"
    torch.save({"state": ll.state_dict(trained()), "trap": Trap()}, path)
    refused(path, "not a readable safetensors file")
    assert not Trap.sprung


def test_another_librarys_safetensors(saved: Path) -> None:
    _, tensors = read(saved)
    for metadata in (None, {}, {"format": "pt"}):
        save_file(tensors, saved, metadata=metadata)
        refused(saved, "no lora-lite adapter", "metadata")


def with_config(metadata: dict[str, str], **fields: Any) -> None:
    metadata["config"] = json.dumps({**json.loads(metadata["config"]), **fields})


DEEP = "[" * 100_000

DAMAGE: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], list[str]]] = {
    "missing tensor": (lambda m, t: t.pop(f"{Q0}.lora_B"), [f"{Q0}.lora_B is missing"]),
    "missing layer": (
        lambda m, t: (t.pop(f"{Q0}.lora_A"), t.pop(f"{Q0}.lora_B")),
        [f"{Q0}.lora_A is missing; {Q0}.lora_B is missing"],
    ),
    "extra tensor": (lambda m, t: t.update(more=torch.ones(1)), ["more is unexpected"]),
    "extra tensor of a layer": (
        lambda m, t: t.update({f"{Q0}.lora_m": torch.ones(32)}),
        [f"{Q0}.lora_m is unexpected"],
    ),
    "wrong shape": (
        lambda m, t: t.update({f"{Q0}.lora_A": torch.ones(5, 32)}),
        [f"{Q0}.lora_A has shape (5, 32), not (4, 32)"],
    ),
    "transposed": (lambda m, t: t.update({f"{Q0}.lora_A": torch.ones(32, 4)}), ["(32, 4), not (4, 32)"]),
    "all wrong": (lambda m, t: t.clear() or t.update(x=torch.ones(1)), ["is missing;", "more)"]),
    "another rank": (lambda m, t: with_config(m, r=8), [f"{Q0}.lora_A has shape (4, 32), not (8, 32)"]),
    "unknown variant": (lambda m, t: with_config(m, variant="fancy"), ["'fancy' is not registered", "lora", "import"]),
    "variant that is no name": (lambda m, t: with_config(m, variant=["lora"]), []),
    "unknown field": (lambda m, t: with_config(m, sharpness={}), ["LoRAConfig has no field sharpness"]),
    "field out of range": (lambda m, t: with_config(m, r=0), ["LoRAConfig.r must be", "got 0"]),
    "field of another type": (lambda m, t: with_config(m, alpha="16"), ["LoRAConfig.alpha must be"]),
    "list field of another type": (lambda m, t: with_config(m, target_roles=3), ["LoRAConfig.target_roles must be"]),
    "field of another type, of one variant": (
        lambda m, t: with_config(m, variant="antipasto", block_size="4"),
        ["AntiPaSTOConfig.block_size must be a whole number below 2³¹; got '4'"],
    ),
    "unknown dtype": (lambda m, t: with_config(m, dtype="float7"), ["LoRAConfig.dtype must be"]),
    "dtype of 8 bits": (
        lambda m, t: with_config(m, dtype="float8_e4m3fn"),
        ["LoRAConfig.dtype must be", "16 bits or more"],
    ),
    "rank that is a flag": (lambda m, t: with_config(m, r=True), ["LoRAConfig.r must be", "got True"]),
    "whole modules are no list": (
        lambda m, t: m.update(whole_modules="3"),
        ["its whole_modules are not readable (JSON of a int)"],
    ),
    "whole tensors are no names": (lambda m, t: m.update(whole_tensors="[3]"), ["its whole_tensors must be", "[3]"]),
    "targets are a list": (
        lambda m, t: m.update(targets="[3]", fingerprint=hashlib.sha256(b"[3]").hexdigest()),
        ["list of target layers is not readable (JSON of a list)"],
    ),
    "dtype that is a function": (lambda m, t: with_config(m, dtype="save"), ["LoRAConfig.dtype must be"]),
    "config is no object": (lambda m, t: m.update(config="[]"), ["config is not readable"]),
    "config is no JSON": (lambda m, t: m.update(config="{"), ["config is not readable"]),
    "config is missing": (lambda m, t: m.pop("config"), ["config is not readable"]),
    "config nested too deep": (lambda m, t: m.update(config=DEEP), ["config is not readable"]),
    "targets nested too deep": (lambda m, t: m.update(targets=DEEP), ["list of target layers is not readable"]),
    "whole modules nested too deep": (lambda m, t: m.update(whole_modules=DEEP), ["whole_modules are not readable"]),
    "a rank beyond all memory": (lambda m, t: with_config(m, r=10**20), ["LoRAConfig.r must be a whole number below"]),
    "whole numbers": (
        lambda m, t: t.update({f"{Q0}.lora_A": torch.ones(4, 32, dtype=torch.int8)}),
        [f"{Q0}.lora_A is of torch.int8, which is not as torch.float32 is"],
    ),
    "complex numbers": (
        lambda m, t: t.update({f"{Q0}.lora_B": torch.ones(32, 4, dtype=torch.complex64)}),
        [f"{Q0}.lora_B is of torch.complex64"],
    ),
    "newer format": (lambda m, t: m.update(format_version="2"), ["version is 2", "up to 1", "upgrade"]),
    "format that is no number": (lambda m, t: m.update(format_version="²"), ["version is ²"]),
    "fingerprint": (lambda m, t: m.update(fingerprint="0" * 64), ["does not match its fingerprint"]),
    "fingerprint is missing": (lambda m, t: m.pop("fingerprint"), ["does not match its fingerprint"]),
    "targets": (lambda m, t: m.update(targets=m["targets"].replace("56", "57")), ["does not match its fingerprint"]),
    "targets are no JSON": (lambda m, t: m.update(targets="{"), ["list of target layers"]),
    "targets are missing": (lambda m, t: m.pop("targets"), ["list of target layers"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged(case: str, saved: Path) -> None:
    change, fragments = DAMAGE[case]
    rewrite(saved, change)
    refused(saved, *fragments)


@pytest.mark.parametrize(
    ("other", "fragments"),
    [
        (lambda: llama(hidden_size=48), [f"{Q0} is [32, 32] (in, out) in the file and [48, 48] in the model", "more)"]),
        (lambda: llama(intermediate_size=60), ["model.layers.0.mlp.gate_proj is [32, 56]", "[32, 60]"]),
        (lambda: llama(num_hidden_layers=1), ["the model has no linear layer model.layers.1.self_attn.q_proj"]),
        (qwen3, [f"{Q0} is [32, 32]", "[32, 64]"]),
        (gpt_neox, [f"the model has no linear layer {Q0}"]),
        (lambda: nn.Sequential(nn.Linear(32, 32)), [f"the model has no linear layer {Q0}"]),
        (lambda: nn.Embedding(3, 3), [f"the model has no linear layer {Q0}"]),
    ],
    ids=["wider", "wider feed-forward", "fewer layers", "qwen3", "gpt_neox", "sequential", "no linear"],
)
def test_wrong_base_model(other: Callable[[], nn.Module], fragments: list[str], saved: Path) -> None:
    model = other()
    if isinstance(model, nn.Embedding):
        with pytest.raises(ll.CheckpointError, match=fragments[0]):
            ll.load(model, saved)
    else:
        refused(saved, "another base model (LlamaForCausalLM)", *fragments, model=model)


def test_load_onto_an_attached_model(saved: Path) -> None:
    model = trained("ia3")
    before = snapshot(model)
    with pytest.raises(ll.AttachError, match="detach"):
        ll.load(model, saved)
    assert_same(model, before)


def test_load_with_an_unknown_backend(saved: Path) -> None:
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match="'cuda'"):
        ll.load(model, saved, backend="cuda")
    assert_same(model, before)


# ---- Files of the original lora-lite: one metadata key, `cfg`, and bfloat16 tensors ----

R, ALPHA = 4, 6.0


def original_file(
    path: Path, model: nn.Module, variant: str, target_names: tuple[str, ...]
) -> dict[str, dict[str, Tensor]]:
    """Write such a file with random tensors for the layers that match; returns its tensors by layer in float32."""
    generator = torch.Generator().manual_seed(3)
    found = ll.targets.find_targets(model, ll.LoRAConfig(target_names=target_names))

    def normal(*shape: int, std: float = 0.3, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std + mean).bfloat16()

    layers = {}
    for target in found:
        layer: Any = target.layer
        N, K = layer.weight.shape
        A, B = {"lora_A": normal(R, K)}, {"lora_B": normal(N, R)}
        layers[target.name] = {
            "lora": {**A, **B},
            "eva": {**A, **B},
            "pissa": {**A, **B},
            "dora": {**A, **B, "lora_m": normal(N, mean=1.0)},
            "delora": {
                **A,
                **B,
                "lora_lambda": normal(mean=3.0),
                "lora_wnorm": layer.weight.detach().norm(dim=0).bfloat16(),
            },
            "ia3": {"lora_g": normal(N, mean=1.0)},
            "ia3_ff": {"lora_g": normal(K, mean=1.0)},
            "hra": {"lora_U": normal(R, K)},
            "antipasto": {"lora_delta_s": normal(R)},
        }[variant]
    cfg = {
        "variant": variant,
        "r": R,
        "alpha": ALPHA,
        "dtype": "bfloat16",
        "target_roles": ["reader", "writer"],
        "target_names": target_names,
        "exclude_names": ["lm_head", "embed_tokens"],
        "layers": None,
        **({"lambda0": 15.0} if variant == "delora" else {}),
    }
    tensors = {f"{name}.{key}": t for name, ts in layers.items() for key, t in ts.items()}
    save_file(tensors, path, metadata={"cfg": json.dumps(cfg)})
    return {name: {key: t.float() for key, t in ts.items()} for name, ts in layers.items()}


def merged(variant: str, W: Tensor, bias: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The dense weight and bias that the original's forward pass amounts to."""
    if variant in ("lora", "eva"):
        return W + ALPHA / R * p["lora_B"] @ p["lora_A"], bias
    if variant == "dora":
        V = W + ALPHA / R * p["lora_B"] @ p["lora_A"]
        return (p["lora_m"] / V.norm(dim=1))[:, None] * V, bias
    if variant == "delora":
        A, B = p["lora_A"], p["lora_B"]
        strength = p["lora_lambda"] / R / (A.norm(dim=1) * B.norm(dim=0))
        return W + B @ torch.diag(strength) @ A @ torch.diag(p["lora_wnorm"]), bias
    if variant == "ia3":
        return p["lora_g"][:, None] * W, p["lora_g"] * bias
    if variant == "ia3_ff":
        return W * p["lora_g"], bias
    for u in p["lora_U"]:  # hra: x meets the last reflection first, W the first one
        W = W - 2 * torch.outer(W @ u, u) / (u @ u)
    return W, bias


@pytest.mark.parametrize("variant", ["lora", "eva", "dora", "delora", "ia3", "ia3_ff", "hra"])
def test_original_file(variant: str, tmp_path: Path) -> None:
    """GPT-NeoX has biases, which DoRA, IA3 and IA3-FF treat differently."""
    path, model = tmp_path / "original.safetensors", gpt_neox()
    layers = original_file(path, model, variant, ("query_key_value$", "dense_4h_to_h$"))
    expected = copy.deepcopy(model)
    for name, tensors in layers.items():
        layer: Any = expected.get_submodule(name)
        W, bias = merged(variant, layer.weight.data, layer.bias.data, tensors)
        layer.weight.data, layer.bias.data = W, bias
    base = logits(model)
    attachment = ll.load(model, path)
    assert {t.name for t in attachment.targets} == set(layers)
    assert len(layers) == 4
    assert attachment.cfg == ll.REGISTRY[variant].config(
        r=4,
        alpha=6.0,
        dtype=torch.bfloat16,
        target_names=("query_key_value$", "dense_4h_to_h$"),
        target_roles=("reader", "writer"),
        exclude_names=("lm_head", "embed_tokens"),
    )
    change = logits(expected) - base
    assert change.norm() > 0.05 * base.norm()
    # DeLoRA's factors of a bfloat16 adapter are bfloat16 themselves.
    assert_close(logits(model) - base, change, 1e-2 if variant == "delora" else 1e-4)
    again, fresh = tmp_path / "again.safetensors", gpt_neox()
    ll.save(model, again)
    ll.load(fresh, again)
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("variant", ["pissa", "antipasto"])
def test_original_file_whose_base_was_changed(variant: str, tmp_path: Path) -> None:
    original_file(tmp_path / "a", llama(), variant, ())
    refused(tmp_path / "a", f"original lora-lite's {variant}", "base weights")


def test_original_file_of_another_base_model(tmp_path: Path) -> None:
    path = tmp_path / "original.safetensors"
    original_file(path, llama(), "lora", ("q_proj",))
    refused(path, f"no linear layer {Q0}", model=gpt_neox())
    refused(path, f"{Q0}.lora_A has shape (4, 32), not (4, 48)", model=llama(hidden_size=48))


def test_damaged_original_file(tmp_path: Path) -> None:
    path = tmp_path / "original.safetensors"
    original_file(path, llama(), "dora", ("q_proj",))
    rewrite(path, lambda m, t: t.pop(f"{Q0}.lora_m"))
    refused(path, f"{Q0}.lora_m is missing")
    rewrite(path, lambda m, t: m.update(cfg="not JSON"))
    refused(path, "config is not readable")
    rewrite(path, lambda m, t: m.update(cfg='{"variant": "oft"}'))
    refused(path, "'oft' is not registered")


def test_no_place_for_a_file(tmp_path: Path) -> None:
    model = llama()
    attach(model, "lora")
    for path, message in (
        (tmp_path, "is a folder; name a file in it"),
        (tmp_path / "no" / "a", "no folder .*/no; make"),
    ):
        with pytest.raises(ll.CheckpointError, match=f"save: can't write .*: .*{message}"):
            ll.save(model, path)
    assert not list(tmp_path.iterdir())


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    """Nor is a device, which a rename would replace."""
    model = llama()
    attach(model, "lora")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ll.CheckpointError, match="device or a pipe"):
        ll.save(model, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(("made", "now"), [("bfloat16", "float32"), ("float32", "float64"), ("float32", "bfloat16")])
def test_a_file_has_the_dtype_that_the_model_was_given(made: str, now: str, tmp_path: Path) -> None:
    model = llama()
    attach(model, "lora", dtype=getattr(torch, made))
    model.to(getattr(torch, now))
    randomize(model)
    tensors = {name: t.clone() for name, t in ll.state_dict(model).items()}
    ll.save(model, tmp_path / "adapter.safetensors")
    ll.detach(model)
    ll.load(model, tmp_path / "adapter.safetensors")
    assert all(
        torch.equal(t, tensors[name]) and t.dtype == tensors[name].dtype for name, t in ll.state_dict(model).items()
    )
