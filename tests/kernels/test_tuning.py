"""Which row of a block table a launch takes, on a GPU that is not there: timings are made up, and so are failures."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from models import rel_error
from torch import Tensor
from triton.runtime.errors import OutOfResources

from lora_lite.kernels import common, expand, expand_backward, ops, shrink, shrink_backward, tuning
from lora_lite.kernels.expand_backward import launch_expand_backward

SLOW, FAST = tuning.candidates("expand", "sm_90", 2, 16)  # the first is taken untimed
MILLISECONDS = {SLOW: 2.0, FAST: 1.0}
Run = Callable[[tuning.Config], tuning.Config]


def on_gpu(run: Run, M: int = 64, tokens: torch.dtype = torch.bfloat16, **moves: Any) -> tuning.Config:
    """What `tuned` gives for products in bf16 on a GPU."""
    x: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=tokens)
    return tuning.tuned("expand", run, x, torch.bfloat16, M, 4096, 16, **moves)


def itself(config: tuning.Config) -> tuning.Config:
    return config


@pytest.fixture
def timed() -> Iterator[list[tuning.Config]]:
    """The rows that were timed, which takes as long as MILLISECONDS says. Nothing is chosen yet."""
    rows: list[tuning.Config] = []

    def do_bench(run: Callable[[], tuning.Config], warmup: int, rep: int) -> float:
        rows.append(run())
        return MILLISECONDS[rows[-1]]

    with (
        tuning.force(architecture="sm_90"),
        mock.patch.dict(tuning._chosen, clear=True),
        mock.patch.object(tuning, "_left_out", set()),
        mock.patch("triton.testing.do_bench", do_bench),
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=False),
    ):
        yield rows


def test_the_fastest_row_is_kept_for_its_shape(timed: list[tuning.Config]) -> None:
    assert on_gpu(itself) == FAST
    assert timed == [SLOW, FAST]
    assert on_gpu(itself, M=60) == FAST  # the same bucket
    assert len(timed) == 2
    on_gpu(itself, M=65)
    assert len(timed) == 4


def test_untimed_where_it_is_switched_off(timed: list[tuning.Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_LITE_AUTOTUNE", "0")
    assert on_gpu(itself) == SLOW
    assert on_gpu(itself, tokens=torch.float32) == replace(SLOW, cols=SLOW.cols // 2, num_stages=1)
    assert not timed


# ---- untimed: what moves least ----


def test_untimed_what_moves_least(timed: list[tuning.Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever came before; among equals the table's first. A graph's capture takes it too."""
    bytes_of = {SLOW: 10.0, FAST: 9.0}
    with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):
        assert on_gpu(itself, M=5, moves=bytes_of.__getitem__) == FAST
    monkeypatch.setenv("LORA_LITE_AUTOTUNE", "0")
    assert on_gpu(itself, moves=bytes_of.__getitem__) == FAST
    bytes_of[FAST] = 11.0
    assert on_gpu(itself, moves=bytes_of.__getitem__) == SLOW
    bytes_of[FAST] = 10.0
    assert on_gpu(itself, moves=bytes_of.__getitem__) == SLOW
    assert not timed


def taken_rows(M: int, R: int, width: int = 1024) -> dict[str, tuple[int, int]]:
    """rows × cols that a layer's step takes untimed on a B200, whose launches are not started."""
    found = {}

    def note(kernel: Any, grid: Any, tensors: Any, numbers: Any, constants: Any, config: tuning.Config) -> None:
        found[kernel.fn.__name__.strip("_").removesuffix("_kernel")] = (config.rows, config.cols)

    x = torch.empty(1, dtype=torch.bfloat16).expand(M, width)
    h, A = torch.empty(M, R, dtype=x.dtype), torch.empty(R, width)
    with (
        tuning.force(architecture="sm_100", programs=132),
        mock.patch.multiple(shrink, launch=note, sum_parts=mock.DEFAULT),
        mock.patch.multiple(expand, launch=note),
        mock.patch.multiple(expand_backward, launch=note, sum_parts=mock.DEFAULT),
    ):
        shrink.launch_shrink(x, A, x.dtype)
        expand.launch_expand(x, h, A.mT, 0.5)
        launch_expand_backward(x, h, A.mT.contiguous(), 0.5, True, True)
    return found


def test_a_short_batch_takes_square_blocks() -> None:
    """Few rows a program would make many parts of dB, and blocks of 32 too few programs."""
    assert taken_rows(800, 16)["expand_backward"] == (64, 128)
    assert taken_rows(16384, 16)["expand_backward"] == (32, 512)
    assert taken_rows(800, 16)["shrink"] == (16, 256)
    assert taken_rows(16384, 16, 4096)["shrink"][0] >= 32


def test_many_ranks_take_large_blocks() -> None:
    """A, h and B are read again for each."""
    few, many = taken_rows(16384, 16, 4096), taken_rows(16384, 256, 4096)
    assert (few["shrink"][0] <= 64, many["shrink"][0]) == (True, 128)
    assert few["expand"] == many["expand"] == (64, 128), "and not the table's other row, of 64 columns"


# ---- determinism ----


@pytest.fixture
def deterministic() -> Iterator[Callable[[bool], None]]:
    before = torch.are_deterministic_algorithms_enabled()
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(before)


def test_deterministic_algorithms_fix_the_row(timed: list[tuning.Config], deterministic: Any) -> None:
    """Also for a shape that was timed before."""
    assert on_gpu(itself) == FAST
    del timed[:]
    deterministic(True)
    assert on_gpu(itself) == on_gpu(itself, M=65) == SLOW
    assert not timed
    deterministic(False)
    assert on_gpu(itself) == FAST


# ---- CUDA graphs ----


def test_a_graphs_row_is_kept(timed: list[tuning.Config]) -> None:
    """Eager calls after a capture give the graph's bits."""
    with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):
        assert on_gpu(itself) == SLOW
    assert on_gpu(itself) == SLOW
    assert not timed


def test_a_graph_takes_the_row_that_was_timed(timed: list[tuning.Config]) -> None:
    assert on_gpu(itself) == FAST
    with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):
        assert on_gpu(itself) == FAST


# ---- rows that fail ----

FAILURES = [OutOfResources(200_000, 101_376, "shared memory"), RuntimeError("PassManager::run failed")]


def failing(error: Exception, *rows: tuning.Config) -> Run:
    def run(config: tuning.Config) -> tuning.Config:
        if config in rows:
            raise error
        return config

    return run


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("bad", "good"), [(SLOW, FAST), (FAST, SLOW)])
@pytest.mark.parametrize("capturing", [False, True])
def test_a_row_that_fails_is_left_out(
    error: Exception, bad: tuning.Config, good: tuning.Config, capturing: bool, timed: list[tuning.Config]
) -> None:
    """And named, once for all shapes."""
    run = failing(error, bad)
    with (
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=capturing),
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        assert on_gpu(run) == on_gpu(run, M=1000) == good
    tried = bad == SLOW or not capturing
    assert [str(each.message) for each in said] == (
        [f"the kernel expand does without a row of its block table, {bad}: {error}"] if tried else []
    )


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_no_row_that_runs_is_an_error(error: Exception, timed: list[tuning.Config]) -> None:
    with pytest.warns(UserWarning, match="kernel expand"), pytest.raises(type(error)) as raised:
        on_gpu(failing(error, SLOW, FAST))
    assert raised.value is error


def test_no_memory_to_time_in(timed: list[tuning.Config]) -> None:
    """Timing needs some of its own; and without memory for the launch itself no other row is tried."""
    memory = torch.OutOfMemoryError("CUDA out of memory")
    with mock.patch("triton.testing.do_bench", side_effect=memory), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert on_gpu(itself) == SLOW
        with pytest.raises(torch.OutOfMemoryError):
            on_gpu(failing(memory, SLOW), M=1000)


# ---- float32 ----


@pytest.fixture
def settings() -> Iterator[None]:
    """PyTorch's settings of float32 products, which are put back."""
    backends = (torch.backends, torch.backends.cuda.matmul)
    before = [each.fp32_precision for each in backends]
    yield
    torch.set_float32_matmul_precision("highest")
    for each, value in zip(backends, before, strict=True):
        each.fp32_precision = value


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda: None, "float32"),
        (lambda: setattr(torch.backends, "fp32_precision", "tf32"), "tf32"),
        (lambda: setattr(torch.backends, "fp32_precision", "ieee"), "float32"),
        (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), "tf32"),
        (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), "tf32"),
        (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
        (lambda: torch.set_float32_matmul_precision("medium"), "tf32"),
        (lambda: torch.set_float32_matmul_precision("highest"), "float32"),
    ],
    ids=["default", "all tf32", "all ieee", "Trainer's tf32", "allow_tf32", "high", "medium", "highest"],
)
def test_float32_is_multiplied_as_pytorch_does(change: Callable[[], None], expected: str) -> None:
    """Whichever of PyTorch's settings says so; once the newer is used, asking the older raises. Full float32 is three
    TF32 products on NVIDIA's tensor cores."""
    change()
    x = torch.randn(7, 12)
    for architecture, has in (("sm_80", True), ("sm_90", True), ("gfx942", True), ("gfx950", False)):
        with tuning.force(architecture=architecture):
            full = "ieee" if architecture.startswith("gfx") else "tf32x3"
            one = expected == "tf32" and has
            assert common.precision(x, torch.float32, many_tiles=True) == ("tf32" if one else full)
            assert common.precision(x, torch.float32, many_tiles=False) == ("tf32" if one else "ieee")
            assert common.precision(x, torch.bfloat16, many_tiles=True) == "ieee"
    same, h = ops.shrink(x.requires_grad_(), torch.randn(3, 12).requires_grad_())
    ops.scale(ops.expand_add(same, h, torch.randn(12, 3), 0.7), torch.ones(12)).sum().backward()


# ---- autocast ----


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
@pytest.mark.parametrize("kernel", ["shrink", "expand_grouped", "expand_backward", "shrink_backward_dropout"])
def test_float32_tokens_of_products_in_bf16_take_fewer_columns(kernel: str, architecture: str) -> None:
    """A tile has no more bytes, and no block has fewer columns than a product takes."""
    for rank in (1, 16, 64, 100, 256):
        first, *_ = tuning.candidates(kernel, architecture, 2, rank)
        (wide,) = tuning.candidates(kernel, architecture, 2, rank, wide=True)
        assert 2 * first.rows * first.cols >= 4 * wide.rows * wide.cols
        assert (wide.cols >= 16, wide.num_stages) == (True, 1)


def taken(call: Callable[[], Any]) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    """(dtype of the tokens, dtype of the product) by which each kernel's row is chosen."""
    found = {}

    def note(kernel: str, run: Any, x: Tensor, dtype: torch.dtype, *shape: int, **moves: Any) -> Any:
        found[kernel] = (x.dtype, dtype)
        return tuning.tuned(kernel, run, x, dtype, *shape, **moves)

    with ExitStack() as stack:
        for module in (shrink, shrink_backward, expand, expand_backward):
            stack.enter_context(mock.patch.object(module, "tuned", note))
        call()
    return found


def test_rows_are_chosen_by_the_products_dtype() -> None:
    """A float32 model under autocast: whatever dtype the tokens are in, the products are in bf16, and so are rows."""
    x, y = torch.randn(70, 40, requires_grad=True), torch.randn(70, 30, requires_grad=True)
    A, B, C = (torch.randn(size, requires_grad=True) for size in ((5, 40), (30, 5), (40, 5)))
    W = torch.randn(30, 40)

    def step(autocast: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            same, h = ops.shrink(ops.shrink_expand(x, A, C), A)
            out = ops.expand_add(y, h, B, 0.7).sum() + ops.expand_add(same @ W.t(), h, B, 0.7).float().sum()
        return list(torch.autograd.grad(out, [x, y, A, B, C]))

    grads: list[Tensor] = []
    f32, bf16 = torch.float32, torch.bfloat16
    kernels = {"shrink", "shrink_across", "expand", "expand_backward", "shrink_backward", "shrink_expand_backward"}
    under_autocast = taken(lambda: grads.extend(step(True)))
    assert set(under_autocast) == kernels
    assert {dtype for _, dtype in under_autocast.values()} == {bf16}
    assert under_autocast["shrink"][0] == under_autocast["shrink_backward"][0] == f32
    assert {dtype for _, dtype in taken(lambda: step(False)).values()} == {f32}
    for got, want in zip(grads, step(False), strict=True):
        assert rel_error(got, want) < 2e-2
