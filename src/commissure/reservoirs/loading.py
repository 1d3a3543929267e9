"""Connectomes from files: what each format holds, read without running anything in it.

| suffix | what is read |
|---|---|
| .npy | one square array (never a pickled one) |
| .csv, .tsv, .txt | a square table; a first row of names, and a first column of the same ones, are recognized |
| .mat | the square numeric variable, or the one named (MATLAB 7.2 and older; sparse ones too) |
| .graphml | nodes, edges, the edge attribute `weight` or its default (1 where there is none), directed or not |
| .zip | a connectivity of The Virtual Brain: weights, tract lengths (mm), centres (names, mm), text or bz2 |

A row more than columns means names in the first row.  Names that are all numbers look like a row too many, so without
names in a first column they are taken only as the columns counted from 0 or from 1, which pandas writes.

Sizes are checked before anything is unpacked: at most 1 GiB of text, 2^28 entries in a dense matrix.
The Virtual Brain's simulator reads rows as targets ("target_source").
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import io
import zipfile
from collections.abc import Callable, Iterator
from os import PathLike, fspath
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from commissure.core.errors import InputError
from commissure.reservoirs.connectome import Connectome, Orientation

__all__ = ["load"]

_MOST_BYTES = 1 << 30  # of text, after decompression
_MOST_ENTRIES = 1 << 28  # of a dense matrix: 16 384 nodes, 2 GiB in float64
_TVB_NAMES = {"weights": ("weight",), "tract_lengths": ("tract",), "centres": ("centre", "center", "position")}


class _Table(NamedTuple):
    values: np.ndarray
    labels: tuple[str, ...] | None


def load(
    path: str | PathLike[str], *, orientation: Orientation | None = None, variable: str | None = None
) -> Connectome:
    """The connectome in a file, by its suffix; `variable` names one of a .mat file with several square matrices.

    `orientation` may be None for symmetric matrices and GraphML only.  Errors name the file and say what to do.
    """
    if not isinstance(path, str | PathLike) or not isinstance(fspath(path), str):
        raise InputError("path", path, "the path of a file, a string or a pathlib.Path")
    path = Path(path)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise InputError("path", str(path), f"a file that ends in {', '.join(_READERS)}", "convert it to one of them")
    try:
        is_file = path.is_file()
    except OSError as error:  # a name that the file system does not take
        raise InputError("path", str(path), "a path the system can open", str(error.strerror)) from error
    if not is_file:
        raise InputError("path", str(path), "an existing file")
    if variable is not None and (read is not _read_mat or not isinstance(variable, str)):
        raise InputError("variable", variable, "None, or a name in a .mat file: only they hold several matrices")
    if read is _read_graphml and orientation is not None and str(orientation) == "target_source":
        raise InputError("orientation", orientation, "None: GraphML names the source and the target of every edge")
    try:
        found = read(path, variable) if read is _read_mat else read(path)
        orientation = "source_target" if read is _read_graphml else orientation
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        made = f"from_file({path.name!r}, orientation={orientation!r}), sha256 {digest}"
        return Connectome.from_array(**found, orientation=orientation, provenance=made)
    except OSError as error:
        raise InputError("path", str(path), "a file that can be read", str(error)) from error
    except InputError as error:
        raise InputError(f"{path}: {error.argument}", error.value, error.allowed, error.fix) from error


def _read_npy(path: Path) -> dict[str, Any]:
    try:
        matrix = np.lib.format.open_memmap(path, mode="r")  # the header is checked against the file's size
    except Exception as error:  # numpy raises whatever a damaged header causes
        fix = f"save it with np.save(path, matrix) as numbers ({error})"
        raise InputError("array", path.suffix, "one array of numbers, not pickled", fix) from error
    _check_size(matrix.shape)
    return {"weights": matrix}


def _read_text(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MOST_BYTES:
        raise InputError("size", path.stat().st_size, f"at most {_MOST_BYTES} bytes of text", "save it as .npy")
    table = _parse("table", path.read_bytes())
    return {"weights": table.values, "labels": table.labels}


def _read_mat(path: Path, variable: str | None) -> dict[str, Any]:
    from scipy.io import loadmat, whosmat

    try:
        held = {name: (shape, kind) for name, shape, kind in whosmat(str(path))}
        square = [name for name, (shape, kind) in held.items() if _is_square(shape) and kind not in _NOT_NUMBERS]
        if variable is not None and variable not in held:
            raise InputError("variable", variable, f"one of {', '.join(held)}")
        if variable is None and len(square) != 1:
            fix = f"name one with variable=, the file holds {', '.join(held) or 'nothing'}"
            raise InputError("variable", None, f"one square matrix, found {len(square)}", fix)
        name = square[0] if variable is None else variable
        shape, kind = held[name]
        if kind in _NOT_NUMBERS:
            fix = f"save the matrix in it as a variable of its own, the file holds {', '.join(held)}"
            raise InputError("variable", variable, f"a matrix of numbers, {name} is of class {kind}", fix)
        if kind != "sparse":
            _check_size(shape)
        return {"weights": loadmat(str(path), variable_names=[name])[name]}
    except InputError:
        raise
    except NotImplementedError as error:
        raise InputError("format", "MATLAB 7.3", "MATLAB 7.2 or older", "save it with -v7") from error
    except Exception as error:  # scipy raises whatever a damaged file causes
        raise InputError("format", str(error), "a readable MATLAB file") from error


def _read_graphml(path: Path) -> dict[str, Any]:
    import networkx as nx

    if path.stat().st_size > _MOST_BYTES:
        raise InputError("size", path.stat().st_size, f"at most {_MOST_BYTES} bytes of text", "save it as .npy")
    try:
        graph = nx.read_graphml(path)
    except Exception as error:  # of the XML parser or of networkx, for whatever is no GraphML
        raise InputError("format", str(error), "readable GraphML") from error
    _check_edges(graph)
    if not len(graph):
        raise InputError("graph", 0, "one node at least")
    matrix = nx.to_scipy_sparse_array(graph, weight="weight", dtype=np.float64)
    return {"weights": matrix, "labels": tuple(str(node) for node in graph)}


def _check_edges(graph: Any) -> None:
    """Give every edge its weight: its own, the attribute's default, or 1 where none has any."""
    if graph.is_multigraph():  # networkx makes one of every file with parallel edges; those of one id are one edge
        repeated = next((f"edge {a} -> {b}" for a, b in graph.edges() if graph.number_of_edges(a, b) > 1), "edges")
        raise InputError(repeated, "there twice", "each edge once", "sum parallel edges or leave one of them")
    default = graph.graph.get("edge_default", {}).get("weight")
    edges = [(a, b, default if weight is None else weight) for a, b, weight in graph.edges(data="weight")]
    without = [edge for edge in edges if edge[2] is None]
    if without and len(without) < len(edges):
        raise InputError(f"edge {without[0][0]} -> {without[0][1]}", None, "a weight, as other edges have")
    for a, b, weight in edges:
        if weight is not None and (not isinstance(weight, int | float) or isinstance(weight, bool)):
            raise InputError(f"edge {a} -> {b}", weight, "a number as its weight")
        graph.edges[a, b]["weight"] = 1.0 if weight is None else weight


def _read_tvb(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {part: _member(archive, part, names) for part, names in _TVB_NAMES.items()}
            if members["weights"] is None:
                allowed = "a file named weights.txt in it, as The Virtual Brain writes it"
                raise InputError("members", archive.namelist()[:8], allowed)
            texts = {part: _unpack(archive, name) for part, name in members.items() if name is not None}
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError("format", str(error), "a readable zip archive without a password") from error
    found: dict[str, Any] = {
        part: _parse(part, texts[part]).values for part in ("weights", "tract_lengths") if part in texts
    }
    if "centres" in texts:
        found["labels"], found["coordinates"] = _centres(texts["centres"])
    return found


_NOT_NUMBERS = ("char", "cell", "struct", "object", "function", "opaque", "unknown")
_READERS: dict[str, Callable[..., dict[str, Any]]] = {
    ".npy": _read_npy,
    ".csv": _read_text,
    ".tsv": _read_text,
    ".txt": _read_text,
    ".mat": _read_mat,
    ".graphml": _read_graphml,
    ".zip": _read_tvb,
}


def _is_square(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[0] == shape[1]


def _check_size(shape: tuple[int, ...]) -> None:
    """Refuse a dense matrix before it is read."""
    entries = int(np.prod([int(n) for n in shape], dtype=object)) if shape else 1
    if entries > _MOST_ENTRIES:
        fix = "build a sparse matrix and pass it to Connectome.from_array"
        raise InputError("shape", tuple(shape), f"at most {_MOST_ENTRIES} entries", fix)


def _member(archive: zipfile.ZipFile, part: str, names: tuple[str, ...]) -> str | None:
    """The member that holds one part, by its own name without folders."""
    found = [
        info.filename
        for info in archive.infolist()
        for own in [PurePosixPath(info.filename).name.lower()]
        if not info.is_dir() and any(own.startswith(name) for name in names)
    ]
    if len(found) > 1:
        raise InputError("members", found, f"one file of {part}", "leave one of them in the archive")
    return found[0] if found else None


def _unpack(archive: zipfile.ZipFile, name: str) -> bytes:
    """The bytes of one member, of the text in it where it is a bz2 file; never more than the limit."""
    with archive.open(name) as file:
        data = file.read(_MOST_BYTES + 1)
    if name.lower().endswith(".bz2"):
        try:
            with bz2.BZ2File(io.BytesIO(data)) as file:  # streams one after the other too; the end must be there
                data = file.read(_MOST_BYTES + 1)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(name, str(error), "a readable bz2 file") from error
    if len(data) > _MOST_BYTES:
        raise InputError(
            name, f"more than {_MOST_BYTES} bytes", "a matrix of at most that size", "is the file damaged?"
        )
    return data


def _centres(data: bytes) -> tuple[tuple[str, ...] | None, Float[np.ndarray, "n 3"]]:
    """Names and coordinates: lines of `name x y z`, with more behind that is not read, or of `x y z`."""
    rows = list(_rows("centres", data))
    width = len(rows[0][1])
    if width < 3:
        raise InputError("centres", rows[0][1], "lines of a name and x, y, z in mm, or of x, y, z")
    _check_widths("centres", rows)
    if width == 3:
        return None, _numbers("centres", rows)
    return tuple(cells[0] for _, cells in rows), _numbers("centres", [(line, cells[1:4]) for line, cells in rows], 2)


def _parse(name: str, data: bytes) -> _Table:
    """A table of numbers with or without names around it."""
    rows = list(_rows(name, data))
    first, body = [cell.strip() for cell in rows[0][1]], rows[1:]
    has_corner = bool(body) and len(rows) == len(first) == len(body[0][1]) and not _is_number(first[0])
    if not (has_corner or _are_names(first, len(body))):
        return _Table(_sized(name, rows), None)
    labels = tuple(first[1:] if has_corner else first)
    if len(body[0][1]) == len(labels) + 1:
        for at, (line, cells) in enumerate(body):
            if cells[0].strip() != labels[at]:
                raise InputError(
                    f"{name}, line {line}, column 1", cells[0], f"{labels[at]!r}, as column {at + 2}'s name"
                )
        body = [(line, cells[1:]) for line, cells in body]
    return _Table(_sized(name, body), labels)


def _are_names(first: list[str], n_below: int) -> bool:
    """Whether a first row is names of the columns: there is one row more than columns, and it is no row of weights."""
    if len(first) != n_below:
        return False
    counted = [[str(start + column) for column in range(n_below)] for start in (0, 1)]
    if not all(map(_is_number, first)) or first in counted:
        return True
    fix = "a row too many, or names: then write them in a first column too, below an empty cell"
    raise InputError("table", (n_below + 1, n_below), "as many rows as columns", fix)


def _rows(name: str, data: bytes) -> Iterator[tuple[int, list[str]]]:
    """Numbered lines as cells: separated by tabs, semicolons, commas or spaces, whichever the first line has."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(name, str(error), "text in UTF-8") from error
    numbered = ((at, line.strip(" ")) for at, line in enumerate(text.splitlines(), 1))
    lines = [(at, line) for at, line in numbered if line.strip() and not line.startswith("#")]
    if not lines:
        raise InputError(name, "an empty file", "rows of numbers")
    separator = next((mark for mark in "\t;," if mark in lines[0][1]), None)
    for at, line in lines:
        try:
            cells = csv.reader([line], delimiter=separator or ",", skipinitialspace=True)
            yield at, line.split() if separator is None else next(cells)
        except csv.Error as error:
            raise InputError(f"{name}, line {at}", f"{len(line)} characters", "cells of text", str(error)) from error


def _sized(name: str, rows: list[tuple[int, list[str]]]) -> Float[np.ndarray, "rows columns"]:
    _check_size((len(rows), len(rows[0][1])))
    return _numbers(name, rows)


def _check_widths(name: str, rows: list[tuple[int, list[str]]]) -> None:
    width = len(rows[0][1])
    for line, cells in rows:
        if len(cells) != width:
            raise InputError(f"{name}, line {line}", f"{len(cells)} columns", f"{width}, as the lines before")


def _numbers(name: str, rows: list[tuple[int, list[str]]], first: int = 1) -> Float[np.ndarray, "rows columns"]:
    """The cells as numbers; `first` is the number of their first column in the file."""
    _check_widths(name, rows)
    try:
        return np.array([cells for _, cells in rows], np.float64)
    except ValueError:
        line, column, cell = next(
            (line, at, cell) for line, cells in rows for at, cell in enumerate(cells, first) if not _is_number(cell)
        )
        fix = "write decimal points and leave no cell empty"
        raise InputError(f"{name}, line {line}, column {column}", cell, "a number", fix) from None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
