"""Run the code of a page or a notebook as a reader would, with the packages of this Python and in this folder.

    python scripts/pages.py needs PAGE...                 the packages that the pages tell their reader to install
    python scripts/pages.py run PAGE [--then CODE]        its blocks in one namespace; then some more code in it

A block that begins with a file's name is saved as that file; ``sh`` blocks go to bash. Needs fastvae, and no other
package than the page names.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

# What a page of these says of a decoder that runs through autograd, fastvae warns of; Lightning advises on workers.
WARN = ("bring-your-model.md", "compose.md")


def text_of(page: Path) -> str:
    """What a reader is told: a page's text, or that of a notebook's cells without code."""
    if page.suffix != ".ipynb":
        return page.read_text()
    return "\n\n".join(text for kind, text in _cells(page) if kind == "markdown")


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the page's code blocks."""
    if page.suffix == ".ipynb":
        return [("python", text) for kind, text in _cells(page) if kind == "code"]
    return re.findall(r"^```(python|sh)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def _cells(notebook: Path) -> list[tuple[str, str]]:
    cells = json.loads(notebook.read_text())["cells"]
    return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]


def needs_of(page: Path) -> list[str]:
    """What a reader of the page is told to install besides fastvae: "needs `pip install NAME NAME`"."""
    return [
        name for line in re.findall(r"needs\s+`pip install ([^`]+)`", text_of(page)) for name in line.split()
    ]


def run(page: Path, then: str) -> int:
    """Run the blocks; returns how many there were."""
    names: dict[str, object] = {"__name__": "__main__"}
    blocks = blocks_of(page)
    with warnings.catch_warnings():
        if page.name in WARN:
            warnings.simplefilter("ignore")
        else:
            warnings.filterwarnings("error", category=UserWarning, module="fastvae")
        for language, text in blocks:
            file = re.match(r"# (\w+\.py)\n", text)
            if language == "sh":
                path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
                subprocess.run(
                    ["bash", "-euc", text], env={**os.environ, "PATH": path}, check=True, timeout=300
                )
            elif file:
                Path(file[1]).write_text(text)
            else:
                with contextlib.redirect_stdout(None):
                    exec(compile(text, str(page), "exec"), names)
        exec(then, names)
    return len(blocks)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("needs").add_argument("page", type=Path, nargs="+")
    runner = commands.add_parser("run")
    runner.add_argument("page", type=Path)
    runner.add_argument("--then", default="")
    options = parser.parse_args()
    if options.command == "needs":
        print("\n".join(sorted({name for page in options.page for name in needs_of(page)})))
    else:
        print(f"{options.page.name}: {run(options.page.resolve(), options.then)} blocks")


if __name__ == "__main__":
    main()
