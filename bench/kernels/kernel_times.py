"""Times of kernels and of whole layers on a GPU, beside what one would use instead, each checked against float64.

The timer is an argument: Triton's on a GPU, a fake one in the tests, which run all of this on a CPU.
"""

import copy
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import peft
import torch
import triton
from operations import error, partner
from rivals import peft_config
from torch import Tensor, nn
from torch.autograd import DeviceType

import lora_lite as ll
from lora_lite.kernels import expand, rotate, row_norm, scale, shrink
from lora_lite.kernels.expand_backward import launch_expand_backward
from lora_lite.kernels.shrink_backward import launch_shrink_backward

Quantiles = tuple[float, float, float]
Timer = Callable[[Callable[[], Any]], Quantiles]
SCALE = 2.0
GROUP_SIZE = 64  # RoAd's


def gpu_timer(run: Callable[[], Any], ms: int = 100) -> Quantiles:
    """Milliseconds: median, and the quantiles at 20 % and 80 %, of as many runs as take `ms`, as they are: where the
    host takes longer to launch than the GPU to work, that is the time."""
    median, low, high = triton.testing.do_bench(run, rep=ms, quantiles=[0.5, 0.2, 0.8])
    return median, low, high


def kernel_timer(run: Callable[[], Any], times: int = 20) -> Quantiles:
    """The same of the GPU alone: each run's launches wait until all are there, and find an empty cache."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    cache = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for before, after in events:
        cache.zero_()
        torch.cuda._sleep(int((2 * host + 50e-6) * 2e9))  # cycles, at about 2 GHz
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    took = torch.tensor([before.elapsed_time(after) for before, after in events])
    median, low, high = took.quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()
    return median, low, high


def by_launch(run: Callable[[], Any], calls: int = 9) -> dict[str, float]:
    """µs that the GPU works in a run, by kernel, PyTorch's too; what fits its cache may be there.

    Raises:
        RuntimeError: the profiler sees nothing of the GPU's.
    """
    for _ in range(3):
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    found: Counter[str] = Counter()
    for event in profile.events() or ():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            found[event.name.removeprefix("void ").split("<")[0].split("(")[0]] += event.time_range.elapsed_us() / calls
    if not found:
        raise RuntimeError("torch.profiler saw no kernel: CUPTI is missing here, or may not be used")
    return dict(found)


def device_timer(run: Callable[[], Any]) -> float:
    """Milliseconds that the GPU works in a run, without its waits for the host."""
    return sum(by_launch(run).values()) / 1e3


@dataclass(frozen=True)
class Shape:
    """A layer and its work: M tokens, K in, N out, rank R; of which model it is a projection, if of one."""

    M: int
    K: int
    N: int
    R: int
    model: str = ""


PROJECTIONS = {
    "Qwen3-0.6B": ((1024, 2048), (1024, 3072), (3072, 1024)),
    "Llama-3.1-8B": ((4096, 4096), (4096, 14336), (14336, 4096)),
    "Llama-3.1-70B": ((8192, 8192), (8192, 28672), (28672, 8192)),
}
TOKENS = (1, 16, 512, 2048, 8192, 16384)
RANKS = (8, 16, 64, 256)


def shapes(tokens: Iterable[int] = TOKENS, ranks: Iterable[int] = RANKS) -> list[Shape]:
    """Every model's projections at every number of tokens and every rank."""
    ranks = list(ranks)
    return [
        Shape(M, K, N, R, model)
        for model, projections in PROJECTIONS.items()
        for K, N in projections
        for M in tokens
        for R in ranks
    ]


@dataclass(frozen=True)
class Limits:
    """What the machine reaches: bytes and multiplications a second, measured in the same run."""

    copy: float
    matmul: float


def limits(timer: Timer, device: str, size: int = 8192) -> Limits:
    """Bandwidth of a copy, reads and writes together, and the rate of a bf16 product of size × size matrices."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    copy, product = timer(lambda: b.copy_(a))[0], timer(lambda: a @ a)[0]
    return Limits(2 * a.nbytes / (copy * 1e-3), 2 * size**3 / (product * 1e-3))


Work = dict[str, tuple[Callable[[], Any], int, int, Callable[[], Any]]]
"""By kernel: launch, bytes that must move, floating-point operations, results in float64."""
Draw = Callable[..., Tensor]


def kernels(s: Shape, timer: Timer, limit: Limits, device: str) -> list[dict[str, Any]]:
    """A row a kernel: time, bytes that must move, bandwidth, share of the copy's and of the roofline, error."""

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    rows = []
    for name, (launch, moved, operations, exact) in {**with_rank(s, draw), **without_rank(s, draw)}.items():
        got, want = launch(), exact()
        pairs = list(zip(got, want, strict=True)) if isinstance(got, tuple) else [(got, want)]
        worst = max(error(a, b) for a, b in pairs)
        median, low, high = timer(launch)
        least = max(moved / limit.copy, operations / limit.matmul) * 1e3
        rows.append(
            {
                "kernel": name, **asdict(s), "ms": median, "ms_20": low, "ms_80": high, "bytes": moved,
                "gb_per_s": moved / median / 1e6, "of_copy": moved / (median * 1e-3) / limit.copy,
                "of_roofline": least / median, "error": worst, "right": worst < (1e-5 if name == "row_norm" else 1e-2),
            }
        )  # fmt: skip
    return rows


def with_rank(s: Shape, t: Draw) -> Work:
    bf16, f32, d = torch.bfloat16, torch.float32, torch.Tensor.double
    x, dx_base, y, dy, h, dh = t(s.M, s.K), t(s.M, s.K), t(s.M, s.N), t(s.M, s.N), t(s.M, s.R), t(s.M, s.R)
    thirds = [each.contiguous() for each in dh.tensor_split(3, 1)]
    A, B, g, W = t(s.R, s.K, dtype=f32), t(s.N, s.R, dtype=f32), t(s.N, dtype=f32), t(s.N, s.K)
    BG, w_sq = B @ (A @ A.t()), W.float().square().sum(1)
    MK, MN, MR, KR, NR = 2 * s.M * s.K, 2 * s.M * s.N, 2 * s.M * s.R, 4 * s.K * s.R, 4 * s.N * s.R
    return {
        "shrink": (
            lambda: shrink.launch_shrink(x, A, bf16), MK + KR + MR, 2 * s.M * s.K * s.R, lambda: d(x) @ d(A).t()
        ),
        "expand": (
            lambda: expand.launch_expand(y, h, B, SCALE), 2 * MN + MR + NR, 2 * s.M * s.N * s.R,
            lambda: d(y) + SCALE * d(h) @ d(B).t(),
        ),
        "expand_backward": (
            lambda: launch_expand_backward(dy, h, B, SCALE, True, True)[:2], MN + 2 * MR + 2 * NR,
            4 * s.M * s.N * s.R, lambda: (SCALE * d(dy) @ d(B), SCALE * d(dy).t() @ d(h)),
        ),
        "expand_backward_rescale": (
            lambda: launch_expand_backward(dy, h, B, SCALE, True, True, y, g), 3 * MN + 2 * MR + 2 * NR,
            4 * s.M * s.N * s.R,
            lambda: (
                SCALE * (d(g) * d(dy)) @ d(B), SCALE * (d(g) * d(dy)).t() @ d(h), d(g) * d(dy),
                (d(dy) * (d(y) + SCALE * d(h) @ d(B).t())).sum(0),
            ),
        ),
        "shrink_backward": (
            lambda: launch_shrink_backward([dx_base], [dh], x, A, True, True)[:2], 3 * MK + MR + 2 * KR,
            4 * s.M * s.K * s.R, lambda: (d(dx_base) + d(dh) @ d(A), d(dh).t() @ d(x)),
        ),
        "shrink_backward_together": (
            lambda: launch_shrink_backward([dx_base] * 3, thirds, x, A, True, True)[:2],
            5 * MK + MR + 2 * KR, 4 * s.M * s.K * s.R, lambda: (3 * d(dx_base) + d(dh) @ d(A), d(dh).t() @ d(x)),
        ),
        "shrink_expand_backward": (
            lambda: launch_shrink_backward([dx_base], [dh], x, A, True, True, h), 3 * MK + 2 * MR + 3 * KR,
            6 * s.M * s.K * s.R, lambda: (d(dx_base) + d(dh) @ d(A), d(dh).t() @ d(x), d(dx_base).t() @ d(h)),
        ),
        "row_norm": (
            lambda: row_norm.launch_row_norm(W, None, A, B, BG, SCALE, w_sq), 2 * s.N * s.K + KR + 2 * NR,
            2 * s.N * s.K * s.R, lambda: (d(W) + SCALE * d(B) @ d(A)).norm(dim=1),
        ),
    }  # fmt: skip


def without_rank(s: Shape, t: Draw) -> Work:
    y, dy, MN, d = t(s.M, s.N), t(s.M, s.N), 2 * s.M * s.N, torch.Tensor.double
    g, sines = (t(s.N, dtype=torch.float32) for _ in range(2))
    return {
        "scale": (lambda: scale.launch_scale(y, g), 2 * MN, s.M * s.N, lambda: d(y) * d(g)),
        "scale_backward": (
            lambda: scale.launch_scale_backward(dy, y, g, True, True), 3 * MN, 2 * s.M * s.N,
            lambda: (d(dy) * d(g), (d(dy) * d(y)).sum(0)),
        ),
        "rotate": (
            lambda: rotate.launch_rotate(y, g, sines, GROUP_SIZE), 2 * MN, 3 * s.M * s.N,
            lambda: d(y) * d(g) + partner(d(y), GROUP_SIZE) * d(sines),
        ),
        "rotate_backward": (
            lambda: rotate.launch_rotate_backward(dy, y, g, sines, GROUP_SIZE, True, True), 3 * MN, 7 * s.M * s.N,
            lambda: (
                d(dy) * d(g) + partner(d(dy) * d(sines), GROUP_SIZE), (d(dy) * d(y)).sum(0),
                (d(dy) * partner(d(y), GROUP_SIZE)).sum(0),
            ),
        ),
    }  # fmt: skip


class _Addmm(torch.autograd.Function):
    """LoRA in the formulation that adds in place: addmm_ on the base's output and on its input gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, A, B)
        return (x @ W.t()).addmm_(x @ A.to(x.dtype).t(), B.to(x.dtype).t(), alpha=SCALE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        (dy,) = grads
        x, W, A, B = ctx.saved_tensors
        a, b = A.to(x.dtype), B.to(x.dtype)
        dh = SCALE * (dy @ b)
        dB = SCALE * (dy.t() @ (x @ a.t()))
        return (dy @ W).addmm_(dh, a), None, (dh.t() @ x).to(A.dtype), dB.to(B.dtype)


@torch.no_grad()
def move(parameters: Iterable[Tensor]) -> None:
    """Away from the start, where half of the gradients are zero."""
    for p in parameters:
        p.add_(torch.randn_like(p) * 0.05)


def contenders(variant: str, s: Shape, device: str, compiler: str) -> dict[str, tuple[Any, list[Tensor], Any]]:
    """By name a layer to call, its trainable tensors, and the module itself; all have the same base weight."""
    W = torch.randn(s.N, s.K, device=device, dtype=torch.bfloat16) * s.K**-0.5

    def linear() -> nn.Module:
        layer = nn.Linear(s.K, s.N, bias=False, device=device, dtype=torch.bfloat16)
        layer.weight = nn.Parameter(W, requires_grad=False)
        return nn.ModuleDict({"k_proj": layer})

    def ours(backend: str) -> nn.Module:
        module = linear()
        torch.manual_seed(0)
        fields = {"r": s.R, "alpha": SCALE * s.R, "target_roles": (), "target_names": ("k_proj",)}
        ll.attach(module, ll.REGISTRY[variant].config.from_common(**fields), backend=backend)
        move(ll.parameters(module))
        return module

    base = linear()
    found: dict[str, tuple[Any, list[Tensor], Any]] = {"base": (base["k_proj"], [], base)}  # type: ignore[index]
    by_backend = {"lora_lite": "triton", "eager": "reference"} | ({"compiled": "reference"} if compiler else {})
    for name, backend in by_backend.items():
        module: Any = ours(backend)
        call = torch.compile(module["k_proj"], backend=compiler) if name == "compiled" else module["k_proj"]
        found[name] = (call, ll.parameters(module), module)
    if variant == "lora":
        A, B = (p.detach().clone().requires_grad_() for p in found["eager"][1])
        found["addmm"] = (lambda x: _Addmm.apply(x, W, A, B), [A, B], None)
    if (config := peft_config(variant, s.R, SCALE * s.R, ["k_proj"])) is None:
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = peft.inject_adapter_in_model(config, linear())
    module.to(device)
    found["peft"] = (module["k_proj"], [p for p in module.parameters() if p.requires_grad], module)
    return found


def layers(
    variant: str,
    s: Shape,
    timer: Timer,
    device: str,
    compiler: str = "inductor",
    device_timer: Callable[[Callable[[], Any]], float] | None = None,
) -> list[dict[str, Any]]:
    """A row a contender: forward, backward and both of base linear and adapter; error and peak memory; with a
    `device_timer` the GPU's own time of both too."""
    x = torch.randn(s.M, s.K, device=device, dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn(s.M, s.N, device=device, dtype=torch.bfloat16)
    found = contenders(variant, s, device, compiler)
    want: list[Tensor] = []
    rows = []
    for name, (call, parameters, _) in found.items():
        wanted = [x, *parameters]

        def step(call: Any = call, wanted: list[Tensor] = wanted) -> list[Tensor]:
            y = call(x)
            return [y, *torch.autograd.grad(y, wanted, dy)]

        on_gpu = device.startswith("cuda")
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        results = step()
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        if name == "lora_lite":
            want = exact(variant, found["eager"], x, dy)
        comparable = name in ("lora_lite", "compiled", "addmm", "eager") and want
        worst = max(error(a, b) for a, b in zip(results, want, strict=True)) if comparable else None
        y = call(x)
        forward = timer(lambda call=call: call(x))
        backward = timer(lambda y=y, wanted=wanted: torch.autograd.grad(y, wanted, dy, retain_graph=True))
        both = timer(step)
        of_device = {"device_ms": device_timer(step)} if device_timer else {}
        rows.append(
            {
                "variant": variant, "contender": name, **asdict(s), "forward_ms": forward[0],
                "backward_ms": backward[0], "both_ms": both[0], "both_ms_20": both[1], "both_ms_80": both[2],
                **of_device, "peak_bytes": peak, "error": worst, "right": worst is None or worst < 2e-2,
            }
        )  # fmt: skip
    return rows


def exact(variant: str, eager: tuple[Any, list[Tensor], Any], x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output and gradients of the layer in float64, by the reference on a copy of it."""
    module = copy.deepcopy(eager[2]).double()
    x = x.detach().double().requires_grad_()
    y = module["k_proj"](x)
    return [y, *torch.autograd.grad(y, [x, *ll.parameters(module)], dy.double())]
