"""Dissimilarities against their textbook formulas in float64, computed by OpenCV."""

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kizu_train.nets.similarity import (
    GradientDissimilarity,
    StructuralDissimilarity,
    Window,
    WindowShape,
    blur,
    window_weights,
)


def _pair(channels: int = 1, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.rand((2, channels, side, side), generator=generator)
    return first, (0.7 * first + 0.3 * torch.rand(first.shape, generator=generator)).clamp(0, 1)


def _blurred(picture: NDArray[np.float64], shape: WindowShape) -> NDArray[np.float64]:
    weights = window_weights(shape, 11).double().numpy()
    return np.asarray(cv2.sepFilter2D(picture, cv2.CV_64F, weights, weights, borderType=cv2.BORDER_REFLECT_101))


def _ssim(x: NDArray[np.float64], y: NDArray[np.float64], shape: WindowShape) -> NDArray[np.float64]:
    mean_x, mean_y = _blurred(x, shape), _blurred(y, shape)
    var_x, var_y = _blurred(x * x, shape) - mean_x**2, _blurred(y * y, shape) - mean_y**2
    both = _blurred(x * y, shape) - mean_x * mean_y
    top = (2 * mean_x * mean_y + 1e-4) * (2 * both + 9e-4)
    return top / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4))


@pytest.mark.parametrize("shape", ["gaussian", "box"])
def test_ssim(shape: WindowShape) -> None:
    """It is 1 − SSIM with the published constants, pixel by pixel, and the mean over channels."""
    first, second = _pair(3)
    found = StructuralDissimilarity(32, Window(shape))(first, second)
    assert found.shape == (2, 32, 32)
    x, y = first.double().numpy(), second.double().numpy()
    wanted = np.stack([np.mean([1 - _ssim(x[n, c], y[n, c], shape) for c in range(3)], axis=0) for n in range(2)])
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-5)
    assert (found >= 0).all()


def test_equal_pictures_are_not_unlike() -> None:
    """Nothing is unlike itself, exactly; what is nearly alike keeps its digits."""
    first, _ = _pair()
    for measure in (StructuralDissimilarity(32, Window()), GradientDissimilarity(32)):
        assert measure(first, first).abs().max() == 0
        little = measure(0.5 + 0.1 * first, 0.5 + 0.1 * first + 1e-4 * first.flip(2))
        exact = measure.double()(0.5 + 0.1 * first.double(), 0.5 + 0.1 * first.double() + 1e-4 * first.flip(2).double())
        torch.testing.assert_close(little.double(), exact, rtol=2e-2, atol=1e-9)


def test_gaussian_window_is_the_published_one() -> None:
    """11 pixels mean σ = 1.5; weights sum to 1 and a constant passes the blur unchanged up to its edges."""
    weights = window_weights("gaussian", 11)
    wanted = cv2.getGaussianKernel(11, 1.5)[:, 0]
    np.testing.assert_allclose(weights.numpy(), wanted, rtol=1e-5)
    flat = torch.full((1, 2, 12, 12), 0.3)
    torch.testing.assert_close(blur(12, "box", 21)(flat), flat)


def test_gradient_similarity() -> None:
    """One scale is 1 − GMS by Prewitt gradients; several scales are the mean of each, enlarged."""
    first, second = _pair(side=16)
    x, y = first[0, 0].double().numpy(), second[0, 0].double().numpy()
    prewitt = np.array([[1.0, 0, -1]] * 3) / 3

    def magnitude(picture: NDArray[np.float64]) -> NDArray[np.float64]:
        slopes = [
            cv2.filter2D(picture, cv2.CV_64F, kernel, borderType=cv2.BORDER_REFLECT_101)
            for kernel in (prewitt, prewitt.T)
        ]
        return np.asarray(np.hypot(*slopes))

    def unlike(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        g, h = magnitude(a), magnitude(b)
        return 1 - (2 * g * h + 0.0026) / (g**2 + h**2 + 0.0026)

    found = GradientDissimilarity(16, 1)(first[:1], second[:1])[0].numpy()
    np.testing.assert_allclose(found, unlike(x, y), rtol=1e-3, atol=1e-5)

    def half(picture: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(cv2.resize(picture, (8, 8), interpolation=cv2.INTER_AREA))

    coarse = cv2.resize(unlike(half(x), half(y)), (16, 16), interpolation=cv2.INTER_LINEAR)
    both = GradientDissimilarity(16, 2)(first[:1], second[:1])[0].numpy()
    np.testing.assert_allclose(both, (unlike(x, y) + coarse) / 2, rtol=1e-3, atol=1e-5)


def test_gradients_stay_finite() -> None:
    """Flat pictures, where roots and quotients have no slope of their own, still give finite gradients."""
    for measure in (StructuralDissimilarity(16, Window()), GradientDissimilarity(16, 3)):
        flat = torch.full((1, 1, 16, 16), 0.5, requires_grad=True)
        measure(flat, torch.full((1, 1, 16, 16), 0.5)).mean().backward()
        assert flat.grad is not None
        assert torch.isfinite(flat.grad).all()


@pytest.mark.parametrize("size", [1, 10])
def test_windows_are_odd(size: int) -> None:
    """A window without a middle pixel, or of one, is refused."""
    with pytest.raises(ValueError, match="odd size"):
        Window(size=size)
