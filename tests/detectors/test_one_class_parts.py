"""The parts of one-class and metric learning: transforms, planted flaws, references, places, heads, phases."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from kizu_train.detectors.base import TileShape
from kizu_train.detectors.doc import DocLoss, compactness
from kizu_train.errors import DataError, UsageError
from kizu_train.nets.embedding import ClassHead, EmbeddingNet, MetricLoss, make_embedding, to_sphere
from kizu_train.nets.phases import Phase, earlier
from kizu_train.nets.planting import plant
from kizu_train.nets.reference_classes import Places, TileSample, place_kinds, read_references, sample_tiles
from kizu_train.nets.scored_by_lof import OtherThings
from kizu_train.nets.transforms import Transforms


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _pixels(count: int, channels: int = 1, side: int = 16) -> Tensor:
    return torch.rand(count, channels, side, side, generator=_generator(9))


def test_rigid_transforms_are_all_different() -> None:
    """Seven turns and flips keep every pixel, four shifts move the middle; none equals another or the tile itself."""
    pixels = _pixels(1)
    views = [pixels, *(transform(pixels) for transform in Transforms().rigid(16))]
    assert len(views) == 12
    for index, view in enumerate(views):
        assert view.shape == pixels.shape
        assert not any(torch.equal(view, other) for other in views[:index])
    for turned in views[1:8]:
        assert torch.equal(turned.flatten().sort().values, pixels.flatten().sort().values)
    assert torch.equal(views[8][0, 0, 8:12, 4:12], pixels[0, 0, 4:8, 4:12])


def test_changed_tiles_are_what_their_class_says() -> None:
    """Each class comes up, its tiles are those of its transform; parts are exchanged in the last."""
    pixels, transforms = _pixels(44), Transforms()
    changed, labels = transforms.apply(pixels, _generator())
    assert labels.bincount().tolist() == [2] * 11 + [22]
    assert (changed[labels == 11] != pixels[labels == 11]).any((1, 2, 3)).all()
    for index, transform in enumerate(transforms.rigid(16)):
        assert torch.equal(changed[labels == index], transform(pixels[labels == index]))
    again, _ = transforms.apply(pixels, _generator())
    assert torch.equal(changed, again)
    assert Transforms(turns=False, shifts=False).apply(pixels, _generator())[1].tolist() == [0] * 44
    assert Transforms(parts=False).apply(pixels, _generator())[1].bincount().tolist() == [4] * 11


def test_planted_flaws_lie_where_their_cover_says() -> None:
    """Pixels change under the cover alone; covers are local, differ from tile to tile, and repeat for one seed."""
    pixels = _pixels(200, channels=3)
    spoilt, cover = plant(pixels, _generator())
    away = (cover == 0).expand_as(pixels)
    assert torch.equal(spoilt[away], pixels[away])
    assert 0 <= spoilt.min() <= spoilt.max() <= 1
    share = cover.mean((1, 2, 3))
    assert 0.005 < share.median() < 0.1
    assert share.max() < 0.4
    assert len({tuple(row.tolist()) for row in cover.flatten(1)}) > 180
    assert torch.equal(plant(pixels, _generator())[0], spoilt)


class _Sweep:
    """A source of numbered tiles, `each` a picture."""

    def __init__(self, pictures: list[NDArray[np.uint8]]) -> None:
        self.pictures = pictures
        self.count = sum(map(len, pictures))

    def batch(self, step: int, size: int) -> NDArray[np.uint8]:
        return np.concatenate(self.pictures)[np.random.default_rng(step).integers(0, self.count, size)]

    def sweep(self) -> Iterator[NDArray[np.uint8]]:
        return iter(self.pictures)


def _numbered(lengths: list[int]) -> list[NDArray[np.uint8]]:
    numbers = np.split(np.arange(sum(lengths), dtype=np.uint8), np.cumsum(lengths)[:-1])
    return [np.broadcast_to(part[:, None, None, None], (len(part), 8, 8, 1)) for part in numbers]


def test_samples_hold_no_tile_twice() -> None:
    """A sample is of the wanted size, in order, without repeats, and knows each tile's place in its picture."""
    sample = sample_tiles(_Sweep(_numbered([20, 30, 40])), 50, 3)
    numbers = sample.tiles[:, 0, 0, 0].astype(int)
    assert len(set(numbers.tolist())) == 50
    assert (np.diff(numbers) > 0).all()
    starts = np.array([0, 20, 50])[np.searchsorted([20, 50], numbers, side="right")]
    assert np.array_equal(sample.places, numbers - starts)
    assert not sample.has_one_grid
    assert sample_tiles(_Sweep(_numbered([20, 20])), 99, 3).has_one_grid


def test_places_count_where_pictures_show_the_same() -> None:
    """Of fixtured pictures the kinds of places follow what lies there; of shuffled ones there are none."""
    draw = np.random.default_rng(0)
    look = draw.integers(20, 230, 36)
    places = np.tile(np.arange(36), 20)
    grain = draw.normal(0, 5, (len(places), 8, 8, 1))
    tiles = np.clip(look[places][:, None, None, None] + grain, 0, 255).astype(np.uint8)
    kinds = place_kinds(TileSample(tiles, places, has_one_grid=True), Places(kinds=4), 0)
    assert kinds is not None
    assert set(kinds.tolist()) == {0, 1, 2, 3}
    assert np.array_equal(kinds[:36], kinds[36:72])
    shuffled = draw.permutation(places)
    assert place_kinds(TileSample(tiles, shuffled, has_one_grid=True), Places(), 0) is None
    assert place_kinds(TileSample(tiles, places, has_one_grid=False), Places(), 0) is None


def test_references_come_by_class(tmp_path: Path) -> None:
    """Sub-folders are classes in the order of their names; small pictures are mirrored up; others are refused."""
    for name, shade, side in (("b", 200, 40), ("a", 50, 5)):
        (tmp_path / name).mkdir()
        for index in range(3):
            cv2.imwrite(str(tmp_path / name / f"{index}.png"), np.full((side, side), shade, np.uint8))
    (tmp_path / "empty").mkdir()
    found = read_references(tmp_path, TileShape(16, 1, 4), 0)
    assert [int(tiles.float().mean()) for tiles in found] == [50, 200]
    assert found[0].shape == (3, 16, 16, 1)
    assert len(found[1]) > 3
    with pytest.raises(DataError, match="at least two sub-folders"):
        read_references(tmp_path / "a", TileShape(16, 1, 4), 0)


def test_others_are_of_the_class_they_are_said_to_be() -> None:
    """Drawn reference tiles carry their own class, each class as often as it goes, and light changes but a little."""
    shades = torch.tensor([50, 120, 200], dtype=torch.uint8)
    others = OtherThings(Transforms(), [shade.expand(4, 16, 16, 1) for shade in shades])
    pixels, labels = others.draw(_pixels(12), _generator())
    assert others.classes == 3
    assert labels.bincount().tolist() == [4, 4, 4]
    assert torch.allclose(pixels.mean((1, 2, 3)), shades[labels] / 255, rtol=0.11)
    assert OtherThings(Transforms(), []).classes == 12


def test_arcface_asks_for_a_margin() -> None:
    """Without a margin it is the plain softmax of scaled cosines; with one the right class must be nearer by it."""
    points, labels = to_sphere(torch.randn(50, 8, generator=_generator())), torch.arange(50) % 3
    plain, strict = (ClassHead(8, 3, MetricLoss("arcface", 10.0, margin), 1) for margin in (0.0, 0.3))
    assert torch.allclose(plain.loss(points, labels), functional.cross_entropy(plain(points), labels))
    assert strict.loss(points, labels) > plain.loss(points, labels) + 0.5
    cosine = (strict(points) / 10).detach()[torch.arange(50), labels]
    turned = torch.cos(torch.acos(cosine) + 0.3)
    logits = strict(points).detach()
    logits[torch.arange(50), labels] = 10 * turned
    near = torch.acos(cosine) + 0.3 < math.pi
    assert near.all()
    assert torch.allclose(strict.loss(points, labels), functional.cross_entropy(logits, labels), atol=1e-5)


def test_compactness_is_the_distance_to_the_others() -> None:
    """It is the mean squared distance from each point to the mean of all the others."""
    points = torch.randn(6, 4, generator=_generator())
    others = torch.stack([torch.cat([points[:i], points[i + 1 :]]).mean(0) for i in range(6)])
    assert torch.allclose(compactness(points), ((points - others) ** 2).sum(1).mean())


def test_embeddings_lie_on_the_sphere() -> None:
    """Every pool and an odd tile size give points of length 1; a seed decides the weights; tiny tiles are refused."""
    for pool in ("flat", "mean"):
        shape = TileShape(28, 1, 4)
        network = EmbeddingNet((8, 8, 8), 6, pool)  # type: ignore[arg-type]
        found = make_embedding(network, shape, 0).eval()(_pixels(3, side=28))
        assert torch.allclose(found.norm(dim=1), torch.ones(3))
        assert torch.equal(found, make_embedding(network, shape, 0).eval()(_pixels(3, side=28)))
    with pytest.raises(UsageError, match="too small"):
        make_embedding(EmbeddingNet(), TileShape(4, 1, 4), 0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: EmbeddingNet(widths=()),
        lambda: MetricLoss(scale=0),
        lambda: MetricLoss(margin=2.0),
        lambda: Transforms(turns=False, shifts=False, parts=False),
        lambda: Transforms(light=1.0),
        lambda: Places(kinds=1),
        lambda: DocLoss(compactness=-1.0),
    ],
)
def test_settings_refuse_what_cannot_be(wrong: Callable[[], object]) -> None:
    """Each is refused."""
    with pytest.raises(ValueError, match=r"\w"):
        wrong()


class _Session:
    """Keeps the last checkpoint."""

    def __init__(self) -> None:
        self.saved: tuple[int, dict[str, Tensor]] | None = None
        self.seed = 3

    def save(self, step: int, tensors: Callable[[], dict[str, Tensor]]) -> None:
        self.saved = (step, tensors())


def test_phases_find_their_own_checkpoint() -> None:
    """A checkpoint goes back to the phase that wrote it, with its own count of steps and what came before."""
    session, weight, learned = _Session(), torch.ones(1), torch.zeros(2)
    Phase(session, 0, 30).save(10, lambda: {"module.w": weight})  # type: ignore[arg-type]
    assert session.saved is not None
    assert session.saved[0] == 10
    assert earlier(session.saved[1]) == {}
    first = Phase(session, 0, 30).resume(session.saved)  # type: ignore[arg-type]
    second = Phase(session, 10, 30, lambda: {"a": learned}).resume(session.saved)  # type: ignore[arg-type]
    assert first.restore() is not None
    assert second.restore() is None
    second.save(5, lambda: {"module.w": weight})
    assert session.saved[0] == 15
    assert torch.equal(earlier(session.saved[1])["a"], learned)
    resumed = Phase(session, 10, 30, lambda: {"a": learned}).resume(session.saved).restore()  # type: ignore[arg-type]
    assert resumed is not None
    assert resumed[0] == 5
    assert Phase(session, 0, 30).resume(session.saved).restore() is None  # type: ignore[arg-type]
