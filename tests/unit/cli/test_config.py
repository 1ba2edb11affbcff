"""The configuration: defaults, TOML, environment, and one-sentence errors."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.config import MAX_SIZE, Config, ConfigError, Size, environment, load


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refused(path: Path | None = None, environ: dict[str, str] | None = None, **overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, environ or {}, **overrides)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def test_defaults_need_no_file(tmp_path: Path) -> None:
    config = load(environ={})
    assert config == Config()
    assert config.dir == tmp_path / "xdg-data/kvfs"
    assert config.mount_point == config.dir / "mnt"
    assert config.store.size == 8 << 30
    assert config.store.memory == 512 << 20


def test_the_environment_gives_another_process_the_whole_configuration(tmp_path: Path) -> None:
    """What `--detach` starts has the settings of who started it, those of a file it doesn't read too."""
    path = write(
        tmp_path / "kvfs.toml",
        'dir = "/data/kvfs"\nmount = "/mnt/kv"\n[store]\nsize = "64G"\nmemory = 0\nshared = "1G"\n[fuse]\nnative = false\n'
        '[remote]\nurl = "kvfs://h:1/a/b"\ntoken = "/t"\ntransport = "tcp"\nconnections = 3\ndeadline = 2.5\n'
        'data_sums = false\nrails = "eth*"\n[log]\nlevel = "debug"\nformat = "json"\n[metrics]\nhost = "::1"\nport = 9100\n',
    )
    config = load(path, {})
    assert load(environ=environment(config)) == config
    default = load(environ={})
    assert load(environ=environment(default)) == default


def test_file_then_environment_then_command_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "kvfs.toml",
        'dir = "/data/kvfs"\n[store]\nsize = "64G"\nmemory = 1048576\n[log]\nlevel = "debug"\n[metrics]\nport = 9100\n',
    )
    config = load(path, {"KVFS_STORE_SIZE": "128G", "KVFS_METRICS_PORT": "9200", "KVFS_MOUNT": "/mnt/kv"})
    assert config.dir == Path("/data/kvfs")
    assert config.mount_point == Path("/mnt/kv")
    assert config.store.size == 128 << 30
    assert config.store.memory == 1 << 20
    assert config.log.level == "debug"
    assert config.metrics.port == 9200
    assert load(path, {"KVFS_STORE_SIZE": "128G"}, store_size="1T", dir=None).store.size == 1 << 40


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dir = [", "not valid TOML"),
        ("dri = '/x'", "dri: unknown setting; did you mean 'dir'?"),
        ("[store]\nsise = '8G'", "store.sise: unknown setting; did you mean 'size'?"),
        ("[store]\nzzz = 1", "store.zzz: unknown setting; known are size, memory"),
        ("[store]\nsize = '8 bananas'", "store.size: '8 bananas' is not a size such as 8G"),
        ("[store]\nsize = -1", "store.size: -1 is out of range"),
        ("[store]\nsize = true", "store.size: true is not a size"),
        ("[store]\nsize = '1M'", "store.size: 1048576 bytes is less than the 64 MiB"),
        ("store = 3", "store: expected object, got int"),
        ("[log]\nlevel = 'loud'", "log.level: invalid enum value 'loud'"),
        ("[metrics]\nport = 70000", "metrics.port: expected int <= 65535"),
        ("[metrics]\nport = '9100'", "metrics.port: expected int, got str"),
        ("dir = ''", "dir: '' is not a path"),
        ("dir = 7", "dir: 7 is not a path"),
    ],
)
def test_wrong_file_is_named_and_explained(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path / "bad.toml", text)
    message = refused(path)
    assert expected in message
    if "64 MiB" not in expected:
        assert message.startswith(f"{path}: ")


def test_unreadable_files(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "absent.toml")
    assert "directory" in refused(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not valid TOML" in refused(binary)
    assert "not valid TOML" in refused(write(tmp_path / "deep.toml", "a = " + "[" * 100_000))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("KVFS_STORE_SISE", "8G", "KVFS_STORE_SISE: unknown setting; known are KVFS_STORE_SIZE, KVFS_STORE_MEMORY"),
        ("KVFS_STORE_SIZE", "much", "environment: store.size: 'much' is not a size"),
        ("KVFS_METRICS_PORT", "http", "environment: metrics.port: expected int, got str"),
        ("KVFS_LOG_FORMAT", "xml", "environment: log.format: invalid enum value 'xml'"),
    ],
)
def test_wrong_environment_is_named(name: str, value: str, expected: str) -> None:
    assert expected in refused(environ={name: value})


def test_wrong_command_line_is_named() -> None:
    assert refused(store_size="much").startswith("command line: store.size: ")


def test_other_variables_are_not_ours() -> None:
    assert load(environ={"KVFS_SOMETHING": "1", "PATH": "/bin"}) == Config()


@given(st.integers(0, MAX_SIZE))
def test_sizes_round_trip(number: int) -> None:
    assert Size.parse(number) == number
    assert Size.parse(str(number)) == number
    assert Size.parse(f"{number >> 30}GiB") == number >> 30 << 30


@given(st.text())
def test_any_text_is_a_size_in_range_or_refused(text: str) -> None:
    try:
        size = Size.parse(text)
    except ValueError:
        return
    assert 0 <= size <= MAX_SIZE


@given(st.binary(max_size=200))
def test_any_bytes_load_or_are_refused(data: bytes) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        file.write(data)
        file.flush()
        try:
            load(Path(file.name), {})
        except ConfigError as error:
            assert str(error).startswith(file.name)  # noqa: PT017 - both outcomes are right
