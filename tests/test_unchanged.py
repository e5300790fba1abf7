"""unchanged: what is made of weights alone is made once, equals what is made each time, and is never an old one."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import accelerate
import pytest
import torch
from models import VARIANTS, assert_close, attach, config, llama, logits, qwen3_moe, randomize, rel_error, token_ids
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lora_lite as ll
from lora_lite import linalg, promise, reference
from lora_lite.adapter import Adapter


def adapted(variant: str, **fields: Any) -> Any:
    model = llama()
    attach(model, variant, **fields)
    randomize(model)
    return model


@contextmanager
def counted(owner: Any, name: str) -> Iterator[mock.Mock]:
    """The calls of a function or method, which runs as always."""
    with mock.patch.object(owner, name, autospec=True, side_effect=getattr(owner, name)) as calls:
        yield calls


def gradients(model: Any, within: AbstractContextManager[Any], steps: int = 3) -> list[Tensor]:
    """Accumulated over batches."""
    model.train().zero_grad()
    torch.manual_seed(0)
    with within:
        for i in range(steps):
            model(input_ids=token_ids(seed=i)).logits.square().mean().backward()
    return [p.grad for p in ll.parameters(model) if p.grad is not None]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_to_the_last_bit(variant: str) -> None:
    dropout = 0.3 if variant in ("lora", "dora") else 0.0
    model = adapted(variant, dropout=dropout)
    want, want_grads = logits(model), gradients(model, nullcontext())
    with ll.unchanged(model):
        for _ in range(2):
            assert torch.equal(logits(model), want)
        grads = gradients(model, nullcontext())
        assert torch.equal(logits(model), want)
    assert len(grads) == len(ll.parameters(model)) == len(want_grads)
    assert all(torch.equal(a, b) for a, b in zip(grads, want_grads, strict=True))
    assert torch.equal(logits(model), want)
    assert not promise._kept


def test_accumulation_takes_the_norm_once() -> None:
    model = adapted("dora")
    layers = len(ll.attachment.require_attachment(model).adapters)
    with counted(reference, "row_norm") as norms:
        want = gradients(model, nullcontext())
        assert norms.call_count == 3 * layers
        norms.reset_mock()
        got = gradients(model, ll.unchanged(model))
        assert norms.call_count == layers
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("variant", ["dora", "hra", "antipasto"])
def test_generation_makes_what_is_before_tokens_once(variant: str) -> None:
    model = adapted(variant)
    layers = len(ll.attachment.require_attachment(model).adapters)
    how: Any = {"input_ids": token_ids(2, 5), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    want = model.generate(**how)
    with counted(Adapter, "primitive") as made, ll.unchanged(model):
        assert torch.equal(model.generate(**how), want)
        assert made.call_count == layers


@pytest.mark.parametrize("within", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("change", ["write", "load"])
def test_a_change_within_it_raises(within: Callable[[], Any], change: str) -> None:
    model = adapted("dora")
    p = ll.parameters(model)[0]
    file = ll.state_dict(model)
    with ll.unchanged(model):
        model(input_ids=token_ids())
        with torch.no_grad():
            if change == "write":
                p.mul_(2.0)
            else:
                ll.load_state_dict(model, file)
        with within(), pytest.raises(ll.AttachError, match=r"q_proj: .*unchanged\(model\).*leave the context"):
            model(input_ids=token_ids())
    model(input_ids=token_ids())


@pytest.mark.parametrize("variant", ["dora", "antipasto"])
def test_tensors_that_are_put_in_the_place_of_others_are_seen(variant: str) -> None:
    """As sharding does, when it gathers anew."""
    model = adapted(variant)
    other = copy.deepcopy(model)
    with ll.unchanged(model):
        logits(model)
        for each in (model, other):
            for p in ll.parameters(each):
                p.data = 1.5 * p.data
        assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("variant", ["dora", "antipasto"])
def test_a_call_with_other_parameters_computes_with_them(variant: str) -> None:
    model = adapted(variant)
    others = {name: 1.5 * p.detach() for name, p in model.named_parameters() if p.requires_grad}
    inputs = (token_ids(),)
    with torch.no_grad():
        want = torch.func.functional_call(model, others, inputs).logits
        with ll.unchanged(model):
            before = logits(model)
            assert torch.equal(torch.func.functional_call(model, others, inputs).logits, want)
            assert torch.equal(logits(model), before)
    assert not torch.equal(before, want)


class PastSight(torch.optim.SGD):
    """Writes as bitsandbytes' optimizers do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(1.0)


def test_an_optimizers_step_within_it_raises_before_it_changes_anything() -> None:
    model = adapted("dora")
    optimizer = PastSight(ll.parameters(model), lr=1.0)
    other = PastSight([nn.Parameter(torch.zeros(2))], lr=1.0)
    before = [p.detach().clone() for p in ll.parameters(model)]
    with ll.unchanged(model):
        gradients(model, nullcontext())
        other.step()
        with pytest.raises(ll.AttachError, match=r"q_proj: optimizer.step\(\) within unchanged\(model\)"):
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ll.parameters(model), before, strict=True))
    optimizer.step()
    assert not torch.equal(ll.parameters(model)[0], before[0])


def test_after_it_nothing_is_kept() -> None:
    """Writes past PyTorch's sight are seen; also after an exception, and by the outer of two."""
    model = adapted("dora")
    other = copy.deepcopy(model)
    with pytest.raises(RuntimeError), ll.unchanged(model):
        model(input_ids=torch.zeros(1, 1))  # no ids
    with ll.unchanged(model):
        with ll.unchanged(model):
            logits(model)
        with counted(reference, "row_norm") as norms:
            logits(model)
            assert norms.call_count == 0
    for each in (model, other):
        for p in ll.parameters(each):
            p.data.mul_(1.5)
    with ll.unchanged(model):
        assert torch.equal(logits(model), logits(other))


def test_inference_mode_and_gradients_within_one() -> None:
    model = adapted("dora")
    want = gradients(model, nullcontext())
    with ll.unchanged(model):
        with torch.inference_mode():
            logits(model)
        got = gradients(model, nullcontext())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_training_and_evaluation_within_one() -> None:
    """Dropout is of the primitive."""
    model = adapted("lora", dropout=0.5)
    with torch.no_grad(), ll.unchanged(model):
        at_rest = logits(model)
        assert not torch.equal(model.train()(input_ids=token_ids()).logits, at_rest)
        assert torch.equal(logits(model), at_rest)


def test_a_copy_is_under_no_promise() -> None:
    model = adapted("dora")
    with ll.unchanged(model):
        want = logits(model)
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin), want)
        with torch.no_grad():
            for p in ll.parameters(twin):
                p.data.mul_(2.0)
        assert not torch.equal(logits(twin), want)
        assert torch.equal(logits(model), want)


def test_several_adapters_and_rows() -> None:
    model = llama()
    ll.attach(model, {"dora": config("dora"), "lora": config("lora", r=3)})
    randomize(model)
    ways: list[tuple[Any, ...]] = [("dora", "lora"), ("lora",), (["dora", None],), (["lora", "dora"],)]

    def outputs() -> list[Tensor]:
        found = []
        for way in ways:
            ll.use(model, *way)
            found.append(logits(model))
        return found

    want = outputs()
    with ll.unchanged(model):
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(outputs(), want, strict=True))


def test_experts_get_the_rows_of_each_call() -> None:
    model = qwen3_moe()
    attach(model, "dora", target_names=(r"experts\.",))
    randomize(model)
    batches = [token_ids(length=n, seed=n) for n in (17, 3, 17)]
    with torch.no_grad():
        want = [model(input_ids=batch).logits for batch in batches]
        with ll.unchanged(model):
            got = [model(input_ids=batch).logits for batch in (*batches, *batches)]
    assert all(torch.equal(a, b) for a, b in zip(got, want + want, strict=True))


def test_a_call_with_another_base_weight_computes_with_it() -> None:
    """And leaves what is kept of the model's own."""
    model, x = nn.Sequential(nn.Linear(12, 16)), torch.randn(3, 12)
    attach(model, "dora", r=4, target_roles=())
    randomize(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(1.5)
        own, want = model(x), other(x)
        for first in (True, False):
            with ll.unchanged(model):
                if first:
                    assert torch.equal(model(x), own)
                assert_close(functional_call(model, {"0.weight": other[0].weight}, (x,)), want, 1e-6)
                assert torch.equal(model(x), own)


@pytest.mark.parametrize("before", ["a copy", "another dtype", "a write", "weight_norm"])
def test_what_is_derived_anew_is_so_before_the_promise(before: str) -> None:
    model, x = nn.Sequential(nn.Linear(12, 16)), torch.randn(3, 12)
    attach(model, "dora", r=4, target_roles=())
    randomize(model)
    if before == "a copy":
        model = copy.deepcopy(model)
    elif before == "another dtype":
        model, x = model.double(), x.double()
    elif before == "a write":
        with torch.no_grad():
            model[0].weight.mul_(2)
    else:
        nn.utils.parametrizations.weight_norm(model[0])
    want = copy.deepcopy(model)(x) if before != "weight_norm" else model(x)
    with ll.unchanged(model):
        assert all(torch.equal(model(x), want) for _ in range(3))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_calls_with_other_base_weights(reentrant: bool) -> None:
    """Each is computed again with the norm of its own."""
    model = nn.Sequential(nn.Linear(12, 16)).double()
    attach(model, "dora", r=4, target_roles=(), dtype=torch.float64)
    randomize(model)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(16, 12, dtype=torch.float64) for _ in range(2)]
    calls = [lambda x, W=W: functional_call(model, {"0.weight": W}, (x,)) for W in weights]
    (want,) = torch.autograd.grad(sum(call(x).square().sum() for call in (*calls, model)), x)
    again = [checkpoint(call, x, use_reentrant=reentrant) for call in (*calls, model)]
    sum(y.square().sum() for y in again).backward()
    assert_close(x.grad, want, 1e-12)


def test_offloaded_weights_are_not_held() -> None:
    model = llama()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    attach(model, "dora")
    randomize(model)
    want = logits(model)
    with ll.unchanged(model):
        for _ in range(2):
            assert torch.equal(logits(model), want)
        assert promise._kept
        assert not any(kept.made for kept in promise._kept.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_without_values_leaves_nothing(variant: str) -> None:
    """In FakeTensorMode, for shapes and memory."""
    model = adapted(variant)
    want = logits(model)
    with torch.no_grad(), ll.unchanged(model):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(input_ids=mode.from_tensor(token_ids()))
        assert torch.equal(logits(model), want)


def test_a_run_without_values_leaves_nothing_of_the_rows() -> None:
    model = adapted("lora")
    ll.attach(model, config("lora"), name="other")
    ll.use(model, ["default", "other"])
    want = logits(model)
    ll.use(model, ["default", "other"])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(input_ids=mode.from_tensor(token_ids()))
    assert torch.equal(logits(model), want)


def test_under_torch_compile_it_computes_as_always() -> None:
    model, x = adapted("dora"), torch.randn(5, 32)
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad(), ll.unchanged(model):
        want = layer(x)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert_close(compiled(x), want, 1e-6)


def test_without_an_adapter_it_raises() -> None:
    with pytest.raises(ll.AttachError), ll.unchanged(llama()):
        pass


@pytest.mark.parametrize("variant", VARIANTS)
def test_verify_within(variant: str) -> None:
    """It undoes what its forward writes to buffers, and writes to none else: those of adapters among them."""
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16))
    model, batches = model.train(), [torch.randn(40, 16)]
    own = {"antipasto": {"block_size": 2}, "road": {"group_size": 4}}.get(variant, {})
    given = batches if variant in ("eva", "antipasto") else None
    attach(model, variant, given, r=2, target_names=("0", "2"), target_roles=(), **own)
    mean = model[1].running_mean.clone()
    with ll.unchanged(model):
        want = model.eval()(batches[0])
        ll.verify(model.train(), batches[0])
        assert torch.equal(model.eval()(batches[0]), want)
    assert torch.equal(model[1].running_mean, mean)


def penalised(model: nn.Module, x: Tensor, between: Callable[[], Any] = lambda: None, **how: Any) -> list[Tensor]:
    """Gradients of a step in a checkpoint, with something between its forward and its backward."""
    loss = checkpoint(model, x, use_reentrant=False, **how).square().sum()
    between()
    return list(torch.autograd.grad(loss, ll.parameters(model)))


def of_layers(variant: str, width: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    attach(model, variant, [torch.randn(40, width)], r=4, target_roles=(), target_names=())
    randomize(model, by=0.3)
    return model


POLICIES: dict[str, Any] = {
    "products": [torch.ops.aten.mm.default, torch.ops.aten.addmm.default],
    "all": lambda *args, **kwargs: CheckpointPolicy.MUST_SAVE,
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("variant", VARIANTS)
def test_selective_checkpointing(variant: str, width: int, policy: str) -> None:
    """It takes what the forward's operators gave in their order, so that a recomputation has to call as many."""
    model, x = of_layers(variant, width), torch.randn(16, width)
    want = torch.autograd.grad(model(x).square().sum(), ll.parameters(model))
    linalg._made.clear()
    contexts = partial(create_selective_checkpoint_contexts, POLICIES[policy])
    for within in (nullcontext(), ll.unchanged(model)):
        with within:
            got = penalised(model, x, context_fn=contexts)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_an_evaluation_before_the_backward() -> None:
    """Of other weights, swapped in by `p.data`, or in inference mode, whose tensors no backward may save."""
    model, x = of_layers("dora", 16), torch.randn(4, 16)
    own = ll.parameters(model)

    def of_averages() -> None:
        kept = [p.detach().clone() for p in own]
        for p in own:
            p.data.mul_(2)
        with torch.no_grad():
            model(x)
        for p, t in zip(own, kept, strict=True):
            p.data.copy_(t)

    def in_inference_mode() -> None:
        with torch.inference_mode():
            model(x)

    want = penalised(model, x)
    for between in (of_averages, in_inference_mode):
        assert all(torch.equal(a, b) for a, b in zip(penalised(model, x, between), want, strict=True))


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_that_gets_another_base(copied: str) -> None:
    """DoRA's ‖W‖² follows the weight of a copy too."""
    twin = COPIES[copied](of_layers("dora", 16))
    with torch.no_grad():
        twin[0].weight.mul_(0.5)
        twin[1].weight.copy_(torch.randn(16, 16))
    x = want = torch.randn(5, 16)
    for layer in twin:
        p = layer.lora_lite["default"]
        V = layer.weight + p.cfg.scale * p.lora_B @ p.lora_A
        want = want @ (p.lora_m[:, None] * V / V.norm(dim=1, keepdim=True)).mT + layer.bias
    assert rel_error(twin(x), want) < 1e-5


def test_promises_that_overlap() -> None:
    """The first to promise is the first to leave, and the second's still holds."""
    model = nn.Sequential(nn.Linear(8, 8))
    ll.attach(model, ll.DoRAConfig(r=2))
    optimizer = torch.optim.SGD(ll.parameters(model), lr=0.1)
    first, second = ll.unchanged(model), ll.unchanged(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(ll.AttachError, match=r"optimizer\.step\(\) within unchanged"):
        optimizer.step()
    second.__exit__(None, None, None)
    optimizer.step()
