"""Files: every format gives back the matrix that was written, and what is wrong with a file is said by name."""

from __future__ import annotations

import bz2
import io
import pickle
import re
import tracemalloc
import zipfile
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from scipy.io import savemat
from scipy.sparse import csc_array

from commissure.core.errors import InputError
from commissure.reservoirs import loading
from commissure.reservoirs.connectome import Connectome

W = np.array([[0, 2.5, 0, 1e-3], [0, 0, -1.5, 0], [0.25, 0, 0, 0], [0, 4, 0, 0]])
NAMES = ("V1", "M1, left", "PFC", "A1")


def read(path: Path, **options) -> Connectome:
    return Connectome.from_file(path, **({"orientation": "source_target"} | options))


def table(separator: str = ",", header: bool = False, index: bool = False, corner: bool = True) -> str:
    names = [f'"{name}"' if separator in name else name for name in NAMES]
    lines = [([names[i]] if index else []) + [repr(float(x)) for x in row] for i, row in enumerate(W)]
    if header:
        lines.insert(0, ([""] if index and corner else []) + names)
    return "\n".join(separator.join(line) for line in lines) + "\n"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize(("header", "index", "corner"), [(False, False, True), (True, False, True), (True, True, True),
                                                         (True, True, False)])  # fmt: skip
def test_tables(tmp_path: Path, separator: str, header: bool, index: bool, corner: bool) -> None:
    path = tmp_path / "net.csv"
    path.write_text(table(separator, header, index, corner), encoding="utf-8-sig" if header else "utf-8")
    network = read(path)
    assert np.array_equal(network.to_array(), W)
    assert network.labels == (NAMES if header else None)
    assert np.array_equal(read(path, orientation="target_source").to_array(), W.T)
    assert re.fullmatch(
        r"from_file\('net.csv', orientation='source_target'\), sha256 [0-9a-f]{64}", network.provenance[0]
    )


def test_tables_of_other_programs(tmp_path: Path) -> None:
    """numpy's savetxt with a comment; pandas' numbers as names, with and without its index."""
    path = tmp_path / "net.txt"
    np.savetxt(path, W, header="connection weights of a network,\nnumbers of streamlines")
    np.testing.assert_allclose(read(path).to_array(), W, rtol=1e-15)
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(W)
    for index in (True, False):
        frame.to_csv(path, index=index)
        network = read(path)
        assert np.array_equal(network.to_array(), W)
        assert network.labels == ("0", "1", "2", "3")


def test_npy(tmp_path: Path) -> None:
    path = tmp_path / "net.npy"
    for dtype in (np.float64, np.float32, np.float16):
        np.save(path, W.astype(dtype))
        assert np.array_equal(read(path).to_array(), W.astype(dtype).astype(np.float64))
    np.save(path, W + W.T)
    assert Connectome.from_file(path).is_undirected
    np.save(path, W)
    with pytest.raises(InputError, match=r"net.npy: orientation = None: expected a choice"):
        Connectome.from_file(path)


def test_mat(tmp_path: Path) -> None:
    path = tmp_path / "net.mat"
    savemat(path, {"sc": W, "names": np.array(NAMES, object), "age": 33.0 * np.ones((1, 3))})
    assert np.array_equal(read(path).to_array(), W)
    savemat(path, {"sc": csc_array(W)})
    assert np.array_equal(read(path).to_array(), W)
    savemat(path, {"sc": W, "fc": 2 * W})
    assert np.array_equal(read(path, variable="fc").to_array(), 2 * W)
    with pytest.raises(InputError, match=r"one square matrix, found 2; name one with variable=, the file holds sc, fc"):
        read(path)
    with pytest.raises(InputError, match=r"variable = 'cov': expected one of sc, fc"):
        read(path, variable="cov")


def test_graphml(tmp_path: Path) -> None:
    path = tmp_path / "net.graphml"
    directed = nx.relabel_nodes(nx.from_numpy_array(W, create_using=nx.DiGraph), dict(enumerate(NAMES)))
    nx.write_graphml(directed, path)
    network = Connectome.from_file(path)
    assert np.array_equal(network.to_array(), W)
    assert network.labels == NAMES
    nx.write_graphml(nx.path_graph(3), path)
    assert Connectome.from_file(path).to_array().tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    with pytest.raises(InputError, match="GraphML names the source and the target of every edge"):
        read(path, orientation="target_source")
    directed["V1"]["A1"].pop("weight")
    nx.write_graphml(directed, path)
    with pytest.raises(InputError, match=r"net.graphml: edge V1 -> A1 = None: expected a weight, as other edges have"):
        Connectome.from_file(path)
    directed["V1"]["A1"]["weight"] = "strong"
    nx.write_graphml(directed, path)
    with pytest.raises(InputError, match=r"edge V1 -> A1 = 'strong': expected a number"):
        Connectome.from_file(path)


def text(matrix: np.ndarray) -> bytes:
    buffer = io.StringIO()
    np.savetxt(buffer, matrix)
    return buffer.getvalue().encode()


CENTRES = "".join(f"{name} {10 * i} {-i} 0.5\n" for i, name in enumerate(["a", "b", "c", "d"])).encode()


@pytest.mark.parametrize(
    "names",
    [
        ("weights.txt", "tract_lengths.txt", "centres.txt"),
        ("conn/weights.txt.bz2", "conn/tract_lengths.txt.txt", "conn/centers.txt.bz2"),
        ("Weights.txt", "tract.txt", "position.txt"),
    ],
)
def test_the_virtual_brain(tmp_path: Path, names: tuple[str, str, str]) -> None:
    path = tmp_path / "connectivity.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in zip(names, (text(W), text(10 * np.abs(W)), CENTRES), strict=True):
            archive.writestr(name, bz2.compress(data) if name.endswith("bz2") else data)
        archive.writestr("areas.txt", "1 2 3 4")
        archive.writestr("__MACOSX/._weights.txt", b"\x00")
    network = read(path, orientation="target_source")
    assert np.array_equal(network.to_array(), W.T)
    assert network.tract_lengths is not None
    assert np.array_equal(network.tract_lengths.toarray(), 10 * np.abs(W.T))
    assert network.labels == ("a", "b", "c", "d")
    assert network.coordinates is not None
    assert network.coordinates[2].tolist() == [20, -2, 0.5]


def archive_of(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("_txt", ".txt").replace(".txt_bz2", ".txt.bz2"), data)
    return path


class Bomb:
    """A pickle that would leave a file behind if anything loaded it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "net.npy"
    for data in (np.array([[Bomb(mark)]], object),):
        np.save(path, data, allow_pickle=True)
        with pytest.raises(InputError, match=r"net.npy: array.*not pickled"):
            read(path)
    path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(InputError, match="not pickled"):
        read(path)
    assert not mark.exists()


def test_sizes_are_checked_before_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = 200_000 * b"0 0 0 0\n"
    monkeypatch.setattr(loading, "_MOST_BYTES", 100_000)
    for name, data in (("weights_txt", zeros), ("weights_txt_bz2", bz2.compress(zeros))):
        assert len(data) < 10_000 or name == "weights_txt"
        path = archive_of(tmp_path / "bomb.zip", **{name: data})
        tracemalloc.start()
        with pytest.raises(InputError, match=r"weights.txt.* expected a matrix of at most that size"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
        tracemalloc.stop()
    (tmp_path / "net.csv").write_bytes(zeros)
    with pytest.raises(InputError, match="at most 100000 bytes of text"):
        read(tmp_path / "net.csv")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**7, 10**7)})
    (tmp_path / "net.npy").write_bytes(header.getvalue())
    with pytest.raises(InputError, match=r"net\.npy: array"):
        read(tmp_path / "net.npy")
    monkeypatch.setattr(loading, "_MOST_ENTRIES", 10)
    np.save(tmp_path / "net.npy", W)
    savemat(tmp_path / "net.mat", {"sc": W})
    (tmp_path / "net.txt").write_bytes(text(W))
    for name in ("net.npy", "net.mat", "net.txt"):
        with pytest.raises(InputError, match=r"shape = \(4, 4\): expected at most 10 entries"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("net.h5", b"", "net.h5': expected a file that ends in .npy, .csv"),
        ("none.csv", None, "none.csv': expected an existing file"),
        ("net.csv", b"", "net.csv: table = 'an empty file'"),
        ("net.csv", b"0,1\n1\n", "net.csv: table, line 2 = '1 columns': expected 2"),
        ("net.csv", b"0,1\n\n1,x\n", "net.csv: table, line 3, column 2 = 'x': expected a number"),
        ("net.csv", b"0,1\n,0\n", "net.csv: table, line 2, column 1 = '': expected a number; write decimal points"),
        ("net.csv", b"0;1,5\n1,5;0\n", "net.csv: table, line 1, column 2 = '1,5': expected a number"),
        ("net.csv", b"a,b\n", "net.csv: table, line 1, column 1 = 'a': expected a number"),
        (
            "net.csv",
            b",a,b\na,0,1\nc,1,0\n",
            "net.csv: table, line 3, column 1 = 'c': expected 'b', as column 3's name",
        ),
        ("net.csv", b"0,1\nnan,0\n", "net.csv: weights[1, 0] = nan"),
        ("net.csv", b"0,1,2\n1,0,2\n", "net.csv: weights = (2, 3)"),
        ("net.csv", b"0.5,1\n1,0\n2,0\n", "net.csv: table = (3, 2)"),
        (
            "net.csv",
            b"5,1\n2,0\n1,1\n",
            "net.csv: table = (3, 2): expected as many rows as columns; a row too many, or",
        ),
        ("net.csv", b"2,1\n0,3\n4,0\n", "net.csv: table = (3, 2)"),
        ("net.csv", b'0,"' + b"1" * 140_000 + b'"\n2,0\n', "net.csv: table, line 1 = '140004 characters'"),
        ("a" * 5000 + ".csv", None, "expected a path the system can open; File name too long"),
        ("net.csv", b"\xff\xfe0,1\n", "net.csv: table"),
        ("net.npy", b"\x93NUMPY", "net.npy: array"),
        ("net.mat", b"not a mat file", "net.mat: format"),
        ("net.graphml", b"<graph", "net.graphml: format"),
        ("net.zip", b"PK", "net.zip: format"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"areas_txt": b"1"}, "members = ['areas.txt']: expected a file named weights.txt"),
        ({"weights_txt": text(W), "weights2_txt": text(W)}, "expected one file of weights"),
        ({"weights_txt_bz2": b"plain"}, "weights.txt.bz2"),
        ({"weights_txt": text(W), "tract_lengths_txt": text(W[:2, :2])}, "tract_lengths"),
        ({"weights_txt": text(W), "tract_lengths_txt": text(-np.abs(W))}, "tract_lengths"),
        ({"weights_txt": text(W), "centres_txt": b"a 1 2\n" * 4}, "centres, line 1, column 1 = 'a': expected a number"),
        (
            {"weights_txt": text(W), "centres_txt": b"a b 1 2 3\n" * 4},
            "centres, line 1, column 2 = 'b': expected a number",
        ),
        ({"weights_txt": text(W), "centres_txt": b"1 2\n" * 4}, "centres = ['1', '2']: expected lines of a name"),
        ({"weights_txt": text(W), "centres_txt": b"a 1 2 3\nb 1 2\n"}, "centres, line 2 = '3 columns': expected 4"),
        ({"weights_txt_bz2": bz2.compress(100 * text(W))[:-8]}, "weights.txt.bz2 = 'Compressed file ended"),
        ({"weights_txt": text(W), "centres_txt": b"a 1 2 3\n" * 4}, "labels[1] = 'a'"),
        ({"weights_txt": text(W), "centres_txt": b"a 1 2 3\nb 1 2 3\n"}, "labels = 2: expected 4"),
    ],
)
def test_bad_archives(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read(archive_of(tmp_path / "net.zip", **members))


def test_variable_is_for_mat_files(tmp_path: Path) -> None:
    np.save(tmp_path / "net.npy", W)
    with pytest.raises(InputError, match=r"variable = 'sc': expected None, or a name in a .mat file"):
        read(tmp_path / "net.npy", variable="sc")
    for wrong in (3, ["sc"]):
        savemat(tmp_path / "net.mat", {"sc": W})
        with pytest.raises(InputError, match="variable = "):
            read(tmp_path / "net.mat", variable=wrong)


@pytest.mark.parametrize("path", [None, 5, b"net.csv", ["net.csv"], 0.5])
def test_a_path_is_a_string_or_a_path(path: object) -> None:
    with pytest.raises(InputError, match=r"^path = .*: expected the path of a file"):
        read(path)


def test_arrays_that_only_end_like_npy(tmp_path: Path) -> None:
    path = tmp_path / "net.npy"
    np.savez(tmp_path / "net.npz", W)
    path.write_bytes((tmp_path / "net.npz").read_bytes())
    with pytest.raises(InputError, match=r"net\.npy: array = '\.npy': expected one array of numbers, not pickled"):
        read(path)
    for header in (b"{'descr': '<f8', 'fortran_order': False, 'shape': (True, 1), }", b"{'descr': '" + 999 * b"("):
        path.write_bytes(b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n" + 64 * b"0")
        with pytest.raises(InputError, match=r"net\.npy: array"):
            read(path)


def test_a_struct_of_a_mat_file_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.mat"
    savemat(path, {"subject": {"sc": W}, "name": "ab", "sc": W})
    monkeypatch.setattr("scipy.io.loadmat", lambda *arguments, **options: pytest.fail("it was unpacked"))
    for name, kind in (("subject", "struct"), ("name", "char")):
        with pytest.raises(InputError, match=f"a matrix of numbers, {name} is of class {kind}; save the matrix in it"):
            read(path, variable=name)


def test_names_of_columns(tmp_path: Path) -> None:
    """Numbers are names where they count the columns, or where a first column repeats them; spaces after commas go."""
    path = tmp_path / "net.csv"
    for content, labels in (
        ("0,1\n0,3\n4,0\n", ("0", "1")),
        ("1,2\n0,3\n4,0\n", ("1", "2")),
        (",5,1\n5,0,3\n1,4,0\n", ("5", "1")),
        ('"a, left", "b"\n0, 3\n4, 0\n', ("a, left", "b")),
        ("  # a comment\n a b\n 0 3 \n 4 0\n", ("a", "b")),
    ):
        path.write_text(content)
        network = read(path)
        assert network.labels == labels
        assert network.to_array().tolist() == [[0, 3], [4, 0]]


GRAPHML = """<graphml xmlns="http://graphml.graphdrawing.org/xmlns"><key id="w" for="edge" attr.name="weight"
attr.type="{kind}">{default}</key><graph edgedefault="{direction}"><node id="a"/><node id="b"/>{edges}
</graph></graphml>"""


def graphml(path: Path, *edges: str, kind: str = "double", default: str = "", direction: str = "directed") -> Path:
    """Edges as "a b 2": source, target, weight, and then an id, if any."""
    found = ""
    for source, target, *rest in map(str.split, edges):
        data = f'<data key="w">{rest[0]}</data>' if rest else ""
        found += f'<edge source="{source}" target="{target}"{" ".join(["", *rest[1:]])}>{data}</edge>'
    path.write_text(GRAPHML.format(kind=kind, default=default, direction=direction, edges=found))
    return path


def test_graphml_defaults_and_doubles(tmp_path: Path) -> None:
    path = tmp_path / "net.graphml"
    network = Connectome.from_file(graphml(path, "a b", "b a 3", default="<default>5</default>"))
    assert network.to_array().tolist() == [[0, 5], [3, 0]]
    with pytest.raises(InputError, match=r"edge a -> b = True: expected a number as its weight"):
        Connectome.from_file(graphml(path, "a b true", kind="boolean"))
    for edges in (("a b 2", "a b 3"), ("a b", "a b")):
        with pytest.raises(InputError, match=r"edge a -> b = 'there twice': expected each edge once"):
            Connectome.from_file(graphml(path, *edges))
    with pytest.raises(InputError, match=r"edge a -> b = 'there twice'"):
        Connectome.from_file(graphml(path, "a b 2", "b a 3", direction="undirected"))
    with pytest.raises(InputError, match=r"edges = 'there twice'"):
        Connectome.from_file(graphml(path, 'a b 2 id="7"', 'a b 3 id="7"'))


@pytest.mark.parametrize("compressed", [False, True])
def test_the_virtual_brain_as_it_ships(tmp_path: Path, compressed: bool) -> None:
    """All the parts its own archives hold, columns behind the places, and bz2 files of several streams."""
    path = tmp_path / "connectivity_4.zip"
    parts = {
        "areas": b"3.5\n1.0\n2.0\n4.0\n",
        "average_orientations": b"0 0 1\n" * 4,
        "centres": CENTRES.replace(b" 0.5\n", b"  0.5 None\n"),
        "cortical": b"1\n1\n0\n0\n",
        "hemispheres": b"0\n0\n1\n1\n",
        "tract_lengths": text(10 * np.abs(W)),
        "weights": text(W),
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("info.txt", "distances in mm, weights from 0 to 3\n")
        for name, data in parts.items():
            cut = len(data) // 2
            streams = bz2.compress(data[:cut]) + bz2.compress(data[cut:])
            archive.writestr(f"{name}.txt.bz2" if compressed else f"{name}.txt", streams if compressed else data)
    network = read(path, orientation="target_source")
    assert np.array_equal(network.to_array(), W.T)
    assert network.tract_lengths is not None
    assert np.array_equal(network.tract_lengths.toarray(), 10 * np.abs(W.T))
    assert network.labels == ("a", "b", "c", "d")
    assert network.coordinates is not None
    assert network.coordinates.tolist() == [[10.0 * i, -i, 0.5] for i in range(4)]
