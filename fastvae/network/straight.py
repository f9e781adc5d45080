"""Lines that a recorder wrote (tape.py) as a function: without what nobody uses, and without doing the same twice."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Line", "compiled", "inputs_of"]


class Line(NamedTuple):
    """One call: ``target = call``."""

    target: str
    """Variables as code; "" where there are none."""
    call: str
    read: frozenset[str]
    written: frozenset[str]
    changes: bool
    """Whether it may change the memory of a variable that was there before."""
    makes: bool
    """Whether it makes new memory to be written to."""


def compiled(
    lines: Sequence[Line],
    inputs: Sequence[str],
    outputs: Sequence[str | None],
    constants: Mapping[str, Any],
) -> Callable[..., Any]:
    """The lines as a function of variables; each is let go after its last use."""
    chosen, kept = _chosen(lines, outputs), {name for name in outputs if name is not None}
    last: dict[str, int] = {}
    for at, line in enumerate(chosen):
        last.update(dict.fromkeys(line.read | line.written, at))
    body = []
    for at, line in enumerate(chosen):
        body.append(f"    {line.target} = {line.call}" if line.target else f"    {line.call}")
        gone = sorted(name for name in line.read | line.written if last[name] == at and name not in kept)
        if gone:
            body.append(f"    del {', '.join(gone)}")
    returned = "".join(f"{name}, " for name in outputs)
    text = "\n".join([f"def run({', '.join(inputs)}):", *body, f"    return ({returned})"])
    found = dict(constants)
    exec(compile(text, "<tape>", "exec"), found)
    run: Callable[..., Any] = found["run"]
    return run


def inputs_of(lines: Sequence[Line], outputs: Sequence[str | None]) -> list[str]:
    """The variables that the lines take from elsewhere."""
    written: set[str] = set()
    found: dict[str, None] = {}
    for line in _chosen(lines, outputs):
        found.update(dict.fromkeys(sorted(line.read - written)))
        written |= line.written
    return list(found)


def _chosen(lines: Sequence[Line], outputs: Sequence[str | None]) -> list[Line]:
    kept = {name for name in outputs if name is not None}
    return _used(_once(lines, kept), kept)


def _once(lines: Sequence[Line], kept: set[str]) -> list[Line]:
    """The lines without calls that were made before of the same variables.

    What is returned stays apart, and so does what is written to: nobody else has that memory. Where something is
    written to, what was computed before it may be another thing from then on.
    """
    apart = kept | _written_to(lines)
    names: dict[str, str] = {}
    known: dict[str, Line] = {}
    found: list[Line] = []
    for line in lines:
        line = _renamed(line, names)
        if line.changes:
            known.clear()
        elif not line.makes and not line.written & apart:
            before = known.get(line.call)
            if before is not None:
                mine, theirs = _VARIABLE.findall(line.target), _VARIABLE.findall(before.target)
                names.update(zip(mine, theirs, strict=True))
                continue
            known[line.call] = line
        found.append(line)
    return found


def _written_to(lines: Sequence[Line]) -> set[str]:
    """Variables whose memory is changed, also through a view, whose first argument is what it looks at."""
    first: dict[str, str | None] = {}
    found: set[str] = set()
    for line in lines:
        variable = _VARIABLE.search(line.call)
        source = None if variable is None else variable[0]
        if line.changes:
            for name in line.written or {source}:
                while name is not None and name not in found:
                    found.add(name)
                    name = first.get(name)
        for name in line.written:
            first.setdefault(name, source)
    return found


def _renamed(line: Line, names: Mapping[str, str]) -> Line:
    if not line.read & names.keys():
        return line
    call = _VARIABLE.sub(lambda found: names.get(found[0], found[0]), line.call)
    return line._replace(call=call, read=frozenset(names.get(name, name) for name in line.read))


def _used(lines: Sequence[Line], results: set[str]) -> list[Line]:
    """The lines that reach the results, and those that change memory."""
    needed = set(results)
    found = []
    for line in reversed(lines):
        if line.changes or line.written & needed:
            needed |= line.read
            found.append(line)
    return found[::-1]


_VARIABLE = re.compile(r"\bv\d+\b")
