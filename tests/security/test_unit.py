"""The systemd unit's sandbox, as systemd itself rates it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "deploy" / "kizu-agent.service"
MOST_EXPOSED = 2.5
"""systemd's figure, 0 (safe) to 10; what it still counts is said in the unit's last lines and its network."""


def test_the_unit_is_little_exposed() -> None:
    """Systemd rates the unit's exposure low."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    command = [program, "security", "--offline=yes", "--no-pager", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode and "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze cannot look at files")
    figure = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    assert figure is not None, done.stdout + done.stderr
    assert float(figure[1]) <= MOST_EXPOSED


def test_no_core_files_and_few_system_calls() -> None:
    """What matters most stands in the unit, whatever systemd there is."""
    text = UNIT.read_text()
    for line in ("LimitCORE=0", "NoNewPrivileges=yes", "CapabilityBoundingSet=", "ProtectSystem=strict"):
        assert f"\n{line}\n" in text
    assert re.search(r"^SystemCallFilter=@system-service adjtimex clock_adjtime$", text, re.MULTILINE)
