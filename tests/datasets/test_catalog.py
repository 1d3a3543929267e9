"""The catalog: complete, pinned, unique, and its errors."""

from __future__ import annotations

import re

import pytest

from commissure.core.errors import InputError
from commissure.datasets.catalog import CATALOG, find, matching


def test_the_catalog_is_pinned_and_complete() -> None:
    assert len(CATALOG) == 13
    assert len({source.name for source in CATALOG}) == 13
    assert len({source.sha256 for source in CATALOG}) == 13
    for source in CATALOG:
        assert re.fullmatch(r"[0-9a-f]{64}", source.sha256)
        assert re.fullmatch(r"https://raw\.githubusercontent\.com/[\w-]+/[\w-]+/[0-9a-f]{40}/[\w./-]+", source.address)
        assert source.address.rpartition("/")[2] == source.name.partition("/")[2]
        assert source.n_bytes > 0
        assert source.license
        assert source.citation


@pytest.mark.parametrize(("name", "n"), [("all", 13), ("mihi-chewie", 4), ("rat-m1", 3), ("wikitext-2/test.txt", 1)])
def test_matching(name: str, n: int) -> None:
    assert len(matching(name)) == n


@pytest.mark.parametrize("name", ["", "nothing", "wikitext", "../secret", "wikitext-2/train.txt"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    for look_up in (find, matching):
        with pytest.raises(InputError, match=r"expected one of .*hcp-s400/s400_coords\.npy.*wikitext-2/test\.txt"):
            look_up(name)
