"""Calibration: the statistics against the exact ones of all data, what may be passed, and what is refused."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from models import (
    ARCHITECTURES,
    SIZES,
    assert_same,
    attach,
    build,
    calibration_batches,
    config,
    llama,
    randomize,
    snapshot,
    start_tolerance,
    token_ids,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lora_lite as ll
from lora_lite.calibration import InputPCA, gather

K = 40


def decaying(rows: int, rate: float = 0.8, mean: float = 0.0) -> Tensor:
    """Rows with principal directions of geometrically falling strength, around a common mean."""
    basis = torch.linalg.qr(torch.randn(K, K)).Q
    return torch.randn(rows, K) * rate ** torch.arange(K) @ basis + mean * torch.randn(K)


def exact_components(X: Tensor, rank: int, center: bool) -> Tensor:
    X = X.double()
    return torch.linalg.svd(X - X.mean(0) if center else X, full_matrices=False).Vh[:rank]


def fed(rank: int, chunks: Any, center: bool = True) -> InputPCA:
    pca = InputPCA(rank, center)
    for chunk in chunks:
        pca.update(chunk)
    return pca


def cosines(got: Tensor, want: Tensor) -> Tensor:
    """|cos| between matching directions."""
    return (got.double() * want.double()).sum(1).abs()


def projector(rows: Tensor) -> Tensor:
    return rows.double().t() @ rows.double()


CENTER = pytest.mark.parametrize("center", [True, False], ids=["centred", "raw"])


# ---- InputPCA ----


@CENTER
@pytest.mark.parametrize("size", [300, 50, 7])
def test_shares_of_the_variance(center: bool, size: int) -> None:
    X = decaying(300, mean=1.0)
    S = torch.linalg.svdvals((X - X.mean(0) if center else X).double())
    got = fed(8, X.split(size), center).explained()
    torch.testing.assert_close(got.double(), (S.square() / S.square().sum())[:8], rtol=1e-3, atol=1e-6)


@CENTER
def test_pca_of_one_chunk_is_exact(center: bool) -> None:
    X = decaying(300, mean=1.0)
    pca = fed(8, [X], center)
    assert pca.seen == 300
    assert cosines(pca.components(), exact_components(X, 8, center)).min() > 1 - 1e-6
    torch.testing.assert_close(pca.components() @ pca.components().t(), torch.eye(8), rtol=0, atol=1e-5)


@CENTER
def test_pca_of_low_rank_data_is_exact_whatever_the_chunks(center: bool) -> None:
    """Data that fits into what is held loses nothing, so its directions do not depend on the cuts."""
    X = torch.randn(500, 9) * 0.7 ** torch.arange(9) @ torch.linalg.qr(torch.randn(K, 9)).Q.t()
    X = X + torch.linspace(0, 2, 500)[:, None] * (torch.randn(K) if center else X[0])  # a mean that drifts
    want = exact_components(X, 6, center)
    for size in (1, 7, 64, 499, 500):
        pca = fed(6, X.split(size), center)
        assert pca.seen == 500
        assert cosines(pca.components(), want).min() > 1 - 1e-4, f"chunks of {size}"


@CENTER
def test_pca_of_full_rank_data_is_close_whatever_the_order(center: bool) -> None:
    X = decaying(2000, mean=0.5)
    want = exact_components(X, 6, center)
    chunks = X.split(50)
    for order in (range(40), reversed(range(40)), torch.randperm(40).tolist()):
        got = fed(6, [chunks[i] for i in order], center).components()
        assert cosines(got, want).min() > 0.999


def test_centring_matters() -> None:
    """The mean of all rows is the first raw direction and no principal one."""
    X = decaying(400, mean=3.0)
    mean = nn.functional.normalize(X.mean(0), dim=0)
    assert (fed(4, [X], center=False).components()[0] @ mean).abs() > 0.99
    assert (fed(4, [X], center=True).components()[0] @ mean).abs() < 0.9


def test_pca_follows_a_shift_between_chunks() -> None:
    """The variance between chunk means is variance too: a PCA that centres each chunk by itself misses it."""
    X = decaying(400)
    shift = torch.randn(K)
    X[200:] += 4 * shift
    got = fed(2, [X[:200], X[200:]]).components()
    assert cosines(got, exact_components(X, 2, True)).min() > 1 - 1e-5
    assert (got[0] @ nn.functional.normalize(shift, dim=0)).abs() > 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pca_of_low_precision_rows(dtype: torch.dtype) -> None:
    """The sums run in float32: only the rows themselves are rounded."""
    X = decaying(4000, mean=0.5).to(dtype)
    assert cosines(fed(6, X.split(100)).components(), exact_components(X, 6, True)).min() > 0.999


def test_pca_memory_does_not_grow() -> None:
    rank, held = 5, set()
    pca = InputPCA(rank)
    for _ in range(50):
        pca.update(decaying(200))
        held.add(sum(t.numel() for t in vars(pca).values() if isinstance(t, Tensor)))
        for t in vars(pca).values():  # and no tensor is a view that keeps something larger alive
            assert not isinstance(t, Tensor) or t.untyped_storage().nbytes() == 4 * t.numel()
    assert held == {(rank + 8) * K + K}  # the directions and the mean
    pca.update(decaying(100_000))
    assert sum(t.numel() for t in vars(pca).values() if isinstance(t, Tensor)) == (rank + 8) * K + K


# ---- What the layers' inputs are ----


def inputs_of(model: Any, names: list[str], batches: list[Any]) -> dict[str, Tensor]:
    """All rows that reach each layer, kept: what calibration may not do."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = []
    for name in names:

        def keep(module: nn.Module, args: tuple[Tensor, ...], into: list[Tensor] = rows[name]) -> None:
            into.append(args[0].detach().reshape(-1, args[0].shape[-1]))

        handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("center", [True, False])
def test_eva_holds_the_principal_directions_of_each_layer(model: Any, center: bool) -> None:
    r = 4
    batches = [{"input_ids": token_ids(4, 32, seed=s)} for s in range(3)]
    attachment = attach(model, "eva", batches, r=r, center=center)
    A = {name: adapter.lora_A.detach().double() for name, adapter in attachment.adapters.items()}
    ll.detach(model)
    for name, X in inputs_of(model, list(A), batches).items():
        X = X.double() - (X.double().mean(0) if center else 0)
        S = torch.linalg.svdvals(X)
        torch.testing.assert_close(A[name] @ A[name].t(), torch.eye(r).double(), rtol=0, atol=1e-5)
        # Random models have flat spectra, so directions are ill-defined and the variance they hold is not.
        assert (X @ A[name].t()).square().sum() > 0.98 * S[:r].square().sum(), name
        assert (X @ A[name].t()).square().sum() < S[: r + 1].square().sum(), name


def counted_updates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    update = InputPCA.update

    def counting(self: InputPCA, rows: Tensor) -> None:
        calls.append(len(rows))
        update(self, rows)

    monkeypatch.setattr(InputPCA, "update", counting)
    return calls


# A block's layers read four tensors, whatever their names: q, k, v one; o; gate and up one; down.
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_that_read_one_tensor_share_its_statistic(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, model, batches = counted_updates(monkeypatch), ARCHITECTURES[architecture](), calibration_batches(3)
    attachment = attach(model, "eva", batches)
    assert len(calls) == 3 * 2 * 4  # batches, blocks, tensors
    assert len(attachment.adapters) >= len(calls) // 3
    by_kind = {name.rpartition(".")[2]: a.lora_A for name, a in attachment.adapters.items() if ".0." in name}
    for kinds in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value")):
        shared = [by_kind[kind] for kind in kinds if kind in by_kind]
        assert all(torch.equal(shared[0], A) for A in shared[1:])
        assert len({A.data_ptr() for A in shared}) == len(shared)  # equal, but each layer trains its own
    if "o_proj" in by_kind:
        assert not torch.equal(by_kind["q_proj"], by_kind["o_proj"])


def test_sharing_is_by_identity_not_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers with inputs that are equal in shape but not the same tensor keep a statistic each."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(K, 8), nn.Linear(K, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(-2 * x.flip(-1))

    calls, X = counted_updates(monkeypatch), decaying(100)
    attachment = attach(Two(), "eva", [X], target_roles=())
    assert len(calls) == 2
    first, second = (adapter.lora_A for adapter in attachment.adapters.values())
    assert cosines(first, exact_components(X, 4, True)).min() > 0.999
    assert cosines(second, exact_components(X.flip(-1), 4, True)).min() > 0.999


# ---- Padding and the forms of a batch ----


@pytest.mark.parametrize("mask_dtype", [torch.long, torch.bool, torch.float32])
def test_padding_is_left_out(mask_dtype: torch.dtype) -> None:
    """Right padding changes no real token of a causal model, so padded batches must equal sequences one by one."""
    lengths = [5, 17, 11, 2]
    ids = token_ids(4, 17)
    mask = torch.arange(17) < torch.tensor(lengths)[:, None]
    padded = [{"input_ids": ids * mask, "attention_mask": mask.to(mask_dtype)}]
    single = [{"input_ids": row[None, :length]} for row, length in zip(ids, lengths, strict=True)]

    def components(batches: list[dict[str, Tensor]]) -> list[Tensor]:
        # r + 8 is the width: nothing is lost between batches, so their number does not matter.
        attachment = attach(llama(), "eva", batches, r=24, target_names=("q_proj", "o_proj", "gate_proj"))
        return [projector(adapter.lora_A.detach()) for adapter in attachment.adapters.values()]

    want = components(single)
    for got, w in zip(components(padded), want, strict=True):
        torch.testing.assert_close(got, w, rtol=0, atol=1e-4)
    unmasked = components([{"input_ids": ids * mask}])
    assert max((got - w).abs().max() for got, w in zip(unmasked, want, strict=True)) > 0.05  # the test can fail


def rows_seen(model: Any, names: list[str], *batch: Any, **named: Any) -> list[int]:
    """How many rows each layer's statistic takes of a batch."""
    wanted = {name: (model.get_submodule(name), InputPCA(1)) for name in names}
    return [each.seen for each in gather(model, wanted, [batch or named]).values()]


def bart() -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 61, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 56, "decoder_ffn_dim": 56, "max_position_embeddings": 64,
    }  # fmt: skip
    return build(transformers.BartForConditionalGeneration, transformers.BartConfig(**sizes))


@pytest.mark.parametrize("longer", [0, 1])
def test_masks_of_an_encoder_and_of_a_decoder(longer: int) -> None:
    """Each leaves out rows of its own stack, also where both are of one length."""
    model, ids, decoder_ids = bart(), token_ids(4, 12), token_ids(4, 12 + longer, seed=3)
    mask = torch.arange(12) < torch.tensor([[6], [12], [6], [6]])
    decoder_mask = torch.arange(12 + longer) < torch.tensor([[3], [3], [3], [4]])
    encoder, decoder = "model.encoder.layers.0.", "model.decoder.layers.0."
    of_encoder = [f"{encoder}self_attn.q_proj", f"{encoder}fc2", f"{decoder}encoder_attn.k_proj"]
    of_decoder = [f"{decoder}self_attn.q_proj", f"{decoder}encoder_attn.q_proj", f"{decoder}fc2"]
    batch = {"input_ids": ids, "attention_mask": mask.long(), "decoder_input_ids": decoder_ids}
    everything = 4 * (12 + longer)
    assert rows_seen(model, of_encoder + of_decoder, **batch) == [30] * 3 + [everything] * 3
    batch["decoder_attention_mask"] = decoder_mask.long()
    assert rows_seen(model, of_encoder + of_decoder, **batch) == [30] * 3 + [13] * 3
    del batch["attention_mask"]
    assert rows_seen(model, of_encoder + of_decoder, **batch) == [48] * 3 + [13] * 3


def test_masks_by_position_and_on_flat_rows() -> None:
    """In a tuple the mask has the place that the model's forward gives it; OPT flattens the rows of its fc1."""
    ids, mask = token_ids(2, 17), torch.arange(17) < torch.tensor([[17], [6]])
    assert rows_seen(llama(), ["model.layers.0.mlp.down_proj", "lm_head"], ids, mask.long()) == [23, 23]
    made = transformers.OPTConfig(
        vocab_size=61, hidden_size=32, ffn_dim=56, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=32
    )
    layers = [f"model.decoder.layers.0.{name}" for name in ("self_attn.q_proj", "fc1")]
    assert rows_seen(build(transformers.OPTForCausalLM, made), layers, ids, mask.long()) == [23, 23]


def test_a_text_mask_is_no_mask_of_images() -> None:
    text: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "num_hidden_layers": 1}
    vision = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1, "num_attention_heads": 4}
    made = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 4, "vision_use_head": False},
        image_token_id=5, mm_tokens_per_image=4,
    )  # fmt: skip
    model: Any = build(transformers.Gemma3ForConditionalGeneration, made)
    ids, mask = token_ids(2, 16), torch.arange(16) < torch.tensor([[16], [9]])
    ids[ids == 5] = 6
    ids[:, 1:5] = 5
    batch = {"input_ids": ids, "attention_mask": mask.long(), "pixel_values": torch.randn(2, 3, 16, 16)}
    names = [
        "model.vision_tower.encoder.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj",
    ]  # fmt: skip
    assert rows_seen(model, names, **batch, token_type_ids=(ids == 5).long()) == [32, 25]


def test_antipasto_leaves_padding_out() -> None:
    ids, mask = token_ids(2, 17), torch.arange(17) < torch.tensor([[17], [6]])
    single = [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :6]}]
    chosen = [
        [a.lora_S.clone() for a in attach(llama(), "antipasto", batches, r=8).adapters.values()]
        for batches in ([{"input_ids": ids * mask, "attention_mask": mask.long()}], single)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*chosen, strict=True))


def as_loader(ids: list[Tensor]) -> DataLoader:
    rows = [{"input_ids": row} for batch in ids for row in batch]
    return DataLoader(rows, batch_size=2, shuffle=False)  # type: ignore[arg-type]


class Mapped:
    """A tokenizer's BatchEncoding: a mapping that is no dict."""

    def __new__(cls, ids: Tensor) -> Any:
        from transformers import BatchEncoding

        return BatchEncoding({"input_ids": ids})


FORMS: dict[str, Callable[[list[Tensor]], Any]] = {
    "dicts": lambda ids: [{"input_ids": b} for b in ids],
    "BatchEncodings": lambda ids: [Mapped(b) for b in ids],
    "tuples": lambda ids: [(b,) for b in ids],
    "lists": lambda ids: [[b] for b in ids],
    "tensors": lambda ids: list(ids),
    "one stacked tensor": lambda ids: torch.stack(ids),
    "generator": lambda ids: (b for b in ids),
    "DataLoader": as_loader,
    "dicts with labels": lambda ids: [{"input_ids": b, "labels": b} for b in ids],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_batch(form: str) -> None:
    ids = [token_ids(seed=s) for s in range(3)]
    want = attach(llama(), "eva", [{"input_ids": b} for b in ids])
    got = attach(llama(), "eva", FORMS[form](ids))
    for name, adapter in want.adapters.items():
        assert torch.equal(got.adapters[name].lora_A, adapter.lora_A), name


def test_dropout_is_off_and_training_flags_come_back() -> None:
    model = nn.Sequential(nn.Linear(K, K), nn.Dropout(0.9), nn.Linear(K, 8)).train()
    model[1].training = True
    model[2].training = False
    X = decaying(200)
    state = torch.get_rng_state()
    attachment = attach(model, "eva", [X], target_roles=())
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in (model, model[0], model[1], model[2])] == [True, True, True, False]
    with torch.no_grad():
        Y = nn.functional.linear(X, model[0].weight, model[0].bias)
    last = list(attachment.adapters.values())[-1].lora_A
    assert cosines(last, exact_components(Y, 4, True)).min() > 0.99


# ---- AntiPaSTO's choice of directions ----


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_antipasto_chooses_as_brute_force_does(svd: str) -> None:
    """With 2r at least the layer's size the pool holds every direction, and the choice is the best of all."""
    N = 24
    layer = nn.Linear(K, N)
    nn.init.normal_(layer.weight, std=K**-0.5)
    X, r = decaying(300, rate=0.85, mean=0.3), 12
    U, S, Vh = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
    score = torch.stack([S[i] * (X.double() @ Vh[i]).abs().mean() for i in range(N)])
    best = sorted(sorted(range(N), key=lambda i: -score[i].item())[:r])
    assert best != list(range(r)), "the singular values alone would choose the same"

    attachment = attach(nn.Sequential(layer), "antipasto", X.split(70), r=r, svd=svd, target_roles=())
    (adapter,) = attachment.adapters.values()
    torch.testing.assert_close(adapter.lora_S.double(), S[best], rtol=1e-5, atol=0)
    assert cosines(adapter.lora_Vh, Vh[best]).min() > 1 - 1e-5
    assert cosines(adapter.lora_U.t(), U[:, best].t()).min() > 1 - 1e-5
    want = sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in best)
    got = (adapter.lora_U * adapter.lora_S) @ adapter.lora_Vh
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


def test_antipasto_without_data_takes_the_strongest() -> None:
    layer = nn.Linear(K, 24)
    attachment = attach(nn.Sequential(layer), "antipasto", r=8, target_roles=())
    (adapter,) = attachment.adapters.values()
    torch.testing.assert_close(adapter.lora_S, torch.linalg.svdvals(layer.weight.detach())[:8], rtol=1e-3, atol=0)


def test_calibrated_antipasto_starts_as_the_base_model(model: Any) -> None:
    ids = token_ids()
    with torch.no_grad():
        base = model(ids).logits
        attach(model, "antipasto", calibration_batches(), r=8)
        assert (model(ids).logits - base).abs().max() <= start_tolerance("antipasto") * base.abs().max()


# ---- What is refused, leaving the model alone ----


def exhausted() -> Iterator[Tensor]:
    batches = iter([token_ids()])
    next(batches)
    return batches


def raising() -> Iterator[Tensor]:
    yield token_ids()
    raise OSError("the disk went away")


# Data → the exception, and words that its message must have: what is wrong, and what to do.
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "missing": (lambda: None, ll.CalibrationError, ("missing", "calibration_data=")),
    "empty": (list, ll.CalibrationError, ("no batch", "calibration_data=")),
    "exhausted iterator": (exhausted, ll.CalibrationError, ("no batch", "run out", "calibration_data=")),
    "too few tokens": (
        lambda: [token_ids(1, 8)],
        ll.CalibrationError,
        ("layers.0.self_attn.q_proj", "8 tokens", "9", "more or longer batches", "lower r"),
    ),
    "all padding": (
        lambda: [{"input_ids": token_ids(), "attention_mask": torch.zeros(2, 17, dtype=torch.long)}],
        ll.CalibrationError,
        ("layers.0.self_attn.q_proj", "0 tokens"),
    ),
    "one dict": (lambda: {"input_ids": token_ids()}, ll.CalibrationError, ("calibration_data is one dict", "[batch]")),
    "one tensor": (token_ids, ll.CalibrationError, ("one tensor of shape (2, 17)", "counts batches", "[batch]")),
    "no batches": (lambda: 5, ll.CalibrationError, ("calibration_data is one int",)),
    "a batch of nothing": (lambda: [None], ll.CalibrationError, ("a batch that is None", "dicts, tuples or tensors")),
    "a number for a batch": (lambda: [5], ll.CalibrationError, ("a batch that is 5",)),
    "a list for a mask": (
        lambda: [{"input_ids": token_ids(), "attention_mask": [[1] * 17] * 2}],
        ll.CalibrationError,
        ("calibration_data: attention_mask is a list", "return_tensors"),
    ),
    "NaN": (
        lambda: [{"inputs_embeds": torch.full((2, 17, 32), float("nan"))}],
        ll.CalibrationError,
        ("layers.0.self_attn.q_proj: calibration_data", "NaN"),
    ),
    "no such argument": (lambda: [{"inputs": token_ids()}], ValueError, ()),
    "tokens out of range": (lambda: [token_ids(), token_ids() + 10_000], IndexError, ()),
    "data that raises": (raising, OSError, ("disk",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_untouched(case: str) -> None:
    data, exception, words = REFUSED[case]
    model: Any = llama().train()
    model.model.layers[1].eval()
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(exception) as caught:
        ll.attach(model, config("eva", r=8), calibration_data=data())
    for word in words:
        assert word in str(caught.value)
    assert_same(model, before)
    attach(model, "eva", r=8)  # and it is ready for another try
    ll.detach(model)
    assert_same(model, before)


@pytest.mark.parametrize("case", ["empty", "exhausted iterator", "too few tokens", "data that raises"])
def test_antipasto_refuses_too(case: str) -> None:
    data, exception, _ = REFUSED[case]
    model = llama()
    before = snapshot(model)
    with pytest.raises(exception):
        ll.attach(model, config("antipasto", r=12), calibration_data=data())
    assert_same(model, before)


def test_exactly_enough_tokens() -> None:
    """Centring takes one degree of freedom: rank r from r + 1 rows."""
    attachment = attach(llama(), "eva", [token_ids(1, 9)], r=8)
    for adapter in attachment.adapters.values():
        torch.testing.assert_close(adapter.lora_A @ adapter.lora_A.t(), torch.eye(8), rtol=0, atol=1e-4)
    attach(llama(), "eva", [token_ids(1, 8)], r=8, center=False)


def test_a_layer_that_never_ran_is_named() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(K, 8), nn.Linear(K, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Unused()
    before = snapshot(model)
    with pytest.raises(ll.CalibrationError, match=r"idle.*0 tokens"):
        attach(model, "eva", [decaying(50)], target_roles=())
    assert_same(model, before)


@pytest.mark.parametrize("variant", ["lora", "pissa", "dora", "delora", "ia3", "ia3_ff", "hra", "road"])
def test_variants_without_calibration_ignore_the_data(variant: str) -> None:
    """One call site serves all variants: data that a variant does not need is not consumed, and it is said."""
    data = iter([token_ids()])
    with pytest.warns(UserWarning, match=rf"not used: {variant} takes none; .*\(antipasto, eva"):
        attach(llama(), variant, data)
    assert next(data) is not None
    with pytest.raises(ll.CalibrationError, match="calibration_data is one int"):
        attach(llama(), variant, 5)


def test_data_for_one_of_several() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ll.attach(llama(), {"a": config("lora"), "b": config("eva")}, calibration_data=iter(calibration_batches()))
    with pytest.warns(UserWarning, match="not used: lora, ia3 takes none"):
        ll.attach(llama(), {"a": config("lora"), "b": config("ia3")}, calibration_data=calibration_batches())


def test_the_bare_model_runs_whatever_is_attached() -> None:
    """An adapter that acts, or acts on some entries of a batch, has no part in another's start."""
    batches = calibration_batches()
    starts = []
    for others in (False, True):
        model = llama()
        if others:
            for name in ("a", "b"):
                ll.attach(model, ll.LoRAConfig(r=4), name=name)
            randomize(model)
            ll.use(model, ["a", "b", None])
        torch.manual_seed(0)
        ll.attach(model, ll.EVAConfig(r=4), name="eva", calibration_data=batches)
        starts.append(ll.state_dict(model, "eva"))
    assert all(torch.equal(t, starts[1][name]) for name, t in starts[0].items())


def test_batches_without_values() -> None:
    """PyTorch computes with a meta tensor on a CPU, on memory that nobody has written."""
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ll.CalibrationError, match="a batch on the meta device, which holds no values"):
        ll.attach(model, ll.EVAConfig(r=2, target_roles=()), calibration_data=[torch.empty(64, 8, device="meta")])
