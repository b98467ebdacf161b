"""`kizu-agent score`: pictures from files to scores, as JSON lines, as a table for people, as maps."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape

from kizu_agent.errors import AgentError
from kizu_agent.inspector import Inspector, load_inspector
from kizu_agent.settings import EngineConfig, Provider
from kizu_contract.bundle import read_bundle
from kizu_contract.errors import KizuError, PictureError
from kizu_contract.judging import FrameScore, Thresholds
from kizu_contract.pictures import list_pictures, read_picture

DONE, FAILED, WRONG_USAGE, CANNOT_START = 0, 1, 2, 3
_GROUP_PIXELS = 8 * 2**20
_GROUP_PICTURES = 64
_COLOURS = {"ok": "green", "warn": "yellow", "reject": "red", "unknown": "magenta"}


@dataclass(frozen=True)
class _Asked:
    """A picture that was asked for, and where its map goes below the map folder."""

    path: Path
    map_name: Path


@dataclass(frozen=True, eq=False)
class _Scored:
    """What became of a picture: a score and its size, or the error that kept it from one."""

    asked: _Asked
    frame: FrameScore | None
    height: int = 0
    width: int = 0
    error: str = ""


def score_command(
    bundle_path: Path, paths: Sequence[Path], json_target: str | None, maps_dir: Path | None, provider: Provider = "cpu"
) -> int:
    """Score the pictures at `paths` in their order and write what was asked for; returns the exit code.

    0: all scored; 1: some picture could not be scored (the others are scored); 2: two maps would share a file;
    3: the model cannot be used.
    """
    asked = [picture for path in paths for picture in _expand(path)]
    clash = _first_clash(asked) if maps_dir is not None else None
    if clash is not None:
        _complain(f"two pictures would write the map {clash}; score them in two runs, or give their common folder")
        return WRONG_USAGE
    if not asked:
        _complain(f"no pictures below {', '.join(map(str, paths))}")
        return FAILED
    try:
        inspector = load_inspector(read_bundle(bundle_path), EngineConfig(provider=provider))
    except KizuError as exc:
        _complain(str(exc))
        return CANNOT_START
    try:
        return _score_all(inspector, asked, json_target, maps_dir)
    except BrokenPipeError:
        raise  # no trouble of ours: the reader of the output has seen enough
    except (AgentError, OSError) as exc:
        _complain(str(exc))
        return FAILED
    finally:
        inspector.close()


def _score_all(inspector: Inspector, asked: Sequence[_Asked], json_target: str | None, maps_dir: Path | None) -> int:
    failures = 0
    thresholds = inspector.manifest.thresholds.scores()
    with ExitStack() as stack:
        tell = _teller(json_target, thresholds, stack)
        for scored in _score_groups(inspector, asked):
            failures += scored.frame is None
            if maps_dir is not None and scored.frame is not None:
                _save_map(maps_dir / scored.asked.map_name, scored.frame.map)
            tell(scored)
    if failures:
        _complain(f"{failures} of {len(asked)} pictures could not be scored")
    return FAILED if failures else DONE


def _expand(path: Path) -> Iterator[_Asked]:
    """A folder gives its pictures, with maps in the same sub-folders; anything else stands for itself."""
    if path.is_dir():
        for found in list_pictures(path):
            yield _Asked(found, found.relative_to(path).with_suffix(".npy"))
    else:
        yield _Asked(path, Path(path.stem + ".npy"))


def _first_clash(asked: Sequence[_Asked]) -> Path | None:
    seen: set[Path] = set()
    for picture in asked:
        if picture.map_name in seen:
            return picture.map_name
        seen.add(picture.map_name)
    return None


def _score_groups(inspector: Inspector, asked: Sequence[_Asked]) -> Iterator[_Scored]:
    """Score pictures in groups that share batches, small enough to hold in memory, in input order."""
    group: list[tuple[_Asked, NDArray[np.uint8] | str]] = []
    pixels = 0
    for item in asked:
        picture = _read(inspector, item.path)
        group.append((item, picture))
        pixels += 0 if isinstance(picture, str) else picture.size
        if pixels >= _GROUP_PIXELS or len(group) >= _GROUP_PICTURES:
            yield from _score_group(inspector, group)
            group, pixels = [], 0
    yield from _score_group(inspector, group)


def _read(inspector: Inspector, path: Path) -> NDArray[np.uint8] | str:
    """The picture at `path`, or why it cannot be scored."""
    try:
        picture = read_picture(path, inspector.manifest.colour)
    except PictureError as exc:
        return str(exc)
    why = inspector.manifest.misfit(*picture.shape[:2])
    return picture if why is None else f"{path}: {why}"


def _score_group(inspector: Inspector, group: Sequence[tuple[_Asked, NDArray[np.uint8] | str]]) -> Iterator[_Scored]:
    frames = iter(inspector.inspect([picture for _, picture in group if not isinstance(picture, str)]))
    for item, picture in group:
        if isinstance(picture, str):
            yield _Scored(item, None, error=picture)
        else:
            yield _Scored(item, next(frames), *picture.shape[:2])


def _save_map(path: Path, frame_map: NDArray[np.float32]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, frame_map, allow_pickle=False)


def _teller(json_target: str | None, thresholds: Thresholds, stack: ExitStack) -> Callable[[_Scored], None]:
    """Choose how results are told: JSON lines to a file or standard output, or lines for people."""
    if json_target is None:
        console = Console(highlight=False, soft_wrap=True)
        console.print("[bold]  score     ratio  verdict  picture[/]")
        return lambda scored: console.print(_human_line(scored, thresholds))
    out: TextIO = sys.stdout if json_target == "-" else stack.enter_context(_opened(json_target))

    def tell(scored: _Scored) -> None:
        out.write(json.dumps(_as_json(scored, thresholds), ensure_ascii=False, allow_nan=False) + "\n")
        out.flush()

    return tell


def _opened(json_target: str) -> TextIO:
    return Path(json_target).open("w", encoding="utf-8")


def _as_json(scored: _Scored, thresholds: Thresholds) -> dict[str, str | float | int | None]:
    """One line's object; a score that is not a finite number becomes null, its verdict unknown."""
    path = str(scored.asked.path)
    if scored.frame is None:
        return {"path": path, "error": scored.error}
    score = scored.frame.score
    finite = math.isfinite(score)
    return {
        "path": path,
        "score": score if finite else None,
        "ratio": thresholds.ratio(score) if finite else None,
        "verdict": thresholds.verdict(score).value,
        "width": scored.width,
        "height": scored.height,
    }


def _human_line(scored: _Scored, thresholds: Thresholds) -> str:
    if scored.frame is None:
        return f"[magenta]{'–':>7} {'–':>9}  error    {escape(scored.error)}[/]"
    score = scored.frame.score
    verdict = thresholds.verdict(score).value
    colour = _COLOURS[verdict]
    path = escape(str(scored.asked.path))
    return f"{score:7.4g} {thresholds.ratio(score):9.3f}  [{colour}]{verdict:<7}[/]  {path}"


def _complain(message: str) -> None:
    print(f"kizu-agent score: {message}", file=sys.stderr)  # noqa: T201 - a command's words to its user
