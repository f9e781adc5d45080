"""The package's docstrings as reStructuredText, and names by the module that makes them public.

Docstrings are plain text with Google's sections, ``code`` and roles; formulas stand in them as they are written.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

# What keeps its meaning; all other text is a formula or prose.
_MARKUP = re.compile(r"(``.+?``|:[\w:]+:`[^`]+`|`[^`]+`_)")
_SECTION = re.compile(r"\s*(Args|Attributes|Returns|Raises|Yields):\s*$")


def escaped(line: str) -> str:
    r"""The line with ``|z|^2``, ``2 * x`` and ``rho_`` as text and no markup."""
    parts = _MARKUP.split(line)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([|*`]|_(?!\w))", r"\\\1", parts[i])
    return "".join(parts)


def as_restructured_text(lines: list[str]) -> list[str]:
    """Text is escaped, and a block that is set in after an empty line is shown as it stands."""
    out: list[str] = []
    margin, block = 0, -1  # the indentation of the paragraph before, and of a block that is being read
    after_section = False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            out.append(line)
            continue
        if block >= 0 and indent < block:
            block = -1
        if block < 0 and out and not out[-1].strip() and indent > margin and not after_section:
            block = indent
            out += [" " * margin + "::", ""]
        out.append(line if block >= 0 or _SECTION.match(line) else escaped(line))
        if block < 0:
            margin, after_section = indent, bool(_SECTION.match(line))
    return out


def with_tables_set_in(lines: list[str]) -> list[str]:
    """Paragraphs in columns ("file.py  what it holds"), as modules' docstrings have them, set in as blocks are."""
    text = "\n".join(lines)
    return re.sub(
        r"^\S+ {2,}\S.*(?:\n.+)*", lambda found: re.sub("(?m)^", "    ", found[0]), text, flags=re.MULTILINE
    ).split("\n")


class Docstrings:
    """What the API's pages show of a docstring."""

    def __init__(self) -> None:
        self._of_attributes: dict[str, list[str]] = {}

    def before_napoleon(
        self, app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
    ) -> None:
        """Escape what is no markup, and list a module's names."""
        lines[:] = as_restructured_text(with_tables_set_in(lines) if what == "module" else lines)
        if what == "module":
            members = [f"   {member}" for member in getattr(obj, "__all__", ())]
            lines += ["", ".. autosummary::", "", *members, ""]
        if what in ("attribute", "property", "data"):
            self._of_attributes[name] = lines.copy()

    def after_napoleon(
        self, app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
    ) -> None:
        """Of an attribute napoleon takes what is before a colon for its type; here it is text, "[B, d]: the code"."""
        if what in ("attribute", "property", "data"):
            lines[:] = self._of_attributes.pop(name)


def skip_member(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Fields of a named tuple whose docstring is Python's own: the class's says what they are."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


class PublicNames:
    """Finds what a reference means among the names that the API's pages describe.

    An annotation names a class by the file that defines it, a docstring perhaps by a shorter way.
    """

    def __init__(self) -> None:
        self._found: dict[int, str] = {}

    def resolve(
        self, app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element
    ) -> nodes.Element | None:
        """The link to the one page that describes what ``node`` refers to; its text alone where no page does."""
        if node.get("refdomain") != "py":
            return None
        domain = env.domains.python_domain
        if not self._found:
            for described in domain.objects:
                self._found.setdefault(id(_object(described)), described)
        found = _object(node["reftarget"], node.get("py:module"))
        if found is None:
            return None
        described = self._found.get(id(found))
        if described is None:
            return content
        entry = domain.objects[described]
        return _link(app, node, entry.docname, entry.node_id, content)


def _object(name: str, module: str | None = None) -> Any:
    """What a dotted name means, in a module or by itself."""
    for full in (f"{module}.{name}", name) if module else (name,):
        parts = full.split(".")
        for i in range(len(parts), 0, -1):
            try:
                found: Any = importlib.import_module(".".join(parts[:i]))
            except ImportError:
                continue
            for part in parts[i:]:
                found = getattr(found, part, None)
            if found is not None:
                return found
    return None


def _link(app: Sphinx, node: pending_xref, page: str, anchor: str, content: nodes.Element) -> nodes.reference:
    uri = app.builder.get_relative_uri(node["refdoc"], page)
    link = nodes.reference("", "", internal=True, refuri=f"{uri}#{anchor}")
    link += content
    return link


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls it."""
    docstrings = Docstrings()
    app.connect("autodoc-process-docstring", docstrings.before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", docstrings.after_napoleon, priority=600)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("missing-reference", PublicNames().resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
