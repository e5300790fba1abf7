"""How often each kernel reads and writes each token-sized tensor, exactly: counted from the executed loads and stores.

Blocks are small here, so that every dimension has several.
"""

from collections.abc import Iterator
from typing import Any

import launches
import pytest
import torch
from models import attach, randomize
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_lite as ll
from lora_lite.kernels import expand, low_rank, ops, rotate, row_norm, scale, shrink, shrink_expand, sums, tuning
from lora_lite.kernels.expand_backward import launch_expand_backward
from lora_lite.kernels.shrink_backward import launch_shrink_backward

M, K, N, R = 200, 260, 300, 20
SMALL = tuning.Config(32, 64)


@pytest.fixture(autouse=True)
def _several_blocks() -> Iterator[None]:
    with tuning.force(config=SMALL, programs=20):
        yield


def passes(launch: launches.Launch, *names: str) -> dict[str, tuple[float, float]]:
    found = launch.passes()
    return {name: found[name] for name in names}


def main_launch(run: Any) -> launches.Launch:
    """The one launch of `run` that does not only put parts together; it must have had several programs."""
    with launches.watch() as seen:
        run()
    (launch,) = launches.main(seen)
    assert launch.programs > 4
    return launch


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


def test_lowrank_add() -> None:
    x, y, h, A, B = tensor(M, K), tensor(M, N), tensor(M, R), tensor(R, K), tensor(N, R)
    assert passes(main_launch(lambda: shrink.launch_shrink(x, A, x.dtype)), "x") == {"x": (1, 0)}
    forward = main_launch(lambda: expand.launch_expand(y, h, B, 0.7))
    assert passes(forward, "y", "out") == {"y": (1, 0), "out": (0, 1)}
    backward = main_launch(lambda: launch_expand_backward(y, h, B, 0.7, True, True))
    assert passes(backward, "dy", "dh", "dB") == {"dy": (1, 0), "dh": (0, 1), "dB": (0, 1)}
    assert all(t.numel() != y.numel() for name, t in backward.tensors.items() if name != "dy"), "another M×N tensor"
    backward = main_launch(lambda: launch_shrink_backward([tensor(M, K)], [h], x, A, True, True))
    assert passes(backward, "x", "dx_base", "dx", "dA") == {"x": (1, 0), "dx_base": (1, 0), "dx": (0, 1), "dA": (0, 1)}


def test_many_ranks_take_one_more_look_at_dy() -> None:
    """Where float32 parts of dh would be several passes over dy."""
    dy, h, B = tensor(M, N), tensor(M, 80), tensor(N, 80)
    with launches.watch() as seen:
        launch_expand_backward(dy, h, B, 0.7, True, True)
    by_name = {launch.kernel: launch for launch in launches.main(seen)}
    assert set(by_name) == {"_expand_backward_kernel", "_shrink_kernel"}
    assert passes(by_name["_expand_backward_kernel"], "dy") == {"dy": (1, 0)}
    assert passes(by_name["_shrink_kernel"], "x") == {"x": (1, 0)}


def test_parts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where parts of dh would take more, as of a long batch, dh is of another look at dy; dB and dA have fewer."""
    dy, h, B, most = tensor(M, N), tensor(M, R), tensor(N, R), 3 * 4 * N * R
    for bound, looks in ((sums.MOST_BYTES, 1), (most, 2)):
        monkeypatch.setattr(sums, "MOST_BYTES", bound)
        with launches.watch() as seen:
            launch_expand_backward(dy, h, B, 0.7, True, True)
            launch_shrink_backward([dy], [h], dy, B.mT, True, True)
        of_dh = [launch.kernel for launch in launches.main(seen) if launch.kernel == "_shrink_kernel"]
        assert len(of_dh) == looks - 1
        parts = [t.nbytes for launch in seen for name, t in launch.tensors.items() if name.startswith("parts")]
        assert (max(parts) > most) == (looks == 1), "each test of a bound has to be able to fail"


def test_shrink_expand() -> None:
    """Its backward reads the output's gradient once more than it must, for dh, and then all the rest from one look."""
    dy, x, h, A = tensor(M, K), tensor(M, K), tensor(M, R), tensor(R, K)
    backward = main_launch(lambda: launch_shrink_backward([dy], [h], x, A, True, True, h))
    names = ("x", "dx_base", "dx", "dA", "dB")
    assert passes(backward, *names) == {"x": (1, 0), "dx_base": (1, 0), "dx": (0, 1), "dA": (0, 1), "dB": (0, 1)}


def test_many_ranks_turn_with_one_more_look() -> None:
    """HRA's dB is of a launch of its own where registers hold too few columns of dA and dB at once."""
    dy, x, h, A, B = tensor(M, K), tensor(M, K), tensor(M, 140), tensor(140, K), tensor(K, 140)
    with launches.watch() as seen:
        shrink_expand.launch_shrink_expand_backward(dy, x, h, A, B, True)
    by_name = {launch.kernel: launch for launch in launches.main(seen)}
    assert set(by_name) == {"_expand_backward_kernel", "_shrink_kernel", "_shrink_backward_kernel"}
    assert passes(by_name["_expand_backward_kernel"], "dy", "dB") == {"dy": (1, 0), "dB": (0, 1)}
    assert passes(by_name["_shrink_kernel"], "x") == {"x": (1, 0)}
    names = {"x": (1, 0), "dx_base": (1, 0), "dx": (0, 1), "dA": (0, 1)}
    assert passes(by_name["_shrink_backward_kernel"], *names) == names


def test_dora() -> None:
    y, h, B, g, bias = tensor(M, N), tensor(M, R), tensor(N, R), torch.randn(N), tensor(N)
    forward = main_launch(lambda: expand.launch_expand(y, h, B, 0.7, g, bias))
    assert passes(forward, "y", "out") == {"y": (1, 0), "out": (0, 1)}
    backward = main_launch(lambda: launch_expand_backward(tensor(M, N), h, B, 0.7, True, True, y, g, bias))
    assert passes(backward, "dy", "y", "dy_base") == {"dy": (1, 0), "y": (1, 0), "dy_base": (0, 1)}
    W, A, B = tensor(N, K), torch.randn(R, K), torch.randn(N, R)
    norm = main_launch(lambda: row_norm.launch_row_norm(W, None, A, B, B, 0.7, g))
    assert passes(norm, "W", "norm") == {"W": (1, 0), "norm": (0, 1)}
    assert all(t.numel() < W.numel() for name, t in norm.tensors.items() if name != "W"), "an N×K temporary"


def test_scale() -> None:
    t, g = tensor(M, N), torch.randn(N)
    assert passes(main_launch(lambda: scale.launch_scale(t, g)), "t", "out") == {"t": (1, 0), "out": (0, 1)}
    backward = main_launch(lambda: scale.launch_scale_backward(tensor(M, N), t, g, True, True))
    assert passes(backward, "dy", "t", "dt") == {"dy": (1, 0), "t": (1, 0), "dt": (0, 1)}


def test_rotate() -> None:
    y, c, s = tensor(M, N), torch.randn(N), torch.randn(N)
    assert passes(main_launch(lambda: rotate.launch_rotate(y, c, s, 60)), "y", "out") == {"y": (1, 0), "out": (0, 1)}
    backward = main_launch(lambda: rotate.launch_rotate_backward(tensor(M, N), y, c, s, 60, True, True))
    assert passes(backward, "dy", "y", "dy_base") == {"dy": (1, 0), "y": (1, 0), "dy_base": (0, 1)}
    frozen = main_launch(lambda: rotate.launch_rotate_backward(tensor(M, N), y, c, s, 60, True, False))
    assert passes(frozen, "dy", "dy_base") == {"dy": (1, 0), "dy_base": (0, 1)}
    assert frozen.passes().get("y", (0, 0)) == (0, 0)


class _TokenSizedOps(TorchDispatchMode):
    """Names of the ATen operators that make a new tensor with as many elements as the tokens' tensors have."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor)]
        if any(t.numel() >= M * min(K, N) for t in made) and not func.is_view and func.namespace == "aten":
            self.names.append(func.overloadpacket.__name__)
        return result


class Layer(nn.Module):
    """One linear that every variant's default targets match where it is named right."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(K, N, bias=False, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.name)(x)


@pytest.mark.parametrize(
    ("variant", "forward", "backward"),
    [
        ("lora", 3, 4), ("pissa", 3, 4), ("delora", 3, 4), ("eva", 3, 4), ("antipasto", 3, 4),
        ("dora", 3, 6), ("ia3", 2, 3), ("ia3_ff", 2, 3), ("hra", 3, 4),
        ("road", 2, 3),
    ],
)  # fmt: skip
def test_a_layers_step(variant: str, forward: int, backward: int) -> None:
    """Passes of a whole layer, through attach and autograd; and PyTorch itself runs the base layer's products only."""
    model = Layer("down_proj" if variant == "ia3_ff" else "k_proj")
    fields = {"block_size": 4} if variant == "antipasto" else {}
    attach(model, variant, [tensor(64, K)] if variant == "eva" else None, r=20, **fields)
    randomize(model)
    x = tensor(M, K).requires_grad_()

    def token_passes(seen: list[launches.Launch]) -> float:
        sizes = {M * K: 0.0, M * N: 0.0}
        for launch in seen:
            for name, t in launch.tensors.items():
                if t.numel() in sizes:
                    sizes[t.numel()] += sum(launch.passes()[name])
        return sum(sizes.values())

    with launches.watch() as seen, _TokenSizedOps() as eager:
        y = model(x)
    assert token_passes(seen) == forward
    dy = tensor(M, N)
    with launches.watch() as seen, eager:
        torch.autograd.grad(y, [x, *ll.parameters(model)], dy)
    assert token_passes(seen) == backward
    # The base layer's two products; and the empty tensors that the kernels fill.
    assert set(eager.names) == {"mm"}, eager.names
    assert eager.names.count("mm") == 2, eager.names


def test_offsets_beyond_2_to_the_31() -> None:
    """Strided views that reach past 2³¹ elements; the pages between are never touched."""
    stride, rows = 2**30 + 8, 3
    far = {}
    for name, size in (("x", K), ("y", N), ("dy", N), ("base", K), ("t", N), ("dt", N)):
        storage = torch.empty(stride * (rows - 1) + size, dtype=torch.bfloat16)
        far[name] = storage.as_strided((rows, size), (stride, 1)).copy_(tensor(rows, size))
    near = {name: t.contiguous() for name, t in far.items()}
    A, B, g, h = torch.randn(R, K), torch.randn(N, R), torch.randn(N), tensor(rows, R)

    def everything(t: dict[str, Tensor]) -> list[Tensor]:
        return [
            shrink.launch_shrink(t["x"], A, torch.bfloat16),
            expand.launch_expand(t["y"], h, B, 0.7, g),
            *launch_expand_backward(t["dy"], h, B, 0.7, True, True, t["y"], g),
            *launch_shrink_backward([t["base"]], [h], t["x"], A, True, True, h),
            scale.launch_scale(t["t"], g),
            *scale.launch_scale_backward(t["dt"], t["t"], g, True, True),
            rotate.launch_rotate(t["t"], g, g.flip(0), 60),
            *rotate.launch_rotate_backward(t["dt"], t["t"], g, g.flip(0), 60, True, True),
            row_norm.launch_row_norm(t["x"], None, A, B[:rows].contiguous(), B[:rows].contiguous(), 0.7, g[:rows]),
        ]

    for got, want in zip(everything(far), everything(near), strict=True):
        assert want.any()
        assert torch.equal(got, want)


def test_operators_are_what_they_claim() -> None:
    """torch's own checks: schema, fake implementation, autograd registration, tracing with dynamic shapes."""
    x, y = torch.randn(2, 9, 12, requires_grad=True), torch.randn(2, 9, 10, requires_grad=True)
    h, A, B = (torch.randn(s, requires_grad=True) for s in ((18, 3), (3, 12), (10, 3)))
    g, bias, W = torch.randn(10, requires_grad=True), torch.randn(10), torch.randn(10, 12)
    check = torch.library.opcheck
    check(low_rank._shrink, (x, A, torch.float32, [], None))
    check(low_rank._expand_add, (y, h, B, 0.7, []))
    check(shrink_expand._shrink_expand, (x, A, torch.randn(12, 3, requires_grad=True), torch.float32, []))
    check(low_rank._expand_add_rescale, (y, h, B, 0.7, g, bias, []))
    check(low_rank._expand_add_rescale, (y, h, B, 0.7, g, None, []))
    check(scale._scale, (y, g, []))
    check(rotate._rotate_pairs, (y, g, torch.randn(10, requires_grad=True), 10, []))
    x, y, h, A, B, g = (t.detach() for t in (x, y, h, A, B, g))
    check(row_norm._row_norm, (W, None, A, B, 0.7, torch.rand(10)))
    check(low_rank._shrink_backward, ([x, x], [h], x, A, [], None, A.dtype, True, True))
    check(low_rank._shrink_backward, ([], [h], x, A, [], None, A.dtype, False, True))
    check(low_rank._shrink_together, (x, [A, A + 1], torch.float32, None))
    check(low_rank._expand_add_backward, (y, h, B, 0.7, [], True, False))
    check(shrink_expand._shrink_expand_backward, (x, x, h, A, torch.randn(12, 3), [], True))
    check(shrink_expand._shrink_expand_backward, (x, x, h, A, torch.randn(12, 3), [], False))
    check(low_rank._expand_add_rescale_backward, (y, y, h, B, 0.7, g, bias, []))
    check(scale._scale_backward, (y, y, g, [], True, True))
    check(rotate._rotate_pairs_backward, (y, y, g, torch.randn(10), 2, [], True, True))
    check(rotate._rotate_pairs_backward, (y, y, g, torch.randn(10), 2, [], False, True))
    check(rotate._rotate_pairs_backward, (y, y, g, torch.randn(10), 2, [], True, False))
    assert ops.__all__
