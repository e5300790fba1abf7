"""The site on a layer: calls from threads, copies, replicas and within each other, calls that raise, and what several
adapters on one layer become."""

import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from models import VARIANTS, assert_close, assert_same, attach, config, llama, randomize, rel_error, snapshot, token_ids
from torch import Tensor, nn
from torch.nn.parallel import replicate
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from lora_lite.calls import _thread
from lora_lite.site import waiting

EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


def mlp(variant: str = "lora", width: int = 24, **fields: Any) -> Any:
    """Two adapted layers under names that every variant's default targets match."""
    model = nn.Sequential()
    for name in ("k_proj", "down_proj"):
        model.add_module(name, nn.Linear(width, width))
    names = {"target_names": ("proj",), **fields}
    ll.attach(model, config(variant, **names), calibration_data=[torch.randn(64, width)] if variant == "eva" else None)
    randomize(model)
    return model


# ---- threads ----


def in_threads(calls: list[Callable[[], Any]], times: int) -> list[list[Any]]:
    """What each call gave, each of them `times` times in a thread of its own, all started at once."""
    found: list[list[Any]] = [[] for _ in calls]
    start = threading.Barrier(len(calls))

    def run(i: int) -> None:
        start.wait()
        found[i] += [calls[i]() for _ in range(times)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(each) == times for each in found), "a thread raised"
    return found


@EACH_VARIANT
@pytest.mark.parametrize("lengths", [(40, 40), (40, 7)], ids=["equal", "unequal"])
def test_two_threads(variant: str, lengths: tuple[int, int]) -> None:
    model = mlp(variant, 128)
    xs = [torch.randn(length, 128) for length in lengths]
    with torch.no_grad():
        want = [model(x) for x in xs]

    def call(x: Tensor) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: model(x))

    for got, y in zip(in_threads([call(x) for x in xs], 150), want, strict=True):
        assert all(torch.equal(each, y) for each in got)


@pytest.mark.parametrize("base", ["weight_norm", "written to"])
def test_two_threads_that_derive(base: str) -> None:
    """None sees what another has not derived yet."""
    model, x = mlp("dora", 32), torch.randn(3, 32)
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    if base == "weight_norm":
        for layer in layers:
            torch.nn.utils.parametrizations.weight_norm(layer)
    for _ in range(1 if base == "weight_norm" else 20):
        with torch.no_grad():
            if base == "written to":
                for layer in layers:
                    layer.weight.mul_(1.1)
            want = copy.deepcopy(model)(x)
        call = torch.no_grad()(lambda: model(x))
        for got in in_threads([call] * 4, 100 if base == "weight_norm" else 1):
            assert all(torch.allclose(y, want, atol=1e-5) for y in got)


@EACH_VARIANT
def test_two_threads_that_generate(variant: str) -> None:
    model: Any = llama()
    attach(model, variant)
    randomize(model, by=0.3)
    prompts = [token_ids(1, 5), token_ids(2, 9, seed=1)]
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}

    def generate(prompt: Tensor) -> Any:
        return model.generate(prompt, **options)

    want = [generate(prompt) for prompt in prompts]
    for runs, alone in zip(in_threads([lambda p=p: generate(p) for p in prompts], 3), want, strict=True):
        for run in runs:
            assert torch.equal(run.sequences, alone.sequences)
            assert all(torch.equal(a, b) for a, b in zip(run.logits, alone.logits, strict=True))


def test_two_threads_that_both_see_what_waits() -> None:
    """It is done once, whichever call comes first."""
    model, done = mlp(), []
    both, real = threading.Barrier(2), torch._C._current_graph_task_id
    late = threading.local()

    def slow() -> int:  # so that both have looked before either goes on
        if not vars(late):
            late.once = True
            both.wait(20)
        return real()

    waiting.append(lambda: done.append(1))
    with mock.patch.object(torch._C, "_current_graph_task_id", slow):
        in_threads([lambda: model(torch.randn(5, 24))] * 2, 1)
    assert done == [1]


# ---- replicas and copies ----


def replicas(model: nn.Module, device: str) -> list[Any]:
    """As torch.nn.parallel.replicate makes them; only the copying of tensors, which needs CUDA, is ours."""

    def broadcast(tensors: Any, devices: Any, detach: bool = False) -> list[list[Tensor]]:
        return [[t.detach().clone().to(device) + (0 if device == "meta" else i) for t in tensors] for i in range(2)]

    with (
        mock.patch("torch.nn.parallel.replicate._broadcast_coalesced_reshape", broadcast),
        mock.patch("torch._utils._get_device_index", lambda device, *_: device),
        mock.patch("torch.nn.parallel.replicate._get_device_index", lambda device, *_: device, create=True),
    ):
        return list(replicate(model, [0, 1]))


@EACH_VARIANT
def test_replicas_run_their_own_adapters(variant: str) -> None:
    """The second replica's tensors are all larger by one: its adapter must be, too."""
    model, x = mlp(variant), torch.randn(5, 24)
    first, second = replicas(model, "cpu")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for t in (*other.parameters(), *other.buffers()):
            t += 1
    assert torch.equal(first(x), model(x))
    assert torch.equal(second(x), other(x))
    assert not torch.allclose(second(x), model(x))


@EACH_VARIANT
def test_replicas_run_on_their_own_device(variant: str) -> None:
    replica = replicas(mlp(variant), "meta")[0]
    y = replica(torch.randn(5, 24, device="meta"))
    assert y.device.type == "meta"
    assert y.shape == (5, 24)


# ---- calls within calls, and calls that raise ----


class Again(nn.Linear):
    """y = f(x) with f the layer itself once more, on half of x."""

    deep = False
    fails: type[BaseException] | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.fails is not None and not self.deep:
            raise self.fails("in the layer")
        if self.deep:
            self.deep = False
            try:
                return super().forward(input) + self(input / 2)
            finally:
                self.deep = True
        return super().forward(input)


@EACH_VARIANT
def test_a_layer_that_calls_itself(variant: str) -> None:
    layer, x = Again(24, 24), torch.randn(5, 24)
    ll.attach(
        layer, config(variant, target_names=()), calibration_data=[torch.randn(64, 24)] if variant == "eva" else None
    )
    randomize(layer)
    adapter = layer.lora_lite["default"]  # type: ignore[index,union-attr]

    def adapted(x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        primitive = adapter.primitive(layer)
        x, carry = primitive.on_input(x, ll.reference)
        return primitive.on_output(base(x), carry, ll.reference)

    def plain(x: Tensor) -> Tensor:
        return nn.functional.linear(x, layer.weight, layer.bias)

    want = adapted(x, lambda x: plain(x) + adapted(x / 2, plain))
    layer.deep = True
    assert_close(layer(x), want, 1e-6)
    assert not _thread.calls


@EACH_VARIANT
def test_the_same_layer_twice_in_a_forward(variant: str) -> None:
    model, x = mlp(variant), torch.randn(5, 24, requires_grad=True)
    layer = model.k_proj
    twice = layer(torch.tanh(layer(x)))
    (got,) = torch.autograd.grad(twice.sum(), x)
    h = layer(x).detach().requires_grad_()
    y = layer(torch.tanh(h))
    assert torch.equal(twice, y)
    (between,) = torch.autograd.grad(y.sum(), h)
    (want,) = torch.autograd.grad(layer(x), x, between)
    assert torch.equal(got, want)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@EACH_VARIANT
def test_a_layer_that_raises(variant: str, error: type[BaseException]) -> None:
    """Nothing of the call stays alive, the next is right, and one that catches its inner call's error is too."""
    model, x = nn.Sequential(nn.Linear(24, 24), Again(24, 24)), torch.randn(5, 24)
    ll.attach(
        model, config(variant, target_names=()), calibration_data=[torch.randn(64, 24)] if variant == "eva" else None
    )
    randomize(model)
    want = model(x)
    held = (x * 1).requires_grad_() * 1
    alive = weakref.ref(held)
    model[1].fails = error
    with pytest.raises(error) as raised:
        model(held)
    del raised, held
    model[1].fails = None
    assert torch.equal(model(x), want)  # what an interrupt left goes now at the latest
    gc.collect()
    assert alive() is None
    assert not _thread.calls


def test_an_inner_call_that_raises_and_is_caught() -> None:
    class Patient(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            if input.shape[-1] != self.in_features:
                raise ValueError
            try:
                self(input[..., :-1])
            except (ValueError, RuntimeError):
                return super().forward(input)
            raise AssertionError

    layer, x = Patient(8, 8), torch.randn(3, 8)
    ll.attach(layer, config("ia3", target_names=()))
    randomize(layer)
    assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias) * layer.lora_lite["default"].lora_g, 1e-6)  # type: ignore[index,union-attr]
    assert len(ll.verify(layer, x)) == 1


def test_output_that_is_no_tensor() -> None:
    """Where the layer's forward can't be tried at attach, its first call says what is wrong."""

    class Router(nn.Linear):
        def forward(self, input: Tensor, k: int) -> Any:
            return super().forward(input).topk(k)

    model = nn.ModuleDict({"gate": Router(8, 8)})
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("gate",)))
    with pytest.raises(ll.AttachError, match=r"gate: its output is a topk.*exclude_names"):
        model["gate"](torch.randn(3, 8), 2)


def test_input_under_another_keyword() -> None:
    class Named(nn.Linear):
        def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(hidden_states)

    layer, x = Named(8, 8), torch.randn(3, 8)
    ll.attach(layer, ll.LoRAConfig(r=2))
    randomize(layer)
    assert torch.equal(layer(hidden_states=x), layer(x))
    with pytest.raises(ll.AttachError, match=r"Named: called without a positional.*which is its input"):
        layer(hidden_states=x, mask=x)


def test_a_pre_hook_that_is_gone() -> None:
    model = mlp()
    model.k_proj._forward_pre_hooks.clear()
    with pytest.raises(ll.AttachError, match="k_proj: the adapter's forward pre-hook did not run"):
        model(torch.randn(5, 24))


@EACH_VARIANT
@pytest.mark.parametrize("how", ["replaced", "written to"])
def test_a_pre_hook_that_changes_the_input(variant: str, how: str) -> None:
    """Registered after the adapter's, as activation patching does: the adapter sees what the layer does, or says so."""
    model, x = mlp(variant), torch.randn(5, 24)

    def zeroed(layer: Any, args: Any) -> Any:
        if how == "replaced":
            return (args[0] * 0.5,)
        args[0].mul_(0.5)
        return None

    changes_input = variant in ("ia3_ff", "hra")
    with torch.no_grad():
        for name in ("k_proj", "down_proj"):
            layer = getattr(model, name)
            want = layer(x * 0.5)
            late = layer.register_forward_pre_hook(zeroed)
            if changes_input and name == "down_proj":
                with pytest.raises(ll.AttachError, match=r"^down_proj: a forward pre-hook .*prepend=True"):
                    layer(x.clone())
            elif not changes_input:
                assert_close(layer(x.clone()), want, 1e-5)
            late.remove()
            early = layer.register_forward_pre_hook(zeroed, prepend=True)
            assert_close(layer(x.clone()), want, 1e-5)
            early.remove()


@EACH_VARIANT
def test_a_pre_hook_that_hands_on_an_alias(variant: str) -> None:
    """As DeepSpeed's do, for hooks in the backward."""
    model, x = mlp(variant), torch.randn(5, 24, requires_grad=True)
    want = model(x)
    for layer in (model.k_proj, model.down_proj):
        layer.register_forward_pre_hook(lambda layer, args: (args[0].view_as(args[0]),))
    assert torch.equal(model(x), want)
    torch.func.vmap(model)(x.detach())
    for layer in (model.k_proj, model.down_proj):  # or a copy, and twice the values
        layer.register_forward_pre_hook(lambda layer, args: (args[0].clone(),))
        layer.register_forward_pre_hook(lambda layer, args: (args[0].double().to(args[0].dtype),))
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_gradients_where_a_pre_hook_changes_the_input(variant: str) -> None:
    model, x = mlp(variant), torch.randn(5, 24)
    own = ll.parameters(model)
    found = []
    for prepend in (True, False):
        handle = model.down_proj.register_forward_pre_hook(lambda layer, args: (args[0].tanh(),), prepend=prepend)
        leaf = x.clone().requires_grad_()
        found.append(torch.autograd.grad(model(leaf).square().sum(), [leaf, *own]))
        handle.remove()
    for first, second in zip(*found, strict=True):
        assert_close(second, first, 1e-5)


def test_a_graph_whose_input_is_replaced_says_so() -> None:
    torch._dynamo.reset()
    model = mlp()
    model.k_proj.register_forward_pre_hook(lambda layer, args: (args[0] * 0.5,))
    with pytest.raises(Exception, match="Register that with prepend=True"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(5, 24))


# ---- the machinery of others ----


def test_dynamic_quantisation_registers_the_hooks_again() -> None:
    """torch.ao puts layers of its own in the old ones' stead, and the old ones' hooks on them, without keywords."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)), torch.randn(5, 64)
    ll.attach(model, ll.LoRAConfig(r=4))
    randomize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised: Any = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert not isinstance(quantised[0], nn.Linear)
    with ll.disabled(model):
        base = model(x)
    assert rel_error(base, model(x)) > 0.5
    assert rel_error(quantised(x), model(x)) < 0.03
    with ll.disabled(quantised):
        assert rel_error(quantised(x), base) < 0.05
    ll.detach(quantised)
    assert rel_error(quantised(x), base) < 0.05
    with ll.disabled(model):
        assert torch.equal(model(x), base)


@EACH_VARIANT
def test_functional_call_and_export(variant: str) -> None:
    model, x = mlp(variant), torch.randn(5, 24)
    doubled = {name: 2 * t for name, t in model.state_dict().items()}
    other = copy.deepcopy(model)
    other.load_state_dict(doubled)
    assert torch.equal(torch.func.functional_call(model, doubled, (x,)), other(x))
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


@EACH_VARIANT
@pytest.mark.parametrize("reentrant", [False, True])
def test_both_kinds_of_checkpointing(variant: str, reentrant: bool) -> None:
    model, x = mlp(variant), torch.randn(5, 24, requires_grad=True)
    want = torch.autograd.grad(model(x).square().sum(), [x, *ll.parameters(model)])
    model(x)  # nothing of a call that is never differentiated gets in the way
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, want[0])  # type: ignore[arg-type]
    assert all(torch.equal(p.grad, g) for p, g in zip(ll.parameters(model), want[1:], strict=True))  # type: ignore[arg-type]


def test_compile_of_changing_lengths_in_two_threads() -> None:
    torch._dynamo.reset()
    model = mlp()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    xs = [torch.randn(length, 24) for length in (3, 11, 5)]
    with torch.no_grad():
        want = [model(x) for x in xs]
        compiled(xs[0])
    got = in_threads([torch.no_grad()(lambda x=x: compiled(x)) for x in xs], 3)
    for runs, y in zip(got, want, strict=True):
        for run in runs:
            torch.testing.assert_close(run, y)


# ---- several adapters on one layer ----


def test_sums_that_act_together_run_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One look at x and one at y for adapters of four methods; a scale in between, or dropout, keeps them apart."""
    calls: list[Any] = []
    for name in ("shrink", "expand_add"):
        operation = getattr(ll.reference, name)
        monkeypatch.setattr(
            ll.reference, name, lambda *a, name=name, call=operation, **own: calls.append(name) or call(*a, **own)
        )
    layer, x = nn.Linear(12, 10), torch.randn(5, 12)
    base = layer(x).detach()
    changes = []
    for name, variant in {"a": "lora", "b": "delora", "c": "pissa", "d": "lora"}.items():
        ll.attach(layer, config(variant, target_roles=()), name=name)
        ll.use(layer, name)
        randomize(layer, seed=len(changes))
        ll.use(layer, *layer.lora_lite)  # type: ignore[union-attr,arg-type]
    for name in "abcd":
        ll.use(layer, name)
        changes.append(layer(x) - base)
    ll.use(layer, *"abcd")
    calls.clear()
    y = layer(x)
    assert calls == ["shrink", "expand_add"]
    assert_close(y - base, sum(changes), 1e-5)
    direction = torch.randn_like(y)
    got = torch.autograd.grad((y * direction).sum(), ll.parameters(layer))
    want = torch.autograd.grad((sum(changes) * direction).sum(), ll.parameters(layer))
    for mine, its in zip(got, want, strict=True):
        assert_close(mine, its, 1e-5)
    ll.use(layer, "a", "d")
    calls.clear()
    layer(x)
    assert calls == ["shrink", "expand_add"]

    ll.attach(layer, config("ia3", target_names=()), name="gain")
    ll.attach(layer, config("lora", target_roles=()), name="e")
    calls.clear()
    ll.use(layer, *"abcd", "gain", "e")
    layer(x)
    assert calls == ["shrink", "shrink", "expand_add", "expand_add"]
    ll.attach(layer, config("lora", target_roles=(), dropout=0.5), name="f")
    ll.use(layer, "e", "f")
    layer.train()
    calls.clear()
    layer(x)
    assert calls == ["shrink", "shrink", "expand_add", "expand_add"], "masks of their own"


def test_two_adapters_come_and_go() -> None:
    layer = nn.Linear(12, 12)
    before = snapshot(layer)
    ll.attach(layer, config("lora"), name="a")
    ll.attach(layer, config("hra"), name="b")
    assert len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 1
    assert list(layer.lora_lite) == ["a", "b"]  # type: ignore[union-attr,arg-type]
    assert list(layer.state_dict())[2:] == ["lora_lite.a.lora_A", "lora_lite.a.lora_B", "lora_lite.b.lora_U"]
    ll.detach(layer, "a")
    assert len(layer._forward_hooks) == 1
    ll.detach(layer)
    assert_same(layer, before)


# ---- autocast ----


def test_antipasto_unturned_is_the_base_under_autocast() -> None:
    layer, x = nn.Linear(64, 48), torch.randn(5, 64)
    ll.attach(layer, ll.AntiPaSTOConfig(r=32))
    for p in ll.parameters(layer):
        nn.init.zeros_(p)  # which start near it
    with torch.autocast("cpu", torch.bfloat16):
        primitive = layer.lora_lite["default"].primitive(layer)  # type: ignore[index,union-attr]
        change = (primitive.B.double() @ primitive.A.double()).norm()
        got = layer(x)
        with ll.disabled(layer):
            base = layer(x)
    S = layer.lora_lite["default"].lora_S  # type: ignore[index,union-attr]
    assert change <= 1e-5 * S.norm()
    assert torch.equal(got, base)


def test_hra_is_orthogonal_under_autocast() -> None:
    layer = nn.Linear(64, 48)
    ll.attach(layer, ll.HRAConfig(r=8))
    randomize(layer)
    with torch.autocast("cpu", torch.bfloat16):
        primitive = layer.lora_lite["default"].primitive(layer)  # type: ignore[index,union-attr]
    Q = torch.eye(64, dtype=torch.float64) + (primitive.B @ primitive.A).double()
    assert rel_error(Q @ Q.t(), torch.eye(64)) < 1e-6


@pytest.mark.parametrize(("variant", "calibrated"), [*((v, v == "eva") for v in VARIANTS), ("antipasto", True)])
def test_attach_within_autocast_starts_as_without(variant: str, calibrated: bool) -> None:
    """Where a trainer's `with torch.autocast` has begun already. Wide enough that SVDs are sketched."""
    x = torch.randn(300, 256) @ torch.diag(torch.logspace(0, -2, 256))

    def started(enabled: bool) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(256, 256))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            attach(model, variant, [x] if calibrated else None, target_names=("0",))
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}

    got, want = started(True), started(False)
    for name, t in want.items():
        assert torch.equal(got[name], t), name


def test_doras_norm_is_not_of_autocasts_dtype() -> None:
    layer = nn.Linear(64, 48)
    ll.attach(layer, ll.DoRAConfig(r=8))
    randomize(layer)
    adapter: Any = layer.lora_lite["default"]  # type: ignore[index,union-attr]
    V = layer.weight.double() + adapter.cfg.scale * adapter.lora_B.double() @ adapter.lora_A.double()
    with torch.autocast("cpu", torch.bfloat16):
        p = adapter.primitive(layer)
        norm = ll.reference.row_norm(p.W, p.A, p.B, p.scale, p.w_sq)
    assert_close(norm, V.norm(dim=1), 1e-6)


def test_a_layer_of_another_library_whose_weight_dora_cannot_read() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU())
    ll.attach(model, ll.DoRAConfig(r=4, target_roles=()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised: Any = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(ll.AttachError, match=r"^0: the weight of its Linear can't be read"):
        quantised(torch.randn(5, 16))


def test_another_thread_attaches_while_one_looks_who_acts() -> None:
    layer = nn.Sequential(nn.Linear(8, 8))
    for name in ("a", "b"):
        ll.attach(layer, ll.LoRAConfig(r=2, target_roles=()), name=name)
    site: Any = layer[0].lora_lite

    class Off(frozenset[str]):
        def __contains__(self, name: object) -> bool:
            site[f"c{len(site)}"] = nn.Identity()
            return super().__contains__(name)

    site.off = Off({"b"})
    assert [name for name, _ in site.acting()] == ["a"]
