"""SGLang 0.5.23 as released, on the CPU: its host pool and its whole engine over its hf3fs backend on a kvfs mount.

The backend's client (Hf3fsUsrBioClient), HiCacheHF3FS and the metadata server are SGLang's own; sglang_cpu/ replaces only
what needs CUDA.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from environments import Environment, environment

HERE = Path(__file__).parent
SERVER = "sglang.srt.mem_cache.storage.hf3fs.mini_3fs_metadata_server"
TEBIBYTE = 1 << 40
PROMPT = 2100
PROMPT_PAGES = 2048  # tokens of the prompt's whole pages

Report = TypeVar("Report", bound=msgspec.Struct)

pytestmark = pytest.mark.timeout(1800)


class PoolReport(msgspec.Struct):
    """What sglang_pool.py prints."""

    backend: str
    client: str
    bytes: int
    wrote: bool
    found: bool
    read: bool
    equal: bool


class Generated(msgspec.Struct):
    """What sglang_engine.py prints."""

    tokens: list[int]
    from_storage: int
    seconds: float


@pytest.fixture(scope="session")
def sglang() -> Environment:
    return environment("sglang")


def variables(**added: str) -> dict[str, str]:
    return {"PYTHONPATH": str(HERE / "sglang_cpu"), **added}


@contextmanager
def metadata_server(sglang: Environment, log: Path) -> Generator[str]:
    """SGLang's own server of which page lies where; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sglang.python, "-m", SERVER, "--host", "127.0.0.1", "--port", str(port)],
            env=sglang.variables(variables()),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{url}/docs", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield url
    finally:
        server.kill()
        server.wait(30)


def configured(directory: Path, config: Path, url: str | None, *, clients: int, file_size: int) -> str:
    """A configuration file of SGLang's hf3fs backend; its name."""
    settings: dict[str, object] = {
        "file_path_prefix": str(directory / "mnt" / "hicache"),
        "file_size": file_size,
        "numjobs": clients,
        "entries": 8,
    }
    if url is not None:
        settings["metadata_server_url"] = url
    config.write_text(json.dumps(settings))
    return str(config)


def last_line(done: subprocess.CompletedProcess[str], kind: type[Report]) -> Report:
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=kind)


@pytest.mark.parametrize(("layout", "clients"), [("layer_first", 4), ("page_first", 16), ("page_first_direct", 4)])
def test_host_pool(sglang: Environment, directory: Path, tmp_path: Path, layout: str, clients: int) -> None:
    """Several clients (16 are SGLang's default) on one file of 1 TiB; every bit of every page comes back."""
    with metadata_server(sglang, tmp_path / "server.log") as url:
        config = configured(directory, tmp_path / "config.json", url, clients=clients, file_size=TEBIBYTE)
        done = sglang.run(
            HERE / "sglang_pool.py",
            "hf3fs",
            layout,
            "--rounds",
            "2",
            variables=variables(SGLANG_HICACHE_HF3FS_CONFIG_PATH=config),
        )
    report = last_line(done, PoolReport)
    assert (report.backend, report.client) == ("HiCacheHF3FS", "Hf3fsUsrBioClient")
    assert report.wrote
    assert report.found
    assert report.read
    assert report.equal
    assert (directory / "mnt" / "hicache.0.bin").stat().st_size == TEBIBYTE


def generate(sglang: Environment, model: Path, backend: str, **added: str) -> Generated:
    done = sglang.run(HERE / "sglang_engine.py", model, backend, str(PROMPT), variables=variables(**added), seconds=400)
    return last_line(done, Generated)


def test_whole_engine_across_processes(sglang: Environment, directory: Path, tmp_path: Path) -> None:
    """The second process, a new one, finds the first one's cache in the file and says the same as one without any. With
    zeros in the file it says something else: it is what was read that decides."""
    with metadata_server(sglang, tmp_path / "server.log") as url:
        config = configured(directory, tmp_path / "config.json", url, clients=2, file_size=TEBIBYTE)
        hooks = {"SGLANG_HICACHE_HF3FS_CONFIG_PATH": config}
        alone = generate(sglang, tmp_path / "model", "none")
        first = generate(sglang, tmp_path / "model", "hf3fs", **hooks)
        second = generate(sglang, tmp_path / "model", "hf3fs", **hooks)
        with open(directory / "mnt" / "hicache.0.bin", "r+b") as pages:
            pages.truncate(0)
            pages.truncate(TEBIBYTE)
        spoilt = generate(sglang, tmp_path / "model", "hf3fs", **hooks)
    assert (alone.from_storage, first.from_storage) == (0, 0)
    assert second.from_storage == PROMPT_PAGES
    assert first.tokens == alone.tokens
    assert second.tokens == alone.tokens
    assert spoilt.from_storage == PROMPT_PAGES
    assert spoilt.tokens != alone.tokens


def test_whole_engine_with_failures_and_delays(sglang: Environment, directory: Path, tmp_path: Path) -> None:
    """SGLang's own hooks let calls of its storage fail or come late: what is found may be less, but never wrong."""
    with metadata_server(sglang, tmp_path / "server.log") as url:
        config = configured(directory, tmp_path / "config.json", url, clients=2, file_size=TEBIBYTE)
        hooks = {
            "SGLANG_HICACHE_HF3FS_CONFIG_PATH": config,
            "SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE": "0.3",
            "SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY": "0.05",
        }
        wanted = generate(sglang, tmp_path / "model", "none").tokens
        for _ in range(2):
            found = generate(sglang, tmp_path / "model", "hf3fs", **hooks)
            assert found.tokens == wanted
            assert found.from_storage in range(0, PROMPT_PAGES + 1, 64)
