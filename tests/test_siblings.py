"""Layers that read the same x: one operation for all, and nothing that a user sees but time."""

import copy
import gc
import io
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import pytest
import torch
import transformers
from models import (
    alone,
    assert_same,
    attach,
    build,
    calibration_batches,
    llama,
    logits,
    randomize,
    rel_error,
    snapshot,
    token_ids,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from lora_lite import in_place, reference
from lora_lite.calls import _thread
from lora_lite.siblings import SIBLINGS

SHRINKING = ("lora", "pissa", "dora", "delora", "eva", "antipasto")
F64 = torch.float64


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many layers each operation of a group served."""
    served: list[int] = []

    def counting(whole: Any, x: Tensor, As: Any, dropouts: Any = ()) -> Any:
        if len(As) > 1:
            served.append(len(As))
        return whole(x, As, dropouts)

    with pytest.MonkeyPatch.context() as patch:
        for ops in (reference, in_place):
            patch.setattr(ops, "shrink_together", partial(counting, ops.shrink_together))
        yield served


def groups(model: nn.Module) -> list[list[list[str]]]:
    return [vars(module)[SIBLINGS].groups for module in model.modules() if SIBLINGS in vars(module)]


def adapted(variant: str = "lora", dtype: torch.dtype = F64, make: Any = llama, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = make().to(dtype)
    fields = {"block_size": 4, **fields} if variant == "antipasto" else fields
    batches = calibration_batches() if variant in ("eva", "antipasto") else None
    attach(model, variant, batches, **{"dtype": F64, "r": 4, **fields})
    randomize(model, by=0.3)
    return model


def step(model: Any, ids: Tensor | None = None) -> dict[str, Tensor]:
    """Logits and gradients of a step, of an input's too."""
    model.zero_grad()
    embedded = model.get_input_embeddings()(token_ids() if ids is None else ids).detach().requires_grad_()
    out = model(inputs_embeds=embedded).logits
    out.float().square().mean().backward() if out.dtype != F64 else out.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert embedded.grad is not None
    return {"logits": out.detach(), "input": embedded.grad, **grads}


def assert_alike(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert got.keys() == want.keys()
    for name, t in want.items():
        assert rel_error(got[name], t) <= tolerance or t.norm() == 0, (name, rel_error(got[name], t))


@pytest.mark.parametrize("variant", SHRINKING)
def test_the_same_as_alone(variant: str) -> None:
    with counted() as served:
        got = step(adapted(variant))
    assert served == [3, 2] * 2
    with counted() as served:
        want = step(alone(adapted(variant)))
    assert not served
    assert_alike(got, want)


def test_no_further_from_float64_than_eager_in_bfloat16() -> None:
    """Over several batches: of one, either may be the further by the luck of its roundings."""
    models = (adapted(), adapted(dtype=torch.bfloat16), alone(adapted(dtype=torch.bfloat16)))
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(6):
        ids = torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(seed))
        exact, ours, single = (step(model, ids) for model in models)
        for name, want in exact.items():
            pair = (rel_error(ours[name].double(), want), rel_error(single[name].double(), want))
            errors.setdefault(name, []).append(pair)
    for name, pairs in errors.items():
        mine, eager = (sum(of_one) for of_one in zip(*pairs, strict=True))
        assert mine <= 1.1 * eager, (name, mine / eager)


def test_members_of_several_methods_and_ranks() -> None:
    def mixed() -> Any:
        torch.manual_seed(0)
        model: Any = llama().to(F64)
        of = {"q": ll.LoRAConfig, "k": ll.DoRAConfig, "v": ll.DeLoRAConfig, "gate": ll.PiSSAConfig, "up": ll.IA3Config}
        ll.attach(
            model,
            {
                name: config.from_common(r=i + 2, dtype=F64, target_names=(rf"{name}_proj$",))
                for i, (name, config) in enumerate(of.items())
            },
        )
        randomize(model, by=0.3)
        return model

    model = mixed()
    with counted() as served:
        got = step(model)
    assert served == [3] * 2  # gate has no one to share with
    assert_alike(got, step(alone(mixed())))


def test_a_rank_that_gets_no_gradient() -> None:
    model = adapted()
    for module in (model, twin := alone(copy.deepcopy(model))):
        for name, p in module.named_parameters():
            if "k_proj" in name and "lora_A" in name:
                p.requires_grad_(False)
    assert_alike(step(model), step(twin))


@pytest.mark.parametrize("rates", [(0.3, 0.3, 0.3), (0.5, 0.0, 0.1)])
def test_dropout_masks_are_each_its_own(rates: tuple[float, ...]) -> None:
    """With dropout in force each layer has the mask that it would draw alone, of its own rate."""

    def rated() -> Any:
        torch.manual_seed(0)
        model: Any = llama().to(F64)
        of = zip(("q", "k", "v"), rates, strict=True)
        ll.attach(
            model, {name: ll.LoRAConfig(r=4, dtype=F64, dropout=p, target_names=(rf"{name}_proj$",)) for name, p in of}
        )
        randomize(model, by=0.3)
        return model.train()

    model, single = rated(), alone(rated())
    with counted() as served:
        torch.manual_seed(1)
        got = step(model)
    assert served == [3] * 2
    torch.manual_seed(1)
    assert_alike(got, step(single))
    assert (step(model)["logits"] - got["logits"]).abs().max() > 1e-3  # another draw


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("used", [1, 2, 3])
def test_gradients_that_arrive_are_not_written_to(used: int, dropout: float) -> None:
    """A hook or another node may hold them."""
    x = torch.randn(5, 8, dtype=F64, requires_grad=True)
    As = [torch.randn(2, 8, dtype=F64, requires_grad=True) for _ in range(3)]
    xs, hs = reference.shrink_together(x, As, [dropout] * 3)
    arriving = [torch.randn(5, 8, dtype=F64) for _ in range(used)]
    before = [g.clone() for g in arriving]
    torch.autograd.grad([*xs[:used], *hs], [x, *As], [*arriving, *(torch.randn_like(h) for h in hs)])
    assert all(torch.equal(now, then) for now, then in zip(arriving, before, strict=True))


# ---- who reads what --------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Three projections, called as a test wants."""

    def __init__(self, D: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D, dtype=F64) for _ in range(3))
        self.plan: Any = None

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.plan(self, x, other)


def attention(plan: Any, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    holder = nn.ModuleDict({"attention": Attention()})
    cfg = ll.LoRAConfig(r=3, dtype=F64, target_roles=(), target_names=("_proj$",), dropout=dropout)
    ll.attach(holder, cfg)
    randomize(holder, by=0.5)
    holder["attention"].plan = plan
    return holder["attention"]


def run(module: Any, *xs: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    leaves = [x.clone().requires_grad_() for x in xs]
    out = module(*leaves)
    out.square().sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **{f"x{i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}, **grads}


PLANS = {
    "self": lambda m, x, o: m.q_proj(x) + m.k_proj(x) * m.v_proj(x) + o,
    "cross": lambda m, x, o: m.q_proj(x) + m.k_proj(o) * m.v_proj(o),
    "one is not called": lambda m, x, o: m.q_proj(x) * m.v_proj(x) + o,
    "one is called twice": lambda m, x, o: m.q_proj(x) * m.q_proj(x) + m.k_proj(x) * m.v_proj(x) + o,
    "another order": lambda m, x, o: m.v_proj(x) * m.k_proj(x) + m.q_proj(x) + o,
    "one without a gradient": lambda m, x, o: m.q_proj(x) * m.k_proj(x) + m.v_proj(x).detach() + o,
    "the first without a graph": lambda m, x, o: _no_grad(m.q_proj, x) + m.k_proj(x) * m.v_proj(x) + o,
    "in place": lambda m, x, o: _in_place(m, x) + o,
    "one raises": lambda m, x, o: _raising(m, x) + o,
    "in place in inference": lambda m, x, o: _in_place(m, x, torch.inference_mode) + o,
    "other values": lambda m, x, o: _other_values(m, x) + o,
    "use in the middle": lambda m, x, o: _used_anew(m, x) + o,
}


def _no_grad(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def _used_anew(m: Any, x: Tensor) -> Tensor:
    """Another adapter from the second layer on."""
    first = m.q_proj(x)
    for name in ("k_proj", "v_proj"):
        getattr(m, name).lora_lite.off = frozenset({"default"})
    try:
        return first + m.k_proj(x) * m.v_proj(x)
    finally:
        for name in ("k_proj", "v_proj"):
            getattr(m, name).lora_lite.off = frozenset()


def _in_place(m: Any, x: Tensor, without: Any = torch.no_grad) -> Tensor:
    with without():
        y = x.clone()
        first = m.q_proj(y)
        y += 1
        return first + m.k_proj(y)


def _other_values(m: Any, x: Tensor) -> Tensor:
    """The same tensor, of the same version, as `.data =` leaves it."""
    with torch.no_grad():
        y = x.clone()
        first = m.q_proj(y)
        y.data = y.data + 1
        return first + m.k_proj(y)


def _raising(m: Any, x: Tensor) -> Tensor:
    m.q_proj(x)
    with pytest.raises(RuntimeError):
        m.k_proj(x[..., :3])
    return m.k_proj(x) * m.v_proj(x)


@pytest.mark.parametrize("plan", PLANS)
def test_whoever_reads_what(plan: str) -> None:
    """Three steps, since groups form in the first."""
    together, single = attention(PLANS[plan]), alone(attention(PLANS[plan]))
    for i in range(3):
        torch.manual_seed(i)
        xs = torch.randn(2, 5, 16, dtype=F64), torch.randn(2, 5, 16, dtype=F64)
        assert_alike(run(together, *xs), run(single, *xs))
    assert not _thread.calls


@pytest.mark.parametrize("between", ["requires_grad_", "detach_"])
def test_an_x_whose_gradient_goes_elsewhere_from_then_on(between: str) -> None:
    """As what the one layer got, x wants no gradient, or passes it on; as what the others get, the other way round."""

    def plan(m: Any, x: Tensor, o: Tensor) -> Tensor:
        x = x.detach() if between == "requires_grad_" else x * 1
        first = m.q_proj(x)
        getattr(x, between)()
        seen.append(x)
        return first * o + m.k_proj(x) * m.v_proj(x)

    seen: list[Tensor] = []
    for make in (attention, lambda plan: alone(attention(plan))):
        torch.manual_seed(0)
        seen.append(run(make(plan), *torch.randn(2, 2, 5, 16, dtype=F64)))  # type: ignore[arg-type]
    x, got, single_x, want = cast(list[Any], seen)
    assert (x.grad is None) == (single_x.grad is None) == (between == "detach_")
    if x.grad is not None:
        assert rel_error(x.grad, single_x.grad) < 1e-12
    assert_alike(got, want)


@pytest.mark.parametrize(
    ("of_q", "of_k_and_v", "calls"), [(5, 5, [3, 2]), (4, 5, [2]), (5, 4, [3]), (4, 4, [])], ids=str
)
def test_cross_attention_finds_its_groups(
    of_q: int, of_k_and_v: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """q reads one tensor, k and v another: after the first call k and v are a group of their own, also where one of the
    two tensors, or both, are too small to share."""
    monkeypatch.setattr(reference, "_WORTH_SHARING", 2 * 5 * 16)
    module = attention(lambda m, x, o: m.q_proj(x).sum(1) + (m.k_proj(o) * m.v_proj(o)).sum(1))
    xs = torch.randn(2, of_q, 16, dtype=F64), torch.randn(2, of_k_and_v, 16, dtype=F64)
    with counted() as served:
        run(module, *xs)
        assert groups(module) == [[["q_proj"], ["k_proj", "v_proj"]]]
        run(module, *xs)
    assert served == calls


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("dropout", "calls"), [(0.3, [1]), (0.0, [2, 1, 1])])
def test_cross_attention_in_a_checkpoint(dropout: float, calls: list[int], reentrant: bool) -> None:
    """Its groups change at its first call, which a backward runs again as it was: its masks, and what it saved.
    `calls`: how many there are before each backward."""

    def gradients(checkpointed: bool) -> list[Tensor]:
        module, found = attention(PLANS["cross"], dropout=dropout).train(), []
        torch.manual_seed(0)
        for count in calls:
            module.zero_grad()
            total = torch.zeros((), dtype=F64)
            for _ in range(count):
                xs = [torch.randn(2, 5, 16, dtype=F64, requires_grad=True) for _ in range(2)]
                out = checkpoint(module, *xs, use_reentrant=reentrant) if checkpointed else module(*xs)
                total = total + out.square().sum()  # type: ignore[union-attr]
            total.backward()
            found += [p.grad.clone() for p in module.parameters() if p.grad is not None]
        module(*xs)
        assert groups(module) == [[["q_proj"], ["k_proj", "v_proj"]]]
        return found

    for got, want in zip(gradients(True), gradients(False), strict=True):
        assert rel_error(got, want) < 1e-12


def test_a_child_that_is_called_on_two_tensors_stays_in_its_group() -> None:
    """Step by step: groups neither part for a second call nor grow."""
    module = attention(lambda m, x, o: m.q_proj(x) + m.k_proj(x) * m.v_proj(x) + m.k_proj(o) * m.q_proj(o))
    xs = torch.randn(2, 5, 16, dtype=F64), torch.randn(2, 5, 16, dtype=F64)
    with counted() as served:
        for _ in range(4):
            run(module, *xs)
            assert groups(module) == [[["q_proj", "k_proj", "v_proj"]]]
    assert served == [3] * 4


def test_what_nobody_fetched_is_dropped() -> None:
    kept: list[Any] = []

    def plan(m: Any, x: Tensor, o: Tensor) -> Tensor:
        out = m.q_proj(x)
        kept.append(weakref.ref(_thread.calls[-1].kept.done[0].ready["k_proj"].h))
        return out + o

    module = attention(plan)
    module(torch.randn(2, 5, 16, dtype=F64), torch.randn(2, 5, 16, dtype=F64))
    gc.collect()
    assert kept[0]() is None
    assert not _thread.calls


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_middle(error: type[BaseException]) -> None:
    def interrupted(m: Any, x: Tensor, o: Tensor) -> Tensor:
        m.q_proj(x)
        raise error

    module = attention(interrupted)
    xs = torch.randn(2, 5, 16, dtype=F64), torch.randn(2, 5, 16, dtype=F64)
    with pytest.raises(error):
        module(*xs)
    module.plan = PLANS["self"]
    assert_alike(run(module, *xs), run(alone(attention(PLANS["self"])), *xs))
    assert not _thread.calls


def test_two_threads() -> None:
    model = adapted()
    inputs = [token_ids(seed=i) for i in range(6)]
    want = [logits_of(model, ids) for ids in inputs]
    got: list[Any] = [None] * len(inputs)

    def work(first: int) -> None:
        for _ in range(3):
            for i in range(first, len(inputs), 2):
                got[i] = logits_of(model, inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits


# ---- with the rest of the library ------------------------------------------------------------------------------------


def test_detached_disabled_used_and_rows() -> None:
    model = adapted()
    ll.attach(model, ll.LoRAConfig(r=2, dtype=F64, target_names=("q_proj$", "up_proj$")), name="other")
    ll.attach(model, ll.IA3Config(dtype=F64, target_names=("v_proj$",)), name="gain")
    randomize(model, by=0.3)
    twin = alone(copy.deepcopy(model))

    def same() -> list[int]:
        with counted() as served:
            got = step(model)
        assert_alike(got, step(alone(twin)))
        return served

    assert same() == [3, 2] * 2
    for each in (model, twin):
        ll.use(each, "other", "gain")
    assert same() == []  # q alone, and v which takes no product of x
    for each in (model, twin):
        ll.use(each, ["default", "other"])
    assert same() == []  # rows of the batch differ
    for each in (model, twin):
        ll.use(each, "default", "other", "gain")
    with ll.disabled(model, "default"), ll.disabled(twin, "default"):
        assert same() == []
    for each in (model, twin):
        ll.detach(each, "other")
    assert same() == [3, 2] * 2


def test_detach_leaves_no_trace() -> None:
    model: Any = llama()
    before, hooks = snapshot(model), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    attach(model, "lora")
    logits(model)
    ll.detach(model)
    assert_same(model, before)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not any(SIBLINGS in vars(module) for module in model.modules())


def test_copies_and_pickles_group_their_own() -> None:
    model = adapted()
    want = step(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = (copy.deepcopy(model), torch.load(file, weights_only=False))
    for p in ll.parameters(model):
        p.data.zero_()  # whoever still reads the first model's shows it
    for other in others:
        with counted() as served:
            assert_alike(step(other), want, 0.0)
        assert served == [3, 2] * 2
        ll.detach(other)


def test_layers_shared_between_blocks() -> None:
    def albert() -> Any:
        sizes = {"vocab_size": 64, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 48}
        config = transformers.AlbertConfig(**sizes, num_hidden_layers=3, num_attention_heads=4)
        return build(transformers.AlbertForMaskedLM, config)

    with counted() as served:
        got = step(adapted(make=albert, target_names=("query$", "key$", "value$")))
    assert served == [3] * 3
    assert_alike(got, step(alone(adapted(make=albert, target_names=("query$", "key$", "value$")))))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    want = step(adapted())
    model = adapted().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with counted() as served:
        assert_alike(step(model), want)
    assert served == [3, 2] * 4  # forward, and again


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("around", ["two", "all"])
def test_a_checkpoint_inside_of_the_parent(around: str, reentrant: bool) -> None:
    """What is in it is computed again without the parent around it."""

    def plan(m: Any, x: Tensor, o: Tensor) -> Tensor:
        x = x * 1
        if around == "two":
            return m.q_proj(x) + checkpoint(lambda x: m.k_proj(x) * m.v_proj(x), x, use_reentrant=reentrant) + o  # type: ignore[operator]
        return checkpoint(lambda x: m.q_proj(x) + m.k_proj(x) * m.v_proj(x), x, use_reentrant=reentrant) + o  # type: ignore[operator]

    xs = torch.randn(2, 5, 16, dtype=F64), torch.randn(2, 5, 16, dtype=F64)
    assert_alike(run(attention(plan), *xs), run(alone(attention(plan)), *xs))


def _as_it_is(t: Any) -> Any:
    return t


SAVING: dict[str, Any] = {
    "functions that live for ever": partial(torch.autograd.graph.saved_tensors_hooks, _as_it_is, _as_it_is),
    "what takes no weak reference": partial(torch.autograd.graph.saved_tensors_hooks, Tensor.numpy, torch.from_numpy),
    "on the CPU": torch.autograd.graph.save_on_cpu,
}


@pytest.mark.parametrize("saving", SAVING)
def test_who_saves_tensors_another_way_runs_nothing_again(saving: str) -> None:
    """Groups change as without it, and nothing is kept of a call."""
    module, single = attention(PLANS["cross"]), alone(attention(PLANS["cross"]))
    for i in range(3):
        torch.manual_seed(i)
        xs = torch.randn(2, 2, 5, 16, dtype=F64)
        with SAVING[saving]():
            got = run(module, *xs)
        assert_alike(got, run(single, *xs))
        assert not vars(module)[SIBLINGS].to_rerun
        assert groups(module) == [[["q_proj"], ["k_proj", "v_proj"]]]


@pytest.mark.parametrize("how", ["wrapped", "in its place", "not"])
@pytest.mark.parametrize("parts", [("q_proj",), ("k_proj", "v_proj")], ids=str)
def test_layers_that_are_compiled_by_themselves(parts: tuple[str, ...], how: str) -> None:
    """Or, "not", those that a compiled parent leaves out."""
    torch._dynamo.reset()
    together, single = attention(PLANS["self"]), alone(attention(PLANS["self"]))
    module: Any = together
    for name in parts:
        if how == "wrapped":
            setattr(together, name, torch.compile(getattr(together, name), backend="aot_eager"))
        elif how == "in its place":
            getattr(together, name).compile(backend="aot_eager")
        else:
            layer = getattr(together, name)
            layer.forward = torch.compiler.disable(layer.forward)
            module = torch.compile(together, backend="aot_eager")
    for i in range(2):
        torch.manual_seed(i)
        xs = torch.randn(2, 2, 5, 16, dtype=F64)
        got = {name.replace("_orig_mod.", ""): t for name, t in run(module, *xs).items()}
        assert_alike(got, run(single, *xs))


@pytest.mark.parametrize("variant", SHRINKING)
def test_compile_with_checkpointing(variant: str) -> None:
    """In one graph, a block of gate and up after the other, as without compiling."""
    torch._dynamo.reset()
    blocks = [layer.mlp for layer in adapted(variant).model.layers]

    def forward(x: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    x = torch.randn(2, 5, 32, dtype=F64, requires_grad=True)
    inputs = [x, *(p for block in blocks for p in block.parameters() if p.requires_grad)]
    want = torch.autograd.grad(forward(x).square().sum(), inputs)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x).square().sum(), inputs)
    for mine, theirs in zip(got, want, strict=True):
        assert rel_error(mine, theirs) < 1e-11


@pytest.mark.parametrize("variant", ["lora", "hra", "ia3"])
def test_without_values(variant: str) -> None:
    """On the meta device, under autocast for another."""
    model = llama()
    attach(model, variant)
    model.to("meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids=token_ids().to("meta")).logits.is_meta


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_compile_without_gradients(context: Any) -> None:
    """Of two layers and of three."""
    torch._dynamo.reset()
    model = adapted()
    with context(), counted() as served:
        want = logits(alone(copy.deepcopy(model)))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert rel_error(logits(compiled), want) < 1e-12
    assert set(served) == {2, 3}


def test_compile_with_changing_lengths() -> None:
    torch._dynamo.reset()
    model, twin = (adapted(make=partial(llama, num_hidden_layers=1)) for _ in range(2))
    twin = alone(twin)
    with counted() as served:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
        for length in (17, 9, 5):
            ids = token_ids(length=length)
            out = compiled(input_ids=ids).logits
            out.square().mean().backward()
            want = twin(input_ids=ids).logits
            want.square().mean().backward()
            assert rel_error(out, want) < 1e-12
    assert served
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if p.grad is not None:
            assert rel_error(p.grad, q.grad) < 1e-11, name


def test_forward_mode_and_second_derivatives() -> None:
    """What one product or another supports, the group does; of the parameters, test_transforms.py."""
    module, single = attention(PLANS["self"]), alone(attention(PLANS["self"]))
    x, o, v = (torch.randn(2, 3, 16, dtype=F64) for _ in range(3))
    for each in (lambda m: torch.func.jvp(lambda x: m(x, o), (x,), (v,))[1], lambda m: _hessian_product(m, x, o, v)):
        assert rel_error(each(module), each(single)) < 1e-12


def _hessian_product(module: Any, x: Tensor, o: Tensor, v: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(module(x, o).pow(3).sum(), x, create_graph=True)
    return torch.autograd.grad((grad * v).sum(), x)[0]


def test_verify_diagnose_and_generation() -> None:
    model = adapted(dtype=torch.float32)
    assert ll.verify(model, {"input_ids": token_ids()})
    ids = token_ids(1, 5)
    want = alone(copy.deepcopy(model)).generate(ids, max_new_tokens=6, do_sample=False)
    with counted() as served:
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), want)
    assert served == [3, 2] * 2 * 6


def test_a_layer_of_another_library_s_offloading_is_left_alone() -> None:
    import accelerate

    model = adapted(dtype=torch.float32)
    want = logits(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    with counted() as served:
        assert rel_error(logits(model), want) < 1e-6
    assert not served


def test_a_small_x_is_read_by_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharing would take longer than it saves; large or small, the results are the same."""
    model, x = llama(), token_ids()
    ll.attach(model, ll.LoRAConfig(r=4))
    randomize(model)
    found = []
    for worth in (0, 1 << 18):
        monkeypatch.setattr(reference, "_WORTH_SHARING", worth)
        with counted() as served:
            loss = model(x, labels=x).loss
        found.append((loss, *torch.autograd.grad(loss, ll.parameters(model))))
        assert bool(served) == (worth == 0)
    for together, alone_ in zip(*found, strict=True):
        assert rel_error(together, alone_) < 1e-5
