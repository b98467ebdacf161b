"""The `kizu-export` command line on real files, as a user meets it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from kizu_contract.bundle import read_bundle
from kizu_export.__main__ import main
from kizu_train.__main__ import main as train


def draw_part(seed: int, *, flawed: bool) -> np.ndarray:
    """A striped plate of 40 × 48 pixels, with a dark dot where flawed."""
    draw = np.random.default_rng(seed)
    picture = 120 + 40 * np.sin(np.arange(48) / 3)[None, :] + draw.normal(0, 3, (40, 48))
    if flawed:
        cv2.circle(picture, (24, 20), 5, 0.0, -1)
    return picture.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and flawed plates in MVTec layout."""
    folder = tmp_path_factory.mktemp("data") / "plates"
    for name, seeds in {"train/good": range(12), "test/good": range(20, 24), "test/dot": range(30, 34)}.items():
        (folder / name).mkdir(parents=True)
        for seed in seeds:
            cv2.imwrite(str(folder / name / f"{seed:03}.png"), draw_part(seed, flawed=name == "test/dot"))
    (folder / "ground_truth/dot").mkdir(parents=True)
    mask = np.zeros((40, 48), np.uint8)
    cv2.circle(mask, (24, 20), 5, 255, -1)
    for seed in range(30, 34):
        cv2.imwrite(str(folder / f"ground_truth/dot/{seed:03}_mask.png"), mask)
    return folder


@pytest.fixture(scope="session")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of a few steps of kizu-train fit."""
    out = tmp_path_factory.mktemp("run") / "run"
    settings = ["--set", "train.steps=40", "--set", "train.batch=32"]
    assert train(["fit", "patch_vae_28px", "--data", str(data), "--out", str(out), *settings]) == 0
    return out


def test_trained_run_ships_and_measures(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real run becomes a bundle that verifies, shows itself, and is measured on the agent's engine."""
    bundle, figures, report = tmp_path / "m.kizu", tmp_path / "q.json", tmp_path / "q.html"
    assert main([str(trained), "--out", str(bundle), "--name", "plates", "--version", "7"]) == 0
    assert main(["verify", str(bundle)]) == 0
    assert main(["inspect", str(bundle)]) == 0
    out = capsys.readouterr().out
    assert "parity" in out
    assert "plates 7" in out
    assert main(["evaluate", str(bundle), "--data", str(data), "--json", str(figures), "--report", str(report)]) == 0
    found = json.loads(figures.read_text())
    assert len(found["pictures"]) == 8
    assert found["image"]["auroc"] >= 0.9
    assert "plates 7" in report.read_text()


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_lower_precision_ships_with_its_price(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    """With the pictures of the training a run ships in lower precision, verifies, and tells what that lost."""
    bundle = tmp_path / "m.kizu"
    options = ["--precision", precision, "--data", str(data), "--most-loss", "5"]
    assert main([str(trained), "--out", str(bundle), *options]) == 0
    assert "on 4 good and 4 defective test pictures" in capsys.readouterr().out
    assert main(["verify", str(bundle)]) == 0
    assert main(["inspect", str(bundle)]) == 0
    assert f"{precision}: image AUROC" in " ".join(capsys.readouterr().out.split())


def test_lower_precision_wants_the_pictures_of_the_training(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other good pictures are wrong usage: what was held out is not among them."""
    other = tmp_path / "other"
    shutil.copytree(data, other)
    next((other / "train/good").iterdir()).unlink()
    out = ["--out", str(tmp_path / "m.kizu")]
    assert main([str(trained), *out, "--precision", "int8", "--data", str(other)]) == 2
    assert "holds other good pictures" in capsys.readouterr().err


def test_kind_of_score_is_chosen(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--score exports another kind the run offers; one it does not is wrong usage."""
    assert main([str(trained), "--out", str(tmp_path / "l.kizu"), "--score", "l"]) == 0
    assert read_bundle(tmp_path / "l.kizu").manifest.provenance.recipe["score"] == "l"
    assert main([str(trained), "--out", str(tmp_path / "x.kizu"), "--score", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_inspect_as_json(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The JSON of inspect gives the manifest and the graph's facts."""
    assert main(["inspect", str(bundle_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["manifest"]["name"] == "small"
    assert shown["graph_facts"]["operators"]["Conv"] == 1


def test_signed_bundle_verifies_by_its_key_only(trained: Path, tmp_path: Path) -> None:
    """A key pair signs and verifies; another key, or a bundle without a signature, does not pass."""
    keys, others, bundle = tmp_path / "keys", tmp_path / "others", tmp_path / "m.kizu"
    for folder in (keys, others):
        assert main(["keygen", "--out", str(folder)]) == 0
    assert main([str(trained), "--out", str(bundle), "--sign", str(keys / "kizu-private.pem")]) == 0
    assert main(["verify", str(bundle), "--key", str(keys / "kizu-public.pem")]) == 0
    assert main(["verify", str(bundle), "--key", str(others / "kizu-public.pem")]) == 1
    assert main([str(trained), "--out", str(bundle)]) == 0
    assert main(["verify", str(bundle), "--key", str(keys / "kizu-public.pem")]) == 1


def test_keys_are_private_and_never_overwritten(tmp_path: Path) -> None:
    """The private key is readable by its owner alone, and a second keygen leaves it as it is."""
    assert main(["keygen", "--out", str(tmp_path / "k")]) == 0
    private = tmp_path / "k/kizu-private.pem"
    before = private.read_bytes()
    assert private.stat().st_mode & 0o777 == 0o600
    assert main(["keygen", "--out", str(tmp_path / "k")]) == 2
    assert private.read_bytes() == before


def test_public_key_does_not_sign(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Signing with what is no private key fails before anything is exported."""
    main(["keygen", "--out", str(tmp_path)])
    assert main([str(trained), "--out", str(tmp_path / "m.kizu"), "--sign", str(tmp_path / "kizu-public.pem")]) == 1
    assert "private key" in capsys.readouterr().err
    assert not (tmp_path / "m.kizu").exists()


def test_damaged_bundle_does_not_verify(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One flipped bit in the middle of the file is found."""
    data = bytearray(bundle_path.read_bytes())
    data[len(data) // 2] ^= 1
    bundle_path.write_bytes(data)
    assert main(["verify", str(bundle_path)]) == 1
    assert str(bundle_path) in capsys.readouterr().err


def test_wrong_usage(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A lower precision without pictures to judge it by says so; the rest is argparse's; all exit with 2."""
    for precision in ("fp16", "int8"):
        assert main([str(trained), "--out", str(tmp_path / "m.kizu"), "--precision", precision]) == 2
        assert "--data DIR" in capsys.readouterr().err
    for wrong in (
        ["--nonsense"],
        ["--most-loss", "-1"],
        ["--most-shift", "x"],
        ["--name", "a/b"],
        ["--version", "no spaces"],
    ):
        with pytest.raises(SystemExit, match="2"):
            main([str(trained), "--out", str(tmp_path / "m.kizu"), *wrong])


def test_missing_run_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is no run is named; one called like a command is reached with its path."""
    (tmp_path / "evaluate").mkdir()
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert main(["./evaluate", "--out", "m.kizu"]) == 1
    finally:
        os.chdir(before)
    assert "evaluate" in capsys.readouterr().err


def test_measuring_needs_no_torch(bundle_path: Path) -> None:
    """evaluate, verify and inspect import no torch: a small box can measure what ships."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import kizu_export.evaluate, kizu_export.show\n"
        "from kizu_export.__main__ import main\n"
        f"sys.exit(main(['verify', {str(bundle_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
