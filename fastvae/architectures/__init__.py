"""Encoders and decoders, untrained: for images of any size, for tables, and those of the papers.

Initial weights are PyTorch's where nothing else is said.
"""

from fastvae.architectures.images import image_decoder, image_encoder, image_networks
from fastvae.architectures.naming import BY_NAME
from fastvae.architectures.papers import (
    dcgan_decoder,
    dcgan_encoder,
    dcgan_states,
    hvae_decoder,
    hvae_encoder,
    jacobian_l1_decoder,
    jacobian_l1_encoder,
    tracin_decoder,
    tracin_encoder,
)
from fastvae.architectures.tables import table_decoder, table_encoder, table_networks

__all__ = [
    "BY_NAME",
    "dcgan_decoder",
    "dcgan_encoder",
    "dcgan_states",
    "hvae_decoder",
    "hvae_encoder",
    "image_decoder",
    "image_encoder",
    "image_networks",
    "jacobian_l1_decoder",
    "jacobian_l1_encoder",
    "table_decoder",
    "table_encoder",
    "table_networks",
    "tracin_decoder",
    "tracin_encoder",
]
