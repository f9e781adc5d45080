"""``fastvae train``, ``score``, ``report``, ``demo`` and ``info``; also as ``python -m fastvae``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastvae._distribution import faults

try:
    from fastvae import demo, info
    from fastvae._version import __version__
    from fastvae.commands import CommandError, report, score, train
    from fastvae.commands.errors import wants_memory
except Exception:
    for fault in faults():  # files of another project among ours explain what no traceback does
        print(fault, file=sys.stderr)
    raise

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """Says what is wrong without all that there is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help lists what there is\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        The exit status: 0; 1 where training came to numbers that are not finite; 2 for arguments or data that do not
        fit, after a message; 130 after Ctrl-C.
    """
    parser = _Parser(prog="fastvae", description="Variational auto-encoders on your images and tables.")
    parser.add_argument("--version", action="version", version=f"fastvae {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module, text in (
        ("train", train, "train a model on a folder of pictures, other images or a table"),
        ("score", score, "write a score of every image or row as CSV"),
        ("report", report, "write a page about a model and its images or rows"),
    ):
        module.add_arguments(
            commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        )
    demo.add_arguments(
        commands.add_parser(
            "demo",
            help="train a VAE and a Hamiltonian VAE on images that are there, and write an HTML report",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    commands.add_parser("info", help="say what this installation is made of")
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal cannot show ends nothing.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    try:
        if options.command == "info":
            return _print_info()
        if options.command == "demo":
            return demo.run(options, command=["python", "-m", "fastvae", *words])
        return {"train": train, "score": score, "report": report}[options.command].run(options)
    except CommandError as error:
        print(f"fastvae {options.command}: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not wants_memory(error):
            raise
        print(
            f"fastvae {options.command}: error: expected enough memory, got less: fewer images at once, a smaller "
            f"network or smaller images need less ({str(error).splitlines()[0] if str(error) else 'MemoryError'})",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"\nfastvae {options.command}: stopped; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of | head
        # What is left would be flushed at the end, to nobody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _print_info() -> int:
    rows = info.describe()
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
