"""Decoders of images, as people write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.likelihoods import Bernoulli, Categorical, Gaussian

from .entry import Entry


class DCGAN(nn.Module):
    """z[:, :, None, None] into bias-free transposed convolutions with BatchNorm."""

    def __init__(self, width: int, nz: int = 8, last: int = 1) -> None:
        super().__init__()
        ngf = 4 * width
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 4, 4, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, last, 4, 2, 1, bias=False),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z[:, :, None, None])


class Probabilities(nn.Module):
    """The PyTorch examples' way: view, transposed convolutions, a sigmoid at the end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c = 6 * width
        self.fc = nn.Linear(5, self.c * 16)
        self.deconv1 = nn.ConvTranspose2d(self.c, 8, 3, stride=2, padding=1, output_padding=1)
        self.deconv2 = nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = F.softplus(self.fc(z)).view(-1, self.c, 4, 4)
        return torch.sigmoid(self.deconv2(F.elu(self.deconv1(h)))).view(z.size(0), -1)


class ResidualBlock(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        h = self.bn2(self.conv2(h))
        h += x
        return F.relu(h)


class ResNet(nn.Module):
    """Residual blocks with BatchNorm, an addition in place, nearest upsampling between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c = 6 * width
        self.fc = nn.Linear(6, self.c * 16)
        self.layers = nn.Sequential(
            ResidualBlock(self.c),
            nn.Upsample(scale_factor=2),
            ResidualBlock(self.c),
            nn.Upsample(scale_factor=2),
        )
        self.out = nn.Conv2d(self.c, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.out(self.layers(self.fc(z).view(z.shape[0], self.c, 4, 4)))


class AttentionBlock(nn.Module):
    """Single-head attention over positions, as latent diffusion has it."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, c)
        self.q, self.k, self.v, self.proj = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.norm(x)
        q, k, v = (f(y).reshape(b, c, h * w) for f in (self.q, self.k, self.v))
        weights = torch.softmax(torch.bmm(q.permute(0, 2, 1), k) * int(c) ** -0.5, dim=2)
        return x + self.proj(torch.bmm(v, weights.permute(0, 2, 1)).reshape(b, c, h, w))


class GroupNormBlock(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(2, cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class GroupNormAttention(nn.Module):
    """GroupNorm, SiLU and attention, from a vector or from a spatial code."""

    def __init__(self, width: int, spatial: bool) -> None:
        super().__init__()
        c = 8 * width
        inp: list[nn.Module] = [nn.Conv2d(2, c, 3, padding=1)]
        self.inp = (
            nn.Sequential(*inp)
            if spatial
            else nn.Sequential(nn.Linear(6, c * 16), nn.Unflatten(1, (c, 4, 4)))
        )
        self.mid = nn.Sequential(GroupNormBlock(c, c), AttentionBlock(c), GroupNormBlock(c, c // 2))
        self.norm, self.out = nn.GroupNorm(2, c // 2), nn.Conv2d(c // 2, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = F.interpolate(self.mid(self.inp(z)), scale_factor=2.0, mode="nearest")
        return self.out(F.silu(self.norm(h)))


def from_image(width: int, layers: nn.Module, latents: int = 5, side: int = 4) -> nn.Module:
    """Linear, an image of 8 channels, and the rest."""
    c = 8 * width
    return nn.Sequential(nn.Linear(latents, c * side * side), nn.Unflatten(1, (c, side, side)), layers)


def reflecting(width: int) -> nn.Module:
    c = 8 * width
    return from_image(
        width,
        nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.ReflectionPad2d(1),
            nn.Conv2d(c, c // 2, 3),
            nn.InstanceNorm2d(c // 2, affine=True),
            nn.ReLU(inplace=True),
            nn.Conv2d(c // 2, 1, 3, padding=1, padding_mode="reflect"),
        ),
    )


def sub_pixel(width: int) -> nn.Module:
    c = 8 * width
    return from_image(
        width,
        nn.Sequential(
            nn.Conv2d(c, 4 * c, 3, padding=1),
            nn.PixelShuffle(2),
            nn.PReLU(c),
            nn.Conv2d(c, 4 * 3, 3, padding=1),
            nn.PixelShuffle(2),
        ),
    )


def circular(width: int) -> nn.Module:
    """Maps of a sphere or a torus: circular padding, bilinear upsampling."""
    c = 8 * width
    return from_image(
        width,
        nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(c, c // 2, 3, padding=1, padding_mode="circular"),
            nn.Softplus(beta=2),
            nn.UpsamplingBilinear2d(scale_factor=2),
            nn.Conv2d(c // 2, 1, (1, 3), padding=(0, 1), padding_mode="circular"),
        ),
    )


class GatedConvolutions(nn.Module):
    """Convolutions with GLU over channels (Dauphin et al. 2017), and a crop to 7 x 7 at the end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        c = 6 * width
        self.c = c
        self.fc = nn.Linear(5, c * 16)
        self.up, self.out = nn.ConvTranspose2d(c, 2 * c, 4, 2, 1), nn.Conv2d(c, 2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = F.glu(self.up(self.fc(z).reshape(-1, self.c, 4, 4)), dim=1)
        a, b = self.out(h).chunk(2, dim=1)
        return (a * torch.sigmoid(b))[:, :, :7, :7]


class Cropped(nn.Module):
    """28 x 28 from 32 x 32 by a crop in the middle, and a border by pad."""

    def __init__(self, width: int) -> None:
        super().__init__()
        c = 4 * width
        self.net = from_image(
            1,
            nn.Sequential(
                nn.ConvTranspose2d(8, c, 4, 2, 1), nn.LeakyReLU(0.2), nn.ConvTranspose2d(c, 1, 4, 2, 1)
            ),
        )

    def forward(self, z: Tensor) -> Tensor:
        return F.pad(self.net(z)[..., 2:-2, 2:-2], (1, 0, 0, 1), value=-2.0)


class StyleBlocks(nn.Module):
    """A constant image, instance-normalised and styled by the code at each layer (AdaIN; Karras et al. 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        c = 6 * width
        self.constant = nn.Parameter(torch.randn(1, c, 4, 4))
        self.mapping = nn.Sequential(
            nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 16), nn.LeakyReLU(0.2)
        )
        self.styles = nn.ModuleList(nn.Linear(16, 2 * c) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for _ in range(2))
        self.out = nn.Conv2d(c, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z)
        h = self.constant.expand(z.shape[0], -1, -1, -1)
        for style, conv in zip(self.styles, self.convs, strict=True):
            scale, shift = style(w)[:, :, None, None].chunk(2, 1)
            h = F.instance_norm(conv(h)) * (1 + scale) + shift
            h = F.interpolate(F.leaky_relu(h, 0.2), scale_factor=2)
        return self.out(h)


class SqueezeExcitation(nn.Module):
    """Channels gated by their own average (Hu et al. 2018), Hardswish and ReLU6 gates as in MobileNet v3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        c = 8 * width
        self.inp = nn.Linear(5, c * 16)
        self.depthwise, self.pointwise = nn.Conv2d(c, c, 3, padding=1, groups=c), nn.Conv2d(c, c, 1)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c // 4, 1), nn.ReLU(), nn.Conv2d(c // 4, c, 1)
        )
        self.out = nn.ConvTranspose2d(c, 1, 2, 2)

    def forward(self, z: Tensor) -> Tensor:
        h = self.inp(z).view(len(z), -1, 4, 4)
        h = F.hardswish(self.depthwise(h))
        # Not nn.Hardsigmoid, which PyTorch cannot differentiate twice.
        gate = F.relu6(self.squeeze(h) + 3) / 6
        return self.out(self.pointwise(h * gate) + h)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, LayerNorm and MLP with channels last, a scale for each channel (Liu et al. 2022)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(c, c, 7, padding=3, groups=c), nn.LayerNorm(c, eps=1e-6)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c)
        self.gamma = nn.Parameter(1e-6 * torch.ones(c))

    def forward(self, x: Tensor) -> Tensor:
        h = self.dwconv(x).permute(0, 2, 3, 1)
        h = self.gamma * self.pwconv2(self.act(self.pwconv1(self.norm(h))))
        return x + h.permute(0, 3, 1, 2)


class Pyramid(nn.Module):
    """Skips over scales: every scale's image is upsampled and added to the next's (a U-Net's right half)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        c = 6 * width
        self.coarse, self.middle = nn.Linear(6, c * 4), nn.Linear(6, c * 16)
        self.up = nn.ConvTranspose2d(c, c, 2, 2)
        self.mix = nn.Conv2d(2 * c, c, 3, padding=1)
        self.heads = nn.ModuleList(nn.Conv2d(c, 1, 1) for _ in range(2))

    def forward(self, z: Tensor) -> Tensor:
        low = torch.tanh(self.coarse(z)).view(z.size(0), -1, 2, 2)
        skip = torch.tanh(self.middle(z)).view(z.size(0), -1, 4, 4)
        high = F.silu(self.mix(torch.cat((self.up(low), skip), dim=1)))
        images = F.interpolate(self.heads[0](low), size=high.shape[-2:], mode="bilinear", align_corners=False)
        return F.avg_pool2d(F.interpolate(self.heads[1](high) + images, scale_factor=4), 2)


class SpatialBroadcast(nn.Module):
    """The code tiled over a grid beside its coordinates (Watters et al. 2019)."""

    def __init__(self, width: int, side: int = 8) -> None:
        super().__init__()
        self.side, c = side, 12 * width
        axis = torch.linspace(-1, 1, side)
        self.register_buffer("grid", torch.stack(torch.meshgrid(axis, axis, indexing="ij"))[None])
        self.net = nn.Sequential(
            nn.Conv2d(6 + 2, c, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(c, c, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(c, 3, 1),
        )

    def forward(self, z: Tensor) -> Tensor:
        tiled = z.view(*z.size(), 1, 1).expand(-1, -1, self.side, self.side)
        return self.net(torch.cat([tiled, self.grid.expand(len(z), -1, -1, -1)], dim=1))


class SIREN(nn.Module):
    """An implicit image: sines of coordinates, shifted by the code (Sitzmann et al. 2020)."""

    def __init__(self, width: int, side: int = 6) -> None:
        super().__init__()
        h = 16 * width
        axis = torch.linspace(-1, 1, side)
        self.register_buffer(
            "points", torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
        )
        self.of_point, self.of_code = nn.Linear(2, h), nn.Linear(4, h, bias=False)
        self.hidden, self.out = nn.Linear(h, h), nn.Linear(h, 1)

    def forward(self, z: Tensor) -> Tensor:
        h = torch.sin(5.0 * (self.of_point(self.points)[None] + self.of_code(z)[:, None]))
        return self.out(torch.sin(self.hidden(h))).squeeze(-1)


def wide_dcgan(width: int) -> nn.Module:
    """The MNIST networks of pythae in half their width: 512-256-128 channels."""
    del width
    return nn.Sequential(
        nn.Linear(8, 512 * 16),
        nn.Unflatten(1, (512, 4, 4)),
        nn.ConvTranspose2d(512, 256, 3, 2, 1),
        nn.BatchNorm2d(256),
        nn.ReLU(),
        nn.ConvTranspose2d(256, 128, 3, 2, 1, 1),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.ConvTranspose2d(128, 1, 3, 2, 1, 1),
    )


ENTRIES = [
    Entry("dcgan", DCGAN, (8,)),
    Entry("wide-dcgan", wide_dcgan, (8,), heavy=True),
    Entry("sigmoid-at-the-end", Probabilities, (5,), Bernoulli(probs=True)),
    Entry("resnet-batchnorm", ResNet, (6,)),
    Entry("groupnorm-silu-attention", lambda w: GroupNormAttention(w, False), (6,), Gaussian(0.5)),
    Entry(
        "groupnorm-silu-attention-spatial",
        lambda w: GroupNormAttention(w, True),
        (2, 4, 4),
        Gaussian(0.5),
    ),
    Entry("nearest-reflect-instancenorm", reflecting, (5,)),
    Entry("pixelshuffle-prelu", sub_pixel, (5,), Gaussian(0.5)),
    Entry("bilinear-circular", circular, (5,)),
    Entry("gated-convolutions", GatedConvolutions, (5,)),
    Entry("crop-and-pad", Cropped, (5,)),
    Entry("adain-styles", StyleBlocks, (6,), Gaussian(0.5)),
    Entry("squeeze-excitation", SqueezeExcitation, (5,)),
    Entry(
        "convnext",
        lambda w: from_image(w, nn.Sequential(ConvNeXtBlock(8 * w), nn.ConvTranspose2d(8 * w, 3, 2, 2))),
        (5,),
        Gaussian(0.5),
    ),
    Entry("pyramid-of-scales", Pyramid, (6,)),
    Entry("spatial-broadcast", SpatialBroadcast, (6,)),
    Entry("siren", SIREN, (4,), Gaussian(0.5)),
    Entry("sub-pixel-categorical", lambda w: DCGAN(w, last=2 * 5), (8,), Categorical(5)),
]
