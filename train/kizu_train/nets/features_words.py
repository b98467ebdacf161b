"""Distance to the nearest of many learned vectors ("words"), inside the graph.

Letters: N tiles; K dimensions; M words; h, w cells.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from kizu_train.nets.features import Projection, projection_from

_CHUNK = 1250
"""Words compared at a time: their distances to a tile's cells fit into a CPU's cache, and memory stays bounded."""
_FLOOR = 1e-3
"""Of the words' mean squared length: under it a squared distance is rounding, which a root would blow up."""


class Words(nn.Module):
    """Features [N, D, h, w] → mean Euclidean distance of each cell to its `nearest` words [N, h, w].

    Squared distances are |z|² - 2 z·w + |w|² by one matrix product; vectors are centred, so that little cancels, and
    what rounding leaves below 0 is clamped. √(d² + floor) instead of d keeps an exact match from showing rounding as
    distance; the least distance is √floor, not 0.
    """

    words: Tensor
    floor: Tensor

    def __init__(self, project: Projection, words: Tensor, nearest: int) -> None:
        super().__init__()
        self.project, self.nearest = project, nearest
        self.register_buffer("words", words)
        self.register_buffer("floor", (_FLOOR * words.square().sum(1).mean()).clamp(min=1e-12).reshape(1))

    def forward(self, features: Tensor) -> Tensor:
        """Distances of `features`."""
        cells = self.project(features)
        found = [self._smallest(self._relative(cells, words)) for words in torch.split(self.words, _CHUNK)]
        nearest = self._smallest(torch.cat(found, 1)) if len(found) > 1 else found[0]
        squares = nearest + cells.square().sum(1, keepdim=True)
        distances: Tensor = (squares.clamp(min=0) + self.floor).sqrt().mean(1)
        return distances

    def _relative(self, cells: Tensor, words: Tensor) -> Tensor:
        """|w|² - 2 z·w of each cell and word, [N, words, h, w]: a 1 × 1 convolution."""
        return functional.conv2d(cells, -2 * words[:, :, None, None], words.square().sum(1))

    def _smallest(self, distances: Tensor) -> Tensor:
        """The `nearest` smallest along axis 1."""
        if self.nearest == 1:
            return distances.amin(1, keepdim=True)
        return distances.topk(min(self.nearest, distances.shape[1]), dim=1, largest=False).values


def words_from(tensors: Mapping[str, Tensor], nearest: int) -> Words:
    """The module whose `state_dict` was `tensors`. Raises KeyError."""
    project = projection_from({name: tensors[f"project.{name}"] for name in ("centre", "weight")})
    found = Words(project, tensors["words"], nearest)
    found.floor.copy_(tensors["floor"])
    return found
