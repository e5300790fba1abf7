"""What data-driven variants learn from a layer's inputs before training, in memory that the batches can't grow."""

import functools
import inspect
from collections.abc import Hashable, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .errors import CalibrationError, LoraLiteError
from .layer_input import input_of
from .linalg import top_svd
from .quantized import evaluation_mode
from .reference import without_autocast
from .segments import Segments

CalibrationData = Iterable[Mapping[str, Any] | tuple[Any, ...] | list[Any] | Tensor]


class Statistic:
    """A running summary of the rows that reach a layer.

    `key`: layers that get the same tensor and whose statistics have equal keys share one. None: never shared.
    `needs`: rows below which the summary means nothing.
    """

    key: Hashable | None = None
    needs: int = 1
    seen: int = 0

    def update(self, rows: Float[Tensor, "M K"]) -> None:
        """Take in one batch of rows."""
        raise NotImplementedError

    def lacking(self) -> str:
        """How few tokens it has got, where it needs more; empty: enough."""
        return f"{self.seen} tokens" if self.seen < self.needs else ""


class InputPCA(Statistic):
    """Leading right singular vectors of all rows, by incremental SVD (Ross et al. 2008): O((rank + 8)·K) held.

    center: subtract the running mean, so that the directions explain variance and not the mean.
    """

    def __init__(self, rank: int, center: bool = True, oversampling: int = 8) -> None:
        self.rank, self.center, self.kept = rank, center, rank + oversampling
        self.key = ("input_pca", rank, center)
        self.needs = rank + center  # centring takes one degree of freedom
        self.scaled_rows: Float[Tensor, "kept K"] | None = None  # diag(S) Vᵀ so far
        self.mean: Float[Tensor, " K"] | None = None
        self.total = 0.0  # Σ of all squared singular values

    def update(self, rows: Float[Tensor, "M K"]) -> None:
        # Chunks bound the copy in float32 and the SVD's work.
        for chunk in rows.split(max(512, 4 * self.kept)):
            self._update(chunk.float())

    def _update(self, X: Float[Tensor, "M K"]) -> None:
        m, rows = X.shape[0], []
        if self.center:
            mean = X.mean(0)
            X = X - mean
            if self.mean is not None:
                shift = (self.seen * m / (self.seen + m)) ** 0.5 * (self.mean - mean)
                rows.append(shift.unsqueeze(0))
                mean = (self.seen * self.mean + m * mean) / (self.seen + m)
            self.mean = mean
        new = torch.cat([*rows, X])
        self.total += new.double().square().sum().item()
        if self.scaled_rows is not None:
            new = torch.cat([self.scaled_rows, new])
        _, S, Vh = top_svd(new, self.kept, tolerance=1e-5)
        self.scaled_rows = S[:, None] * Vh
        self.seen += m

    def components(self, count: int | None = None) -> Float[Tensor, "R K"]:
        """The leading directions, all or `count` of them, as orthonormal rows, strongest first."""
        assert self.scaled_rows is not None
        return nn.functional.normalize(self.scaled_rows[: self.rank if count is None else count], dim=1)

    def explained(self) -> Float[Tensor, " R"]:
        """Of each direction the share of the total variance."""
        assert self.scaled_rows is not None
        return self.scaled_rows[: self.rank].square().sum(1) / max(self.total, 1e-30)


class MeanAbsProjection(Statistic):
    """Mean |x · vᵢ| over all rows, for each right singular vector vᵢ of a (partial) SVD, which it keeps."""

    def __init__(self, svd: tuple[Float[Tensor, "N C"], Float[Tensor, " C"], Float[Tensor, "C K"]], needs: int) -> None:
        self.svd, self.needs = svd, needs
        self.total: Float[Tensor, " C"] = torch.zeros_like(svd[1])

    def update(self, rows: Float[Tensor, "M K"]) -> None:
        Vh = self.svd[2]
        for chunk in rows.split(4096):
            self.total += (chunk.to(Vh.dtype) @ Vh.t()).abs().sum(0)
        self.seen += rows.shape[0]

    def mean(self) -> Float[Tensor, " C"]:
        return self.total / self.seen


class OfExperts(Statistic):
    """A statistic for each expert of a stack, from the rows that it really got."""

    def __init__(self, of: list[Any]) -> None:
        self.of, self.needs = of, max(each.needs for each in of)

    def update_runs(self, rows: Float[Tensor, "M K"], kept: Bool[Tensor, " M"] | None, segments: Segments) -> None:
        """Take in one batch of rows in runs, but for those that are not `kept`."""
        start = 0
        for each, end in zip(self.of, segments.ends.tolist(), strict=True):
            mine = rows[start:end] if kept is None else rows[start:end][kept[start:end]]
            if len(mine):
                each.update(mine)
            start = end

    def explained(self) -> Tensor:
        """The mean over the experts of what their statistics explain."""
        return torch.stack([each.explained() for each in self.of]).mean(0)

    def lacking(self) -> str:
        """Which expert has got too few rows; empty: none."""
        short = [(i, each) for i, each in enumerate(self.of) if each.seen < each.needs]
        if not short:
            return ""
        i, each = short[0]
        return f"{each.seen} tokens to its expert {i} ({len(short)} of {len(self.of)} experts lack some)"


_REMEDY = "pass attach(..., calibration_data=batches), an iterable of model inputs (dicts, tuples or tensors)"


def require_batches(data: Any) -> None:
    """Raise a CalibrationError where it is a single thing."""
    if isinstance(data, Mapping | str) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise CalibrationError(f"calibration_data is one {type(data).__name__}: {_REMEDY}; [batch], if it is one batch")


@torch.no_grad()
def gather(
    model: nn.Module, wanted: dict[str, tuple[nn.Module, Statistic]], data: CalibrationData | None
) -> dict[str, Statistic]:
    """Run the batches through the bare model, in evaluation mode, and summarise the inputs of the wanted layers.

    A batch is a dict (keyword arguments), a tuple or list (positional arguments) or a tensor. Layers that read one
    tensor share one statistic (q, k and v; gate and up), decided on the first batch.

    Rows that the model's argument attention_mask marks as padding are left out. In transformers models each stack of
    layers (encoder, decoder, language model, vision tower) goes by the mask with which it is called itself: a decoder
    by decoder_attention_mask, but for the rows of encoder_hidden_states, which go by the encoder's; one that gets none
    counts all rows. In other models the mask counts for each layer whose input has a row for each of its elements.

    Returns:
        The statistic of each layer by name; sharing layers return one object.

    Raises:
        CalibrationError: no data, no batch in it, a batch instead of batches, a mask that is no tensor, inputs that are
            not finite, or fewer rows than a statistic needs.
    """
    if data is None:
        raise CalibrationError(f"calibration_data is missing: {_REMEDY}")
    require_batches(data)

    watch = _Watch(wanted)
    handles = [
        layer.register_forward_pre_hook(functools.partial(watch.seen, name), with_kwargs=True)
        for name, (layer, _) in wanted.items()
    ]
    for stack in [module for module in model.modules() if module is model or hasattr(module, "save_pretrained")]:
        handles.append(stack.register_forward_pre_hook(watch.entered, with_kwargs=True, prepend=True))
        handles.append(stack.register_forward_hook(watch.left))
    try:
        with evaluation_mode(model):
            for batch in data:
                _require_inputs(batch)
                with _naming_the_batches(data):
                    run_batch(model, batch)
                watch.settled, watch.previous = True, None
    finally:
        for handle in handles:
            handle.remove()

    if not watch.settled:
        raise CalibrationError(f"calibration_data gave no batch (an iterator that has run out?): {_REMEDY}")
    gathered = {name: wanted[watch.leader[name]][1] for name in wanted}
    for name, statistic in gathered.items():
        gave = statistic.lacking()
        if gave:
            raise CalibrationError(
                f"{name}: calibration_data gave {gave}, and at least {statistic.needs} are needed for this rank; pass "
                "more or longer batches, or lower r"
            )
    return gathered


class _Masks(NamedTuple):
    """Which rows are no padding, as a call of a stack of layers was told: of its own, and of an encoder's output."""

    own: Bool[Tensor, "*M"] | None = None
    encoded: Any = None
    of_encoded: Bool[Tensor, "*M"] | None = None

    def of(self, x: Tensor) -> Bool[Tensor, "*M"] | None:
        """Those of a layer's input: one for each row, or None."""
        mask = self.of_encoded if x is self.encoded else self.own
        if mask is None or mask.numel() * x.shape[-1] != x.numel():
            return None
        return mask if mask.shape == x.shape[:-1] or x.ndim == 2 else None  # a mixture's router gets flat rows


class _Watch:
    """Feeds what layers read to their statistics. Those that read one tensor have one leader among them, decided on the
    first batch."""

    def __init__(self, wanted: dict[str, tuple[nn.Module, Statistic]]) -> None:
        self.wanted = wanted
        self.leader = {name: name for name in wanted}
        self.settled = False
        self.previous: tuple[str, Tensor] | None = None  # the last that ran and its input: kept alive, so `is` is safe
        self.masks: list[_Masks] = [_Masks()]  # of the stacks of layers that are being called

    def entered(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a stack of layers."""
        given = _argument(stack, "attention_mask", args, kwargs)
        # What is no mask of rows is made of one, which a stack around this one has got.
        own = self.masks[-1].own if given is not None and not _is_of_rows(given) else _as_mask(given)
        encoded, of_encoded = (
            _argument(stack, f"encoder_{name}", args, kwargs) for name in ("hidden_states", "attention_mask")
        )
        self.masks.append(_Masks(own, encoded, _as_mask(of_encoded)))

    def left(self, stack: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of a stack of layers."""
        self.masks.pop()

    def seen(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the layer of that name."""
        x, statistic = input_of(name, args, kwargs), self.wanted[name][1]
        if isinstance(statistic, OfExperts):
            mask, tokens = self.masks[-1].own, kwargs["tokens"]
            kept = None if mask is None or mask.numel() != tokens.total else mask.flatten()[tokens.of_rows]
            _require_finite(name, x if kept is None else x[kept])
            with without_autocast(x.device):
                return statistic.update_runs(x.detach(), kept, kwargs["segments"])
        if not self.settled and self.previous is not None and self.previous[1] is x and statistic.key is not None:
            other = self.leader[self.previous[0]]
            if self.wanted[other][1].key == statistic.key:
                self.leader[name] = other
        self.previous = (name, x)
        if self.leader[name] == name:
            rows, mask = x.reshape(-1, x.shape[-1]), self.masks[-1].of(x)
            rows = rows if mask is None else rows[mask.flatten()]
            _require_finite(name, rows)  # but not what is left out: rows of padding may be NaN
            if len(rows):
                with without_autocast(rows.device):
                    statistic.update(rows.detach())


def _require_finite(name: str, rows: Tensor) -> None:
    if not rows.isfinite().all():
        raise CalibrationError(
            f"{name}: calibration_data gave it inputs with NaN or infinity; leave such batches out, or load the model "
            "in a dtype in which they stay finite"
        )


def _require_inputs(batch: Any) -> None:
    if batch is None or isinstance(batch, str | bytes | int | float):
        raise CalibrationError(f"calibration_data has a batch that is {batch!r:.40}: {_REMEDY}")
    if any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves(batch)):
        raise CalibrationError(
            "calibration_data has a batch on the meta device, which holds no values; make it on another"
        )
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = batch.get(name) if isinstance(batch, Mapping) else None
        if not (mask is None or isinstance(mask, Tensor)):
            raise CalibrationError(
                f"calibration_data: {name} is a {type(mask).__name__}, and must be a tensor (a tokenizer's "
                "return_tensors='pt')"
            )


@contextmanager
def _naming_the_batches(data: CalibrationData) -> Any:
    """A tensor holds batches, and may have been meant as one."""
    try:
        yield
    except Exception as error:
        if not isinstance(data, Tensor) or isinstance(error, LoraLiteError):
            raise
        raise CalibrationError(
            f"calibration_data is one tensor of shape {tuple(data.shape)}, whose first dimension counts batches, and "
            f"the model does not take what that makes of it ({error}); pass [batch], if it is one batch"
        ) from error


def _argument(module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The argument of that name in a call of the module; None: there is none."""
    if name in kwargs or not args:
        return kwargs.get(name)
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)).get(name)


def _is_of_rows(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim <= 2


def _as_mask(given: Any) -> Bool[Tensor, "*M"] | None:
    return given.bool() if _is_of_rows(given) else None


def run_batch(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: a dict of keyword arguments, a tuple or list of positional ones, or a tensor."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
