"""A small network that learns features from the user's own good pictures, where no pretrained one is given.

Two tasks at once, both dense, at two depths:

*Planted patches*: find, cell by cell, what was pasted into a tile. Source: Li et al., "CutPaste", 2021. What differs:
the answer is asked of every cell, not of the picture; shapes are discs and bars with ragged edges; a cell counts only
as far as the paste changed it (as in NSA, Schlüter et al. 2022).

*Cells know each other again*: of two views of a tile under other light and noise, a cell's features must be nearer to
its own other view than to other cells. Source: Wang et al., "Dense Contrastive Learning", 2021, without its queue. It
keeps what tells normal places apart, which the first task alone would forget.

Letters: B tiles in a batch; C channels; P crop side; h, w cells.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kizu_train.nets.features import to_scale
from kizu_train.nets.layers import MirrorConv, to_pixels
from kizu_train.nets.self_supervised_planting import Planting, plant

_STRIDES = (4, 8)
_CELLS = 256
"""Cells drawn for each depth and step to know each other again."""
_RARE = 3.0
"""How much more a planted cell weighs: most cells of most crops are good."""


@dataclass(frozen=True)
class ScratchNetwork:
    """Widths at stride 2, 4 and 8, the crops it is trained on, and the weight of each task.

    A cell sees 29 pixels at the first depth and 53 at the second. `embedding`: channels in which cells are compared.
    """

    widths: tuple[int, int, int] = (24, 48, 96)
    crop_px: int = 64
    planted: float = 1.0
    instance: float = 0.3
    temperature: float = 0.1
    embedding: int = 32

    def __post_init__(self) -> None:
        if min(*self.widths, self.embedding) < 1 or self.temperature <= 0 or min(self.planted, self.instance) < 0:
            raise ValueError("widths, embedding and temperature must be positive, planted and instance at least 0")
        if self.crop_px < 16 or self.crop_px % _STRIDES[-1]:
            raise ValueError(f"crop_px must be a multiple of {_STRIDES[-1]}, at least 16")


class ScratchNet(nn.Module):
    """Pixels float32 [N, C, T, T], 0–1 → features at stride 4 and 8."""

    strides = _STRIDES

    def __init__(self, widths: tuple[int, int, int], channels: int) -> None:
        super().__init__()
        low, middle, high = widths
        self.shallow = nn.Sequential(
            MirrorConv(channels, low, 5, 2),
            MirrorConv(low, low),
            MirrorConv(low, middle, 3, 2),
            MirrorConv(middle, middle),
        )
        self.deep = nn.Sequential(MirrorConv(middle, high, 3, 2), MirrorConv(high, high))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Both feature maps, [N, middle, T/4, T/4] and [N, high, T/8, T/8]."""
        shallow = self.shallow(pixels * 4 - 2)
        return [shallow, self.deep(shallow)]


def net_from(state: Mapping[str, Tensor]) -> ScratchNet:
    """The network whose `state_dict` was `state`: widths are the shapes of its parameters. Raises KeyError."""
    first, last = state["shallow.0.1.weight"], state["deep.0.1.weight"]
    net = ScratchNet((len(first), int(last.shape[1]), len(last)), int(first.shape[1]))
    net.load_state_dict(dict(state))
    return net.eval().requires_grad_(requires_grad=False)


class Pretext(nn.Module):
    """The network with its tasks' heads, which are thrown away after training; `done` counts the steps.

    Each step looks at crops of one of `scales`, 2 for half size.
    """

    done: Tensor

    def __init__(
        self, settings: ScratchNetwork, planting: Planting, channels: int, scales: tuple[int, ...] = (1,)
    ) -> None:
        super().__init__()
        self.settings, self.planting, self.scales = settings, planting, scales
        self.net = ScratchNet(settings.widths, channels)
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))
        depths = settings.widths[1:]
        self.finders = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in depths)
        self.embedders = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, settings.embedding, 1))
            for width in depths
        )

    def loss(self, tiles: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of both tasks' losses on crops of `tiles` uint8 [B, T, T, C]; and each for itself."""
        self.done += 1
        scale = self.scales[int(torch.randint(len(self.scales), (), generator=generator, device=tiles.device))]
        side = min(scale * self.settings.crop_px, tiles.shape[1])
        crops = to_scale(to_pixels(crop(tiles, side, generator)), scale)
        spoilt, change = plant(crops, self.planting, generator)
        views = torch.cat([relight(spoilt, generator), relight(crops, generator)])
        planted = instance = crops.new_zeros(())
        maps = self.net(views)
        for features, stride, finder, embedder in zip(maps, _STRIDES, self.finders, self.embedders, strict=True):
            truth = functional.avg_pool2d(change, stride)  # [B, 1, h, w]
            planted = planted + _finding(finder(features), (2 * truth).clamp(max=1))
            instance = instance + self._knowing(embedder(features), truth, generator)
        total = self.settings.planted * planted + self.settings.instance * instance
        return total, {"loss": total.detach(), "planted": planted.detach(), "instance": instance.detach()}

    def _knowing(self, embedded: Tensor, truth: Tensor, generator: torch.Generator) -> Tensor:
        """InfoNCE among cells drawn from the batch; what was planted is not asked for, only told apart."""
        one, other = functional.normalize(embedded, dim=1).chunk(2)
        drawn = torch.randint(truth.numel(), (_CELLS,), generator=generator, device=truth.device)
        ours, theirs = (view.permute(0, 2, 3, 1).flatten(0, 2)[drawn] for view in (one, other))
        likeness = ours @ theirs.T / self.settings.temperature
        same = drawn[:, None] == drawn[None, :]
        likeness = likeness.masked_fill(same & ~torch.eye(_CELLS, dtype=torch.bool, device=same.device), -1e4)
        clean = (truth.flatten()[drawn] == 0).float()
        found = functional.cross_entropy(likeness, torch.arange(_CELLS, device=same.device), reduction="none")
        return (found * clean).sum() / clean.sum().clamp(min=1)


def crop(tiles: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """One crop [B, P, P, C] of each tile [B, T, T, C], at a place of its own; whole tiles where they are smaller."""
    count, tile = tiles.shape[:2]
    side = min(side, tile)
    corner = torch.randint(tile - side + 1, (2, count, 1), generator=generator, device=tiles.device)
    y, x = corner + torch.arange(side, device=tiles.device)  # [B, P] each
    picture = torch.arange(count, device=tiles.device)[:, None, None]
    return tiles[picture, y[:, :, None], x[:, None, :]]


def relight(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Another light, contrast and grain for each picture: what changes on a line without any product being worse."""
    draw = torch.rand((3, len(pixels), 1, 1, 1), generator=generator, device=pixels.device)
    noise = torch.randn(pixels.shape, generator=generator, device=pixels.device)
    mean = pixels.mean((1, 2, 3), keepdim=True)
    return (pixels - mean) * (0.85 + 0.3 * draw[0]) + mean + 0.1 * (draw[1] - 0.5) + 0.015 * draw[2] * noise


def _finding(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy of [2 B, 1, h, w]: the spoilt views against `truth`, the good ones against nothing."""
    wanted = torch.cat([truth, torch.zeros_like(truth)])
    return functional.binary_cross_entropy_with_logits(logits, wanted, pos_weight=logits.new_tensor(_RARE))
