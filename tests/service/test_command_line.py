"""The commands: versions, and sentences where something is wrong."""

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import cv2
import numpy as np
import pytest

from kizu_agent import __main__ as command_line
from kizu_contract.errors import BundleError, KizuError


@pytest.mark.parametrize("module", ["kizu_agent", "kizu_train", "kizu_export"])
def test_every_command_tells_its_version(module: str) -> None:
    """`--version` prints the command's name and kizu's version."""
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{module.replace('_', '-')} {version('kizu')}\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BundleError("x.kizu: is damaged"), 1),
        (OSError(28, "No space left on device"), 1),
        (ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_whatever_a_command_raises_ends_with_a_sentence(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors that a user can mend, missing extras and Ctrl-C never show a traceback."""

    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(command_line, "_check", fail)
    assert command_line.main(["check"]) == code
    told = capsys.readouterr().err
    assert told.startswith("kizu-agent: ")
    if isinstance(error, KizuError | OSError):
        assert str(error) in told


def test_a_bug_still_shows_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no user's fault keeps its traceback."""

    def fail(_: object) -> int:
        raise ModuleNotFoundError("No module named 'kizu_agent.nonsense'", name="kizu_agent.nonsense")

    monkeypatch.setattr(command_line, "_check", fail)
    with pytest.raises(ModuleNotFoundError):
        command_line.main(["check"])


def test_an_agent_without_onnxruntime_says_what_to_install(box) -> None:
    """The base installation has no onnxruntime: exit 3 and the extra's name."""
    code = "import sys; sys.modules['onnxruntime'] = None\nfrom kizu_agent.__main__ import main\n"
    code += "sys.exit(main(sys.argv[1:]))"
    config = box.configure([{"name": "cam", "source": "sim:gears"}])
    command = [sys.executable, "-c", code, "run", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 3
    assert "kizu[cpu]" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_check_without_a_traceback(box) -> None:
    """SIGINT while a camera is tried: exit 130 and one line."""
    os.mkfifo(box.folder / "pipe.mp4")  # opening it waits for ever
    config = box.configure([{"name": "cam", "source": f"video:{box.folder / 'pipe.mp4'}"}])
    process = subprocess.Popen(
        [sys.executable, "-m", "kizu_agent", "check", "--config", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "broker" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in told


def test_a_reader_that_has_seen_enough_is_no_trouble(bundle_file, tmp_path) -> None:
    """`kizu-agent score … | head -1` ends without a word on standard error."""
    for number in range(40):
        cv2.imwrite(str(tmp_path / f"{number:02}.png"), np.full((64, 64), number, np.uint8))
    command = [sys.executable, "-u", "-m", "kizu_agent", "score", str(bundle_file), str(tmp_path), "--json", "-"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read().decode()
    process.stderr.close()
    process.wait(30)
    assert said == ""
