"""The catalog of real data: every file by name, at a pinned commit, with its digest, license and citation.

A name is a relative path.  The same path is looked up below `COMMISSURE_DATA`; the address it is otherwise downloaded
from is `https://raw.githubusercontent.com/OWNER/REPO/COMMIT/PATH`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from commissure.core.errors import InputError

__all__ = ["CATALOG", "Source", "find", "matching"]


@dataclass(frozen=True)
class Source:
    """One file: `name` (relative path), address, SHA-256 (hex), size in bytes, license and what to cite."""

    name: str
    address: str
    sha256: str
    n_bytes: int
    license: str
    citation: str


class _Collection(NamedTuple):
    folder: str
    repository: str
    commit: str
    license: str
    citation: str
    files: tuple[tuple[str, int, str], ...]  # path in the repository, bytes, SHA-256


_COLLECTIONS = (
    _Collection(
        "mihi-chewie",
        "nerdslab/myow-neuro",
        "6aa684bbbdaecea644db24000a5ce6ff3c033b84",
        "Apache-2.0",
        "Dyer et al. (2017), A cryptography-based approach for movement decoding, Nature Biomedical Engineering 1, "
        "967-976; binned by Azabou et al. (2021), Mine Your Own vieW, arXiv:2102.10106",
        (
            (
                "data/mihi-chewie/processed/full-chewie-10032013-bin0.05-vel_thresh5.00.pkl",
                1691277,
                "ac4bdce8129fe64414a084efbf777a310d5ba926b19cf27c4e490ff8bb0a230c",
            ),
            (
                "data/mihi-chewie/processed/full-chewie-10032013-bin0.10-vel_thresh5.00.pkl",
                1055836,
                "2bf23f43a2f8e5f7794e9d1e3604c1dd8b222edca6b9980dcb9605ad12997adb",
            ),
            (
                "data/mihi-chewie/processed/full-chewie-12192013-bin0.10-vel_thresh5.00.pkl",
                996327,
                "62057a140c8c0e660b8cca2515317d583f83d2e362d04b166c789ba57aeca9b3",
            ),
            (
                "data/mihi-chewie/processed/full-mihi-03032014-bin0.10-vel_thresh5.00.pkl",
                1372265,
                "aa53dffd7c7fea6787843221f2d4d01881befbc4c53a655fa9989cd5c837f729",
            ),
        ),
    ),
    _Collection(
        "mc-maze",
        "MaryamOstadsharif/HiSDE",
        "a3fd0fd603cf023d35d3c79e9719b7a220b1b6d8",
        "MIT",
        "Churchland & Kaufman, MC_Maze (DANDI 000128); Pei et al. (2021), Neural Latents Benchmark '21, "
        "arXiv:2109.04463",
        (
            (
                "Dataset/trial_748_data.csv",
                1616869,
                "2938aafde65215c3a6a2e167490bc9c01aca3417fa201cfa9fc709dfdac6adcb",
            ),
        ),
    ),
    _Collection(
        "hcp-s400",
        "fmilisav/milisav_hierarchical_modularity",
        "e0cd6f3335f96e65f19dd423cbb0435d3dc3695c",
        "BSD-3-Clause",
        "Acknowledge the Human Connectome Project: Van Essen et al. (2013), The WU-Minn Human Connectome Project, "
        "NeuroImage 80, 62-79; parcels of Schaefer et al. (2018), Cerebral Cortex 28, 3095-3114",
        (
            ("data/SC_wei_HCP_s400.npy", 1280128, "ef205659477ac56da8ca790991bdde481794eb9f824c711c55654d5def3b42a6"),
            ("data/parc_timescales.npy", 1728, "e51f1688104231c6ae76985f9eb5a68efe88abe5a06d0ce4840ef256f6608535"),
            ("data/s400_coords.npy", 9728, "59439ea5028b12ff763a72ac0aa235690bc44a1ae6cb4a501fd7876e81d0f9cd"),
        ),
    ),
    _Collection(
        "rat-m1",
        "mbonizzato/EduOptimNeurostim",
        "3c4632bbf0ec5a9e519a211f0fd6147923f8c002",
        "BSD-2-Clause",
        "Bonizzato et al. (2023), Autonomous optimization of neuroprosthetic stimulation parameters that drive the "
        "motor cortex and spinal cord outputs in rats and monkeys, Cell Reports Medicine 4, 101008",
        (
            ("priors/rat_mapping_2D.mat", 384, "c976313fbdab9d9cccec00e20fc470bbebe338555da2fcec8a0b2568032f8640"),
            (
                "priors/rat_mapping_2D_injury.mat",
                448,
                "31b98792f1d64c3023ca89372d1d4ff42ba42f6df6800e77175ec5c5ade42066",
            ),
            (
                "priors/rat_mapping_2D_intact.mat",
                534,
                "8028ca2b6c8a0abdeb8ae7b52815c6e5ef86b6a4361f30c44368cf6e8ac4f257",
            ),
        ),
    ),
    _Collection(
        "wikitext-2",
        "pytorch/examples",
        "77f55b912142e11fcfdf5b530231fb9c52f181e8",
        "CC BY-SA 3.0",
        "Merity et al. (2016), Pointer sentinel mixture models, arXiv:1609.07843",
        (
            (
                "word_language_model/data/wikitext-2/valid.txt",
                1121681,
                "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
            ),
            (
                "word_language_model/data/wikitext-2/test.txt",
                1256449,
                "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
            ),
        ),
    ),
)


def _sources(collection: _Collection) -> list[Source]:
    root = f"https://raw.githubusercontent.com/{collection.repository}/{collection.commit}"
    return [
        Source(
            f"{collection.folder}/{path.rpartition('/')[2]}",
            f"{root}/{path}",
            sha256,
            n_bytes,
            collection.license,
            collection.citation,
        )
        for path, n_bytes, sha256 in collection.files
    ]


CATALOG: tuple[Source, ...] = tuple(source for collection in _COLLECTIONS for source in _sources(collection))


def find(name: str) -> Source:
    """The source of this name; an unknown name raises `InputError` that lists the known ones.

    >>> find("wikitext-2/test.txt").n_bytes
    1256449
    """
    for source in CATALOG:
        if source.name == name:
            return source
    raise InputError("name", name, "one of " + ", ".join(source.name for source in CATALOG))


def matching(name: str) -> tuple[Source, ...]:
    """The file of this name, all files of a folder such as "hcp-s400", or all files for "all".

    >>> len(matching("hcp-s400")), len(matching("all"))
    (3, 13)
    """
    if name == "all":
        return CATALOG
    return tuple(source for source in CATALOG if source.name.startswith(f"{name}/")) or (find(name),)
