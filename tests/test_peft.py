"""Against PEFT's layers: the same base model, the same adapter weights, outputs and gradients."""

import warnings
from typing import Any

import peft
import pytest
import rivals
import torch
from models import ARCHITECTURES, SIZES, assert_close, attach, llama, randomize, start_tolerance, token_ids
from torch import Tensor, nn

import lora_lite as ll

# float32 through two blocks; the libraries order their sums differently.
TOLERANCE = 1e-5
ALPHA, R = 6.0, 4
EXCLUDE = ("lm_head", "embed", "cls")  # PEFT's PiSSA would change BERT's head, which is tied to the embeddings

# Our tensor → PEFT's, by variant. PEFT keeps some of them transposed or with an axis of size 1.
LORA = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"}
NAMES: dict[str, dict[str, str]] = {
    "lora": LORA,
    "pissa": LORA,
    "dora": {**LORA, "lora_m": "lora_magnitude_vector.default.weight"},
    "delora": {"lora_A": "delora_A.default", "lora_B": "delora_B.default", "lora_lambda": "delora_lambda.default"},
    "ia3": {"lora_g": "ia3_l.default"},
    "ia3_ff": {"lora_g": "ia3_l.default"},
    "hra": {"lora_U": "hra_u.default"},
    "road": {"lora_theta": "road_theta.default", "lora_alpha": "road_alpha.default"},
}


def peft_config(variant: str, targets: list[str]) -> Any:
    config = rivals.peft_config(variant, R, ALPHA, targets, group_size=4)
    assert config is not None, variant
    return config


def both(architecture: str, variant: str) -> tuple[Any, Any, ll.Attachment]:
    """Our model and PEFT's, each at its own start."""
    ours, theirs = ARCHITECTURES[architecture](), ARCHITECTURES[architecture]()
    fields = {"svd": "exact"} if variant == "pissa" else {}
    attachment = attach(
        ours, variant, r=R, alpha=ALPHA, exclude_names=EXCLUDE[: 3 if architecture == "bert" else 2], **fields
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(theirs, peft_config(variant, list(attachment.adapters)))
    return ours, theirs.eval(), attachment


def pairs(theirs: Any, attachment: ll.Attachment) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
    """(name, our parameter, PEFT's) of every trainable tensor. That none of PEFT's is left over is checked too."""
    found = []
    for layer, adapter in attachment.adapters.items():
        wrapped = theirs.base_model.model.get_submodule(layer)
        for mine, its in NAMES[attachment.cfg.variant].items():
            found.append((f"{layer}.{mine}", getattr(adapter, mine), wrapped.get_parameter(its)))
    trainable = {id(p) for p in theirs.parameters() if p.requires_grad}
    assert trainable == {id(p) for _, _, p in found}
    return found


def like(t: Tensor, other: Tensor) -> Tensor:
    """One library's tensor in the shape that the other keeps it in."""
    return t.t() if t.squeeze().ndim == 2 and t.shape != other.shape else t.reshape(other.shape)


@torch.no_grad()
def copy_to_peft(theirs: Any, attachment: ll.Attachment) -> None:
    for _, mine, its in pairs(theirs, attachment):
        its.copy_(like(mine, its))


def logits_and_gradients(model: Any) -> tuple[Tensor, Tensor]:
    """Logits for fixed random embeddings, the gradient of those; the parameters' are left in `.grad`."""
    generator = torch.Generator().manual_seed(7)
    embeds = torch.randn(2, 17, SIZES["hidden_size"], generator=generator).requires_grad_()
    model.zero_grad()
    logits = model(inputs_embeds=embeds).logits
    (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
    assert embeds.grad is not None
    return logits.detach(), embeds.grad


def compare(ours: Any, theirs: Any, attachment: ll.Attachment) -> None:
    got, want = logits_and_gradients(ours), logits_and_gradients(theirs)
    assert_close(got[0], want[0], TOLERANCE, "logits")
    assert_close(got[1], want[1], TOLERANCE, "gradient of the embeddings")
    scalars = []
    for name, mine, its in pairs(theirs, attachment):
        assert mine.grad is not None
        assert its.grad is not None
        if mine.numel() > 1:
            assert_close(mine.grad, like(its.grad, mine), TOLERANCE, f"gradient of {name}")
        else:
            scalars.append((mine.grad.squeeze(), its.grad.squeeze()))
    if scalars:
        # One sum over all tokens and features each, which may cancel to nothing in one layer: judged together.
        mine, its = (torch.stack(list(grads)) for grads in zip(*scalars, strict=True))
        assert_close(mine, its, TOLERANCE, "gradients of the scalars")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", NAMES)
def test_same_weights_same_outputs_and_gradients(variant: str, architecture: str) -> None:
    ours, theirs, attachment = both(architecture, variant)
    base = ARCHITECTURES[architecture]()(token_ids()).logits
    randomize(ours)
    copy_to_peft(theirs, attachment)
    assert (ours(token_ids()).logits - base).norm() > 0.05 * base.norm()  # the adapter does something
    compare(ours, theirs, attachment)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", ["ia3", "ia3_ff", "road"])
def test_near_starts_agree(variant: str, architecture: str) -> None:
    """PEFT's are at one and zero exactly: the outputs to 1e-3, and from our start all gradients too."""
    ours, theirs, attachment = both(architecture, variant)
    assert_close(logits_and_gradients(ours)[0], logits_and_gradients(theirs)[0], start_tolerance(variant), "logits")
    for name, mine, its in pairs(theirs, attachment):
        assert (mine.flatten() - its.flatten()).abs().max() < 1e-3, name
    copy_to_peft(theirs, attachment)
    compare(ours, theirs, attachment)


@pytest.mark.parametrize("kind", [2, 4])
def test_kinds_of_road(kind: Any) -> None:
    ours, theirs = llama(), llama()
    attachment = attach(ours, "road", kind=kind, group_size=8)
    config = peft.RoadConfig(variant=f"road_{kind}", group_size=8, target_modules=list(attachment.adapters))
    theirs = peft.get_peft_model(theirs, config).eval()
    randomize(ours)
    copy_to_peft(theirs, attachment)
    compare(ours, theirs, attachment)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dora_magnitudes_start_alike(architecture: str) -> None:
    _, theirs, attachment = both(architecture, "dora")
    magnitudes = [pair for pair in pairs(theirs, attachment) if pair[0].endswith("lora_m")]
    assert len(magnitudes) == len(attachment.targets)
    for name, mine, its in magnitudes:
        assert_close(mine, its, 1e-6, name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pissa_starts_from_the_same_function(architecture: str) -> None:
    """PEFT subtracts s·BA from W, we add s·(BA − B₀A₀). Singular vectors have a free sign: aᵢ bᵢᵀ and bᵢ·∇bᵢ do not."""
    ours, theirs, attachment = both(architecture, "pissa")
    got, want = logits_and_gradients(ours), logits_and_gradients(theirs)
    assert_close(got[0], want[0], TOLERANCE, "logits")
    assert_close(got[1], want[1], TOLERANCE, "gradient of the embeddings")
    for layer, adapter in attachment.adapters.items():
        wrapped = theirs.base_model.model.get_submodule(layer)
        A, B = wrapped.lora_A.default.weight, wrapped.lora_B.default.weight
        for i in range(R):
            mine = torch.outer(adapter.lora_B[:, i], adapter.lora_A[i])
            # Singular vectors are sensitive where singular values lie close: looser than their span.
            assert_close(mine, torch.outer(B[:, i], A[i]), 1e-3, f"{layer} component {i}")
        assert_close(adapter.lora_B @ adapter.lora_A, B @ A, TOLERANCE, f"{layer} BA")
        assert_close(adapter.lora_B.grad @ adapter.lora_A, B.grad @ A, 1e-4, f"{layer} dB·A")
        assert_close(adapter.lora_B @ adapter.lora_A.grad, B @ A.grad, 1e-4, f"{layer} B·dA")


# ---- EVA's start ----


def anisotropic_llama() -> Any:
    """A Llama whose layers' inputs have principal directions of clearly different strength."""
    model: Any = llama()
    hidden = SIZES["hidden_size"]
    basis = torch.linalg.qr(torch.randn(hidden, hidden)).Q
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings.copy_(torch.randn_like(embeddings) * 0.6 ** torch.arange(hidden) @ basis)
        for layer in model.model.layers:  # let the residual stream keep its shape
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
    return model


def test_eva_finds_pefts_directions() -> None:
    """PEFT cycles over the batches until its incremental PCA stands still; ours passes once. Directions whose singular
    values stand clear of their neighbours must be the same, up to their sign."""
    r, batches = 4, [{"input_ids": token_ids(8, 32, seed=s)} for s in range(4)]
    ours, theirs = anisotropic_llama(), anisotropic_llama()
    with torch.no_grad():
        theirs.load_state_dict(ours.state_dict())
    attachment = attach(ours, "eva", batches, r=r)

    config = peft.LoraConfig(
        r=r,
        target_modules=list(attachment.adapters),
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0, tau=0.9999, use_label_mask=False),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(theirs, config)
    padless = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches]
    directions = peft.get_eva_state_dict(theirs, padless, show_progress_bar=False)

    compared = 0
    inputs = layer_inputs(ours, batches, list(attachment.adapters))
    for name, adapter in attachment.adapters.items():
        want = directions[f"base_model.model.{name}"]
        assert adapter.lora_A.shape == want.shape
        cosines = (adapter.lora_A * want).sum(1).abs()
        X = inputs[name]
        S = torch.linalg.svdvals(X - X.mean(0))
        for i in range(r):
            if S[i] > 1.3 * S[i + 1] and (i == 0 or S[i - 1] > 1.3 * S[i]):
                compared += 1
                assert cosines[i] > 0.99, f"{name} component {i}: |cos| = {cosines[i]:.4f}"
    assert compared >= 20


@pytest.mark.parametrize("rho", [1.5, 2.0, 3.0])
def test_eva_shares_out_ranks_by_variance(rho: float) -> None:
    """The rule of section 3.2 on exact float64 spectra of all that reaches a layer. (PEFT takes its shares from batches
    that it stops reading layer by layer.)"""
    r, alpha, batches = 4, 6.0, [{"input_ids": token_ids(8, 32, seed=s)} for s in range(4)]
    model: Any = anisotropic_llama()
    attachment = attach(model, "eva", batches, r=r, rho=rho, target_roles=())
    names = [target.name for target in ll.targets.find_targets(anisotropic_llama(), ll.LoRAConfig(target_roles=()))]
    shares = []
    for name, X in layer_inputs(model, batches, names).items():
        squares = torch.linalg.svdvals(X.double() - X.double().mean(0)).square()
        shares += [(share.item(), name) for share in (squares / squares.sum())[: round(r * rho)]]
    shares.sort(reverse=True)
    kept = [name for _, name in shares[: r * len(names)]]
    last, next_one = shares[r * len(names) - 1][0], shares[r * len(names)][0]
    want = {name: kept.count(name) for name in names}
    got = {name: len(adapter.lora_A) for name, adapter in attachment.adapters.items()}
    assert sum(got.values()) == r * len(names)
    differing = {name for name in names if got.get(name, 0) != want[name]}
    assert not differing or last - next_one < 1e-3 * last, differing  # layers that read one tensor tie
    assert max(got.values()) > r > min(got.values())
    assert max(got.values()) <= round(r * rho)
    assert all(adapter.cfg.scale == pytest.approx(alpha / r) for adapter in attachment.adapters.values())


@torch.no_grad()
def layer_inputs(model: Any, batches: list[dict[str, Tensor]], names: list[str]) -> dict[str, Tensor]:
    """All rows that reach each layer of the bare model."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: rows[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    with ll.disabled(model):
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}
