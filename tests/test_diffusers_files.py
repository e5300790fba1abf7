"""LoRA's file for diffusers: the pipeline's own loader computes what we do, and we what its own saver wrote."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from models import assert_close, assert_same, attach, build, randomize, rel_error, snapshot
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_lite as ll

diffusers = pytest.importorskip("diffusers")

FILE = "pytorch_lora_weights.safetensors"
TO_QKV = (r"to_(q|k|v|out\.0)$",)


def flux() -> nn.Module:
    return build(
        lambda _: diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        ),
        None,
    )  # fmt: skip


def clip() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.CLIPTextConfig(vocab_size=64, projection_dim=24, eos_token_id=63, **sizes)
    return build(transformers.CLIPTextModel, config)


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def out(model: Any) -> Tensor:
    kind = type(model).__name__
    if kind == "CLIPTextModel":
        return model(torch.arange(2, 20).view(2, 9)).last_hidden_state
    if kind == "UNet2DConditionModel":
        return model(_draw(2, 4, 8, 8), timestep=7, encoder_hidden_states=_draw(2, 5, 24)).sample
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(7, 3)}
    return model(
        hidden_states=_draw(1, 16, 4), encoder_hidden_states=_draw(1, 7, 32), pooled_projections=_draw(1, 32),
        timestep=torch.tensor([1.0]), **ids,
    ).sample  # fmt: skip


MODELS = {"unet": zoo.unet, "transformer": flux}
EACH_PLACE = pytest.mark.parametrize("place", MODELS)


def pipeline(**parts: Any) -> Any:
    """A pipeline of the models in question and nothing else."""
    if "transformer" in parts:
        others = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        return diffusers.FluxPipeline(**{**others, **parts})
    others = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return diffusers.StableDiffusionPipeline(
            **{**others, **parts}, scheduler=diffusers.DDIMScheduler(), requires_safety_checker=False
        )


def trained(model: nn.Module, variant: str = "lora", **fields: Any) -> Any:
    before = out(model)
    attach(model, variant, **{"r": 4, "target_names": TO_QKV, **fields})
    randomize(model, by=0.3)
    assert rel_error(out(model), before) > 0.01
    return model


@EACH_PLACE
@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        ("lora", {"rank_pattern": {r"to_q$": 2}, "alpha_pattern": {r"to_k$": 3.0}, "rslora": True}),
        ("pissa", {}),
        ("dora", {"alpha": 3.0}),
    ],
)
@pytest.mark.parametrize("uniform", [False, True])
def test_there_and_back(place: str, variant: str, fields: dict[str, Any], uniform: bool, tmp_path: Path) -> None:
    ours = trained(MODELS[place](), variant, **fields)
    ll.export_diffusers(ours, tmp_path, uniform=uniform)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    theirs: Any = MODELS[place]()
    pipeline(**{place: theirs}).load_lora_weights(tmp_path)
    assert_close(out(theirs), out(ours), 1e-5)
    again = MODELS[place]()
    attachment = ll.import_diffusers(again, tmp_path)
    assert attachment.cfg.variant == ("dora" if variant == "dora" else "lora")
    assert_close(out(again), out(ours), 1e-5)
    if uniform and variant != "dora":  # what a reader without the metadata computes
        tensors = load_file(tmp_path / FILE)
        bare: Any = MODELS[place]()
        bare.load_lora_adapter(tensors, prefix=place)
        assert_close(out(bare), out(ours), 1e-5)


@EACH_PLACE
@pytest.mark.parametrize("metadata", [True, False])
def test_what_diffusers_saved(place: str, metadata: bool, tmp_path: Path) -> None:
    import peft

    theirs: Any = MODELS[place]()
    theirs.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=6 if metadata else 4, target_modules=["to_q", "to_v"], use_dora=not metadata)
    )
    randomize(theirs, by=0.3)
    saver, layers = type(pipeline(**{place: theirs})), peft.get_peft_model_state_dict(theirs)
    of_config = {f"{place}_lora_adapter_metadata": theirs.peft_config["default"].to_dict()} if metadata else {}
    saver.save_lora_weights(tmp_path, **{f"{place}_lora_layers": layers}, **of_config)
    ours = MODELS[place]()
    ll.import_diffusers(ours, tmp_path / FILE)
    assert_close(out(ours), out(theirs), 1e-5)


@EACH_PLACE
def test_what_one_model_saved_by_itself(place: str, tmp_path: Path) -> None:
    import peft

    theirs: Any = MODELS[place]()
    theirs.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v"]))
    randomize(theirs, by=0.3)
    theirs.save_lora_adapter(tmp_path)
    for own in (None, ""):
        ours = MODELS[place]()
        ll.import_diffusers(ours, tmp_path, place=own)
        assert_close(out(ours), out(theirs), 1e-5)


def test_alphas_beside_the_tensors(tmp_path: Path) -> None:
    """As older trainers write them, under the layers' names."""
    ours = trained(zoo.unet(), alpha=6.0)
    ll.export_diffusers(ours, tmp_path)
    tensors = load_file(tmp_path / FILE)
    layers = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    save_file(tensors | {f"{layer}.alpha": torch.tensor(6.0) for layer in layers}, tmp_path / FILE)
    again = zoo.unet()
    ll.import_diffusers(again, tmp_path)
    assert_close(out(again), out(ours), 1e-5)


def test_several_models_of_a_pipeline(tmp_path: Path) -> None:
    unet, text = trained(zoo.unet()), trained(clip(), target_names=(r"(q|v)_proj$",))
    ll.export_diffusers({"unet": unet, "text_encoder": text}, tmp_path)
    theirs: Any = pipeline(unet=zoo.unet(), text_encoder=clip())
    theirs.load_lora_weights(tmp_path)
    assert_close(out(theirs.unet), out(unet), 1e-5)
    assert_close(out(theirs.text_encoder), out(text), 1e-5)
    again = clip()
    ll.import_diffusers(again, tmp_path)
    assert_close(out(again), out(text), 1e-5)


def test_alpha_and_rank_are_kept(tmp_path: Path) -> None:
    ll.export_diffusers(trained(flux(), alpha=6.0), tmp_path)
    with safe_open(tmp_path / FILE, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["transformer.r"] == 4
    assert config["transformer.lora_alpha"] == 6


def test_refusals(tmp_path: Path) -> None:
    model = zoo.unet()
    with pytest.raises(ll.AttachError, match="no adapter is attached"):
        ll.export_diffusers(model, tmp_path / "a")
    attach(model, "ia3", target_names=TO_QKV)
    with pytest.raises(ll.AttachError, match=r"export_diffusers: .*to_q: there is nothing .* ia3's ScaleOutput"):
        ll.export_diffusers(model, tmp_path / "a")
    ll.detach(model)
    attach(model, "lora", target_names=TO_QKV, modules_to_save=("conv_norm_out",))
    with pytest.raises(ll.AttachError, match=r"no modules that train in full \(conv_norm_out\)"):
        ll.export_diffusers(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    ll.detach(model)
    before = snapshot(model)
    ll.export_diffusers(trained(flux()), tmp_path / "b")
    with pytest.raises(ll.CheckpointError, match=r"nothing for 'unet'; its names begin with transformer\. Say which"):
        ll.import_diffusers(model, tmp_path / "b")
    save_file({"unet.down.to_q.lora.down.weight": torch.ones(2, 2)}, tmp_path / FILE)
    with pytest.raises(ll.CheckpointError, match=r"not in diffusers' present format; rewrite it by pipeline"):
        ll.import_diffusers(model, tmp_path)
    save_file({"lora_unet_down.lora_down.weight": torch.ones(2, 2)}, tmp_path / FILE)
    with pytest.raises(ll.CheckpointError, match="a file of another program is rewritten by"):
        ll.import_diffusers(model, tmp_path)
    matrices = {"unet.fc.lora_A.weight": torch.ones(2, 2), "unet.fc.lora_B.weight": torch.ones(2, 2)}
    for changed, message in [
        ({"unet.fc.alpha": torch.ones(2)}, r"fc\.alpha must be one number"),
        ({"unet.fc.alpha": torch.ones(1, dtype=torch.complex64)}, r"fc\.alpha must be one number"),
        ({"unet.fc.lora_A.weight": torch.tensor(1.0)}, r"no tensor of a layer's name and \.lora_A\.weight that is"),
    ]:
        save_file({**matrices, **changed}, tmp_path / FILE)
        with pytest.raises(ll.CheckpointError, match=message):
            ll.import_diffusers(model, tmp_path)
    assert_same(model, before)
