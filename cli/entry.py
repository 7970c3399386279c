"""Where the installed command starts: Ctrl-C ends in a line even while the command line itself is being imported."""

import sys


def main() -> None:
    """Import the command line and run it."""
    try:
        from srdeploy.cli.main import main as run
    except KeyboardInterrupt:
        print("error: interrupted; nothing was left half-written", file=sys.stderr)
        sys.exit(130)
    run()
