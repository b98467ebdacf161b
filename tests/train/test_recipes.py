"""Recipes and overrides."""

from pathlib import Path

import pytest

from kizu_train.errors import UsageError
from kizu_train.recipes import DEFAULTS, list_recipes, parse_recipe, resolve_recipe


def test_packaged_recipes() -> None:
    """The recipes are there, each says what it is for in one line, and each survives its own resolved form."""
    found = list_recipes()
    assert {"patch_vae", "patch_vae_28px", "patch_vae_paper", "synthetic_defects", "joint"} <= found.keys()
    for name, about in found.items():
        assert 20 < len(about) <= 118
        assert "\n" not in about
        recipe = resolve_recipe(name)
        assert recipe.name == name
        assert parse_recipe(recipe.to_dict()) == recipe


def test_the_named_defaults() -> None:
    """Each stands for a recipe that is there, and gives it under its own name, overrides included."""
    for name, recipe in DEFAULTS.items():
        assert resolve_recipe(name, ["reduction.kind=mean"]) == resolve_recipe(recipe, ["reduction.kind=mean"])
    assert not DEFAULTS.keys() & list_recipes().keys()


def test_overrides_are_typed() -> None:
    """`--set` takes numbers, lists, booleans and bare words, each to the type of its setting."""
    overrides = (
        "train.steps=7",
        "network.widths=[4, 8]",
        "network.decoder_widths=[4]",
        "augment.flips=true",
        "score=l",
    )
    recipe = resolve_recipe("patch_vae", (*overrides, "loss.beta=2", "reduction.kind=mean"))
    settings = recipe.settings
    assert (settings.train.steps, settings.network.widths, settings.augment.flips) == (7, (4, 8), True)
    assert (recipe.score, settings.loss.beta, recipe.reduction.kind) == ("l", 2.0, "mean")


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("train.step=7", r"train.step is not known; known are .*train.steps"),
        ("nothing=7", r"nothing is not known; known are .*network.latent"),
        ("train.steps=many", r"recipe.train.steps is 'many'; it must be a int"),
        ("train.steps=1.5", "must be a int"),
        ("augment.flips=1", "must be a bool"),
        ("train=7", "recipe.train must be an object"),
        ("train.steps.more=7", "train.steps"),
        ("train.steps", "key=value"),
        ("grid.stride_px=64", "stride_px is 64"),
        ("map_cell_px=5", "must divide"),
        ("network.kernel=3", "even number"),
        ("detector=oracle", "known are .*patch_vae"),
        ("calibration.warn_rate=0.0001", "reject_rate"),
        ("data.colour=blue", "auto, grey, rgb"),
    ],
)
def test_wrong_overrides_are_refused(override: str, why: str) -> None:
    """An unknown key, a wrong type or an impossible value is refused, naming what is known or needed."""
    with pytest.raises(UsageError, match=why):
        resolve_recipe("patch_vae", ["train.steps=5", override])


def test_recipe_file(tmp_path: Path) -> None:
    """A recipe may be a TOML file; its name is the file's."""
    file = tmp_path / "mine.toml"
    file.write_text('detector = "patch_vae"\n[train]\nsteps = 3\n')
    recipe = resolve_recipe(str(file), ["train.batch=4"])
    assert (recipe.name, recipe.settings.train.steps, recipe.settings.train.batch) == ("mine", 3, 4)


@pytest.mark.parametrize(("name", "why"), [("nope", "known are .*patch_vae, "), ("nope.toml", "cannot be read")])
def test_unknown_recipes(name: str, why: str) -> None:
    """A recipe that does not exist is refused with the known names."""
    with pytest.raises(UsageError, match=why):
        resolve_recipe(name)


def test_broken_toml(tmp_path: Path) -> None:
    """A file that is not TOML is refused by name."""
    (tmp_path / "bad.toml").write_text("[train\n")
    with pytest.raises(UsageError, match=r"bad.toml: is not TOML"):
        resolve_recipe(str(tmp_path / "bad.toml"))
