"""The importance-sampled log-likelihood of images under a VAE, against eager PyTorch.

    python -m benchmarks.speed log_likelihood             about a minute on 2 cores
    python -m benchmarks.speed log_likelihood --quick     tiny sizes: does everything run?

Every contestant computes log p(x) of the same images from the same noise, in float32, without gradients. The rivals:
"eager, copies", as code around likelihood regret does it (Xiao, Yan, Amit, NeurIPS 2020): the image repeated for every
sample, encoder and decoder on all copies, F.cross_entropy on the decoder's output; "eager, careful": the encoder once,
the decoder in channels_last in tiles of 64 codes, F.cross_entropy on its rows, in inference mode, and the same through
torch.compile. Floor: "FLOP floor", the decoder's operations at the rate of a large square product.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import fastvae
from fastvae.architectures import dcgan_decoder, dcgan_encoder

from ..rivals.log_likelihood import careful, copies
from . import floors, harness, timing

OURS, COPIES, CAREFUL = "ours", "eager, copies", "eager, careful"


def cases(quick: bool) -> list[harness.Case]:
    if quick:
        return [harness.Case("dcgan", "DCGAN of width 2, 1 image, 3 samples", build, (1, 2, 1, 3), 0.1)]
    grey, color = "1x32x32, 256 classes, 1 image, 200 samples", "3x32x32, 256 classes, 4 images, 25 samples"
    return [
        harness.Case("dcgan", f"DCGAN {grey}", build, (1, 32, 1, 200), 12),
        harness.Case("color", f"DCGAN {color}", build, (3, 32, 4, 25), 12),
    ]


def build(options: harness.Options, channels: int, width: int, images: int, samples: int) -> harness.Trial:
    device = options.device
    torch.manual_seed(0)
    decoder = dcgan_decoder(channels, width)
    model = fastvae.VAE(dcgan_encoder(channels, width), decoder, "categorical")
    model = model.to(device).eval().requires_grad_(False)
    fast = copy.deepcopy(model)
    fast.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = (torch.randint(256, (images, channels, 32, 32)) / 255).to(device)
    noise = torch.randn(samples, images, 100, device=device)

    def ours() -> Tensor:
        drawn = noise[None]
        return model.log_likelihood(x, samples, noise=lambda first, count, _: drawn[:, first : first + count])

    def inference(work: Callable[[], Tensor]) -> timing.Contestant:
        return torch.inference_mode()(work)

    contestants: dict[str, Callable[[], timing.Contestant]] = {
        OURS: lambda: ours,
        COPIES: lambda: inference(lambda: copies(model, x, noise)),
        CAREFUL: lambda: inference(lambda: careful(fast, fast.decoder, x, noise)),
    }
    if options.compile:
        decode = functools.cache(lambda: timing.compiled(fast.decoder))
        contestants[CAREFUL + harness.COMPILED] = lambda: inference(lambda: careful(fast, decode(), x, noise))
    wide = copy.deepcopy(model).double()
    exact = careful(wide, wide.decoder, x.double(), noise.double())
    layers = floors.products(decoder, torch.randn(images * samples, 100, device=device))
    operations = sum(layer.operations for layer in layers)
    return harness.Trial(contestants, [exact], {OURS: 1e-5}, operations=operations)


def main(arguments: Sequence[str] | None = None) -> None:
    options = harness.parse(harness.parser(__doc__), arguments)
    of_cases = cases(options.quick)
    harness.Benchmark("log_likelihood", "Importance-sampled log-likelihood", of_cases).run(options)
