"""Bars of what takes long: on a terminal or in a notebook, and nowhere else."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

from fastvae._distribution import to_mend

__all__ = ["bar_of", "with_bar"]

_Item = TypeVar("_Item")


def with_bar(owner: str, items: Iterable[_Item], unit: str, total: int | None = None) -> Iterable[_Item]:
    """The items, ``total`` of them, with a bar. ImportError without tqdm, in the owner's name."""
    try:
        bar = _kind()
    except ImportError as error:
        raise ImportError(f"{owner}: show_progress=True needs tqdm; {to_mend('tqdm')}") from error
    found: Iterable[_Item] = bar(items, total=total, desc=owner, unit=unit)
    return found


def bar_of(total: int | None, what: str, unit: str, wanted: bool = True, **options: Any) -> Any:
    """A context with tqdm's ``update`` and ``set_postfix_str``; they do nothing without tqdm, or if none is wanted."""
    if not wanted:
        return _NoBar()
    try:
        bar = _kind()
    except ImportError:
        return _NoBar()
    # None: on a terminal only, which a notebook's output does not take itself for.
    disable = False if _is_notebook() else None
    return bar(
        total=total,
        desc=what,
        unit=unit,
        disable=disable,
        dynamic_ncols=True,
        **options,
    )


def _kind() -> Any:
    """tqdm's bar for where this runs: with widgets in a notebook that has them."""
    with warnings.catch_warnings():
        # Where it has none, tqdm advises on them.
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
    return tqdm


def _is_notebook() -> bool:
    """As tqdm finds out."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


class _NoBar:
    n = 0

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, steps: int) -> None:
        pass

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass

    def close(self) -> None:
        pass
