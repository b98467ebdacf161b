"""`kizu-agent score` on real files."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from kizu_agent.inspector import Inspector
from kizu_agent.score import score_command
from kizu_contract.bundle import Bundle, write_bundle


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures in sub-folders, and one that is none."""
    draw = np.random.default_rng(3)
    folder = tmp_path / "pictures"
    for name, shape in {"a/1.png": (30, 44), "a/2.png": (50, 20, 3), "b/1.png": (64, 64)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name), draw.integers(0, 256, shape, dtype=np.uint8))
    (folder / "a" / "broken.png").write_bytes(b"\x89PNG nothing")
    (folder / "a" / "notes.txt").write_text("not a picture")
    return folder


def read_lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_broken_picture_fails_alone(
    bundle_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str], inspector: Inspector
) -> None:
    """A folder is scored in order; a picture that cannot be read is told, the others are scored, the exit code is 1."""
    assert score_command(bundle_path, [pictures], "-", None, "cpu") == 1
    lines = read_lines(capsys.readouterr().out)
    assert [Path(str(line["path"])).relative_to(pictures).as_posix() for line in lines] == [
        "a/1.png",
        "a/2.png",
        "a/broken.png",
        "b/1.png",
    ]
    assert set(lines[2]) == {"path", "error"}
    for line in (lines[0], lines[1], lines[3]):
        assert list(line) == ["path", "score", "ratio", "verdict", "width", "height"]
    picture = cv2.imread(str(pictures / "a/1.png"), cv2.IMREAD_GRAYSCALE)
    assert lines[0]["score"] == pytest.approx(inspector.inspect([picture[:, :, None]])[0].score, rel=1e-5)
    assert lines[0]["ratio"] == pytest.approx(float(str(lines[0]["score"])) / 6.0)
    assert (lines[0]["width"], lines[0]["height"]) == (44, 30)


def test_maps_keep_size_and_folders(bundle_path: Path, pictures: Path, tmp_path: Path, inspector: Inspector) -> None:
    """Maps are float32 of the picture's own size, below the same sub-folders; JSON may go to a file."""
    out, maps = tmp_path / "out.jsonl", tmp_path / "maps"
    assert score_command(bundle_path, [pictures], str(out), maps, "cpu") == 1
    assert sorted(path.relative_to(maps).as_posix() for path in maps.rglob("*.npy")) == [
        "a/1.npy",
        "a/2.npy",
        "b/1.npy",
    ]
    frame_map = np.load(maps / "b/1.npy", allow_pickle=False)
    picture = cv2.imread(str(pictures / "b/1.png"), cv2.IMREAD_GRAYSCALE)
    assert (frame_map.dtype, frame_map.shape) == (np.float32, (64, 64))
    np.testing.assert_allclose(frame_map, inspector.inspect([picture[:, :, None]])[0].map, rtol=1e-5)
    assert len(read_lines(out.read_text())) == 4


def test_single_pictures_succeed(bundle_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures given by name are scored in the order given, in lines for people, with exit code 0."""
    assert score_command(bundle_path, [pictures / "b/1.png", pictures / "a/1.png"], None, None, "cpu") == 0
    out = capsys.readouterr().out
    assert out.index("b/1.png") < out.index("a/1.png")


def test_missing_picture_is_an_error_line(
    bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path that does not exist gives an error line and exit code 1."""
    assert score_command(bundle_path, [tmp_path / "none.png"], "-", None, "cpu") == 1
    assert "none.png" in str(read_lines(capsys.readouterr().out)[0]["error"])


def test_maps_that_would_overwrite_each_other_are_refused(bundle_path: Path, pictures: Path, tmp_path: Path) -> None:
    """Two pictures of one name in two given folders would share a map: wrong usage, nothing is written."""
    maps = tmp_path / "maps"
    assert score_command(bundle_path, [pictures / "a", pictures / "b"], "-", maps, "cpu") == 2
    assert not maps.exists()


@pytest.mark.parametrize("content", [None, b"no bundle"])
def test_unusable_model_cannot_start(pictures: Path, tmp_path: Path, content: bytes | None) -> None:
    """A missing or broken bundle gives exit code 3."""
    path = tmp_path / "m.kizu"
    if content is not None:
        path.write_bytes(content)
    assert score_command(path, [pictures], "-", None, "cpu") == 3


def test_not_a_number_is_unknown(
    bundle: Bundle,
    make_scorer: Callable[..., bytes],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A score that is not a number is null and unknown in JSON, never ok."""
    path = tmp_path / "nan.kizu"
    write_bundle(replace(bundle, scorer=make_scorer(divisor=0.0)), path)
    assert score_command(path, [pictures / "b"], "-", None, "cpu") == 0
    line = read_lines(capsys.readouterr().out)[0]
    assert (line["score"], line["ratio"], line["verdict"]) == (None, None, "unknown")
