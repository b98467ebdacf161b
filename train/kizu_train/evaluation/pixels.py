"""Pixel metrics over any number of pictures in bounded memory, exact to the last tie.

Only defective pixels are held (12 bytes each). Defect-free ones, nearly all, wait in a spool of 4 bytes each that moves
to disk when it outgrows its share of memory; at the end they are sorted chunk by chunk and counted against the distinct
scores of the defective ones, which is all that the curves need.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from kizu_train.evaluation.metrics import Ranking, count_below

SPOOL_BYTES = 1 * 2**30
"""Defect-free pixels beyond this much wait on disk."""
CHUNK_PIXELS = 16 * 2**20
"""Pixels sorted at a time."""


@dataclass(frozen=True, eq=False)
class PixelRankings:
    """The ranking of all pixels, and for each kind the one of its pictures with all good pictures.

    `regions` is the number of ground-truth regions, 8-connected.
    """

    pooled: Ranking | None
    kinds: dict[str, Ranking]
    regions: int


@dataclass(eq=False)
class _Group:
    """Pixels of one kind: `spans` (offset, length in bytes) of defect-free ones in the spool, and the defective."""

    spans: list[tuple[int, int]] = field(default_factory=list)
    scores: list[NDArray[np.float32]] = field(default_factory=list)
    shares: list[NDArray[np.float64]] = field(default_factory=list)
    """For each defective pixel, 1 / pixels of its region."""
    regions: int = 0


class PixelPool:
    """Collects maps picture by picture; to be closed, for its spool may lie on disk."""

    def __init__(self, spool_bytes: int = SPOOL_BYTES, chunk_pixels: int = CHUNK_PIXELS) -> None:
        self._spool = tempfile.SpooledTemporaryFile(max_size=spool_bytes)  # noqa: SIM115 - closed by close()
        self._chunk_bytes = chunk_pixels * 4
        self._groups: dict[str | None, _Group] = {}
        self._end = 0

    def close(self) -> None:
        """Give memory and disk back; idempotent."""
        self._spool.close()

    def add_good(self, frame_map: NDArray[np.float32]) -> None:
        """Add the map float32 [H, W] of a good picture. Raises ValueError unless all of it is finite."""
        _check_finite(frame_map)
        self._put(self._group(None), frame_map.ravel())

    def add_defective(self, kind: str, frame_map: NDArray[np.float32], mask: NDArray[np.bool_]) -> None:
        """Add the map float32 [H, W] of a picture of `kind` whose ground truth is `mask` bool [H, W], not empty.

        Raises ValueError unless all of the map is finite and the shapes agree.
        """
        _check_finite(frame_map)
        if frame_map.shape != mask.shape:
            raise ValueError(f"the map has shape {frame_map.shape}, its mask {mask.shape}")
        group = self._group(kind)
        self._put(group, frame_map[~mask])
        count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8, ltype=cv2.CV_32S)
        inside = labels[mask]
        sizes = np.bincount(inside, minlength=count)
        group.scores.append(np.asarray(frame_map[mask], np.float32))
        group.shares.append(1.0 / sizes[inside])
        group.regions += count - 1

    def rankings(self) -> PixelRankings:
        """Rank what was added; pooled is None where no defective pixel or no defect-free pixel was."""
        kinds = [(kind, group) for kind, group in self._groups.items() if kind is not None]
        regions = sum(group.regions for _, group in kinds)
        if regions == 0:
            return PixelRankings(None, {}, 0)
        values, places = np.unique(np.concatenate([s for _, g in kinds for s in g.scores]), return_inverse=True)
        good = self._count(self._groups.get(None, _Group()), values)
        pooled = _Tally(len(values)).add(good)
        rankings: dict[str, Ranking] = {}
        start = 0
        for kind, group in kinds:
            stop = start + sum(map(len, group.scores))
            own = self._count(group, values).find(places[start:stop], np.concatenate(group.shares))
            pooled.add(own)
            rankings[kind] = own.add(good).ranking(group.regions)
            start = stop
        return PixelRankings(pooled.ranking(regions), rankings, regions)

    def _group(self, kind: str | None) -> _Group:
        return self._groups.setdefault(kind, _Group())

    def _put(self, group: _Group, pixels: NDArray[np.float32]) -> None:
        data = np.ascontiguousarray(pixels, np.float32)
        self._spool.seek(self._end)
        self._spool.write(data.tobytes())
        if group.spans and sum(group.spans[-1]) == self._end:
            start, length = group.spans.pop()
        else:
            start, length = self._end, 0
        group.spans.append((start, length + data.nbytes))
        self._end += data.nbytes

    def _chunks(self, group: _Group) -> Iterator[NDArray[np.float32]]:
        """The group's defect-free pixels in chunks, however its pictures lie in the spool."""
        parts: list[bytes] = []
        free = self._chunk_bytes
        for start, length in group.spans:
            at, end = start, start + length
            while at < end:
                self._spool.seek(at)
                parts.append(self._spool.read(min(free, end - at)))
                at, free = at + len(parts[-1]), free - len(parts[-1])
                if free == 0:
                    yield np.frombuffer(b"".join(parts), np.float32)
                    parts, free = [], self._chunk_bytes
        if parts:
            yield np.frombuffer(b"".join(parts), np.float32)

    def _count(self, group: _Group, values: NDArray[np.float32]) -> "_Tally":
        tally = _Tally(len(values))
        for chunk in self._chunks(group):
            left, right = count_below(np.sort(chunk), values)
            tally.above += len(chunk) - right
            tally.level += right - left
            tally.negatives += len(chunk)
        return tally


class _Tally:
    """A ranking in the making; scores rising."""

    def __init__(self, length: int) -> None:
        self.hits = np.zeros(length, np.int64)
        self.shares = np.zeros(length)
        self.above = np.zeros(length, np.int64)
        self.level = np.zeros(length, np.int64)
        self.negatives = 0

    def find(self, places: NDArray[np.int64], shares: NDArray[np.float64]) -> "_Tally":
        self.hits += np.bincount(places, minlength=len(self.hits))
        self.shares += np.bincount(places, shares, minlength=len(self.hits))
        return self

    def add(self, other: "_Tally") -> "_Tally":
        for name in ("hits", "shares", "above", "level"):
            array = getattr(self, name)
            array += getattr(other, name)
        self.negatives += other.negatives
        return self

    def ranking(self, regions: int) -> Ranking:
        falling = np.flatnonzero(self.hits)[::-1]
        return Ranking(
            self.hits[falling],
            self.shares[falling] / regions,
            self.above[falling],
            self.level[falling],
            self.negatives,
        )


def _check_finite(frame_map: NDArray[np.float32]) -> None:
    if not np.isfinite(frame_map).all():
        raise ValueError("the map holds numbers that are not finite")
