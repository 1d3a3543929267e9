"""Writing a file in one step: the target is the old file or the whole new one, never a part."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from commissure.core.errors import InputError

__all__ = ["check_target", "replacing"]


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
