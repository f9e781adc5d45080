"""The order of the pages in the site's menu; the pages themselves hold no directives of Sphinx."""

from __future__ import annotations

from sphinx.application import Sphinx

# A page that is in no list, or a name without a page, ends the build.
MENU = {
    "docs/index": {
        "Start": [
            "docs/install",
            "docs/your-images",
            "docs/your-tables",
            "docs/clean-machine",
            "docs/tour",
            "docs/which-method",
            "docs/notebooks/*",
        ],
        "Guides": [
            "docs/bring-your-model",
            "docs/compose",
            "docs/report",
            "docs/other-data",
            "docs/evidence",
            "docs/samplers",
            "docs/on-a-gpu",
            "docs/several-processes",
        ],
        "Reference": ["docs/reference", "docs/api/index", "docs/ops/*"],
        "Results": ["docs/results", "Tables </benchmarks/results/README>"],
        "Inside": ["docs/kernels", "docs/adding-a-layer"],
        "Project": ["Read me </README>", "CHANGELOG", "CONTRIBUTING", "DATA", "SECURITY"],
    },
    "docs/api/index": {"": ["docs/api/*"]},
    "benchmarks/results/README": {
        "": [f"benchmarks/results/{folder}*" for folder in ("", "papers/", "zen5/", "zen4/")]
    },
}


def add_menu(app: Sphinx, page: str, source: list[str]) -> None:
    """Append a page's part of the menu to its text, and give a table of results that has no title its file's name."""
    if page.startswith("benchmarks/results/") and not source[0].lstrip().startswith("# "):
        source[0] = f"# {page.rsplit('/', 1)[1].replace('_', ' ').capitalize()}\n\n{source[0]}"
    for caption, pages in MENU.get(page, {}).items():
        lines = [
            ":hidden:",
            ":glob:",
            *([f":caption: {caption}"] if caption else []),
            "",
            *(p if "<" in p else f"/{p}" for p in pages),
        ]
        if str(app.env.doc2path(page)).endswith(".rst"):
            source[0] += "\n.. toctree::\n" + "".join(f"   {line}\n" for line in lines)
        else:
            source[0] += "\n```{toctree}\n" + "\n".join(lines) + "\n```\n"


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls it."""
    app.connect("source-read", add_menu)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
