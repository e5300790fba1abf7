"""attach and detach: put a variant's parameters on the matching layers, hook them, and take all of it off again."""

import dataclasses
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import nn

from .adapter import Adapter
from .attachment import (
    DEFAULT,
    Attachment,
    attachments,
    chosen,
    forget,
    in_force,
    record,
    settle_modules,
    sites_of,
    unwrap,
)
from .backend import check_backend
from .beside import Beside, peft_in
from .calibration import CalibrationData, OfExperts, Statistic, gather, require_batches
from .config import AdapterConfig
from .embeddings import require_inputs, require_sum
from .errors import AttachError, NarrowError, UnfitError, naming
from .fitness import unfit
from .idle import copied, listing
from .left_out import left_out
from .params import SITE
from .placement import replicate
from .quantized import is_dense, weight_of
from .reference import without_autocast
from .rows import Rows
from .selection import disabled
from .shapes import shape
from .siblings import settle_siblings
from .site import Site
from .stacks import Stack, join, joined, part
from .targets import Target, choose, stacks_among
from .variant import REGISTRY, Variant, require_loadable, variant_of
from .watch import Watch
from .whole_modules import WholeModules, inside, matched, settle


@overload
def attach(
    model: nn.Module, cfg: AdapterConfig, *, name: str = ..., backend: str = ..., calibration_data: Any = ...
) -> Attachment: ...


@overload
def attach(
    model: nn.Module, cfg: Mapping[str, AdapterConfig], *, backend: str = ..., calibration_data: Any = ...
) -> dict[str, Attachment]: ...


def attach(
    model: nn.Module,
    cfg: AdapterConfig | Mapping[str, AdapterConfig],
    *,
    name: str = DEFAULT,
    backend: str = "auto",
    calibration_data: CalibrationData | None = None,
) -> Attachment | dict[str, Attachment]:
    """Freeze `model` and put an adapter on each layer that `cfg` selects. The base weights are never changed.

    A model can carry several adapters under different names; all of them act, in the order in which they were attached,
    until `use` says otherwise. Low-rank sums on one layer run as one; other adapters nest: each acts on the input that
    the one before it leaves, and on the output likewise.

    A UserWarning names fields of `cfg` that the method has no use for, and layers that by default are left out since
    they are narrower than r. After the first backward or, where an optimiser holds the adapters, its first step, one
    names adapted layers that never ran or that no gradient reached.

    Args:
        model: any module with linear layers, or what has their shape: quantised ones, Conv1D, stacks of experts.
        cfg: a variant's config, such as `LoRAConfig(r=8)`; or a dict of them by name: all are attached, or none.
        name: of the adapter, for `use`, `save`, `detach` and the rest. A dict has the names itself.
        backend: "triton" for the fused kernels, "reference" for PyTorch, "auto" for kernels where they run.
        calibration_data: model inputs (dicts, tuples, tensors; a DataLoader works) for EVA and, optionally, AntiPaSTO.
            Given to methods that take none alone it is not touched, and a UserWarning says so.

    Returns:
        An `Attachment`, or a dict of them by name; print its `summary()`, which also says what is left out and why.

    Raises:
        AttachError: `model` is no module, an adapter of that name is attached already, PEFT has one there, no layer
            matches or something that `cfg` names matches none, or a layer can't take this adapter.
        CalibrationError: the variant needs calibration data and got none or too little, or it is no batches.
        ConfigError: a field of `cfg` has a value that no file can hold.
        In each case the model is as it was.
    """
    model = unwrap(model)
    if calibration_data is not None:
        require_batches(calibration_data)
        _warn_of_unused_data(cfg)
    if isinstance(cfg, Mapping):
        if name != DEFAULT:
            raise AttachError(f"attach: name={name!r} is for one config; a dict has its adapters' names for keys")
        return _attach_all(model, cfg, backend, calibration_data)
    check_backend(backend)
    variant = variant_of(cfg)
    _warn_of_unused_fields(variant, cfg)
    cfg.require_storable()
    require_loadable(cfg)
    check_free(model, name)
    cfg = _with_divided_ranks(model, cfg)
    targets, adapters, reasons = _built(model, variant, cfg, backend)
    if variant.calibration == "required" or (variant.calibration == "optional" and calibration_data is not None):
        gathered = _gathered(model, targets, adapters, calibration_data)
        planned: AdapterConfig = variant.plan(gathered, cfg)
        if planned is not cfg:
            cfg = planned
            targets, adapters, reasons = _built(model, variant, cfg, backend, planned=True)
        for t in targets:
            _calibrate(adapters[t.name], t, gathered[t.name])
    else:
        init(targets, adapters)
    derive(targets, adapters)
    _require_dropout(targets, adapters)
    whole = whole_modules(model, matched(model, cfg.modules_to_save))
    return install(model, name, cfg, backend, targets, adapters, reasons, whole)


def _warn_of_unused_data(cfg: AdapterConfig | Mapping[str, AdapterConfig]) -> None:
    """A warning where none of the methods takes calibration data."""
    variants = [variant_of(each) for each in (cfg.values() if isinstance(cfg, Mapping) else [cfg])]
    if all(variant.calibration == "none" for variant in variants):
        takers = ", ".join(name for name, variant in REGISTRY.items() if variant.calibration != "none")
        warnings.warn(
            f"attach: calibration_data is not used: {', '.join(each.name for each in variants)} takes none; leave it "
            f"out, or choose a method that starts from it ({takers})",
            stacklevel=3,
        )


def _warn_of_unused_fields(variant: type[Variant], cfg: AdapterConfig) -> None:
    """A warning where the user gave a field that the method has no use for."""
    if idle := cfg.idle:
        given = ", ".join(f"{name}={value!r}" for name, value in idle.items())
        warnings.warn(
            f"attach: {type(cfg).__name__}({given}): {variant.name} has no use for {', '.join(idle)}; leave it out",
            stacklevel=3,
        )


def _gathered(
    model: nn.Module, targets: Sequence[Target], adapters: Mapping[str, Adapter], data: CalibrationData | None
) -> dict[str, Any]:
    """The statistic of each target's input."""
    statistics = {}
    for t in targets:
        with _making(adapters[t.name], t.label, "statistic"):
            statistics[t.name] = (t.layer, _statistic(adapters[t.name], t.layer))
    with joined(stacks_among(targets)), disabled(model) if attachments(model) else nullcontext():
        return gather(model, statistics, data)


def _attach_all(
    model: nn.Module, configs: Mapping[str, AdapterConfig], backend: str, calibration_data: Any
) -> dict[str, Attachment]:
    attached: dict[str, Attachment] = {}
    if not configs:
        raise AttachError("cfg is an empty dict; give it a config for each adapter's name")
    if not all(isinstance(cfg, AdapterConfig) for cfg in configs.values()):
        variant_of(cast(AdapterConfig, configs))  # a dict of something else
    try:
        for name, cfg in configs.items():
            data = None if variant_of(cfg).calibration == "none" else calibration_data
            attached[name] = attach(model, cfg, name=name, backend=backend, calibration_data=data)
    except Exception:
        for name in attached:
            detach(model, name)
        raise
    return attached


# ---- the steps -------------------------------------------------------------------------------------------------------


def check_free(model: nn.Module, name: str) -> None:
    """Raise where `name` is taken or can't be a name, where a layer carries an adapter that was attached through
    another model, where PEFT has adapters (a second one would freeze those), or within torch.inference_mode."""
    if torch.is_inference_mode_enabled():
        raise AttachError(
            "tensors that are made in torch.inference_mode can't be trained; attach or load outside of it"
        )
    try:
        Site(nn.Identity(), "")[name] = nn.Identity()
        name.encode()  # half of a surrogate pair stands in no file
    except (KeyError, TypeError, UnicodeEncodeError) as error:
        raise ValueError(f"name={name!r} can't be an adapter's name ({error}); use letters, digits and _") from None
    mine = attachments(model)
    if name in {each.name for each in mine}:
        raise AttachError(
            f"an adapter named {name!r} is attached to this model already; call detach(model) first, or give this one "
            "another name"
        )
    own = {id(adapter) for each in mine for adapter in each.adapters.values()}
    for path, module in model.named_modules():
        if (site := module._modules.get(SITE)) is not None and not isinstance(site, Site):
            raise AttachError(
                f"{path or type(module).__name__} has a submodule named {SITE!r}, which is where adapters stand; give "
                "it another name"
            )
        if any(id(adapter) not in own for adapter in getattr(module, SITE, {}).values()):
            raise AttachError(
                f"{path or type(module).__name__} carries an adapter already; call detach on the model it was attached "
                "through"
            )
    if found := peft_in(model):
        raise AttachError(
            f"{found}: PEFT adapts this model already. Call its unload() or merge_and_unload() first, or bring PEFT's "
            "adapter by import_peft"
        )


def _with_divided_ranks(model: nn.Module, cfg: AdapterConfig) -> AdapterConfig:
    """The config with the ranks of stacks that `divide_r_among_experts` asks for, as patterns."""
    if not cfg.divide_r_among_experts:
        return cfg
    ranks: dict[str, int] = {}
    for target in choose(model, cfg)[0]:
        if isinstance(target.layer, Stack):
            with naming(target.label):
                r = max(1, cfg.r // target.layer.active)
            ranks[rf"^{re.escape(target.name)}$"] = r
    if not ranks:
        raise AttachError(
            "divide_r_among_experts: no stack of experts is adapted; add 'expert' to target_roles or name them"
        )
    added = {pattern: r for pattern, r in ranks.items() if pattern not in cfg.rank_pattern}
    return dataclasses.replace(cfg, rank_pattern={**cfg.rank_pattern, **added}, divide_r_among_experts=False)


def _built(
    model: nn.Module, variant: type[Variant], cfg: AdapterConfig, backend: str, planned: bool = False
) -> tuple[list[Target], dict[str, Adapter], dict[str, str]]:
    """The layers that `cfg` selects and that can take an adapter, their adapters with the tensors as the specs start
    them, and of each other linear layer why it is left out. A layer that was asked for by name is not left out: that it
    can't be adapted is an error, and so it is where none can be of a kind that `target_roles` asks for. `planned`:
    `cfg` is the variant's plan, which may leave out what the user's names."""
    selected, reasons = choose(model, cfg, promised=not planned)
    targets: list[Target] = []
    adapters: dict[str, Adapter] = {}
    problems: list[tuple[Target, UnfitError]] = []
    for target in selected:
        try:
            with naming(target.label):
                require_fit(model, target)
                own = cfg.for_layer(target.name)
                variant.check_worth(*shape(target.layer), own)
                adapters[target.name] = Adapter(target, variant, own, backend)
                targets.append(target)
        except UnfitError as error:
            if cfg.names_given or any(re.search(pattern, target.name) for pattern in cfg.rank_pattern):
                raise
            reasons[target.name] = error.why
            problems.append((target, error))
    asked_for = () if planned else cfg.kinds_given
    for problem, error in problems:
        if not targets or (problem.role in asked_for and not any(target.role == problem.role for target in targets)):
            raise error
    if not planned:
        _warn_of_narrow(cfg, {t.name: error.most for t, error in problems if isinstance(error, NarrowError)})
    return targets, adapters, reasons


_NARROW = 16  # nobody expects layers narrower than this (routers, gates, heads) to take a rank


def _warn_of_narrow(cfg: AdapterConfig, most: Mapping[str, int]) -> None:
    """A warning where a larger rank means fewer layers, as a comparison of ranks has to know. `most`: the largest that
    layers take which got none."""
    if narrow := {name: r for name, r in most.items() if r >= _NARROW}:
        warnings.warn(
            f"attach: r={cfg.r} is larger than these layers allow, and they get no adapter: {listing(list(narrow))}. "
            f"Take r ≤ {min(narrow.values())}, give them less by rank_pattern, or leave them out by exclude_names",
            stacklevel=4,
        )


def require_fit(model: nn.Module, target: Target) -> None:
    """Raise where an adapter of the layer could not act, or could not be trained.

    Raises:
        UnfitError: it could not act, or the layer trains in full with another adapter.
        AttachError: the layer passes no gradient to its input.
    """
    holder = [each.name for each in attachments(model) if inside(target.name, each.whole.names)]
    why = f"it trains in full with the adapter {holder[0]!r} (modules_to_save)" if holder else ""
    if why := why or unfit(model, target, to_train=True):
        raise UnfitError(f"{why}; adapt the layers around it instead", why)


def build(target: Target, variant: type[Variant], cfg: AdapterConfig, backend: str) -> Adapter:
    """A layer's adapter, not yet on the layer, whose tensors are to be filled. A file's dropout is of the layers beside
    an embedding: an id has no elements to leave out, and `attach` takes none there."""
    own = cfg.for_layer(target.name)
    if target.role == "embedding":
        own = dataclasses.replace(own, dropout=0.0)
    with naming(target.label):
        return Adapter(target, variant, own, backend, to_fill=True)


def init(targets: list[Target], adapters: dict[str, Adapter]) -> None:
    """`Variant.init` for each layer. Factorisations are too small for many threads each, so on a CPU up to four layers
    at a time are done side by side, where the method allows it and the weights are dense already."""

    def of(t: Target) -> None:
        adapter = adapters[t.name]
        with _making(adapter, t.label, "init"):
            for p, layer in adapter.each(t.layer):
                adapter.variant.init(p, layer, adapter.cfg)

    threads = torch.get_num_threads()
    workers = min(threads, 4)
    if workers == 1 or not all(adapters[t.name].variant.side_by_side and _dense_on_cpu(t) for t in targets):
        for t in targets:
            of(t)
        return
    torch.set_num_threads(threads // workers)
    try:
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(of, targets):
                pass
    finally:
        torch.set_num_threads(threads)


def _names_on(adapter: Adapter) -> set[str]:
    """Of its attributes, tensors and children."""
    return {*vars(adapter), *adapter._parameters, *adapter._buffers, *adapter._modules}


@contextmanager
def _making(adapter: Adapter, label: str, step: str) -> Iterator[None]:
    """Around a method's own code: what it raises names the layer, autocast does not reach it, and what it puts on the
    adapter that no file holds is an AttachError."""
    before = _names_on(adapter)
    with naming(label), without_autocast(adapter.device):
        yield
        if more := sorted(_names_on(adapter) - before):
            raise AttachError(
                f"{adapter.variant.__name__}.{step} has set {', '.join(more)}, which no file would hold: give a tensor "
                "a ParamSpec in param_specs, derived=True for what `derive` makes of the weight; keep notes in cfg"
            )


def _require_dropout(targets: Sequence[Target], adapters: Mapping[str, Adapter]) -> None:
    """Raise an AttachError where the config has dropout, and the method's primitive doesn't ask for it."""
    asked = [(adapters[t.name], t.layer) for t in targets if adapters[t.name].cfg.dropout]
    if asked and not any(adapter.uses_dropout(layer) for adapter, layer in asked):
        adapter, kind = asked[0][0], asked[0][0].variant
        raise AttachError(
            f"dropout={adapter.cfg.dropout}: {kind.__name__}.primitive does not use cfg.dropout; pass it on, as "
            f"LowRankAdd(A, B, scale, cfg.dropout), or set takes_dropout = False in {kind.config.__name__}, which "
            "then refuses it"
        )


def _dense_on_cpu(t: Target) -> bool:
    weight = weight_of(t.layer)
    return weight is not None and is_dense(weight) and weight.device.type == "cpu"


def derive(targets: list[Target], adapters: dict[str, Adapter]) -> None:
    """`Variant.derive` for each layer."""
    for t in targets:
        with naming(t.label):
            adapters[t.name].derive(t.layer)


def _statistic(adapter: Adapter, layer: nn.Module) -> Statistic:
    require_inputs(adapter.variant.name, layer)
    found = [adapter.variant.statistic(p, each, adapter.cfg) for p, each in adapter.each(layer)]
    return OfExperts(found) if isinstance(layer, Stack) else found[0]


def _calibrate(adapter: Adapter, target: Target, statistic: Statistic) -> None:
    found = statistic.of if isinstance(statistic, OfExperts) else [statistic]
    with _making(adapter, target.label, "calibrate"):
        for (p, _), each in zip(adapter.each(target.layer), found, strict=True):
            adapter.variant.calibrate(p, each, adapter.cfg)


def whole_modules(model: nn.Module, names: list[str]) -> WholeModules:
    """The modules of these names, to train in full, with copies of their tensors.

    Raises:
        AttachError: one carries an adapter, is quantised, sharded, on the meta device or without a shape.
    """
    return WholeModules(model, names, [each.whole for each in attachments(model)])


def install(
    model: nn.Module,
    name: str,
    cfg: AdapterConfig,
    backend: str,
    targets: list[Target],
    adapters: dict[str, Adapter],
    reasons: dict[str, str],
    whole: WholeModules,
) -> Attachment:
    """Freeze the base, put the adapters on their layers' sites, and the modules that train in full in their places.
    Nothing in here can fail half-way.

    Raises:
        AttachError: an adapter of this method can't stand on an embedding, which is among the targets.
    """
    for target in targets:
        with naming(target.label):
            require_sum(adapters[target.name], target.layer)
    in_force(targets, backend)  # warns now, and not in the middle of a forward, where "triton" has to fall back
    others = attachments(model)
    beside = others[0].beside if others else Beside(model)
    if both := [each.name for each in others if each.whole.entries.keys() & whole.entries.keys()]:
        warnings.warn(
            f"attach: modules that train in full with {name!r} do so with {', '.join(both)} too; the last attached "
            "that acts counts: use(model, name) says which",
            stacklevel=3,
        )
    without = left_out(model, reasons, adapters)
    if not others:
        beside.freeze(model)
    join(stacks_among(targets))
    fresh = any(SITE not in target.layer._modules for target in targets)
    sites = {target.name: Site.of(target.layer, target.name) for target in targets}
    for target in targets:
        adapter, site = adapters[target.name].train(target.layer.training), sites[target.name]
        if target.mesh is not None:
            replicate(adapter, target.mesh)
        site[name] = adapter
        site.off -= {name}
    watch = Watch(name, targets, adapters, sites, whole)
    cfg = dataclasses.replace(cfg)  # with patterns of its own: nothing that becomes of the caller's reaches a file
    attachment = Attachment(name, cfg, backend, targets, adapters, without, sites, watch, beside, whole)
    record(model, attachment)
    settle_modules(model)
    _settle_siblings(model)
    watch.start(model)
    if fresh:
        _forget_compiled()
    return attachment


# PyTorch's own that is compiled by itself, and calls no layer: flex attention, optimisers' steps.
_WITHOUT_LAYERS = tuple(str(Path(torch.__file__).parent.joinpath(*each)) for each in (("nn", "attention"), ("optim",)))


def _forget_compiled() -> None:
    """Let torch.compile compile anew what may have run these layers: it does not ask whether they have got hooks since,
    as it does whether what their hooks found there has changed."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return
    frames = dynamo.convert_frame
    with frames.compile_lock:
        for seen in (*frames.input_codes.seen, *frames.output_codes.seen):
            if (code := seen()) is not None and not code.co_filename.startswith(_WITHOUT_LAYERS):
                dynamo.reset_code(code)


def _settle_siblings(model: nn.Module) -> None:
    settle_siblings(model, [target for each in attachments(model) for target in each.targets])


def _without(model: nn.Module, names: set[str]) -> None:
    """Entries of a batch that took these adapters take none: one of that name that is attached later is another."""
    made: dict[Rows, Rows] = {}
    for each in (each for site in sites_of(model) for each in (site, *site.contexts)):
        if (rows := each.rows) is not None and not names.isdisjoint(rows.names):
            kept = tuple(None if name in names else name for name in rows.names)
            each.rows = made.setdefault(rows, Rows(kept, rows.lengths, rows.batch_dim))


def _without_copies(model: nn.Module, names: set[str]) -> list[str]:
    """Take the adapters of these names off copies of adapted layers. The layers' names."""
    found = []
    for layer, module in copied(model).items():
        site = cast(Site, module._modules[SITE])
        for name in names & set(site):
            site.leave(module, name)
            found.append(layer)
    return found


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take off the adapter of that name, or all of them. After the last, every base tensor and `requires_grad` flag is
    as it was before `attach`. Of modules that train in full, those that were replaced or resized meanwhile stay as they
    are, and a UserWarning names them.

    Raises:
        AttachError: nothing is attached, nothing of that name, or a module that trains in full is sharded.
    """
    model = unwrap(model)
    gone = chosen(model, name)
    of_entries = {each for site in sites_of(model) if site.rows for each in site.rows.names}
    given_up: list[str] = []
    taken: list[str] = []
    for attachment in gone:
        given_up += attachment.whole.give_up(model)
        settle([(each.whole, each.acts and each is not attachment) for each in attachments(model)])
        attachment.watch.stop()
        for target in attachment.targets:
            if attachment.name in (site := attachment.sites[target.name]):
                site.leave(target.layer, attachment.name)
            else:
                taken.append(target.name)
        part(stacks_among(attachment.targets))
        forget(model, attachment)
        _settle_siblings(model)
        if not attachments(model):
            attachment.beside.restore(model)
    names = {each.name for each in gone}
    _without(model, names)
    if copies := _without_copies(model, names):
        warnings.warn(
            f"detach: {listing(copies)} were copied with their adapters, which are taken off too; what was "
            "frozen there stays so. Copy layers before attach",
            stacklevel=2,
        )
    if given_up:
        warnings.warn(
            f"detach: these of modules_to_save were replaced or resized since attach, and stay as they are: "
            f"{', '.join(given_up)}",
            stacklevel=2,
        )
    if taken:
        warnings.warn(
            f"detach: the adapters of {listing(taken)} had been taken off already, by way of a copy.copy of the model, "
            "which has the same layers; copy.deepcopy has its own",
            stacklevel=2,
        )
    if (left := attachments(model)) and not any(each.acts for each in left):
        warnings.warn(
            f"detach: what is left ({', '.join(each.name for each in left)}) does not act, since `use` named only what "
            "was detached; call use(model, name)",
            stacklevel=2,
        )
    elif left and (of_gone := [each.name for each in gone if each.name in of_entries]):
        warnings.warn(
            f"detach: the entries of a batch that use(model, [...]) gave to {', '.join(of_gone)} have no adapter now; "
            "call use again",
            stacklevel=2,
        )
