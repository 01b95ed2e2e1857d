"""How every command line of ours ends: a user's mistake is one sentence on stderr and exit code 2."""

import sys
from collections.abc import Sequence

import tyro


def answer(app: tyro.extras.SubcommandApp, prog: str, description: str, args: Sequence[str] | None = None) -> None:
    """Runs the command that `args` name, by default those of the process."""
    try:
        app.cli(prog=prog, description=description, args=args, config=(tyro.conf.FlagCreatePairsOff,))
    except (ValueError, OSError) as error:
        print(f"engrammar: {error}", file=sys.stderr)
        sys.exit(2)
