"""Files: written in one step, so that the target is the old one or the whole new one, and tensors read back."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from commissure.core.errors import InputError

if TYPE_CHECKING:  # the command line writes reports without torch
    from torch import Tensor

__all__ = ["check_target", "read_tensors", "replacing"]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in the same folder to write to; it replaces `path` on success and is removed on failure."""
    path = check_target(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_target(path: str | os.PathLike[str], argument: str = "path") -> Path:
    """`path`, or `InputError` where no file could be written there: call it before the work that would be lost."""
    path = Path(path)
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(argument, str(path), "a file in an existing folder", "create the folder, or name another file")
    return path


def read_tensors(path: str | os.PathLike[str], argument: str = "path") -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file; `InputError` for any other file."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise InputError(argument, str(path), "an existing file")
    try:
        with safe_open(str(path), framework="pt") as file:
            # Clones are aligned as torch's own memory is: an unaligned matrix takes other BLAS kernels, other bits.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return dict(file.metadata() or {}), tensors
    except (OSError, SafetensorError) as error:
        raise InputError(argument, str(path), "a readable safetensors file", str(error)) from None
