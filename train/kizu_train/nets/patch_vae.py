"""The patch VAE's network, wholly described by its settings: one code for every published and own variant.

Letters: N tiles; C channels; T tile side; Z latent size.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import lcm
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kizu_train.arithmetic import exact
from kizu_train.errors import UsageError
from kizu_train.nets.patch_vae_terms import CalibratedSigma

_LOG_VARIANCE_LIMIT = 12.0
"""Beyond e^±12 a latent's variance says nothing more, and exp would overflow."""


@dataclass(frozen=True)
class Network:
    """Encoder, latent, decoder and its two heads.

    Encoder: one convolution per entry of `widths`, then linear layers of `dense`, then mean and log σ² of `latent`.
    Decoder: `dense` reversed, linear to `decoder_start` channels at the encoder's last size, transposed convolutions
    of `decoder_widths`; then one head each for mean and variance, transposed again where one enlargement is missing.
    `padding` `mirror` keeps a tile's edge from looking darker than its middle; `zero` is what the papers used.
    `sigma_floor` is the softest σ, in pixels of 0–1: σ = softplus + floor, or σ² = sigmoid + floor². `calibrated`
    has no head for the variance: one σ for all pixels, the one that explains the residuals best (see CalibratedSigma).
    """

    widths: tuple[int, ...] = (32, 64, 128)
    kernel: int = 2
    stride: int = 2
    padding: Literal["mirror", "zero"] = "mirror"
    batch_norm: bool = True
    dense: tuple[int, ...] = ()
    latent: int = 16
    decoder_start: int = 128
    decoder_widths: tuple[int, ...] = (64, 32)
    head_kernel: int = 4
    head_batch_norm: bool = False
    mean: Literal["linear", "sigmoid"] = "linear"
    variance: Literal["softplus", "sigmoid", "calibrated"] = "softplus"
    sigma_floor: float = 0.03

    def __post_init__(self) -> None:
        counts = (*self.widths, *self.dense, self.latent, self.decoder_start, *self.decoder_widths)
        if not self.widths or min(counts) < 1:
            raise ValueError("widths, dense, latent, decoder_start and decoder_widths must be at least 1")
        if self.stride < 2 or self.kernel < self.stride or (self.kernel - self.stride) % 2:
            raise ValueError("stride >= 2 and kernel = stride + an even number are needed, so that sizes halve evenly")
        if len(self.widths) - len(self.decoder_widths) not in (0, 1):
            raise ValueError("decoder_widths needs as many entries as widths, or one fewer (the heads then enlarge)")
        if self.head_kernel < 1 or (self._heads_enlarge and (self.head_kernel - self.stride) % 2):
            raise ValueError("a head that enlarges needs head_kernel = stride + an even number")
        if not 0 < self.sigma_floor < 1:
            raise ValueError("sigma_floor must lie between 0 and 1")

    @property
    def _heads_enlarge(self) -> bool:
        return len(self.decoder_widths) < len(self.widths)

    @property
    def lowest_sigma(self) -> float:
        """What σ of a pixel never falls below."""
        return CalibratedSigma.LOWEST if self.variance == "calibrated" else self.sigma_floor

    def smallest_px(self, tile_px: int) -> int:
        """Side of the encoder's last feature map. Raises UsageError when the tile does not divide or is too small."""
        shrink = int(self.stride ** len(self.widths))
        side = tile_px // shrink
        reach = (self.kernel - self.stride) // 2
        if tile_px % shrink or side < 1:
            raise UsageError(f"tiles of {tile_px} px must be a multiple of {shrink} px for {len(self.widths)} strides")
        if self.padding == "mirror" and (side * self.stride <= reach or (reach and side < 2)):
            raise UsageError(f"tiles of {tile_px} px shrink to {side} px, too small to mirror; use fewer widths")
        return side


class PatchVae(nn.Module):
    """The network for tiles of `tile_px` and `channels`."""

    def __init__(self, network: Network, tile_px: int, channels: int) -> None:
        super().__init__()
        self.network, self.tile_px = network, tile_px
        self.side = network.smallest_px(tile_px)
        self.encoder = _encoder(network, channels, self.side)
        features = network.dense[-1] if network.dense else network.widths[-1] * self.side**2
        self.latent_mean = nn.Linear(features, network.latent)
        self.latent_log_variance = nn.Linear(features, network.latent)
        self.start = _dense(network, (network.latent, *reversed(network.dense), network.decoder_start * self.side**2))
        widths = (network.decoder_start, *network.decoder_widths)
        self.decoder = nn.Sequential(*(_Enlarge(network, low, high, network.kernel) for low, high in pairwise(widths)))
        self.mean_head = _head(network, widths[-1], channels)
        is_calibrated = network.variance == "calibrated"
        self.sigma = CalibratedSigma() if is_calibrated else None
        self.variance_head: nn.Module = nn.Identity() if is_calibrated else _head(network, widths[-1], channels)

    def encode(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Tiles float32 [N, C, T, T], 0–1 → posterior mean and log σ², both [N, Z]."""
        features = self.encoder(tiles)
        log_variance = self.latent_log_variance(features).clamp(-_LOG_VARIANCE_LIMIT, _LOG_VARIANCE_LIMIT)
        return self.latent_mean(features), log_variance

    def can_share(self, stride_px: int) -> bool:
        """Whether tiles every `stride_px` have features of the encoder in common: none of them saw a tile's border."""
        return self.network.kernel == self.network.stride and lcm(stride_px, self._shrink) < self.tile_px

    def encode_block(self, block: Tensor, stride_px: int) -> tuple[Tensor, Tensor]:
        """Posterior means and log σ² [n, Z] of the tiles every `stride_px` in `block` [1, C, h, w], row by row.

        As `encode` of each tile, but what tiles have in common is convolved once. Tiles whose origins differ by no
        multiple of the encoder's strides have nothing in common: they are encoded in as many passes.
        """
        passes = lcm(stride_px, self._shrink) // stride_px
        high, wide = ((int(length) - self.tile_px) // stride_px + 1 for length in block.shape[2:])
        index = torch.arange(high * wide).reshape(high, wide)
        found, order = [], []
        for y in range(min(passes, high)):
            for x in range(min(passes, wide)):
                order.append(index[y::passes, x::passes])
                rows, columns = ((count - 1) * stride_px * passes + self.tile_px for count in order[-1].shape)
                top, left = y * stride_px, x * stride_px
                part = block[:, :, top : top + rows, left : left + columns]
                found.append(self._encode_apart(part, stride_px * passes))
        if passes == 1:
            return found[0]
        back = torch.argsort(torch.cat([part.reshape(-1) for part in order]))
        mean, log_variance = (torch.cat(parts).index_select(0, back) for parts in zip(*found, strict=True))
        return mean, log_variance

    def _encode_apart(self, block: Tensor, step_px: int) -> tuple[Tensor, Tensor]:
        """As `encode_block`, for a step that the encoder's strides divide."""
        *convolutions, _flatten, dense = self.encoder
        assert isinstance(dense, nn.Sequential)  # noqa: S101  # a Sequential forgets what it holds
        features = nn.Sequential(*convolutions)(block)
        step = step_px // self._shrink
        heads = (self.latent_mean, self.latent_log_variance)
        if len(dense):
            first = dense[1:](self._linear(features, dense[0], step))
            mean, log_variance = (head(first) for head in heads)
        else:
            mean, log_variance = (self._linear(features, head, step) for head in heads)
        return mean, log_variance.clamp(-_LOG_VARIANCE_LIMIT, _LOG_VARIANCE_LIMIT)

    def _linear(self, features: Tensor, linear: nn.Module, step: int) -> Tensor:
        """`linear` of every tile's features [1, F, h, w], as a convolution: [n, out]."""
        assert isinstance(linear, nn.Linear)  # noqa: S101  # a Sequential forgets what it holds
        kernel = linear.weight.reshape(linear.out_features, -1, self.side, self.side)
        found = functional.conv2d(features, kernel, linear.bias, stride=step)
        return found.permute(0, 2, 3, 1).reshape(-1, linear.out_features)

    @property
    def _shrink(self) -> int:
        return int(self.network.stride ** len(self.network.widths))

    def decode(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [N, Z] → mean and variance of each pixel, both [N, C, T, T]."""
        start = self.start(latent).reshape(-1, self.network.decoder_start, self.side, self.side)
        features = self.decoder(start)
        mean = exact(self.mean_head(features))
        if self.network.mean == "sigmoid":
            mean = torch.sigmoid(mean)
        return mean, self._variance(features, mean)

    def variance_for(self, target: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """The variance [N, C, T, T] to train with: the one decoded, or where σ is calibrated the batch's optimum."""
        return variance if self.sigma is None else self.sigma.observe(target, mean).expand_as(mean)

    def _variance(self, features: Tensor, mean: Tensor) -> Tensor:
        if self.sigma is not None:
            one: Tensor = self.sigma()
            return one.expand_as(mean)
        raw, floor = exact(self.variance_head(features)), self.network.sigma_floor
        if self.network.variance == "sigmoid":
            return torch.sigmoid(raw) + floor**2
        sigma = functional.softplus(raw) + floor
        return sigma**2


class _Pad(nn.Module):
    """Mirror (or fill with zeros) `before` pixels at the upper and left, `after` at the lower and right edge."""

    def __init__(self, network: Network, before: int, after: int) -> None:
        super().__init__()
        self.pads = (before, after, before, after)
        self.mode = "reflect" if network.padding == "mirror" else "constant"

    def forward(self, features: Tensor) -> Tensor:
        return functional.pad(features, self.pads, mode=self.mode) if any(self.pads) else features


class _Enlarge(nn.Module):
    """Transposed convolution by `stride`, then batch norm and ReLU; a head leaves those to its caller."""

    def __init__(self, network: Network, low: int, high: int, kernel: int, *, is_head: bool = False) -> None:
        super().__init__()
        overlap = kernel > network.stride
        # Padding the input by one pixel and cutting it off again gives the outermost pixels the overlap others have.
        self.pad = _Pad(network, int(overlap), int(overlap))
        cut = (kernel - network.stride) // 2 + network.stride * int(overlap)
        norm = network.batch_norm and not is_head
        self.up = nn.ConvTranspose2d(low, high, kernel, network.stride, cut, bias=not norm)
        self.finish = nn.Identity() if is_head else nn.Sequential(_norm(network, high), nn.ReLU(inplace=True))

    def forward(self, features: Tensor) -> Tensor:
        finished: Tensor = self.finish(self.up(self.pad(features)))
        return finished


def _norm(network: Network, width: int) -> nn.Module:
    return nn.BatchNorm2d(width) if network.batch_norm else nn.Identity()


def _dense(network: Network, sizes: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for low, high in pairwise(sizes):
        norm = nn.BatchNorm1d(high) if network.batch_norm else nn.Identity()
        layers += [nn.Linear(low, high, bias=not network.batch_norm), norm, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _encoder(network: Network, channels: int, side: int) -> nn.Sequential:
    widths = (channels, *network.widths)
    reach = (network.kernel - network.stride) // 2
    layers: list[nn.Module] = []
    for low, high in pairwise(widths):
        convolution = nn.Conv2d(low, high, network.kernel, network.stride, bias=not network.batch_norm)
        layers += [_Pad(network, reach, reach), convolution, _norm(network, high), nn.ReLU(inplace=True)]
    dense = _dense(network, (network.widths[-1] * side**2, *network.dense))
    return nn.Sequential(*layers, nn.Flatten(), dense)


def _head(network: Network, width: int, channels: int) -> nn.Sequential:
    if network._heads_enlarge:  # noqa: SLF001 - a derived fact that is no setting
        layers: list[nn.Module] = [_Enlarge(network, width, channels, network.head_kernel, is_head=True)]
    else:
        # A transposed convolution of stride 1 that keeps the size is a convolution with its kernel turned by 180°.
        reach = network.head_kernel - 1
        layers = [_Pad(network, reach // 2, reach - reach // 2), nn.Conv2d(width, channels, network.head_kernel)]
    if network.head_batch_norm:
        layers.append(nn.BatchNorm2d(channels))
    return nn.Sequential(*layers)
