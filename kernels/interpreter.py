"""Makes Triton's interpreter compute bfloat16 as a GPU does. Active under TRITON_INTERPRET=1 only.

The interpreter keeps bfloat16 as raw uint16. Left alone it multiplies those integers in `tl.dot` and drops the low
half of a float32 where it should round to nearest even (Triton 3.7 to 3.9). float16 and float32 are right as they are.
Elementwise arithmetic on bfloat16 is wrong too, and stays so: the kernels convert to float32 first.

It also searches the whole of `triton.language` for functions to replace at every call of a device function; here it
remembers what it found, which saves a large part of its time.
"""

import functools
import inspect
import os
from typing import Any

import numpy as np

# Read once, as Triton does when a kernel is defined.
ACTIVE = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bits, to nearest even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def install() -> None:
    """Patch the interpreter, once; where it is not in use, nothing."""
    if not ACTIVE:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    if hasattr(builder, "_lora_lite"):
        return
    builder._lora_lite = True
    handle, cast, dot = interpreter.TensorHandle, builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        kinds = (src.dtype.scalar, dst_type.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return handle(to_float32(src.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return handle(to_bfloat16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *args: Any) -> Any:
        a, b = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, a, b, d, *args)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot

    @functools.cache
    def builtins_of(owner: Any) -> list[tuple[str, Any]]:
        return [(name, each) for name, each in inspect.getmembers(owner) if tl.core.is_builtin(each)]

    patch_lang, no_changes = interpreter._patch_lang, getattr(interpreter, "_LangPatchScope", lambda: None)

    @functools.cache
    def language_of(fn: Any) -> list[Any]:
        return [each for each in fn.__globals__.values() if inspect.ismodule(each) and each in (tl, tl.core)]

    def patch_lang_once(fn: Any) -> Any:
        languages = language_of(fn)
        replaced = languages and not any(tl.core.is_builtin(each.load) for each in languages)
        return no_changes() if replaced else patch_lang(fn)  # replaced: at the call of a device function

    def patch_builtin(owner: Any, *args: Any) -> None:
        for name, builtin in builtins_of(owner):
            if getattr(owner, name) is builtin:  # and not replaced already
                interpreter._patch_attr(owner, name, builtin, *args)

    interpreter._patch_builtin, interpreter._patch_lang = patch_builtin, patch_lang_once
    _remember_types(tl, interpreter)


def _remember_types(tl: Any, interpreter: Any) -> None:
    """Let blocks and tensors of one type share what follows from it, of which each operation makes several anew."""
    block_init, tensor_init, np_dtype = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
    blocks: dict[Any, dict[str, Any]] = {}
    tensors: dict[Any, dict[str, Any]] = {}
    np_dtypes: dict[str, np.dtype] = {}

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = (size.value if isinstance(size, tl.constexpr) else size for size in shape)
        key = (element_ty.name, getattr(element_ty, "address_space", None), *sizes)
        if key not in blocks:
            block_init(self, element_ty, shape)
            blocks[key] = {**vars(self), "_lora_lite": key}
        vars(self).update(blocks[key])

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        key = getattr(type, "_lora_lite", None)
        if key not in tensors:
            tensor_init(self, handle, type)
            if key is None:
                return
            tensors[key] = {**vars(self), "handle": None}  # whose memory would be held
        vars(self).update(tensors[key], handle=handle, type=type)

    def get_np_dtype(type: Any) -> np.dtype:
        name = type.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(type)
        return np_dtypes[name]

    tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype = init_block, init_tensor, get_np_dtype
