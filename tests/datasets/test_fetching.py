"""fetch: the local folder, the download, and every way either can go wrong."""

from __future__ import annotations

import hashlib
import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from commissure.core.errors import InputError
from commissure.datasets import available, cache_folder, catalog, fetch
from commissure.datasets.catalog import Source

CONTENT = b"forty-two spikes\n"
NAME = "small/file.txt"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """A catalog of one file on a local server; `served["content"]` is what the server sends."""
    state: dict[str, object] = {"content": CONTENT, "requests": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = state["content"]
            assert isinstance(content, bytes)
            state["requests"] = int(str(state["requests"])) + 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    _use(monkeypatch, f"http://127.0.0.1:{server.server_port}/{NAME}")
    monkeypatch.delenv("COMMISSURE_DATA", raising=False)
    monkeypatch.setenv("COMMISSURE_HOME", str(tmp_path / "home"))
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def _use(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setattr(catalog, "CATALOG", (Source(NAME, address, digest, len(CONTENT), "CC0", "nobody"),))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_a_file_is_downloaded_once(served: dict[str, object]) -> None:
    assert not available(NAME)
    path = fetch(NAME)
    assert path == cache_folder() / NAME
    assert path.read_bytes() == CONTENT
    assert available(NAME)
    assert fetch(NAME) == path
    assert served["requests"] == 1


def test_a_damaged_cached_file_is_downloaded_again(served: dict[str, object]) -> None:
    path = fetch(NAME)
    path.write_bytes(CONTENT[:-1])
    assert not available(NAME)
    assert fetch(NAME).read_bytes() == CONTENT
    assert served["requests"] == 2


def test_a_wrong_download_is_refused_and_not_kept(served: dict[str, object]) -> None:
    served["content"] = b"something else"
    with pytest.raises(InputError, match=r"small/file\.txt.*COMMISSURE_DATA=DIR.*SHA256"):
        fetch(NAME)
    assert not available(NAME)


def test_offline_the_error_tells_about_the_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    _use(monkeypatch, f"http://127.0.0.1:{port}/{NAME}")
    monkeypatch.delenv("COMMISSURE_DATA", raising=False)
    monkeypatch.setenv("COMMISSURE_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"put the file at DIR/small/file\.txt and set COMMISSURE_DATA=DIR"):
        fetch(NAME)


def test_the_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, "http://127.0.0.1:1/never")
    monkeypatch.setenv("COMMISSURE_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"a folder that holds small/file\.txt; .* unset COMMISSURE_DATA"):
        fetch(NAME)
    assert not available(NAME)
    (tmp_path / "small").mkdir()
    (tmp_path / NAME).write_bytes(CONTENT)
    assert fetch(NAME) == tmp_path / NAME
    assert available(NAME)
    (tmp_path / NAME).write_bytes(b"tampered")
    digests = hashlib.sha256(CONTENT).hexdigest(), hashlib.sha256(b"tampered").hexdigest()
    with pytest.raises(InputError, match=rf"small/file\.txt.*{digests[0]}, found {digests[1]}; replace it"):
        fetch(NAME)
    assert not available(NAME)
    monkeypatch.setenv("COMMISSURE_DATA", str(tmp_path / "absent"))
    with pytest.raises(InputError, match="an existing folder"):
        fetch(NAME)


def test_the_cache_is_below_home_or_the_platform_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMISSURE_HOME", "somewhere")
    assert cache_folder() == Path("somewhere/data")
    monkeypatch.delenv("COMMISSURE_HOME")
    assert "commissure" in str(cache_folder())
