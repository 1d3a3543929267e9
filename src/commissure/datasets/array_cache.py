"""Arrays read once from a slow or unsafe format, kept as .npz files named by the digest of the source.

The cache holds nothing that needs pickle, a file appears in one step, and a damaged one is rebuilt with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from commissure.core.errors import CommissureWarning
from commissure.core.files import replacing
from commissure.datasets.catalog import find
from commissure.datasets.fetching import cache_folder, fetch

__all__ = ["cached_arrays"]

_LAYOUT = 1  # raise when a reader gives other arrays for the same file


def cached_arrays(
    name: str, read: Callable[[Path], Mapping[str, np.ndarray]], names: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """The arrays `names` that `read` makes of the file `name`, from the cache where it holds them.

    The source file is fetched and checked only when it must be read.
    """
    path = cache_folder() / "arrays" / f"{find(name).sha256}-{_LAYOUT}.npz"
    if path.is_file():
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                return {key: archive[key] for key in names}
        except Exception as error:  # zipfile, zlib, KeyError, ValueError, EOFError: whatever a damaged file causes
            message = f"the cached arrays {path} are damaged ({error}); they are read again from {name}"
            warnings.warn(message, CommissureWarning, stacklevel=3)
    source = read(fetch(name))
    arrays = {key: np.ascontiguousarray(source[key]) for key in names}
    try:
        _write(path, arrays)
    except OSError as error:
        message = f"the arrays of {name} could not be cached ({error}); they are read again next time"
        warnings.warn(message, CommissureWarning, stacklevel=3)
    return arrays


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **dict(arrays))
