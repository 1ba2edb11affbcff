"""The `kvfs` command. Each subcommand has its own module here; this one puts them together.

Exit codes of every subcommand: 0 done, 1 failed, 2 wrong usage.
"""

from kvfs.cli.app import app


def main() -> None:
    """Entry point of the `kvfs` script."""
    app()
