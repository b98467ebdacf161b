"""What Deep One-Class, metric and geometric learning share: an embedding, scored by how odd it is among good ones.

Kinds of score: `lof`, the local outlier factor: how much further the neighbours are than theirs are to each other.
`distance`: the mean distance to the neighbours, which judges all regions by one measure. Where good tiles are of many
kinds, common and rare ones, the factor is low about the rare ones whatever it may be that lies there.

A fit is: train the embedding; keep the embeddings of a sample of good tiles; where asked for, train a localiser on the
frozen scorer. Letters: N tiles; C channels; T tile side; m map cell side.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kizu_train.detectors.base import Scores, Session, TileShape, TileSource
from kizu_train.errors import TrainError
from kizu_train.nets.backbone_files import read_backbone
from kizu_train.nets.backbones import Backbone, build_backbone
from kizu_train.nets.descent import Descent, descend
from kizu_train.nets.embedding import Embedding, EmbeddingNet, make_embedding
from kizu_train.nets.layers import seeded, to_pixels
from kizu_train.nets.localiser import Localiser, LocaliserSettings, make_localiser, spread, train_localiser
from kizu_train.nets.lof import LocalOutlierFactor, Lof, fit_lof
from kizu_train.nets.phases import Phase, earlier
from kizu_train.nets.reference_classes import read_references, sample_tiles
from kizu_train.nets.transforms import Transforms

_BATCH_PIXELS = 2**19


@dataclass(frozen=True)
class EmbeddingSettings:
    """Settings that every detector scored by its local outlier factor has."""

    network: EmbeddingNet = field(default_factory=EmbeddingNet)
    transforms: Transforms = field(default_factory=Transforms)
    lof: Lof = field(default_factory=Lof)
    localiser: LocaliserSettings = field(default_factory=LocaliserSettings)
    train: Descent = field(default_factory=lambda: Descent(steps=1500, batch=32, learning_rate=1e-3))


class Task(nn.Module, ABC):
    """What the embedding is trained on: holds it and its heads."""

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    @abstractmethod
    def loss(self, good: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Good pixels float32 [N, C, T, T], 0–1 → loss and the terms to show."""


class OtherThings:
    """Pixels of other things with their classes, from a user's folder or made from good tiles by transforms."""

    def __init__(self, transforms: Transforms, references: list[Tensor]) -> None:
        self.transforms = transforms
        self.classes = len(references) or transforms.classes
        self._tiles = references

    @classmethod
    def of(cls, session: Session, transforms: Transforms, shape: TileShape) -> "OtherThings":
        """From the session's `references` folder where one was given. Raises DataError where that is unfit."""
        folder = session.extras.references
        found = read_references(folder, shape, session.seed) if folder else []
        return cls(transforms, [tiles.to(session.device) for tiles in found])

    def draw(self, good: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As many tiles as `good` [N, C, T, T] has, relit, and their classes int64 [N] from 0."""
        if not self._tiles:
            changed, labels = self.transforms.apply(good, generator)
            return self.transforms.relight(changed, generator), labels
        labels = torch.arange(len(good), device=good.device) % self.classes
        labels = labels[torch.randperm(len(good), generator=generator, device=good.device)]
        chance = torch.rand(len(good), generator=generator, device=good.device)
        pixels = torch.empty_like(good)
        for index, tiles in enumerate(self._tiles):
            rows = (chance[labels == index] * len(tiles)).long()
            pixels[labels == index] = to_pixels(tiles[rows])
        return self.transforms.relight(pixels, generator), labels


class EmbeddingScorer(nn.Module):
    """Tiles uint8 [N, T, T, C] → score [N] of one `kind` and map [N, T/m, T/m].

    Without a localiser the map is the score spread evenly; overlapping tiles then localise coarsely.
    """

    def __init__(
        self, kind: str, embedding: Embedding, lof: LocalOutlierFactor, localiser: Localiser | None,
        even_share: float, cells: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kind, self.embedding, self.lof, self.localiser = kind, embedding, lof, localiser
        self.even_share, self.cells = even_share, cells

    def forward(self, tiles: Tensor) -> Scores:
        """Score `tiles`; all normalisation is inside."""
        pixels = to_pixels(tiles)
        return self.with_map(self.score(pixels), pixels)

    def score(self, pixels: Tensor) -> Tensor:
        """Score pixels [N, C, T, T]."""
        embeddings = self.embedding(pixels)
        found: Tensor = self.lof(embeddings) if self.kind == "lof" else self.lof.distance(embeddings)
        return found

    def with_map(self, score: Tensor, pixels: Tensor) -> Scores:
        """Give the score [N] of pixels [N, C, T, T] its map."""
        counts = self.localiser(pixels) if self.localiser else None
        return spread(score, counts, self.even_share, self.cells)


class PretrainedBody(nn.Module):
    """Layers of a pretrained backbone, frozen, each averaged over a lattice of `side` × `side`: [N, features]."""

    def __init__(self, backbone: Backbone, shape: TileShape, side: int) -> None:
        super().__init__()
        self.backbone, self.side = backbone, side
        with torch.no_grad():
            self.features = self(torch.zeros(1, shape.channels, shape.tile_px, shape.tile_px)).shape[1]

    def forward(self, pixels: Tensor) -> Tensor:
        """Describe `pixels` [N, C, T, T]."""
        maps = self.backbone(pixels)
        cells = [max(1, layer.shape[-1] // self.side) for layer in maps]
        pooled = [nn.functional.avg_pool2d(layer, cell) for layer, cell in zip(maps, cells, strict=True)]
        return torch.cat([layer.flatten(1) for layer in pooled], 1)

    def train(self, mode: bool = True) -> "PretrainedBody":
        """Keep the backbone's statistics as they are."""
        super().train(mode)
        self.backbone.eval()
        return self


class EmbeddingDetector(ABC):
    """An embedding with a local outlier factor as a detector; its `task` is what differs."""

    score_kinds: tuple[str, ...] = ("lof", "distance")
    """The first is what the localiser explains."""

    def __init__(self, settings: EmbeddingSettings, shape: TileShape, seed: int) -> None:
        self.embedding_settings, self.shape, self.seed = settings, shape, seed
        self.embedding = make_embedding(settings.network, shape, seed).eval()
        self.architecture = ""
        self.lof: LocalOutlierFactor | None = None
        self.localiser = make_localiser(settings.localiser, shape, seed + 1)

    @abstractmethod
    def task(self, tiles: TileSource, session: Session) -> Task:
        """What to train the embedding on."""

    def fit(self, tiles: TileSource, session: Session) -> None:
        """Train the embedding, take the references, train the localiser."""
        settings, saved = self.embedding_settings, session.restore()
        if session.extras.backbone is not None:
            self._take_backbone(*read_backbone(session.extras.backbone))
        total = settings.train.steps + (settings.localiser.train.steps if self.localiser else 0)
        first = Phase(session, 0, total).resume(saved)
        if saved is not None and (kept := earlier(saved[1])):
            self.load(kept)
        else:
            self._learn(tiles, first)
            if first.done < settings.train.steps:
                return
        if self.localiser is not None:
            second = Phase(session, settings.train.steps, total, self.tensors).resume(saved)
            self._localise(self.localiser, tiles, second)

    def tensors(self) -> dict[str, Tensor]:
        """Embedding, references and localiser, and which backbone the embedding builds on."""
        parts = {"embedding": self.embedding.state_dict(), "lof": self._lof().learned()}
        if self.localiser is not None:
            parts["localiser"] = self.localiser.state_dict()
        found = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
        if self.architecture:
            found["architecture"] = torch.tensor(list(self.architecture.encode()), dtype=torch.uint8)
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        if "architecture" in tensors:
            name = bytes(tensors["architecture"].tolist()).decode()
            self._take_backbone(name, build_backbone(name))
        self.embedding.load_state_dict(_part(tensors, "embedding"))
        self.lof = LocalOutlierFactor(self.embedding_settings.lof, _part(tensors, "lof"))
        if self.localiser is not None:
            self.localiser.load_state_dict(_part(tensors, "localiser"))

    def score_all(self, tiles: Tensor) -> dict[str, Scores]:
        """Score by both kinds in one pass."""
        pixels, scorer = to_pixels(tiles), self._scorer("lof")
        embeddings = self.embedding(pixels)
        score, cells = scorer.with_map(self._lof()(embeddings), pixels)
        distance = self._lof().distance(embeddings)
        # A factor is never 0, so that its map tells how much each cell counts.
        return {"lof": (score, cells), "distance": (distance, cells * (distance / score)[:, None, None])}

    def scorer(self, kind: str) -> nn.Module:
        """The exportable module of `kind`."""
        return self._scorer(kind)

    def _scorer(self, kind: str) -> EmbeddingScorer:
        cells = self.shape.tile_px // self.shape.map_cell_px
        even_share = self.embedding_settings.localiser.even_share
        return EmbeddingScorer(kind, self.embedding, self._lof(), self.localiser, even_share, cells).eval()

    def _lof(self) -> LocalOutlierFactor:
        if self.lof is None:
            raise TrainError("this detector has learned nothing yet: it has no references to score against")
        return self.lof

    def _learn(self, tiles: TileSource, session: Session) -> None:
        task = self.task(tiles, session)
        transforms = self.embedding_settings.transforms

        def loss(batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            total, terms = task.loss(transforms.relight(to_pixels(batch), generator), generator)
            return total, {"loss": total.detach()} | terms

        descend(task, loss, self.embedding_settings.train, tiles, session)
        chosen = sample_tiles(tiles, self.embedding_settings.lof.references, self.seed).tiles
        self.lof = fit_lof(self._embed(torch.from_numpy(chosen)), self.embedding_settings.lof)

    @torch.no_grad()
    def _embed(self, tiles: Tensor) -> Tensor:
        size = max(1, _BATCH_PIXELS // self.shape.tile_px**2)
        return torch.cat([self.embedding(to_pixels(part)) for part in torch.split(tiles, size)])

    def _localise(self, localiser: Localiser, tiles: TileSource, session: Session) -> None:
        scorer = self._scorer(self.score_kinds[0]).requires_grad_(requires_grad=False).to(session.device)
        localiser.requires_grad_(requires_grad=True)
        train_localiser(localiser, scorer.score, self.embedding_settings.localiser, tiles, session)
        scorer.cpu()

    def _take_backbone(self, architecture: str, backbone: Backbone) -> None:
        network = self.embedding_settings.network
        body = PretrainedBody(backbone, self.shape, 2 if network.pool == "flat" else 1)
        with seeded(self.seed):
            self.embedding = Embedding(body, body.features, network.size).eval()
        self.architecture = architecture


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
