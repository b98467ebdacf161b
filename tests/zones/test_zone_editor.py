"""The page on which zones are drawn: what it is given, what it gives back, and how the command refuses."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from kizu_agent.__main__ import main
from kizu_agent.camera_settings import ZoneConfig
from kizu_agent.zone_editor import zone_page

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
GIVEN = ZoneConfig(name="thread", polygon=((10, 10), (90, 10), (50, 70)), threshold_factor=1.5, min_area_px=12)
DRAW = """
<script>
const act = () => setTimeout(() => {
  const box = canvas.getBoundingClientRect();
  const press = (x, y) => canvas.dispatchEvent(new PointerEvent("pointerdown", {
    clientX: box.left + (x + .5) * box.width / canvas.width,
    clientY: box.top + (y + .5) * box.height / canvas.height }));
  document.getElementById("add-exclude").click();
  [[120, 20], [180, 20], [180, 60], [120, 60]].forEach(([x, y]) => press(x, y));
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
  press(100, 90); press(110, 95);
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));  // two corners are no zone
  const out = document.createElement("pre"); out.id = "result"; out.textContent = toml(); document.body.append(out);
}, 0);
if (picture.complete) act(); else picture.addEventListener("load", act);
</script>
"""


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "reference.png"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (100, 200, 3), np.uint8))
    return path


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed; the page is not run")
@pytest.mark.slow
def test_what_is_drawn_is_what_the_configuration_takes(tmp_path: Path, picture: Path) -> None:
    """In a real browser: the zones given and one more that is clicked come back as tables for the agent."""
    page = tmp_path / "zones.html"
    page.write_text(zone_page("cam", picture, (GIVEN,)).replace("</html>", DRAW + "</html>"), "utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [str(CHROMIUM), *options, "--virtual-time-budget=5000", "--dump-dom", f"file://{page}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    _, _, after = done.stdout.partition('<pre id="result">')
    tables: dict[str, Any] = tomllib.loads(after.partition("</pre>")[0])
    zones = [ZoneConfig.model_validate(zone) for zone in tables["cameras"]["zones"]]
    corners = ((120, 20), (180, 20), (180, 60), (120, 60))
    assert zones == [GIVEN, ZoneConfig(name="out1", kind="exclude", polygon=corners)]


def test_no_name_can_break_out_of_the_page(picture: Path) -> None:
    """What comes from a command line stays text."""
    page = zone_page("</script><script>alert(1)</script>", picture)
    assert "<script>alert" not in page


def test_the_command_takes_the_cameras_zones(tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page begins with what is configured; an unknown camera is an error that names those there are."""
    config = tmp_path / "agent.toml"
    cameras = '[[cameras]]\nname = "top"\nsource = "sim:gears"\n[[cameras]]\nname = "side"\nsource = "sim:gears"\n'
    zone = '[[cameras.zones]]\nname = "rim"\npolygon = [[1, 2], [3, 4], [1, 9]]\n'
    config.write_text(f'[agent]\nname = "box"\nprefix = "plant"\n{cameras}{zone}', "utf-8")
    out = tmp_path / "zones.html"
    given = ["zones", str(picture), "--config", str(config), "--out", str(out)]
    assert main([*given, "--camera", "side"]) == 0
    assert '"name": "rim"' in out.read_text("utf-8")
    assert main(given) == 3
    assert "name one of top, side" in capsys.readouterr().err
    assert main(["zones", str(config), "--out", str(out)]) == 1
    assert "agent.toml" in capsys.readouterr().err
