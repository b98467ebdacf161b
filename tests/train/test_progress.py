"""What a fit shows: the bar needs a terminal, so it gets one."""

import os
import pty
import subprocess
import sys

_SHOW = """
from kizu_train.progress import FitProgress
progress = FitProgress()
progress.start()
for step in (1, 2, 4):
    progress.show(step, 4, {"loss": 9.0, "D": 1.5, "A": -2.5, "M": 3.5})
progress.stop()
"""


def test_a_terminal_shows_a_bar_with_the_losses() -> None:
    """On a terminal the bar shows the steps, the losses D, A and M, and what is left."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", _SHOW], stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:
        pass  # a pseudo-terminal ends this way
    finally:
        os.close(ours)
    assert process.wait(30) == 0, shown.decode()
    assert "D 1.5  A -2.5  M 3.5" in shown.decode()
    assert "4/4" in shown.decode()


def test_elsewhere_lines_show_the_losses() -> None:
    """Without a terminal there is a plain line now and then, the last step always."""
    done = subprocess.run([sys.executable, "-c", _SHOW], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.splitlines()[-1].startswith("training 4/4  D 1.5  A -2.5  M 3.5")
