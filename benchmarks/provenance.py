"""What a result was measured on: commit, processor, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

from torch.utils import collect_env


def commit() -> str:
    """Of the tree that this file is in, and whether it has changes; "unknown" without a history."""
    if known := os.environ.get("FASTVAE_COMMIT"):  # of a copy without its history
        return known
    words = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty= with changes"]
    done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def processor() -> str:
    """Its name and how many logical ones there are."""
    name = re.search(r"^Model name:\s*(.+)$", collect_env.get_cpu_info(collect_env.run) or "", re.MULTILINE)
    return f"{name[1] if name else platform.machine()}, {os.cpu_count()} logical"


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
