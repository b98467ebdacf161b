"""Data folders: which pictures are there, which are good, and which are held out for calibration."""

import csv
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kizu_contract.errors import PictureError
from kizu_contract.pictures import MAX_PICTURE_BYTES, Colour, decode_picture, list_pictures
from kizu_contract.tiles import FrameSize
from kizu_train.errors import DataError

ColourChoice = Literal["auto", "grey", "rgb"]
MANIFEST = "manifest.csv"
_COLOUR_SAMPLE = 64
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TestPicture:
    """A picture to evaluate on; `kind` is its folder (`good`, `crack`, …), `mask` marks its defect, if drawn."""

    __test__ = False  # the name is the field's word; pytest must not collect it

    path: Path
    kind: str
    is_good: bool
    mask: Path | None


@dataclass(frozen=True)
class PictureSet:
    """The readable pictures of a data folder; `train` holds good ones only, sorted by name.

    `hashes` and `groups` run along `train`: SHA-256 of the file, and the name of the group it must stay with (same
    part, same board) or None. `fingerprint` is the SHA-256 over the sorted names and hashes of `train`.
    """

    root: Path
    train: tuple[Path, ...]
    tests: tuple[TestPicture, ...]
    colour: Colour
    fingerprint: str
    unreadable: tuple[Path, ...]
    hashes: tuple[str, ...]
    groups: tuple[str | None, ...]
    size: FrameSize | None = None
    """The one size that all of `train` have; None where they differ."""


@dataclass(frozen=True)
class Split:
    """Good pictures to learn from and good pictures held out for calibration, both sorted."""

    learn: tuple[Path, ...]
    held_out: tuple[Path, ...]


@dataclass(frozen=True)
class _Checked:
    path: Path
    sha256: str | None
    """None where the file is not a readable picture."""
    is_grey: bool
    size: FrameSize | None = None


def open_data(folder: Path, colour: ColourChoice = "auto", *, with_tests: bool = True) -> PictureSet:
    """Look through `folder`: MVTec layout where it has `train` or `test` folders, else a plain folder of good pictures.

    Every picture is decoded once; unreadable ones are logged by name and left out. `auto` takes grey when each of a
    sample of good pictures is grey. Test pictures are not touched unless `with_tests`. Raises DataError.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: is not a folder; --data names the folder that holds the pictures")
    is_mvtec = (folder / "train").is_dir() or (folder / "test").is_dir()
    good = folder / "train" / "good" if is_mvtec else folder
    checked = _check(list_pictures(good) if good.is_dir() else [])
    tests = tuple(_test_pictures(folder)) if is_mvtec and with_tests else ()
    checked_tests = _check([test.path for test in tests])
    unreadable = tuple(item.path for item in (*checked, *checked_tests) if item.sha256 is None)
    for path in unreadable:
        _LOG.warning("%s: is not a readable picture; left out", path)
    readable = [item for item in checked if item.sha256 is not None]
    hashes = tuple(item.sha256 or "" for item in readable)
    train = tuple(item.path for item in readable)
    tests = tuple(test for test, item in zip(tests, checked_tests, strict=True) if item.sha256 is not None)
    if not train and not tests:
        raise DataError(f"{folder}: holds no readable picture; wanted train/good and test/<kind>, or pictures in it")
    found = _choose_colour([item.is_grey for item in readable or checked_tests if item.sha256 is not None])
    return PictureSet(
        folder,
        train,
        tests,
        found if colour == "auto" else colour,
        _fingerprint(folder, train, hashes),
        unreadable,
        hashes,
        _groups(folder, train),
        readable[0].size if len({item.size for item in readable}) == 1 else None,
    )


def hold_out(pictures: PictureSet, seed: int, share: float = 0.2, at_least: int = 5) -> Split:
    """Hold out about `share` of the good pictures, `at_least` so many but never more than half, chosen by `seed`.

    No picture, no byte-identical copy of one and no group lies on both sides. Raises DataError when that leaves
    either side empty.
    """
    clusters = _clusters(pictures)
    if len(clusters) < 2:
        raise DataError(
            f"{pictures.root}: {len(pictures.train)} good pictures in {len(clusters)} group(s) that "
            "must stay together; at least 2 independent ones are needed to learn from one and calibrate on another"
        )
    total = len(pictures.train)
    wanted = max(1, min(max(at_least, round(share * total)), total // 2))
    order = np.random.default_rng([seed, 0x401D]).permutation(len(clusters))
    chosen: set[int] = set()
    for index in order:
        # A large group is passed over rather than let it swallow what there is to learn from.
        if len(chosen) < wanted and len(chosen) + len(clusters[index]) <= max(wanted * 5 // 4, 1):
            chosen.update(clusters[index])
    if not chosen:
        chosen.update(clusters[int(np.argmin([len(cluster) for cluster in clusters]))])
    learn = tuple(path for i, path in enumerate(pictures.train) if i not in chosen)
    return Split(learn, tuple(pictures.train[i] for i in sorted(chosen)))


def fold_out(pictures: PictureSet, seed: int, count: int) -> list[Split]:
    """Hold out every good picture once, in `count` shares of about the same size, chosen by `seed`.

    Copies and groups stay together. Raises DataError where there are fewer independent pictures than shares.
    """
    clusters = _clusters(pictures)
    if not 2 <= count <= len(clusters):
        raise DataError(
            f"{pictures.root}: {count} folds of {len(clusters)} independent good pictures; take 2 to {len(clusters)}"
        )
    order = np.random.default_rng([seed, 0xF01D]).permutation(len(clusters))
    shares: list[set[int]] = [set() for _ in range(count)]
    # The largest first, each into the smallest share so far.
    for index in sorted(order, key=lambda index: -len(clusters[index])):
        min(shares, key=len).update(clusters[index])
    return [
        Split(
            tuple(path for i, path in enumerate(pictures.train) if i not in share),
            tuple(pictures.train[i] for i in sorted(share)),
        )
        for share in shares
    ]


def _check(paths: Sequence[Path]) -> list[_Checked]:
    # OpenCV releases the interpreter while it decodes.
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(_check_one, paths))


def _check_one(path: Path) -> _Checked:
    try:
        if path.stat().st_size > MAX_PICTURE_BYTES:
            return _Checked(path, None, is_grey=False)
        data = path.read_bytes()
        picture = decode_picture(data)
    except (OSError, PictureError):
        return _Checked(path, None, is_grey=False)
    return _Checked(
        path, hashlib.sha256(data).hexdigest(), is_grey=_is_grey(picture), size=FrameSize(*picture.shape[:2])
    )


def _is_grey(picture: NDArray[np.uint8]) -> bool:
    return picture.shape[2] == 1 or bool((picture == picture[:, :, :1]).all())


def _choose_colour(are_grey: Sequence[bool]) -> Colour:
    step = max(1, len(are_grey) // _COLOUR_SAMPLE)
    return "grey" if all(are_grey[::step]) else "rgb"


def _test_pictures(folder: Path) -> Iterator[TestPicture]:
    tests = folder / "test"
    for path in list_pictures(tests) if tests.is_dir() else []:
        parts = path.relative_to(tests).parts
        if len(parts) < 2:
            raise DataError(f"{path}: test pictures lie in folders named by their kind, such as test/good")
        is_good = parts[0] == "good"
        yield TestPicture(path, parts[0], is_good, None if is_good else _mask(folder, path.relative_to(tests)))


def _mask(folder: Path, relative: Path) -> Path | None:
    mask = folder / "ground_truth" / relative.parent / f"{relative.stem}_mask.png"
    return mask if mask.is_file() else None


def _fingerprint(folder: Path, train: Iterable[Path], hashes: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name, sha256 in sorted(zip((path.relative_to(folder).as_posix() for path in train), hashes, strict=True)):
        digest.update(f"{sha256}  {name}\n".encode())
    return digest.hexdigest()


def _groups(folder: Path, train: Sequence[Path]) -> tuple[str | None, ...]:
    """The `group` column of manifest.csv; its `image` column may start above `folder`, so leading parts may differ."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return (None,) * len(train)
    groups: dict[str, str] = {}
    wanted = {path.relative_to(folder).as_posix() for path in train}
    with manifest.open(newline="", encoding="utf-8-sig") as file:
        for row in csv.DictReader(file):
            name = _match(row.get("image") or "", wanted)
            if name is not None and row.get("group"):
                groups[name] = row["group"]
    return tuple(groups.get(path.relative_to(folder).as_posix()) for path in train)


def _match(image: str, wanted: set[str]) -> str | None:
    parts = PurePosixPath(image).parts
    tails = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((tail for tail in tails if tail in wanted), None)


def _clusters(pictures: PictureSet) -> list[list[int]]:
    """Indices of `train` that must stay together, through equal content or equal group, however chained."""
    parent = list(range(len(pictures.train)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, (sha256, group) in enumerate(zip(pictures.hashes, pictures.groups, strict=True)):
        for key in [("content", sha256)] + ([("group", group)] if group else []):
            parent[root(i)] = root(first.setdefault(key, i))
    clusters: dict[int, list[int]] = {}
    for i in range(len(parent)):
        clusters.setdefault(root(i), []).append(i)
    return list(clusters.values())
