"""The likelihood less the length of the compressed image as an outlier score."""

from __future__ import annotations

import importlib
import io
import math
from typing import Any, Literal

import torch
from torch import Tensor

from fastvae._distribution import to_mend
from fastvae.arguments import expect, expect_choice
from fastvae.data import images_of
from fastvae.likelihoods import Bernoulli, Categorical
from fastvae.models.base import BaseVAE
from fastvae.models.inputs import check_is_tensor
from fastvae.models.observation import Observation
from fastvae.ood.negative_log_likelihood import LikelihoodScore

__all__ = ["InputComplexity", "compressed_bits"]

_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {"optimize": True}),
    "jpeg2000": ("JPEG2000", {"irreversible": False, "quality_mode": "rates", "quality_layers": [0]}),
}


class InputComplexity(LikelihoodScore):
    """-log p(x) - L(x) ln 2 in nats, with L(x) the bits of the image, compressed without loss.

    Serra et al., Input Complexity and Out-of-Distribution Detection with Likelihood-based Generative Models,
    ICLR 2020, equation (3), there in bits per dimension: divide by ln 2 and the number of elements. A simple
    image is likely and short, a complex one unlikely and long; what is left says how foreign it is. Both
    terms must count the same thing: only a likelihood of discrete values can be compared with a length.

    Args:
        model: a trained fastvae model with a ``Categorical`` likelihood, whose classes are compressed as
            bytes, or with ``Bernoulli`` and images of zeros and ones, compressed as one bit a pixel (png) or
            one byte (jpeg2000 knows no bits).
        compressor: "png" or "jpeg2000" (lossless), by Pillow. The length is that of the file, less that of
            the shortest file of an image of this shape, a constant one: headers say nothing of an image.
            JPEG 2000 codes strokes on an empty ground badly (a 28x28 digit of MNIST takes 437 bytes, 201 as
            png): simple images of that kind then seem less foreign than they are.
        num_samples: importance samples.
        seed: of the noise, which is keyed by (seed, the image).

    Raises:
        ValueError: another compressor; a Gaussian likelihood, or more than 256 classes; num_samples below 1;
            images that are not [B, H, W] or [B, C, H, W] with 1 or 3 channels; under ``Bernoulli``, values
            other than 0 and 1.
        TypeError: not a fastvae model.
        ImportError: Pillow is not installed, or was built without JPEG 2000.
    """

    def __init__(
        self,
        model: BaseVAE,
        compressor: Literal["png", "jpeg2000"] = "png",
        *,
        num_samples: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__(model, num_samples=num_samples, seed=seed)
        expect_choice("InputComplexity", sorted(_FORMATS), compressor=compressor)
        likelihood = self.model.likelihood
        if not isinstance(likelihood, (Bernoulli, Categorical)) or likelihood.values_per_element > 256:
            raise ValueError(
                f"InputComplexity: model: expected a likelihood of discrete values, Bernoulli or Categorical with "
                f"at most 256 classes, got {likelihood}: a density cannot be compared with the length of a file"
            )
        _pillow(compressor)
        self.compressor = compressor

    def predict(self, x: Tensor, *, condition: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """Scores [B] in nats of images x [B, ...], higher = more foreign; detached, on the model's device.

        Args:
            x: [B, ...].
            condition: [B, ...] of a conditional model: the score takes log p(x | condition).
            weight: none. A file has the length of a whole image, which log p of a part cannot be compared with.
        """
        check_is_tensor(self, x)
        if weight is not None:
            raise ValueError(
                "InputComplexity: weight: expected none, since a file has the length of a whole image, with which the "
                "log-likelihood of a part of it cannot be compared; NegativeLogLikelihood takes weights"
            )
        bits = compressed_bits(self._values(x), self.compressor, binary=self._binary)
        log_px = self._log_likelihood(self.model, self._copies, Observation(x, condition))
        return -log_px - (bits * math.log(2)).to(log_px)

    @property
    def _binary(self) -> bool:
        return isinstance(self.model.likelihood, Bernoulli)

    def _values(self, x: Tensor) -> Tensor:
        """The classes as uint8."""
        likelihood = self.model.likelihood
        if isinstance(likelihood, Categorical):
            return likelihood.classes(x.detach()).to(torch.uint8)
        values = likelihood.as_float(x.detach(), torch.float32)
        expect(
            bool(((values == 0) | (values == 1)).all()),
            "InputComplexity: x: expected zeros and ones under a Bernoulli likelihood",
            "other values; see fastvae.data.binarize",
        )
        return values.to(torch.uint8)


def compressed_bits(images: Tensor, compressor: str = "png", *, binary: bool = False) -> Tensor:
    """Length of each image's file beyond that of a constant image of the same shape, in bits: [B], float64.

    Args:
        images: uint8 [B, H, W], [B, 1, H, W] or [B, 3, H, W].
        compressor: "png" or "jpeg2000", without loss.
        binary: the images hold zeros and ones.

    Raises:
        ValueError: another shape or dtype.
        ImportError: Pillow is not installed, or was built without JPEG 2000.
    """
    pixels = images_of(images)
    if pixels.dim() == 3:
        pixels = pixels[:, None]
    expect(
        pixels.dtype == torch.uint8 and pixels.dim() == 4 and pixels.shape[1] in (1, 3),
        "InputComplexity: x: expected images [B, H, W] or [B, C, H, W] with 1 or 3 channels",
        f"{images.dtype} {list(images.shape)}",
    )
    pillow = _pillow(compressor)
    form, options = _FORMATS[compressor]

    def length(image: Tensor) -> int:
        array = image.cpu().permute(1, 2, 0).contiguous().numpy()
        if binary:
            array = array * 255
        picture = pillow.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
        if binary and compressor == "png" and array.shape[2] == 1:
            picture = picture.convert("1", dither=pillow.Dither.NONE)
        buffer = io.BytesIO()
        picture.save(buffer, format=form, **options)
        return 8 * buffer.getbuffer().nbytes

    shortest = length(torch.zeros_like(pixels[0])) if len(pixels) else 0
    return torch.tensor([length(image) - shortest for image in pixels], dtype=torch.float64, device="cpu")


def _pillow(compressor: str) -> Any:
    try:
        module = importlib.import_module("PIL.Image")
        features = importlib.import_module("PIL.features")
    except ModuleNotFoundError as error:
        raise ImportError(f"InputComplexity: needs Pillow; {to_mend('pillow', 'ood')}") from error
    if compressor == "jpeg2000" and not features.check("jpg_2000"):
        raise ImportError(
            'InputComplexity: compressor: "jpeg2000" needs a Pillow built with OpenJPEG, got one without it'
        )
    return module
