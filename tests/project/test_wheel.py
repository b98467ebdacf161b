"""What `pip install kizu` puts on a machine."""

import subprocess
import sys
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"kizu_contract": "contract", "kizu_train": "train", "kizu_export": "export", "kizu_agent": "agent"}
SCRIPTS = ("kizu-agent", "kizu-export", "kizu-train")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built with the build backend that is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("kizu-*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    """Everything the wheel holds."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it; what it depends on comes from the environment of this test."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = _purelib(python)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, timeout=100)
    # Dependencies only: an editable kizu is not on the path that .pth files name.
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    return folder


def _purelib(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True, timeout=30)
    return Path(found.stdout.strip())


def test_the_wheel_holds_the_four_packages_and_nothing_else(names: list[str]) -> None:
    """No tests, no benchmarks, no stray top-level names."""
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)
    assert len(top) == len(PACKAGES) + 1


def test_the_wheel_holds_every_file_of_the_packages(names: list[str]) -> None:
    """Sources, recipes, style sheets and type markers all travel."""
    tracked = subprocess.run(
        ["git", "ls-files", *PACKAGES.values()], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    )
    expected = {line.partition("/")[2] for line in tracked.stdout.splitlines()}
    assert expected <= set(names)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert any(name.startswith("kizu_train/recipes/") and name.endswith(".toml") for name in names)


def test_the_wheel_says_what_it_is(wheel: Path, names: list[str]) -> None:
    """Name, licence, oldest Python, extras and console scripts stand in the metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        metadata = HeaderParser().parsestr(archive.read(f"{folder}/METADATA").decode())
        scripts = archive.read(f"{folder}/entry_points.txt").decode()
        assert "Apache License" in archive.read(f"{folder}/licenses/LICENSE").decode()
    assert metadata["Name"] == "kizu"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra", [])) == {"cpu", "gpu", "openvino", "train", "export", "demo"}
    for script in SCRIPTS:
        assert f"{script} = {script.replace('-', '_')}.__main__:main" in scripts


def test_the_base_pulls_in_neither_torch_nor_a_runtime(wheel: Path) -> None:
    """Without an extra nothing heavy is required: the box chooses its runtime."""
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        metadata = HeaderParser().parsestr(archive.read(path).decode())
    base = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert base
    assert not [line for line in base if line.startswith(("torch", "onnx", "scikit", "safetensors", "amqtt"))]


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_installed_script_answers_help(installation: Path, script: str) -> None:
    """The installed package starts from its wheel, not from this checkout."""
    module = script.replace("-", "_")
    code = (
        f"import sys, {module}.__main__ as m; assert 'site-packages' in m.__file__, m.__file__; "
        f"sys.argv = ['{script}', '--help']; sys.exit(m.main())"
    )
    python = installation / "bin" / "python"
    result = subprocess.run(
        [str(python), "-P" if sys.version_info >= (3, 11) else "-I", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=installation,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: {script}")
