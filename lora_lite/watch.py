"""Watches the first steps of an attachment for adapters that do nothing: their layer never runs, no gradient reaches
them, or they do not change.

A warning names them once: at the end of the first backward that reaches the attachment or, where an optimiser holds
them, after its first step. Experts to which a batch was not routed are no news, nor are blocks that chance leaves out
(LayerDrop): those count only if they have not run after some more steps. A layer that has left the model does.
"""

import gc
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.optim.optimizer import register_optimizer_step_post_hook

from .adapter import Adapter
from .beside import peft_in
from .calls import called_by
from .fitness import passes_gradient
from .idle import astray, copied, describe, here_and_gone, listing, whole_kinds
from .progress import ENOUGH, Progress, standing_still
from .quantized import weight_of
from .site import Site, waiting
from .targets import Target
from .whole_modules import WholeModules

_IN_TURN = ("never", "unreached", "frozen")  # what an optimiser's first step decides about
_PATIENCE = 20  # steps after which a block that has never run has not been left out by chance

_watching: "weakref.WeakSet[Watch]" = weakref.WeakSet()


class Watch:
    """Looks at the first steps of an attachment: which layers run, and which of its adapters get gradients.

    Nothing in it keeps a model alive: hooks of parameters are out of the garbage collector's sight.
    """

    def __init__(
        self,
        name: str,
        targets: list[Target],
        adapters: Mapping[str, Adapter],
        sites: Mapping[str, Site],
        whole: WholeModules,
    ) -> None:
        self.name, self.targets, self.adapters, self.sites, self.whole = name, targets, adapters, sites, whole
        self.reached: set[str] = set()  # layers whose adapters got a gradient
        self.steps = self.backwards = 0  # steps: of the optimiser that has made the most
        self.trained = False  # whether an optimiser has stepped, with gradients
        self._steps_of: Counter[int] = Counter()  # by the optimiser's id
        self._stepped: set[str] = set()  # layers whose adapters such an optimiser holds
        self._progress: dict[str, Progress] = {}  # of layers that are reached
        self._said: set[str] = set()
        self._backward, self._stepped_within = -1, False  # at whose end to look, and whether optimisers step within
        self._kinds: dict[str, type] = {}  # of weights at attach
        self._model: Any = lambda: None
        self._handles: dict[str, list[Any]] = {}  # of each layer's parameters
        self._looking = True  # at the ends of backwards
        self._at_rest: set[str] = set()  # layers that were reached in evaluation mode, and have dropout

    def start(self, model: nn.Module) -> None:
        """Wait for the first backward, and for optimisers' steps."""
        me = weakref.ref(self)
        self._model = weakref.ref(model)
        self._kinds = {t.name: type(weight_of(t.layer)) for t in self.targets}
        _watching.add(self)

        def reached(layer: str) -> Callable[[Any], None]:
            def hook(p: Any) -> None:
                if _in_compiled_backward() or (watch := me()) is None:
                    return
                if p.grad is not None and layer not in watch.reached:  # PyTorch calls this for a gradient of None too
                    watch.reached.add(layer)
                    if (adapter := watch.adapters[layer]).cfg.dropout and not adapter.training:
                        watch._at_rest.add(layer)
                if watch._looking:
                    watch._await_the_end()

            return hook

        for layer, adapter in self.adapters.items():
            for p in adapter.parameters():
                if p.requires_grad and p.is_leaf:
                    self._handles.setdefault(layer, []).append(p.register_post_accumulate_grad_hook(reached(layer)))

    def stop(self) -> None:
        """Look no further."""
        _watching.discard(self)
        self._unhook(self.adapters)

    def _unhook(self, layers: Iterable[str]) -> None:
        """Look at no more backwards. Of layers that are not among these it is still noted that a gradient has come:
        they may have their turn later."""
        self._looking = False
        for layer in layers:
            for handle in self._handles.pop(layer, ()):
                handle.remove()

    def _await_the_end(self) -> None:
        """Look once this backward is over."""
        backward = torch._C._current_graph_task_id()
        if backward in (-1, self._backward):
            return
        self._backward, me = backward, weakref.ref(self)

        def ended() -> None:
            if (watch := me()) is not None:
                watch._ended()

        _at_the_end_of_backward(ended)

    def _ended(self) -> None:
        if self._backward == -1:  # the end of another backward that this one ran inside of
            return
        within, self._backward, self._stepped_within = self._stepped_within, -1, False
        self.backwards += 1
        if within:
            self._look_at_steps(within=True)
        else:
            unseen = self.backwards >= _PATIENCE and not self.steps  # who holds them makes no steps that can be seen
            when = f"after {self.backwards} backwards" if self.backwards > 1 else "after the first backward"
            self._report(when, self.never_trained(), everything=unseen)
        if self.backwards == 1:
            self._report_recast()
            self._report_bases_without_backward()
        if self.backwards >= _PATIENCE:
            self._unhook(self.reached)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step of an optimiser."""
        model = self._model()
        if model is None:
            return self.stop()
        mine = {id(p) for module in (model, *self.adapters.values()) for p in module.parameters()}
        own = [p for p in _parameters(optimizer) if id(p) in mine]
        if not self.acts:
            return None
        self._look_for_changes()
        if not own:
            return None
        # Also those that came another way than by a backward: torch.autograd.grad, torch.func.grad.
        self.reached |= {layer for layer, a in self.adapters.items() if any(p.grad is not None for p in a.parameters())}
        self._steps_of[id(optimizer)] += 1
        count = self._steps_of[id(optimizer)]
        self.steps = max(self.steps, count)
        due = count in (1, _PATIENCE)
        held = self._held(own)
        # A step without a gradient says nothing: it may come before the first backward, or in the other's turn.
        if count >= _PATIENCE or held & self.reached or any(p.grad is not None for p in own):
            self.trained = True
            due = due or not held <= self._stepped
            self._report_dropout(held)
            self._stepped |= held
        if due and torch._C._current_graph_task_id() != -1:
            self._stepped_within = True
            self._await_the_end()
        elif due:
            self._look_at_steps(within=False)
        return None

    def _look_for_changes(self) -> None:
        """Name those of whose progress all is known since this step, and that make none."""
        for layer in self.reached - self._progress.keys():
            self._progress[layer] = Progress(self.adapters[layer])
        known = {layer: each for layer, each in self._progress.items() if each.look(self.backwards)}
        if not known:
            return
        acting = {layer: each for layer, each in known.items() if self.name not in self.sites[layer].off}
        if any(self.sites[layer].strengths.get(self.name) == 0 for layer in acting):
            warnings.warn(
                f"after {ENOUGH} steps: adapter {self.name!r} acts at strength 0, at which it learns nothing; "
                f"use(model, {{{self.name!r}: 1}})",
                stacklevel=2,
            )
            return
        trains = {layer: each for layer, each in acting.items() if not _is_frozen(each.adapter)}
        optimizers = _optimizers()
        busy = [each for each in optimizers if self._steps_of[id(each)] >= ENOUGH - 1]
        held = self._held(p for each in optimizers for p in _parameters(each))
        stepped = self._held(p for each in busy for p in _parameters(each, at_rest=False))
        for text, layers in standing_still(trains, held, stepped).items():
            if layers:
                warnings.warn(f"after {ENOUGH} steps: {text.format(listing(sorted(layers)))}", stacklevel=2)

    def _look_at_steps(self, within: bool) -> None:
        model = self._model()
        if model is None:
            return
        if self.steps < _PATIENCE:
            self._report("after the first step", self.idle(model, _PATIENCE))
        else:
            self._report(f"after {self.steps} steps", self.idle(model, _PATIENCE), everything=within)
            _watching.discard(self)
            self._unhook(self.reached)

    def _held(self, parameters: Iterable[Any]) -> set[str]:
        """Layers of whose adapters a tensor is among these."""
        ids = {id(p) for p in parameters}
        return {layer for layer, a in self.adapters.items() if any(id(p) in ids for p in a.parameters())}

    @property
    def acts(self) -> bool:
        """Whether `use` and `disabled` let the adapter act."""
        return any(self.name not in site.off for site in self.sites.values())

    # ---- what is idle ----

    def never_trained(self) -> dict[str, list[str]]:
        """What a single backward can tell; another one may belong to the same step."""
        model = self._model()
        found = self.idle(model, _PATIENCE) if model is not None else {}
        alone = [name for name in found.get("unreached", []) if not self.sites[name].ran_with_grad]
        return {**found, "unreached": alone, "frozen": []}

    def idle(self, model: nn.Module, after: int = ENOUGH) -> dict[str, list[str]]:
        """Layers by what is wrong with them: "never" ran, "unreached" by a gradient, "frozen", frozen by "PEFT", "gone"
        from the model; "copied", with a block; and "astray", tensors that train in full elsewhere than in the model.

        The first needs that some layer has run, the second and third a backward or an optimiser's step; of a layer that
        ran in no training yet, `after` steps.
        """
        here, gone = here_and_gone(model, self.targets)
        beside = {"copied": list(copied(model)), "gone": gone, "astray": astray(model, self.whole)}
        here = [t for t in here if self.name not in self.sites[t.name].off]
        trained = bool(self.reached) or self.trained
        if not (trained or any(site.ran for site in self.sites.values())):
            return beside
        ran = {t.name for t in here if self.sites[t.name].ran or t.name in self.reached}
        frozen = {t.name for t in here if _is_frozen(self.adapters[t.name])}
        reached = self.reached if trained else ran
        patient = self.steps >= _PATIENCE
        running = [t for t in here if t.name in ran - frozen]
        # An evaluation before tells nothing of a step, in which chance may leave the block out.
        stepped = {name for name, site in self.sites.items() if site.ran_with_grad or site.ran_in_training}
        without = (ran if self.steps >= after else ran & stepped) - reached - frozen
        # All of an attachment is frozen by intent; a part of it by an accident: tower.requires_grad_(False).
        by_accident = sorted(frozen) if trained and len(frozen) < len(here) else []
        by_peft = sorted(frozen) if trained and not by_accident and peft_in(model) else []
        return {
            "never": whole_kinds(here, {t.name for t in here} - ran, "entries" if patient else "kinds"),
            "unreached": whole_kinds(running, without, "entries" if patient else "blocks"),
            "frozen": by_accident,
            "PEFT": by_peft,
            **beside,
        }

    def _report(self, when: str, found: dict[str, list[str]], everything: bool = False) -> None:
        """Say what was not said before. Of a generator and a discriminator each waits for its turn: layers, unless
        `everything` is to be said, while all optimisers that hold them have yet to step."""
        news = {kind: [name for name in names if name not in self._said] for kind, names in found.items()}
        # What has trained is frozen by intent, in the other's turn.
        news["frozen"] = [name for name in news.get("frozen", []) if name not in self.reached]
        if not everything and any(news.get(kind) for kind in _IN_TURN):
            later = self._held(p for each in _optimizers() for p in _parameters(each)) - self._stepped
            news |= {kind: [name for name in news.get(kind, []) if name not in later] for kind in _IN_TURN}
        self._said |= {name for names in news.values() for name in names}
        if text := describe(news):
            warnings.warn(f"{when}: {text}", stacklevel=2)

    def _report_dropout(self, held: set[str]) -> None:
        if found := sorted(self._at_rest & held):
            self._at_rest -= held
            warnings.warn(
                "after the first step: these adapters have dropout, and were trained in evaluation mode, without it: "
                f"{listing(found)}. Call model.train() before training",
                stacklevel=3,
            )

    def _report_recast(self) -> None:
        if recast := [layer for layer, adapter in self.adapters.items() if adapter.recast]:
            warnings.warn(
                f"since attach, something has given tensors of these adapters another dtype, and not by model.to: "
                f"{listing(recast)}. Their start may be wrong, and small steps be lost. TRL's trainers do so on a base "
                "that bitsandbytes has quantised: AdapterCallback(model), made before the trainer, takes it back",
                stacklevel=2,
            )

    def _report_bases_without_backward(self) -> None:
        """`attach` refuses such bases; here of each kind that there is since then the first is tried."""
        kinds: dict[type, list[Target]] = {}
        for t in self.targets:
            weight = weight_of(t.layer)
            if weight is not None and type(weight) is not self._kinds.get(t.name):
                kinds.setdefault(type(weight), []).append(t)
        for kind, targets in kinds.items():
            if not passes_gradient(targets[0].layer):
                warnings.warn(
                    f"since attach, the weights of these layers have become {kind.__name__}, and pass no gradient to "
                    f"their input, so that adapters before them train on a part of theirs: "
                    f"{listing([t.name for t in targets])}. Use a kind of quantisation that does, before attach",
                    stacklevel=2,
                )

    def __getstate__(self) -> dict[str, Any]:
        # Hooks of parameters are neither copied nor pickled.
        return {**vars(self), "_handles": {}, "_model": None, "_backward": -1}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._model = lambda: None


def _is_frozen(adapter: Adapter) -> bool:
    has_any = any(spec.trainable for spec in adapter.specs.values())
    return has_any and not any(p.requires_grad for p in adapter.parameters())


@_disable_dynamo  # where a step is compiled, this runs beside it
def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for watch in list(_watching):
        watch.step(optimizer)


register_optimizer_step_post_hook(_after_step)


def _optimizers() -> list[torch.optim.Optimizer]:
    """All that exist: PyTorch keeps no list, the garbage collector does."""
    return [each for each in gc.get_objects() if issubclass(type(each), torch.optim.Optimizer)]


def _parameters(optimizer: torch.optim.Optimizer, at_rest: bool = True) -> Iterator[Any]:
    """What it holds; nothing, if it is half made. `at_rest`: also what it has no learning rate for by now."""
    groups = getattr(optimizer, "param_groups", ())
    return (p for group in groups if at_rest or group.get("lr") is None or group["lr"] != 0 for p in group["params"])


def _in_compiled_backward() -> bool:
    """Whether compiled autograd traces this. It can put nothing at the backward's end; gradients are then looked at
    after the optimiser's step."""
    if not torch.compiler.is_compiling():
        return False
    from torch._dynamo import compiled_autograd

    return compiled_autograd.in_compiled_autograd_region


def _at_the_end_of_backward(callback: Callable[[], None]) -> None:
    """Run the callback when the whole backward is over. Reentrant checkpointing runs one backward inside of another,
    and only the inner one's end can be known: the callback then waits for the next call of an adapted layer."""

    def ended() -> None:
        if called_by("apply", "torch.autograd.function"):  # a torch.autograd.Function's backward
            waiting.append(callback)
        else:
            callback()

    torch.autograd.Variable._execution_engine.queue_callback(ended)  # type: ignore[attr-defined]
