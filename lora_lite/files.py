"""Files and folders on disk: safetensors read strictly, and whatever is written replaced once all of it is there."""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError
from .quantized import widened

T = TypeVar("T")


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file, on the CPU, 8-bit floats as float32; a CheckpointError where it is
    unreadable."""
    if is_folder(path):
        raise CheckpointError(f"it is a folder; {_reader_of(path)}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.metadata() or {}, {name: widened(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError("there is no such file") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"not a readable safetensors file ({error}); it may be truncated") from error


def read_json(text: str, kind: type[T], what: str) -> T:
    """The list or dict that JSON text holds; a CheckpointError of `what` where it holds none or is nested too deep."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its {what} not readable ({error})") from error
    if not isinstance(found, kind):
        raise CheckpointError(f"its {what} not readable (JSON of a {type(found).__name__})")
    return found


def is_folder(path: Path) -> bool:
    """Whether there is a folder; no name that the system refuses is one."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _reader_of(folder: Path) -> str:
    """What to do with a folder where a file was expected."""
    if (folder / "adapter_config.json").exists():
        return "it holds PEFT's adapter_config.json: call import_peft(model, folder)"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    return f"name the file in it ({', '.join(files[:3]) or 'there is no .safetensors'})"


def replace_files(writers: Mapping[Path, Callable[[Path], Any]]) -> None:
    """Write each file beside its path, flush it to disk, and rename all over their paths once all are there: a full
    disk, or a crash, leaves the earlier ones. A link stays, and the file that it leads to is replaced."""
    with ExitStack() as left_over:
        ready = []
        for path, write in writers.items():
            path = Path(os.path.realpath(path)) if path.is_symlink() else path
            if path.is_dir():
                raise OSError(f"it is a folder; name a file in it, such as {path / 'adapter.safetensors'}")
            if not path.parent.is_dir():
                raise OSError(f"there is no folder {path.parent}; make it first")
            if path.exists() and not path.is_file():
                raise OSError("it is a device or a pipe, which a file would replace")
            temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
            left_over.callback(_remove, temporary)
            write(temporary)
            _flush(temporary)
            ready.append((temporary, path))
        for temporary, path in ready:
            os.replace(temporary, path)


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous, each in memory of its own: safetensors takes no two of one."""
    taken: set[int] = set()
    found = {}
    for name, t in tensors.items():
        storage = t.untyped_storage().data_ptr()
        found[name] = t.clone(memory_format=torch.contiguous_format) if storage in taken else t.contiguous()
        taken.add(storage)
    return found


def write_weights(what: str, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """A model's weights as libraries read them: model.safetensors in the folder."""
    own, path = apart(tensors), folder / "model.safetensors"
    with writing_folder(what, folder):
        replace_files({path: lambda file: save_file(own, file, metadata={"format": "pt"})})


def replace_folder(folder: Path, write: Callable[[Path], Any], obsolete: Callable[[str, set[str]], bool]) -> None:
    """`write` files into a folder in `folder`, and once all are there rename each over the one of its name. Then those
    of the earlier ones go that are `obsolete`, given a name and the names written."""
    temporary = folder / f".{uuid.uuid4().hex}"
    try:
        write(temporary)
        written = [path for path in temporary.rglob("*") if path.is_file()]
        for path in written:
            _flush(path)
        for path in written:
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        names = {path.name for path in written if path.parent == temporary}
        for path in folder.iterdir():
            if names and path.name not in names and path.is_file() and obsolete(path.name, names):
                path.unlink()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    with open(path, "rb") as written:
        os.fsync(written.fileno())


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """A CheckpointError where what is in this context can't write to `path`."""
    try:
        if "\0" in str(path):
            raise OSError("a path has no null characters")
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{what}: can't write {path}: {error}; whatever was there still is") from error


@contextmanager
def writing_folder(what: str, folder: Path) -> Iterator[None]:
    """`writing` to a folder, which is made where it is missing, and goes again if nothing could be written."""
    with writing(what, folder):
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        except BaseException:
            if is_new:
                with suppress(OSError):
                    folder.rmdir()
            raise
