"""Who is judged by which step: turns, all kinds of optimisers, backwards that fail; adapters that do not change."""

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_close, randomize
from situations import Body, step, warned
from torch import Tensor, nn

import lora_lite as ll

L = ll.LoRAConfig


@pytest.mark.parametrize("how", ["trained", "in evaluation", "evaluated before the step", "a frozen tower at rest"])
def test_dropout_that_the_mode_switches_off(how: str) -> None:
    """from_pretrained gives a model in evaluation mode. What counts is the mode in which gradients came."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    ll.attach(model, L(r=2, dropout=0.5, target_roles=()))
    model.train(how != "in evaluation")
    if how == "a frozen tower at rest":
        model[0].eval().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def steps() -> None:
        for _ in range(3):
            model(x).sum().backward()
            if how == "evaluated before the step":
                model.eval()
            optimizer.step()

    said = [text for text in warned(steps) if "dropout" in text]
    assert len(said) == (how == "in evaluation")
    assert not said or ("* ×2" in said[0] and "model.train()" in said[0])


def test_adapters_that_become_nan() -> None:
    """Here by one gradient."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    ll.attach(model, L(r=2, target_roles=()))
    optimizer = torch.optim.SGD(ll.parameters(model), lr=0.1)

    def steps() -> None:
        for i in range(12):
            optimizer.zero_grad()
            (model(x).sum() * (torch.nan if i == 4 else 1.0)).backward()
            optimizer.step()

    (said,) = warned(steps)
    assert "after 10 steps: these adapters hold NaN or infinity: * ×2" in said


def test_two_losses_in_one_step() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    ll.attach(model, L(r=2))
    x = torch.randn(3, 8)

    def both() -> None:
        first, second = model["a"](x).sum(), model["b"](x).sum()
        first.backward()
        step(second, ll.parameters(model))

    assert not warned(both)


def test_a_first_backward_that_fails_or_is_of_the_base() -> None:
    model, x = Body(), torch.randn(3, 8)
    ll.attach(model, L(r=2))

    def fails() -> None:
        y = model(x)
        y.register_hook(lambda grad: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            y.sum().backward()

    assert not warned(fails)
    model.head.requires_grad_(True)
    with ll.disabled(model):
        assert not warned(lambda: model(x).sum().backward())
    (text,) = warned(lambda: step(model(x, "skipped").sum(), model.parameters()))
    assert "never ran" in text or "no gradient" in text


@pytest.mark.parametrize("how", ["autograd.grad", "functional_call", "assign"])
def test_gradients_that_come_another_way_are_seen(how: str) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
    ll.attach(model, L(r=2, target_roles=()))
    if how == "assign":
        model.load_state_dict(model.state_dict(), assign=True)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(params.values(), 0.1)

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    if how == "autograd.grad":
        for p, g in zip(params.values(), torch.autograd.grad(model(x).sum(), list(params.values())), strict=True):
            p.grad = g
    elif how == "functional_call":
        grads = torch.func.grad(loss)({name: p.detach() for name, p in params.items()})
        for name, p in params.items():
            p.grad = grads[name]
    else:
        model(x).sum().backward()
    assert not warned(optimizer.step)


class Adversaries(nn.Module):
    """A generator and a discriminator, and in each a layer that nobody calls, if so wanted."""

    def __init__(self, idle: bool) -> None:
        super().__init__()
        self.gen, self.disc = (nn.ModuleDict({"fc": nn.Linear(8, 8), "out": nn.Linear(8, 8)}) for _ in range(2))
        for part in (self.gen, self.disc) if idle else ():
            part["spare"] = nn.Linear(8, 8)

    def forward(self, part: str, x: Tensor) -> Tensor:
        layers = getattr(self, part)
        return layers["out"](layers["fc"](x).relu())


def _generated(model: Adversaries, how: str, z: Tensor) -> Tensor:
    """What the discriminator learns from."""
    with torch.set_grad_enabled(how != "no_grad"):
        return model("gen", z).detach()


def _turns(model: Adversaries, how: str, rounds: int) -> None:
    """How people train such a pair."""
    own = {part: [p for p in getattr(model, part).parameters() if p.requires_grad] for part in ("gen", "disc")}
    gen, disc = (torch.optim.SGD(own[part], lr=1e-5) for part in ("gen", "disc"))
    z = torch.randn(4, 8)
    if how == "evaluated first":
        with torch.no_grad():
            model("disc", model("gen", z))
    if how in ("an empty step first", "evaluated first"):
        gen.step()
    for _ in range(rounds):
        if how == "frozen in turns":
            for p in own["disc"]:
                p.requires_grad_(False)
            model("disc", model("gen", z)).sum().backward()
            gen.step()
            for part in ("gen", "disc"):
                for p in own[part]:
                    p.requires_grad_(part == "disc")
            model("disc", _generated(model, how, z)).sum().backward()
            disc.step()
            for p in own["gen"]:
                p.requires_grad_(True)
        elif how == "two backwards before a step":
            model("gen", z).sum().backward()
            model("disc", z).sum().backward()
            gen.step()
            disc.step()
        elif how == "both step in each turn":
            for part in ("disc", "gen"):
                model(part, z).sum().backward()
                for each in (gen, disc):
                    each.step()
                    each.zero_grad()
        else:
            disc.zero_grad()
            model("disc", _generated(model, how, z)).sum().backward()
            disc.step()
            gen.zero_grad()
            model("disc", model("gen", z)).sum().backward()
            gen.step()


TURNS = (
    "no_grad", "detached", "frozen in turns", "two backwards before a step", "both step in each turn",
    "an empty step first", "evaluated first",
)  # fmt: skip


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("how", TURNS)
def test_a_generator_and_a_discriminator(how: str, idle: bool) -> None:
    """Each is judged by its own optimiser's step, and what is idle in it is said then."""
    model = Adversaries(idle)
    ll.attach(model, L(r=2, target_roles=(), target_names=("gen", "disc")))
    first = warned(lambda: _turns(model, how, 2))
    assert all(text.startswith("after the first step: these adapted layers never ran") for text in first)
    assert {name for name in ("gen", "disc") if any(f"{name}.spare" in text for text in first)} == (
        {"gen", "disc"} if idle else set()
    )
    assert not any(each in text for text in first for each in (".fc", ".out"))
    assert not warned(lambda: _turns(model, how, 25))


@pytest.mark.parametrize("way", ["trains", "a part under no_grad", "one is idle", "no adapter gets a gradient"])
def test_optimizers_that_step_within_the_backward(way: str) -> None:
    """One for each tensor, as PyTorch's recipe has it. Who gets no gradient then makes no step either."""
    model = Adversaries(idle=way == "one is idle")
    ll.attach(model, L(r=2, target_roles=(), target_names=("gen",)))
    head = model.disc["fc"].requires_grad_(way == "no adapter gets a gradient")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = {p: torch.optim.SGD([p], lr=1e-3) for p in trained}

    def hook(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        optimizers[p].zero_grad()  # type: ignore[index]

    for p in trained:
        p.register_post_accumulate_grad_hook(hook)
    z = torch.randn(4, 8)

    def backward() -> None:
        if way == "no adapter gets a gradient":
            return head(model("gen", z).detach()).sum().backward()
        with torch.set_grad_enabled(way != "a part under no_grad"):
            h = model.gen["fc"](z)
        return model.gen["out"](h).sum().backward()

    before = [p.detach().clone() for p in trained]
    said = [text for _ in range(25) for text in warned(backward)]
    assert all(p.grad is None for p in trained)
    if way == "trains":
        assert not said
        assert not any(torch.equal(p, old) for p, old in zip(trained, before, strict=True))
    else:
        (text,) = said
        idle = {"a part under no_grad": "gen.fc", "one is idle": "gen.spare", "no adapter gets a gradient": "gen.fc"}
        assert text.startswith("after 20 steps: ")
        assert idle[way] in text


def test_an_optimizer_that_never_gets_a_gradient() -> None:
    """What trains beside the adapters has another optimizer, or none."""
    model, x = Body(), torch.randn(3, 8)
    ll.attach(model, L(r=2, target_names=("body",)))
    model.head.requires_grad_(True)
    optimizer = torch.optim.SGD(ll.parameters(model), lr=1e-3)

    def train() -> None:
        model(x, "detached").sum().backward()
        optimizer.step()

    (text,) = [text for _ in range(25) for text in warned(train)]
    assert text.startswith("after 20 steps: these ran, but no gradient reached")
    assert "body.* ×2" in text


def test_an_optimizer_whose_steps_are_not_seen() -> None:
    """It exists, and steps in a way of its own or not at all: the backwards tell after a while."""
    model, x = Body(), torch.randn(3, 8)
    ll.attach(model, L(r=2))
    kept = torch.optim.SGD(ll.parameters(model), lr=1e-3)
    for _ in range(19):
        assert not warned(lambda: model(x, "skipped").sum().backward())
    with pytest.warns(UserWarning, match=r"after 20 backwards: these adapted layers never ran.*body\.\* ×2"):
        model(x, "skipped").sum().backward()
    del kept


def test_a_backward_that_fails_half_way() -> None:
    """The next one is looked at as the first."""
    model, x = Body(), torch.randn(3, 8)
    ll.attach(model, L(r=2))
    h = model.body(x)
    h.register_hook(lambda grad: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        model.head(h).sum().backward()
    for site in (model.body[0].lora_lite, model.body[1].lora_lite):
        site.ran = site.ran_with_grad = site.ran_in_training = False
    (text,) = warned(lambda: model(x, "skipped").sum().backward())
    assert text.startswith("after the first backward: these adapted layers never ran")


@pytest.mark.parametrize("how", ["around a compiled step", "alone", "not by Dynamo"])
def test_a_compiled_backward(how: str) -> None:
    """Compiled autograd traces hooks of parameters. The model trains as without, and the step tells who is idle."""
    from torch._dynamo.compiled_autograd import _enable

    def trained(compiled: bool) -> Tensor:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Adversaries(idle=True)
        ll.attach(model, L(r=2, target_roles=(), target_names=("gen",)))
        randomize(model, by=0.3)
        optimizer, x = torch.optim.SGD(ll.parameters(model), lr=1e-2), torch.randn(4, 8)

        def backward() -> None:
            model("gen", x).square().mean().backward()

        with contextlib.ExitStack() as stack:
            call: Callable[[], None] = backward
            if compiled and how == "around a compiled step":
                stack.enter_context(torch._dynamo.config.patch(compiled_autograd=True))
                call = torch.compile(backward, backend="eager")
            elif compiled:
                stack.enter_context(_enable(torch.compile(backend="eager") if how == "alone" else lambda graph: graph))
            (text,) = [*warned(call), *warned(optimizer.step)]
            assert text.startswith("after the first step: these adapted layers never ran")
            assert "gen.spare" in text
            for _ in range(3):
                optimizer.zero_grad()
                call()
                optimizer.step()
        return torch.cat([p.detach().flatten() for p in ll.parameters(model)])

    assert_close(trained(True), trained(False), 1e-6)


def test_an_optimizer_that_does_not_hold_the_adapters(tmp_path: Path) -> None:
    """It was made before them, or of those that they replaced."""

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 25) -> list[str]:
        def loop() -> None:
            for _ in range(steps):
                optimizer.zero_grad()
                model(torch.randn(4, 8)).square().sum().backward()
                optimizer.step()

        return warned(loop)

    def two() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    model = two()
    early = torch.optim.SGD(model.parameters(), lr=1e-3)
    ll.attach(model, L(r=2, target_roles=()))
    (text,) = train(model, early)
    assert "after 10 steps: these adapters get gradients, and no optimiser holds them" in text
    assert "* ×2" in text
    model = two().requires_grad_(False)
    ll.attach(model, L(r=2, target_roles=()))
    stale = torch.optim.SGD(ll.parameters(model), lr=1e-3)
    assert not train(model, stale)
    ll.save(model, tmp_path / "adapter.safetensors")
    ll.detach(model)
    ll.load(model, tmp_path / "adapter.safetensors")
    (text,) = train(model, stale)
    assert "no optimiser holds them" in text
    model = two().requires_grad_(False)
    attachment = ll.attach(model, L(r=2, target_roles=()))
    one = torch.optim.SGD(attachment.adapters["0"].parameters(), lr=1e-3)
    (text,) = train(model, one)
    assert "do not train: 1. Make" in text
    model = two().requires_grad_(False)
    attachment = ll.attach(model, L(r=2, target_roles=()))
    copies = [p.detach().clone().requires_grad_() for p in ll.parameters(model)]

    class OfCopies(torch.optim.SGD):
        """As those that train float32 copies of 16-bit tensors."""

        def step(self, closure: Any = None) -> Any:
            for copied, p in zip(copies, ll.parameters(model), strict=True):
                copied.grad = p.grad
            found = super().step(closure)
            for copied, p in zip(copies, ll.parameters(model), strict=True):
                p.data.copy_(copied.data)
            return found

    del early, stale, one
    assert not train(model, OfCopies(copies, lr=1e-3))


def _steps(model: nn.Module, lr: float = 1e-3, steps: int = 25) -> list[str]:
    kind = torch.optim.SGD if lr < 1e-3 else torch.optim.AdamW  # whose weight decay moves what gets no gradient
    optimizer = kind(ll.parameters(model), lr=lr)

    def loop() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 8, dtype=model[0].weight.dtype)).float().square().sum().backward()  # type: ignore
            optimizer.step()

    return warned(loop)


@pytest.mark.parametrize("variant", ["dora", "delora", "hra"])
def test_a_weight_of_zeros_gives_no_gradient(variant: str) -> None:
    """As of layers that start so, and have not been trained: these methods stay where they are."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    nn.init.zeros_(model[1].weight)  # type: ignore[arg-type]
    ll.attach(model, ll.REGISTRY[variant].config(r=2, target_roles=()))
    (text,) = _steps(model)
    assert "after 10 steps: the gradients of these adapters were zero" in text
    assert "do not train: *" in text  # and through it no gradient reaches the first
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    ll.attach(model, ll.REGISTRY[variant].config(r=2, target_roles=()))
    assert not _steps(model)


def test_steps_that_are_lost_in_rounding() -> None:
    def model(dtype: torch.dtype) -> nn.Module:
        bare = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(torch.bfloat16).requires_grad_(False)
        ll.attach(bare, ll.PiSSAConfig(r=2, alpha=2, target_roles=(), dtype=dtype))
        return bare

    (text,) = _steps(model(torch.bfloat16), lr=1e-7)
    assert "after 10 steps: the optimiser's steps have not changed these adapters: * ×2" in text
    assert "dtype=torch.float32" in text
    assert not _steps(model(torch.float32), lr=1e-5)
    assert not _steps(model(torch.bfloat16), lr=0.0)  # not to be trained yet


def test_unused_in_a_compiled_region() -> None:
    """A layer that shares x with others gets a gradient of zeros there, and not none."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) + self.k(x).detach()

    model = Reads().requires_grad_(False)
    ll.attach(model, L(r=2, target_names=("q", "k")))
    compiled, optimizer = torch.compile(model, backend="aot_eager"), torch.optim.SGD(ll.parameters(model), lr=1e-3)

    def loop() -> None:
        for _ in range(12):
            optimizer.zero_grad()
            compiled(torch.randn(4, 8, requires_grad=True)).square().sum().backward()
            optimizer.step()

    text = warned(loop)[-1]
    assert "after 10 steps: the gradients of these adapters were zero" in text
    assert "do not train: k." in text


def test_only_steps_with_gradients_of_its_own_count() -> None:
    """An expert that the first step visits, and no other for a while; and a layer that comes later, whose adapter no
    optimiser holds."""
    model = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)).requires_grad_(False)
    ll.attach(model, L(r=2, target_roles=()))
    attachment = ll.attachment.require_attachment(model)
    held = [p for name in ("0", "1") for p in attachment.adapters[name].parameters()]
    optimizer = torch.optim.SGD(held, lr=1e-3)

    def loop() -> None:
        for i in range(18):
            optimizer.zero_grad()
            model[2].zero_grad()
            which = (0, 1, 2) if i == 0 else (0, 2) if i > 3 else (0,)
            sum(model[each](torch.randn(4, 8)).square().sum() for each in which).backward()  # type: ignore[union-attr]
            optimizer.step()

    (text,) = warned(loop)
    assert "no optimiser holds them, so that they do not train: 2." in text


def test_not_trained_after_a_look_in_evaluation(tmp_path: Path) -> None:
    """A layer that ran before training alone: `save` says so, once chance has hardly left it out."""
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 8)}).eval()
    ll.attach(model, L(r=2, target_roles=()))
    with torch.no_grad():
        model["head"](model["body"](torch.randn(4, 8)))
    optimizer = torch.optim.SGD(ll.parameters(model), lr=1e-3)

    def loop() -> None:
        for _ in range(12):
            optimizer.zero_grad()
            model.train()["body"](torch.randn(4, 8)).square().sum().backward()  # type: ignore[index]
            optimizer.step()

    assert not warned(loop)
    (text,) = warned(lambda: ll.save(model, tmp_path / "adapter.safetensors"))
    assert text.startswith("save: these ran, but no gradient reached their adapters")
    assert ": head. " in text


def test_a_turn_that_comes_late(tmp_path: Path) -> None:
    """After the watch has ended: a tower that later batches use, a layer that is unfrozen later."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.tower, self.head = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor, image: Tensor | None) -> Tensor:
            h = self.text(x)
            return self.head(h if image is None else h + self.tower(image))

    model = Two()
    attachment = ll.attach(model, ll.LoRAConfig(r=2, target_roles=()))
    own = [p for name, p in model.named_parameters() if name.startswith("text.lora_lite")]
    optimizer = torch.optim.AdamW(ll.parameters(model), lr=1e-2)
    for i in range(30):
        for p in own:
            p.requires_grad_(i >= 25)
        image = torch.randn(4, 8) if i >= 25 else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the first steps, in which the tower has no turn
            model(torch.randn(4, 8), image).square().mean().backward()
            optimizer.step()
        optimizer.zero_grad()
    assert not attachment.watch.idle(model)["unreached"]
    assert not attachment.watch.idle(model)["never"]
    ll.save(model, tmp_path / "late")  # without a warning, which would be an error here
    assert [row.idle for row in ll.diagnose(model).rows] == [""] * 3
    ll.detach(model)
    assert not any(p._post_accumulate_grad_hooks for p in attachment.parameters())
