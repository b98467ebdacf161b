"""AnoGAN on generated products."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kizu_contract.pictures import read_picture
from kizu_train.data import open_data
from kizu_train.detectors.anogan import AnoganDetector, AnoganObjective, AnoganSettings
from kizu_train.detectors.base import Extras, TileShape
from kizu_train.errors import UsageError
from kizu_train.nets.descent import Descent
from kizu_train.nets.gan import GanNetwork
from kizu_train.nets.gan_search import Search, search_scores
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import Run, build_detector, open_run
from kizu_train.scoring import frame_scorer

QUICK = (
    "grid.tile_px=16",
    "grid.stride_px=8",
    "grid.margin_px=8",
    "network.widths=[12,24]",
    "network.noise=16",
    "train.steps=200",
    "encode.steps=150",
    "encode.learning_rate=3e-3",
    "reduction.smooth_sigma_px=2.0",
)
SHAPE = TileShape(8, 1, 1)
SMALL = AnoganSettings(
    network=GanNetwork(noise=4, widths=(4, 8)),
    train=Descent(steps=4, batch=4, learning_rate=1e-3, warm_up=0),
    encode=Descent(steps=3, batch=4, learning_rate=1e-3, warm_up=0),
)


class Stripes:
    """Tiles of stripes in random phase."""

    count = 64

    def batch(self, step: int, size: int) -> NDArray[np.uint8]:
        random = np.random.default_rng(step)
        across = np.arange(8) + random.uniform(0, 8, (size, 1, 1, 1))
        return np.broadcast_to(128 + 100 * np.sin(across).swapaxes(2, 3), (size, 8, 8, 1)).astype(np.uint8)

    def sweep(self) -> Iterator[NDArray[np.uint8]]:
        yield self.batch(0, self.count)

    def frame_layout(self) -> Any:
        raise AssertionError("places are not asked for")


class Memory:
    """A session that keeps every checkpoint, and stops after `stop_after` steps."""

    def __init__(self, saved: tuple[int, dict[str, Tensor]] | None = None, stop_after: int = 10**9) -> None:
        self.extras, self.device, self.seed = Extras(), "cpu", 3
        self.saves = {} if saved is None else {saved[0]: saved[1]}
        self._saved, self._stop_after, self._last = saved, stop_after, 0
        self.shown: list[tuple[int, int, set[str]]] = []

    @property
    def should_stop(self) -> bool:
        return self._last >= self._stop_after

    def restore(self) -> tuple[int, dict[str, Tensor]] | None:
        return self._saved

    def save(self, step: int, tensors: Callable[[], dict[str, Tensor]]) -> None:
        self._last = step
        self.saves[step] = {name: tensor.clone() for name, tensor in tensors().items()}

    def report(self, step: int, steps: int, losses: Mapping[str, float]) -> None:
        self.shown.append((step, steps, set(losses)))


def fitted(session: Memory) -> AnoganDetector:
    detector = AnoganDetector(SMALL, SHAPE, 1)
    detector.fit(Stripes(), session)
    return detector


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def border_excess(run: Run, data: Path) -> float:
    """How much higher maps of good pictures are within half a tile of the border than inside, on average."""
    score, reach = frame_scorer(run.scorer, run.grid, run.reduction), run.grid.tile_px // 2
    good = [test.path for test in open_data(data).tests if test.is_good]
    whole = np.mean([score(read_picture(path, run.colour)).map for path in good], axis=0)
    inside = whole[reach:-reach, reach:-reach]
    return float((whole.sum() - inside.sum()) / (whole.size - inside.size) / inside.mean())


def test_separates_planted_defects(
    make_product: Callable[..., Path],
    stand_trial: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """A generator that drew good tiles for some hundred steps cannot draw the planted spots, as a bundle."""
    data = make_product(tmp_path / "weave", "weave")
    trial = stand_trial("anogan", data, *QUICK)
    assert trial.image_auroc > 0.9
    assert trial.pixel_auroc > 0.95
    assert border_excess(trial.run, data) < 1.25
    again = open_run(trial.run.path).scorer
    tiles = torch.from_numpy(trial.run.golden_tiles)
    with torch.no_grad():
        assert torch.equal(again(tiles)[0], trial.run.scorer(tiles)[0])


def test_both_phases_train_their_own_networks() -> None:
    """The players learn in the first phase, the encoder alone in the second, and each reports its own losses."""
    start = AnoganDetector(SMALL, SHAPE, 1).tensors()
    session = Memory()
    end = fitted(session).tensors()
    parts = {name.rsplit(".", 1)[0] for name in start if not torch.equal(start[name], end[name])}
    assert {".".join(name.split(".")[:2]) for name in parts} >= {"gan.generator", "gan.discriminator", "encoder.dense"}
    drawn = session.saves[4]
    assert all(torch.equal(drawn[f"module.{name[4:]}"], end[name]) for name in end if name.startswith("gan."))
    assert session.shown == [(4, 7, {"discriminator", "slope", "generator"}), (7, 7, {"loss", "residual", "features"})]


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_resumed_fit_gives_the_same_weights(step: int) -> None:
    """Stopped in either phase or between them and gone on with, a fit ends at the bits of an uninterrupted one."""
    whole = fitted(Memory())
    stopped = Memory(stop_after=step)
    fitted(stopped)
    assert max(stopped.saves) == step
    assert same(fitted(Memory((step, stopped.saves[step]))).tensors(), whole.tensors())


def test_scores_add_features_to_the_residual() -> None:
    """izi_f = izi + κ · features; both draw the same map, whose values are absolute residuals between 0 and 1."""
    detectors = [
        AnoganDetector(replace(SMALL, loss=AnoganObjective(kappa=kappa)), SHAPE, 1) for kappa in (0.0, 1.0, 3.0)
    ]
    tiles = torch.from_numpy(Stripes().batch(1, 5))
    with torch.no_grad():
        plain, once, thrice = (detector.score_all(tiles) for detector in detectors)
        single = detectors[1].scorer("izi")(tiles)
    assert torch.equal(plain["izi_f"][0], plain["izi"][0])
    torch.testing.assert_close(thrice["izi_f"][0] - plain["izi"][0], 3 * (once["izi_f"][0] - plain["izi"][0]))
    assert torch.equal(single[0], once["izi"][0])
    assert torch.equal(once["izi_f"][1], once["izi"][1])
    assert 0 <= float(single[1].min()) <= float(single[1].max()) <= 1


def test_tiles_do_not_influence_one_another() -> None:
    """A tile's score is its own, whichever tiles stand beside it; by the search as well."""
    detector = fitted(Memory())
    tiles = torch.from_numpy(Stripes().batch(1, 4))
    with torch.no_grad():
        torch.testing.assert_close(
            detector.score_all(tiles)["izi_f"][0][2:3], detector.score_all(tiles[2:3])["izi_f"][0]
        )
    search = Search(steps=5)
    alone = search_scores(detector.gan, tiles[2:3], search, 0)
    torch.testing.assert_close(search_scores(detector.gan, tiles, search, 0)[2:3], alone)


def test_the_search_finds_what_the_generator_draws() -> None:
    """Fitting the noise brings the score of a drawn tile far down, leaves the networks alone, and repeats."""
    gan = AnoganDetector(SMALL, SHAPE, 1).gan
    with torch.no_grad():
        # An untrained generator draws nearly the same whatever the noise.
        torch._foreach_mul_(list(gan.generator.layers.parameters()), 3.0)
    before = {name: tensor.clone() for name, tensor in gan.state_dict().items()}
    with torch.no_grad():
        drawn = gan.generator(torch.tensor([[0.9, -0.9, 0.9, -0.9]])).permute(0, 2, 3, 1)
    tiles = (255 * drawn).round().to(torch.uint8)
    near, far = (search_scores(gan, tiles, Search(steps=steps, learning_rate=0.02), 0) for steps in (150, 1))
    assert float(near) < 0.5 * float(far)
    assert torch.equal(near, search_scores(gan, tiles, Search(steps=150, learning_rate=0.02), 0))
    assert same(before, gan.state_dict())


@pytest.mark.parametrize("override", ["grid.tile_px=30", "grid.tile_px=4", "network.widths=[4,4,4,4,4]"])
def test_tiles_must_halve(override: str) -> None:
    """A tile that cannot be halved as often as there are widths is refused, saying what to change."""
    sets = ("grid.stride_px=4", "map_cell_px=1", "grid.margin_px=0", override)
    with pytest.raises(UsageError, match=r"change grid.tile_px or network.widths"):
        build_detector(resolve_recipe("anogan", sets), "grey", 0)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("network.noise=0", "noise"),
        ("network.widths=[]", "widths"),
        ("loss.kappa=-1", "kappa"),
        ("loss.gradient_penalty=-1", "gradient_penalty"),
        ("encode.steps=0", "steps >= 1"),
    ],
)
def test_impossible_settings_are_refused(override: str, why: str) -> None:
    """Settings say what they need."""
    with pytest.raises(UsageError, match=why):
        resolve_recipe("anogan_28px", (override,))


def test_the_search_checks_its_settings() -> None:
    """A search without steps is refused."""
    with pytest.raises(ValueError, match="steps"):
        Search(steps=0)


def test_published_network() -> None:
    """28 px and two widths give the published sizes: 6,272 = 7 × 7 × 128 from noise of 30."""
    detector = build_detector(resolve_recipe("anogan_28px"), "grey", 0)
    assert isinstance(detector, AnoganDetector)
    assert detector.gan.generator.start == (128, 7, 7)
    assert detector.gan.generator.dense[0].weight.shape == (6272, 30)
    assert detector.gan.generator(torch.zeros(2, 30)).shape == (2, 1, 28, 28)


def test_borders_are_mirrored() -> None:
    """No network can tell the border of an even tile from its middle."""
    gan = AnoganDetector(SMALL, TileShape(16, 1, 1), 1).gan
    with torch.no_grad():
        seen = gan.discriminator.features(torch.full((1, 1, 16, 16), 0.7))
        drawn = gan.generator.layers(torch.ones(1, 8, 4, 4))
    torch.testing.assert_close(seen, seen[:, :, 2:3, 2:3].expand_as(seen))
    torch.testing.assert_close(drawn, drawn[:, :, 8:12, 8:12].repeat(1, 1, 4, 4))
