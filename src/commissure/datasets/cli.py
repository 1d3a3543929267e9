"""`commissure data`: what data exist, which are here, and how to get them."""

from __future__ import annotations

import json as json_format
import sys
from typing import Annotated

from cyclopts import App, Parameter

from commissure.datasets.catalog import CATALOG, Source, matching
from commissure.datasets.fetching import available, fetch

__all__ = ["app"]

app = App(name="data", help="Real data: list the catalog, download files.")

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]


@app.command(name="list")
def list_(*, json: Json = False) -> None:
    """List every file of the catalog: name, bytes, license, and whether it is here."""
    present = {source.name: available(source.name) for source in CATALOG}
    if json:
        _write_json([_row(source) | {"present": present[source.name]} for source in CATALOG])
        return
    cells = [("name", "bytes", "license", "present")]
    for source in CATALOG:
        cells.append((source.name, f"{source.n_bytes:,}", source.license, "yes" if present[source.name] else "no"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, size, license_, here in cells:
        line = f"{name:{widths[0]}}  {size:>{widths[1]}}  {license_:{widths[2]}}  {here}"
        sys.stdout.write(line.rstrip() + "\n")


@app.command
def get(name: str, /, *, json: Json = False) -> None:
    """Download a file, a folder of the catalog ("hcp-s400"), or "all"; print the paths.

    Parameters
    ----------
    name
        A name of `commissure data list`, the folder it begins with, or "all".
    """
    rows = [_row(source) | {"path": str(fetch(source.name))} for source in matching(name)]
    if json:
        _write_json(rows)
    else:
        sys.stdout.writelines(f"{row['path']}\n" for row in rows)


def _row(source: Source) -> dict[str, object]:
    return {
        "name": source.name,
        "bytes": source.n_bytes,
        "license": source.license,
        "citation": source.citation,
        "address": source.address,
        "sha256": source.sha256,
    }


def _write_json(rows: list[dict[str, object]]) -> None:
    sys.stdout.write(json_format.dumps(rows, indent=2) + "\n")
