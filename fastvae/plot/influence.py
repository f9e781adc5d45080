"""Training samples beside the samples that they shaped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastvae.arguments import expect
from fastvae.influence import KMostInfluentialResults
from fastvae.plot.images import as_images, captioned_rows

__all__ = ["influences"]


def influences(
    queries: Tensor,
    train: Tensor,
    proponents: KMostInfluentialResults | tuple[Tensor, Tensor],
    opponents: KMostInfluentialResults | tuple[Tensor, Tensor] | None = None,
    *,
    query_captions: Sequence[str] | None = None,
) -> Figure:
    """In each row a query, the training images of most influence on it, and its opponents if given, with scores.

    Scores are written in units of the largest magnitude of their row.

    Args:
        queries: [Q, C, H, W].
        train: [N, C, H, W], which the indices count.
        proponents: of ``TracIn.influence(queries, k)``: indices and scores, [Q, k] each.
        opponents: of ``TracIn.influence(queries, k, proponents=False)``.
        query_captions: Q of a few characters, under the queries.

    Raises:
        ValueError: shapes that do not fit.
    """
    given = [proponents] if opponents is None else [proponents, opponents]
    queries, train = (as_images("plot.influences", each, None) for each in (queries, train))
    for indices, scores in given:
        fits = indices.shape == scores.shape and indices.dim() == 2 and len(indices) == len(queries)
        if not fits or not indices.shape[1]:
            raise ValueError(
                f"plot.influences: expected indices and scores [{len(queries)}, k], got {list(indices.shape)} and "
                f"{list(scores.shape)}"
            )
        if indices.is_floating_point() or not 0 <= int(indices.min()) <= int(indices.max()) < len(train):
            raise ValueError(
                f"plot.influences: expected indices from 0 to {len(train) - 1}, of the training images, got "
                f"{indices.dtype} from {indices.min():g} to {indices.max():g}"
            )
    captions = [""] * len(queries) if query_captions is None else list(query_captions)
    expect(
        len(captions) == len(queries),
        f"plot.influences: query_captions: expected {len(queries)}, one an image",
        len(captions),
    )
    rows = []
    for row, (query, caption) in enumerate(zip(queries, captions, strict=True)):
        scores = torch.cat([scores[row] for _, scores in given]).double()
        largest = float(scores.abs().max()) or 1.0
        shown = [train[indices[row].cpu()] for indices, _ in given]
        rows.append(
            (
                torch.cat([query[None], *shown]),
                [caption, *(f"{score / largest:.2f}" for score in scores.tolist())],
            )
        )
    headings = [(0, "image"), (1, "proponents")]
    if opponents is not None:
        headings.append((1 + proponents[0].shape[1], "opponents"))
    return captioned_rows(rows, headings=headings)
