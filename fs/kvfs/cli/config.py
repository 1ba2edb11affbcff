"""`kvfs config`: the configuration as it will be used, after file and environment."""

from pathlib import Path
from typing import Annotated

import typer

from kvfs.cli.output import fail, print_json
from kvfs.config import ConfigError, load

EXAMPLES = "Examples:  kvfs config   |   kvfs config -c kvfs.toml   |   KVFS_STORE_SIZE=64G kvfs config"


def config(
    file: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file to read.")] = None,
) -> None:
    """Check a configuration and print it as JSON, defaults and KVFS_* variables included."""
    try:
        print_json(load(file))
    except ConfigError as error:
        fail(str(error))
