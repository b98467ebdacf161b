"""`fit auto`: planted flaws, pace, choice by figures, an ordinary run that says why."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kizu_train import auto, trials
from kizu_train.__main__ import main
from kizu_train.auto import AutoRequest, Choice, fit_auto
from kizu_train.detectors.base import Extras
from kizu_train.errors import DataError, TrainError, UsageError
from kizu_train.planted import KINDS, plant
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import open_run
from kizu_train.trials import Trial, scaled, steps_of

SMALL = """
about = "a test's"
detector = "patch_vae"
score = "m"
reduction = {{ smooth_sigma_px = 2.0 }}
grid = {{ tile_px = 16, stride_px = 8, margin_px = 8 }}
network = {{ widths = [8, 16], decoder_start = 16, decoder_widths = [8], latent = 4 }}
train = {{ steps = {steps}, batch = 16, learning_rate = {rate} }}
"""


@pytest.fixture
def candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """One that learns, one that learns nothing, one that breaks; short trials are enough for them."""
    for module in (auto, trials):
        monkeypatch.setattr(module, "LEAST_TRIAL_S", 0.5)
    for name, rate in (("blind", "1e-12"), ("broken", "1e30")):
        (tmp_path / f"{name}.toml").write_text(SMALL.format(steps=60, rate=rate))
    seeing = Path(auto.__file__).with_name("recipes") / "raw_gaussian.toml"
    (tmp_path / "seeing.toml").write_text(seeing.read_text())
    return tuple(str(tmp_path / f"{name}.toml") for name in ("blind", "seeing", "broken"))


@pytest.mark.slow
def test_the_better_candidate_is_chosen_and_trained(
    tmp_path: Path, draw_pictures: Callable[..., list[Path]], candidates: tuple[str, ...]
) -> None:
    """The candidate that learns wins, the run is an ordinary one that says why, and the time is about kept."""
    draw_pictures(tmp_path / "parts", 16, size=(64, 64))
    heard: list[Choice] = []
    began = time.monotonic()
    record = fit_auto(
        AutoRequest(tmp_path / "parts", tmp_path / "run", 1.0, candidates=candidates, device="cpu"), heard.append
    )
    assert time.monotonic() - began < 75
    assert [trial.recipe.name for trial in heard[0].trials] == ["seeing", "blind", "broken"]
    assert heard[0].trials[0].figure > heard[0].trials[1].figure + 0.05
    assert "not finite" in (heard[0].trials[2].failed or "")
    assert record.recipe["name"] == "seeing"
    assert record.recipe["about"].startswith("chosen by fit auto")
    assert record.metrics["auto_seeing_image_auroc"] > record.metrics["auto_blind_image_auroc"]
    assert "auto_broken_image_auroc" not in record.metrics
    run = open_run(tmp_path / "run")
    assert run.provenance.metrics["auto_seeing_au_pro"] == record.metrics["auto_seeing_au_pro"]
    assert "against blind" in run.recipe["about"]


@pytest.mark.slow
def test_members_that_were_tried_are_only_joined(
    tmp_path: Path, draw_pictures: Callable[..., list[Path]], candidates: tuple[str, ...]
) -> None:
    """A joint recipe of two candidates takes their weights, and is judged like any other."""
    draw_pictures(tmp_path / "parts", 12, size=(64, 64))
    tables = "".join(
        f"[members.{name}]\n{SMALL.format(steps=60, rate=rate)}"
        for name, rate in (("blind", "1e-12"), ("other", "3e-3"))
    )
    (tmp_path / "other.toml").write_text(SMALL.format(steps=60, rate="3e-3"))
    (tmp_path / "joint.toml").write_text(
        'detector = "joint"\nscore = "joint"\ngrid = { tile_px = 16, stride_px = 8, margin_px = 8 }\n'
        f'joint = {{ members = ["blind", "other"] }}\n{tables}'
    )
    names = (candidates[0], str(tmp_path / "other.toml"), str(tmp_path / "joint.toml"))
    heard: list[Choice] = []
    fit_auto(AutoRequest(tmp_path / "parts", tmp_path / "run", 1.0, candidates=names, device="cpu"), heard.append)
    trials = {trial.recipe.name: trial for trial in heard[0].trials}
    assert not any(trial.failed for trial in trials.values())
    assert trials["joint"].detector is None
    assert trials["joint"].pace.step_s == pytest.approx(
        (trials["blind"].pace.step_s + trials["other"].pace.step_s) / 2, rel=1e-6
    )


def test_what_cannot_be_done_is_refused(
    tmp_path: Path, draw_pictures: Callable[..., list[Path]], candidates: tuple[str, ...]
) -> None:
    """Too few pictures, too little time, a folder in use, and no candidate that works are each one sentence."""
    draw_pictures(tmp_path / "few", 5)
    draw_pictures(tmp_path / "enough", 10)

    def refuse(data: str, out: str, minutes: float, names: tuple[str, ...] | None = None) -> None:
        fit_auto(AutoRequest(tmp_path / data, tmp_path / out, minutes, device="cpu", candidates=names), print)

    with pytest.raises(DataError, match="5 good pictures; fit auto needs 8"):
        refuse("few", "run", 1)
    with pytest.raises(UsageError, match="does not do for even one candidate"):
        refuse("enough", "run", 0.001)
    with pytest.raises(UsageError, match="is in use"):
        refuse("enough", "few", 1)
    with pytest.raises(TrainError, match=r"no candidate could be tried in 0\.1 minutes: broken: the loss"):
        refuse("enough", "run", 0.1, candidates[2:])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("auto", "--resume"), "--resume: fit auto begins anew"),
        (("patch_vae", "--minutes", "3"), "--minutes: is for fit auto"),
        (("auto", "--set", "nope=1"), "recipe key nope is not known"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: tuple[str, ...], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options that auto, or a recipe, has no use for are refused."""
    assert main(["fit", *arguments, "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert why in capsys.readouterr().err


def test_steps_are_scaled_wherever_they_stand() -> None:
    """A share of the steps reaches every table that has some, members' too; nothing else changes."""
    whole = resolve_recipe("joint", ["joint.members=['synthetic_defects', 'patch_vae']"])
    half = scaled(whole, 0.5)
    members = ("synthetic_defects", "patch_vae")
    for name in members:
        assert half.settings.recipe(name).settings.train.steps == whole.settings.recipe(name).settings.train.steps // 2
    assert steps_of(whole) == sum(whole.settings.recipe(name).settings.train.steps for name in members)
    assert half.grid == whole.grid
    assert steps_of(resolve_recipe("raw_gaussian")) == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_planted_flaws_show_and_are_marked(channels: int) -> None:
    """Every kind occurs, changes what its mask marks and little else, and comes again with the same seed."""
    texture = np.random.default_rng(0).integers(60, 190, (12, 16, channels), np.uint8)
    picture = np.repeat(np.repeat(texture, 6, 0), 6, 1)
    found = set()
    for seed in range(60):
        spoilt, mask, kind = plant(picture, 14.0, np.random.default_rng(seed))
        again = plant(picture, 14.0, np.random.default_rng(seed))[0]
        found.add(kind)
        change = np.abs(spoilt.astype(int) - picture).max(2)
        assert 6 <= mask.sum() < mask.size // 4
        assert change[mask].min() >= 6
        assert change[~mask].max(initial=0) < 6
        assert (spoilt == again).all()
    assert found >= set(KINDS)


def test_a_flat_tiny_picture_gets_a_flaw_too() -> None:
    """Where nothing can be smeared or bent, a flaw is drawn all the same."""
    for seed in range(20):
        spoilt, mask, _ = plant(np.full((9, 9, 1), 128, np.uint8), 3.0, np.random.default_rng(seed))
        assert mask.any()
        assert (spoilt[mask] != 128).all()


def test_a_backbone_brings_feature_methods_and_a_joint_one() -> None:
    """With a backbone they compete too; whatever is joined comes after its members, also in a small budget."""
    backed = AutoRequest(Path("x"), Path("y"), 10.0, extras=Extras(backbone=Path("w.pth")))
    names = auto._names(backed)
    assert {"gaussian_features", "patch_memory", "joint_backbone", *auto.CANDIDATES} == set(names)
    for joined in ("joint", "joint_backbone"):
        members = resolve_recipe(joined).settings.joint.members
        assert all(names.index(member) < names.index(joined) for member in members)
    assert "patch_memory" not in auto._names(replace(backed, extras=Extras()))
    assert auto._names(replace(backed, minutes=1.0))[-2:] == ("joint", "joint_backbone")


@pytest.mark.parametrize(("behind", "chosen"), [(0.07, "joint"), (0.09, "synthetic_defects")])
def test_a_joint_recipe_is_preferred_when_it_is_close(behind: float, chosen: str) -> None:
    """Within noise of the best the joint recipe wins, and the reason says so; one that failed never does."""
    single = Trial(resolve_recipe("synthetic_defects"), 1.0, 0.8, 0.8)
    joint = Trial(resolve_recipe("joint"), 1.0, 0.8 - behind, 0.8 - behind)
    choice = auto._choose([single, joint], 5.0)
    assert choice.trials[0].recipe.name == chosen
    assert ("preferred" in choice.why) == (chosen == "joint")
    assert auto._choose([single, replace(joint, failed="broke")], 5.0).trials[0] is single
