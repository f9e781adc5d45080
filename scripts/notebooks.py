"""Run notebooks anew and keep what they show, without what differs from run to run (`make notebooks`).

python scripts/notebooks.py docs/notebooks/*.ipynb
"""

from __future__ import annotations

import base64
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbclient
import nbformat
from PIL import Image

LIMIT_BYTES = 300_000
"""of a notebook with its figures, which are committed"""


def smaller(png: str) -> str:
    """A picture, in base64, with 64 colours."""
    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(64, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def renew(path: Path) -> int:
    """Execute a notebook in an empty folder and write it; returns its size in bytes."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=folder)
    notebook.metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                if output.output_type == "stream" and output.name == "stderr":
                    raise RuntimeError(f"{path}: cell {number} writes to stderr: {output.text[:500]}")
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = smaller(output.data["image/png"])
                if "execution_count" in output:
                    output.execution_count = None
    nbformat.write(notebook, path)
    return path.stat().st_size


def main(paths: Sequence[str]) -> None:
    """Renew each."""
    for path in map(Path, paths):
        size = renew(path)
        print(f"{path}: {size // 1000} kB")
        if size > LIMIT_BYTES:
            raise SystemExit(f"notebooks.py: {path}: expected at most {LIMIT_BYTES // 1000} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
