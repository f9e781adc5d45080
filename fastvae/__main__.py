"""``python -m fastvae info`` and ``python -m fastvae demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastvae._distribution import faults

try:
    from fastvae import demo, info
except Exception:
    for fault in faults():  # files of another project among ours explain what no traceback does
        print(fault, file=sys.stderr)
    raise

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status (2: arguments that do not fit, with a message)."""
    parser = argparse.ArgumentParser(prog="python -m fastvae", description="fastvae on the command line.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="say what this installation is made of")
    demo_parser = commands.add_parser(
        "demo",
        help="train a VAE and a Hamiltonian VAE on real images, and write an HTML report",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_arguments(demo_parser)
    options = parser.parse_args(arguments)
    if options.command == "info":
        rows = info.describe()
        width = max(len(name) for name, _ in rows)
        print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
        return 0
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return demo.run(options, command=["python", "-m", "fastvae", *words])
    except demo.DemoError as error:
        demo_parser.error(str(error))
    except KeyboardInterrupt:
        print("\nstopped; no report was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
