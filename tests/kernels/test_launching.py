"""Operators that repeat their launches give the bits of operators that find them out anew."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compiling import compiled_value
from philox import seed_of
from torch import Tensor

from lora_lite.kernels import launching, low_rank, rotate, row_norm, scale, shrink_expand

BF16 = torch.bfloat16
M, K, N, R = 160, 80, 640, 6  # sums have parts


@pytest.fixture(autouse=True)
def _without_recordings() -> Iterator[None]:
    launching.forget()
    yield
    launching.forget()


def recorded() -> list[launching.Recording]:
    return [each for each in launching._recordings.values() if isinstance(each, launching.Recording)]


def anew(run: Callable[[], Any]) -> Any:
    """What it gives where nothing is remembered, before or after."""
    before = dict(launching._recordings)
    launching.forget()
    result = run()
    launching._recordings.clear()
    launching._recordings.update(before)
    return result


def same(a: Any, b: Any) -> bool:
    a, b = (each if isinstance(each, tuple) else (each,) for each in (a, b))
    return all(
        torch.equal(p, q) and p.dtype == q.dtype and (p.any() or not p.numel()) for p, q in zip(a, b, strict=True)
    )


def t(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def arguments(name: str) -> tuple[Any, ...]:
    f32 = torch.float32
    x, y, h, A, B, g = t(4, 40, K), t(4, 40, N), t(M, R), t(R, K, dtype=f32), t(N, R, dtype=f32), t(N, dtype=f32)
    seed, A_2, h_2 = torch.tensor([seed_of(5, 0.3)]), t(R, K, dtype=f32), t(M, R)
    return {
        "shrink": (x, A, BF16, [], None),
        "shrink of dropout": (x, A, BF16, [], seed),
        "shrink_backward": ([t(4, 40, K)], [h], x, A, [], None, A.dtype, True, True),
        "shrink_backward of dA": ([], [h], x, A, [], None, A.dtype, False, True),
        "shrink_together": (x, [A, A_2], BF16, None),
        "shrink_backward of two": ([t(4, 40, K), t(4, 40, K)], [h, h_2], x, t(2 * R, K), [], None, f32, True, True),
        "expand_add": (y, h, B, 0.5, []),
        "expand_add_backward": (y, h, B, 0.5, [], True, True),
        "shrink_expand": (x, A, t(R, K, dtype=f32).mT, BF16, []),
        "shrink_expand_backward": (t(4, 40, K), x, h, A, t(R, K, dtype=f32).mT, [], True),
        "expand_add_rescale": (y, h, B, 0.5, g, t(N), []),
        "expand_add_rescale_backward": (t(4, 40, N), y, h, B, 0.5, g, None, []),
        "scale": (y, g, []),
        "scale_backward": (t(4, 40, N), y, g, [], True, True),
        "rotate_pairs": (y, g, t(N, dtype=f32), 2, []),
        "rotate_pairs_backward": (t(4, 40, N), y, g, t(N, dtype=f32), 2, [], True, True),
    }[name]


NAMES = (
    "shrink", "shrink of dropout", "shrink_backward", "shrink_backward of dA", "shrink_together",
    "shrink_backward of two", "expand_add", "expand_add_backward",
    "shrink_expand", "shrink_expand_backward", "expand_add_rescale", "expand_add_rescale_backward", "scale",
    "scale_backward", "rotate_pairs", "rotate_pairs_backward",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_other_values(name: str) -> None:
    function = f"_{name.split()[0]}"
    operator = getattr(
        next(module for module in (low_rank, shrink_expand, scale, rotate) if hasattr(module, function)), function
    )
    for _ in range(2):
        operator(*arguments(name))
    assert len(recorded()) == 1, "it was not recorded"
    for _ in range(2):
        values = arguments(name)
        assert same(operator(*values), anew(lambda values=values: operator(*values)))
    assert len(launching._recordings) == 1


def test_memory_is_as_the_mode_has_it() -> None:
    """Results of inference mode are its own, and what was recorded there is none of what comes after."""
    for inference in (True, True, True, False):
        with torch.inference_mode(inference):
            h = low_rank._shrink(*arguments("shrink"))
        assert h.is_inference() == inference
    assert len(recorded()) == 1
    h.mul_(2)  # which a tensor of inference mode refuses


def test_row_norm() -> None:
    for _ in range(4):
        W, A, B = t(N, K), t(R, K, dtype=torch.float32), t(N, R, dtype=torch.float32)
        operands = (W, A, B, 0.7, W.float().square().sum(1))
        assert same(row_norm.row_norm(*operands), anew(lambda operands=operands: row_norm.row_norm(*operands)))
    assert len(recorded()) == 1


def test_each_layout_has_its_own() -> None:
    """Strides, alignment, dtype, and a number."""
    rows, cols = 20, 48
    wide = t(rows, 2 * cols)
    layouts = (
        wide[:, :cols],
        wide[:, 1 : cols + 1],
        t(cols, rows).mT,
        t(rows, cols),
        t(rows, cols, dtype=torch.float16),
    )
    for _ in range(3):
        for y in layouts:
            for gain in (0.5, 2.0):
                operands = (y, t(rows, R, dtype=y.dtype), t(cols, R, dtype=torch.float32), gain, [])
                got = low_rank._expand_add(*operands)
                assert same(got, anew(lambda operands=operands: low_rank._expand_add(*operands)))
    assert len(recorded()) == 2 * len(layouts)


def test_a_tensor_passed_twice() -> None:
    """It must not stand for two that are different later."""
    g = t(N, dtype=torch.float32)
    for _ in range(3):
        y = t(M, N)
        scale._scale_backward(y, y, g, [], True, True)
    dy, y = t(M, N), t(M, N)
    _, dg = scale._scale_backward(dy, y, g, [], True, True)
    torch.testing.assert_close(dg.double(), (dy.double() * y.double()).sum(0), rtol=1e-5, atol=1e-5)


def test_what_does_anything_else_is_not_replayed() -> None:
    @launching.replayed
    def doubled(y: Tensor, g: Tensor) -> Tensor:
        return scale.launch_scale(2 * y, g)

    @launching.replayed
    def written(y: Tensor, g: Tensor) -> Tensor:
        return scale.launch_scale(y, g).mul_(2)

    for call in (doubled, written):
        for _ in range(5):
            y, g = t(M, N), t(N, dtype=torch.float32)
            torch.testing.assert_close(call(y, g).double(), 2 * y.double() * g.double(), rtol=1e-2, atol=1e-2)
    assert not recorded()


def test_a_profiler_sees_launches_that_are_repeated() -> None:
    """Triton's has hooks around each launch; without them, none is looked for."""
    code = """
import json, host, launch_path
from lora_lite.kernels import launching
from triton import knobs
with launch_path.without_launching() as counts:
    step = host.step_of(host.ours("lora", "triton", host.model(64, 64)), 8, 64)
    for _ in range(4):
        step()
    repeated = sum(isinstance(each, launching.Recording) for each in launching._recordings.values())
    counts.clear()
    seen = []
    see = lambda metadata: seen.append(metadata.get()["name"])
    knobs.runtime.launch_enter_hook.add(see)
    step()
    knobs.runtime.launch_enter_hook.remove(see)
    step()
    print(json.dumps([repeated, sorted(seen), counts]))
"""
    repeated, seen, counts = compiled_value(code)
    assert repeated == len(seen) == 4
    assert counts == dict.fromkeys(seen, 2)
