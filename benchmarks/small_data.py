"""Pictures of the published small experiments, read from their own files and written as data folders."""

import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Pictures = NDArray[np.uint8]
"""Pictures uint8 [N, H, W, C], RGB or grey."""

_SNEAKER, _BOOT = 7, 9
_REFERENCES_EACH = 1000
_MAGIC = {1: 0x801, 3: 0x803}


@dataclass(frozen=True, eq=False)
class Sample:
    """What an experiment learns from and is judged on; `references` are other things by class."""

    train: Pictures
    good: Pictures
    bad: Pictures
    references: dict[str, Pictures] = field(default_factory=dict)

    def thinned(self, most: int) -> "Sample":
        """At most `most` pictures of each sort."""
        few = {name: pictures[:most] for name, pictures in self.references.items()}
        return Sample(self.train[:most], self.good[:most], self.bad[:most], few)

    def write(self, folder: Path) -> None:
        """Write it in MVTec layout, and references as `references/<class>`; what is whole already stays."""
        done = folder / "whole"
        if done.exists():
            return
        parts = {"data/train/good": self.train, "data/test/good": self.good, "data/test/bad": self.bad}
        parts |= {f"references/{name}": pictures for name, pictures in self.references.items()}
        for name, pictures in parts.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            for index, picture in enumerate(pictures):
                assert cv2.imwrite(str(folder / name / f"{index:05}.png"), picture[:, :, ::-1])
        done.touch()


def mnist_1_9(root: Path) -> Sample:
    """MNIST: ones are good, nines are bad."""
    return _one_against(root / "mnist", 1, 9)


def sneaker_boot(root: Path) -> Sample:
    """Fashion-MNIST: sneakers are good, boots are bad."""
    return _one_against(root / "fashion_mnist", _SNEAKER, _BOOT)


def sneaker_boot_references(root: Path) -> Sample:
    """Fashion-MNIST: 1,000 sneakers to learn from, and 1,000 pictures of each of the eight other classes."""
    whole = sneaker_boot(root)
    pictures, labels = read_idx_set(root / "fashion_mnist", "train")
    others = [label for label in range(10) if label not in (_SNEAKER, _BOOT)]
    references = {f"class{label}": pictures[labels == label][:_REFERENCES_EACH] for label in others}
    return Sample(whole.train[:1000], whole.good, whole.bad, references)


def deer_horse(root: Path) -> Sample:
    """CIFAR-10: deer are good, horses bad; eight other classes as references."""
    with np.load(root / "cifar10_deer_horse" / "deer_horse.npz") as file:
        labels = file["reference_y"]
        references = {f"class{label}": file["reference_x"][labels == label] for label in np.unique(labels)}
        return Sample(file["normal_x"], file["test_normal_x"], file["test_anomaly_x"], references)


SAMPLES: dict[str, Callable[[Path], Sample]] = {
    "mnist": mnist_1_9,
    "fashion": sneaker_boot,
    "fashion_references": sneaker_boot_references,
    "cifar": deer_horse,
}
"""Samples by name. Each raises FileNotFoundError, naming the file, where its pictures are not there."""


def read_idx_set(folder: Path, part: str) -> tuple[Pictures, NDArray[np.uint8]]:
    """Pictures [N, 28, 28, 1] and labels [N] of the idx files of `part`, train or t10k."""
    pictures = read_idx(folder / f"{part}-images-idx3-ubyte")
    return pictures[..., None], read_idx(folder / f"{part}-labels-idx1-ubyte")


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An idx file of bytes, packed (`.gz`) or not. Raises FileNotFoundError, ValueError."""
    packed = path.with_name(f"{path.name}.gz")
    data = gzip.decompress(packed.read_bytes()) if packed.is_file() else path.read_bytes()
    dimensions = int.from_bytes(data[:4], "big") & 0xFF
    shape = [int(length) for length in np.frombuffer(data, ">i4", dimensions, 4)] if dimensions in _MAGIC else []
    if int.from_bytes(data[:4], "big") != _MAGIC.get(dimensions) or len(data) != 4 + 4 * dimensions + math.prod(shape):
        raise ValueError(f"{path}: is not a whole idx file of bytes")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _one_against(folder: Path, good: int, bad: int) -> Sample:
    pictures, labels = read_idx_set(folder, "train")
    tests, test_labels = read_idx_set(folder, "t10k")
    return Sample(pictures[labels == good], tests[test_labels == good], tests[test_labels == bad])
