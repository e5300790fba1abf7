"""The kernels' tests run in Triton's interpreter. Triton reads TRITON_INTERPRET when a kernel is defined."""

import os
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if INTERPRETED or collection_path.name == "conftest.py":
        return None
    return True


@pytest.fixture(autouse=True)
def _interpreted() -> None:
    from lora_lite.kernels import interpreter

    assert interpreter.ACTIVE, "run these with TRITON_INTERPRET=1, as `just test` does"
