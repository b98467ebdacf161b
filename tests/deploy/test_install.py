"""install.sh in a folder of its own: every step shown, nothing overwritten, everything removed again."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
INSTALL = DEPLOY / "install.sh"


def _run(*options: str, code: int = 0) -> str:
    # No index: what the wheel needs must be there, and the tests never leave the machine.
    environment = {**os.environ, "PYTHON": sys.executable, "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        ["/bin/sh", str(INSTALL), *options],
        capture_output=True,
        text=True,
        env=environment,
        cwd="/",
        timeout=100,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel with the name, the extras and the script of kizu and nothing to fetch."""
    path = tmp_path / "kizu-9.9.9-py3-none-any.whl"
    info = "kizu-9.9.9.dist-info"
    files = {
        "kizu_stand_in.py": "def main():\n    print('installed')\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: kizu\nVersion: 9.9.9\n"
        "Provides-Extra: cpu\nProvides-Extra: gpu\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\nkizu-agent = kizu_stand_in:main\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]))
    return path


def _everything(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_dry_run_changes_nothing(tmp_path: Path, wheel: Path) -> None:
    """A dry run prints the steps of a real installation, service and user included, and touches nothing."""
    root = tmp_path / "root"
    root.mkdir()
    said = _run("--dry-run", "--prefix", str(root), "--wheel", str(wheel))
    assert f"-m venv {root}/opt/kizu/venv" in said
    assert "kizu-9.9.9-py3-none-any.whl[cpu]" in said
    assert _everything(root) == []
    system = _run("--dry-run", "--gpu", "--wheel", str(wheel))
    assert "/etc/systemd/system/kizu-agent.service" in system
    assert "kizu-9.9.9-py3-none-any.whl[gpu]" in system
    intel = _run("--dry-run", "--openvino", "--wheel", str(wheel))
    assert "kizu-9.9.9-py3-none-any.whl[openvino]" in intel
    assert "uninstall --yes onnxruntime onnxruntime-gpu\n" in intel
    if not shutil.which("getent") or subprocess.run(["getent", "passwd", "kizu"], check=False).returncode:
        assert "useradd --system" in system
        assert not Path("/opt/kizu").exists()


def test_install_and_uninstall(tmp_path: Path, wheel: Path) -> None:
    """Below a prefix the installation is complete and repeatable, and the two ways of removing it differ as told."""
    root = tmp_path / "root"
    options = ("--prefix", str(root), "--wheel", str(wheel))
    _run(*options)
    agent = root / "opt/kizu/venv/bin/kizu-agent"
    assert subprocess.run([agent], capture_output=True, text=True, check=True).stdout == "installed\n"
    unit = (root / "etc/systemd/system/kizu-agent.service").read_text()
    assert f"ExecStart={agent} run --config {root}/etc/kizu/agent.toml" in unit
    drop, config = root / "var/lib/kizu/drop", root / "etc/kizu/agent.toml"
    assert drop.stat().st_mode & 0o7777 == 0o2770
    assert config.stat().st_mode & 0o777 == 0o640

    config.write_text("mine")
    (drop / "m.kizu").write_text("a model")
    assert "stays as it is" in _run(*options)
    assert config.read_text() == "mine"

    assert "--purge" in _run("--uninstall", "--prefix", str(root))
    assert not agent.exists()
    assert (config.read_text(), (drop / "m.kizu").exists()) == ("mine", True)
    _run("--uninstall", "--purge", "--prefix", str(root))
    assert not [path for path in root.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--nonsense",), "unknown option --nonsense"),
        (("--purge",), "--purge goes with --uninstall"),
        (("--wheel",), "--wheel needs a value"),
        (("--prefix", "/tmp/a b"), "--prefix may hold"),  # noqa: S108 - never made
        (("--dry-run", "--wheel", "/none.whl"), "/none.whl: there is no such file"),
    ],
)
def test_wrong_usage(options: tuple[str, ...], said: str) -> None:
    """Wrong usage ends with 2 and says what is wrong."""
    assert said in _run(*options, code=2)


def test_shellcheck() -> None:
    """The script has nothing that shellcheck warns of."""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", "--shell=sh", str(INSTALL)], check=True)


@pytest.fixture
def unit(tmp_path: Path) -> Callable[[], Path]:
    """Write the unit file with a program that exists here."""

    def write() -> Path:
        lines = (DEPLOY / "kizu-agent.service").read_text().splitlines()
        path = tmp_path / "kizu-agent.service"
        changed = ["ExecStart=/bin/true" if line.startswith("ExecStart=") else line for line in lines]
        path.write_text("\n".join(line for line in changed if not line.startswith(("User=", "Group="))) + "\n")
        return path

    return write


def test_unit_is_valid(unit: Callable[[], Path]) -> None:
    """The systemd of this machine knows every line of the unit."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run(["systemd-analyze", "verify", str(unit())], capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if "kizu-agent.service" in line]
    assert not complaints


def test_unit_fits_the_agent() -> None:
    """The unit gives the agent more time to stop than it takes, and never restarts it on a bad configuration."""
    from kizu_agent.settings import AgentConfig

    text = (DEPLOY / "kizu-agent.service").read_text()
    settings = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    deadline_s = AgentConfig(name="box1", prefix="a").stop_deadline_s
    assert float(settings["TimeoutStopSec"]) > deadline_s + 5
    assert "3" in settings["RestartPreventExitStatus"].split()
    assert settings["Type"] == "notify"
