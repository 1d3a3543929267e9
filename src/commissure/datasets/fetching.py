"""From a name to a file on disk whose SHA-256 is the catalog's.

Two places: the folder `COMMISSURE_DATA` where that is set (nothing is downloaded), else the user's cache
(`$COMMISSURE_HOME/data`, or the platform's cache folder), filled by download on first use.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from commissure.core.errors import InputError
from commissure.datasets.catalog import Source, find

__all__ = ["available", "cache_folder", "fetch"]

_TIMEOUT_S = 30  # of one connection attempt; the largest file is 1.7 MB


def cache_folder() -> Path:
    """Where downloads and arrays read from them are kept; not created here."""
    home = os.environ.get("COMMISSURE_HOME")
    if home:
        return Path(home) / "data"
    import pooch

    return Path(pooch.os_cache("commissure"))


def available(name: str) -> bool:
    """Whether `fetch(name)` would succeed with no network: the file is there and its SHA-256 is right."""
    source = find(name)
    path = (_local_folder() or cache_folder()) / source.name
    return path.is_file() and _sha256(path) == source.sha256


def fetch(name: str) -> Path:
    """Path of the file `name` of the catalog, checked against its SHA-256; downloaded on first use.

    Raises `InputError` for an unknown name, a file that is not the catalog's, or where it is absent and cannot be
    downloaded; the message says what to do.
    """
    source = find(name)
    folder = _local_folder()
    return _download(source) if folder is None else _local(source, folder)


def _local_folder() -> Path | None:
    folder = os.environ.get("COMMISSURE_DATA")
    return Path(folder) if folder else None


def _local(source: Source, folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError("COMMISSURE_DATA", str(folder), "an existing folder", "correct it, or unset it to download")
    path = folder / source.name
    if not path.is_file():
        fix = f"put the file of {source.address} there, or unset COMMISSURE_DATA to download it"
        raise InputError("COMMISSURE_DATA", str(folder), f"a folder that holds {source.name}", fix)
    found = _sha256(path)
    if found != source.sha256:
        allowed = f"the file with SHA-256 {source.sha256}, found {found}"
        raise InputError("COMMISSURE_DATA", str(path), allowed, f"replace it by the file of {source.address}")
    return path


def _download(source: Source) -> Path:
    import pooch

    store = pooch.create(
        cache_folder(),
        base_url="",
        registry={source.name: f"sha256:{source.sha256}"},
        urls={source.name: source.address},
        retry_if_failed=1,
    )
    try:
        return Path(store.fetch(source.name, downloader=pooch.HTTPDownloader(timeout=_TIMEOUT_S)))
    except (
        OSError,
        ValueError,
    ) as error:  # requests' errors are OSErrors; ValueError is pooch's word for a wrong digest
        fix = (
            f"connect to the network, or put the file at DIR/{source.name} and set COMMISSURE_DATA=DIR "
            f"({type(error).__name__}: {error})"
        )
        raise InputError("name", source.name, f"a file that can be downloaded from {source.address}", fix) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
