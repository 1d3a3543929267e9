"""The loaders on the real files, where COMMISSURE_DATA holds them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from commissure import datasets
from commissure.core.errors import InputError

needs_data = pytest.mark.skipif(
    not os.environ.get("COMMISSURE_DATA"), reason="real data: set COMMISSURE_DATA to a folder that holds them"
)


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMMISSURE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@needs_data
@pytest.mark.parametrize("source", datasets.CATALOG, ids=lambda source: source.name)
def test_every_file_is_the_catalogs(source: datasets.Source) -> None:
    assert datasets.available(source.name)
    assert datasets.fetch(source.name).stat().st_size == source.n_bytes


@needs_data
def test_mihi_chewie_is_the_same_from_the_cache() -> None:
    first, second = datasets.mihi_chewie(), datasets.mihi_chewie()
    assert first.counts[0].dtype == second.counts[0].dtype == np.int64
    for name in ("counts", "velocity", "position", "acceleration", "force", "timestep"):
        for one, other in zip(getattr(first, name), getattr(second, name), strict=True):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(first.target, second.target)
    assert sorted(np.unique(first.target).tolist()) == list(range(8))


@needs_data
def test_mihi_has_no_position() -> None:
    mihi = datasets.mihi_chewie("mihi-2014-03-03")
    assert mihi.position is None
    assert mihi.acceleration is None


@needs_data
def test_hcp_s400() -> None:
    brain = datasets.hcp_s400()
    assert (brain.weights.shape, brain.coordinates.shape, brain.timescales.shape) == ((400, 400), (400, 3), (400,))
    np.testing.assert_array_equal(brain.weights, brain.weights.T)
    assert not brain.weights.diagonal().any()
    assert brain.weights.min() == 0
    assert brain.weights.max() == 1
    assert (brain.coordinates[:200, 0] < 0).all()
    assert (brain.coordinates[200:, 0] > 0).all()
    assert 10 < brain.timescales.min() < brain.timescales.max() < 44


@needs_data
def test_wikitext2() -> None:
    valid, test = datasets.wikitext2("valid"), datasets.wikitext2("test")
    assert (len(valid.utf8), len(test.utf8)) == (1121681, 1256449)
    assert bytes(valid.utf8).decode() == valid.text
    assert valid.text.lstrip().startswith("= Homarus gammarus =")


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(InputError, match=r"split = 'train': expected 'valid' or 'test'"):
        datasets.wikitext2("train")  # type: ignore[arg-type]


def test_python_topics() -> None:
    found = datasets.python_topics()
    assert found.utf8.tobytes().decode() == found.text
    assert found.text.count("\n") > 5000
    assert "import" in found.text
