"""What goes wrong, by the step at which it does. Each message names the layer, the argument and the remedy."""

from collections.abc import Iterator
from contextlib import contextmanager


class LoraLiteError(Exception):
    """Base of every error that lora-lite raises itself."""


class ConfigError(LoraLiteError, ValueError):
    """A config field has a value that no layer could use; raised when the config is made."""


class AttachError(LoraLiteError, RuntimeError):
    """The adapter and the model do not fit together; the model is as it was before the call."""


class UnfitError(AttachError):
    """A layer can't take this adapter; `why` says it in short. Where it was not asked for by name, `attach` leaves it
    out instead."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


class NarrowError(UnfitError):
    """A layer is narrower than the rank, of which `most` is the largest that it takes."""

    def __init__(self, message: str, why: str, most: int) -> None:
        super().__init__(message, why)
        self.most = most


class CalibrationError(LoraLiteError, ValueError):
    """The calibration data is missing, empty or too small; the model is as it was before the call."""


class CheckpointError(LoraLiteError, RuntimeError):
    """A file can't be written or read as an adapter for this model; model and files are as they were."""


class KernelMismatchError(LoraLiteError, ArithmeticError):
    """A backend's output or gradient is further from the reference than rounding explains."""


def first_of(problems: list[str], shown: int = 3) -> str:
    """The first few, and how many more there are."""
    more = f" (and {len(problems) - shown} more)" if len(problems) > shown else ""
    return "; ".join(problems[:shown]) + more


def put_name(name: str, error: Exception) -> None:
    """Put the layer's name before the error's message, where it is not there; with one that is not ours, a note."""
    if not isinstance(error, AttachError):
        if (note := f"in lora_lite, on the layer {name}") not in getattr(error, "__notes__", ()):
            error.add_note(note)
    elif not str(error).startswith((f"{name}:", f"{name} (")):
        error.args = (f"{name}: {error}",)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Name the layer in what is raised about it."""
    try:
        yield
    except Exception as error:
        put_name(name, error)
        raise
