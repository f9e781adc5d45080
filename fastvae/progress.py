"""Bars of what takes long, on request."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from fastvae._distribution import to_mend

__all__ = ["with_bar"]

_Item = TypeVar("_Item")


def with_bar(owner: str, items: Iterable[_Item], unit: str, total: int | None = None) -> Iterable[_Item]:
    """The items, ``total`` of them, with a bar on a terminal. ImportError without tqdm, in the owner's name."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(f"{owner}: show_progress=True needs tqdm; {to_mend('tqdm', 'train')}") from error
    bar: Iterable[_Item] = tqdm(items, total=total, desc=owner, unit=unit)
    return bar
