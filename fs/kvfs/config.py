"""The configuration of a kvfs node: a TOML file, overridden by KVFS_* environment variables, as validated structs.

Owns the names, defaults and checks of every setting. Each setting `[section] key` has the variable KVFS_SECTION_KEY
(top-level keys: KVFS_KEY). Wrong input gives a ConfigError of one sentence that names the file or variable.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import msgspec

_SIZE = re.compile(r"\s*([0-9]{1,19})\s*(?:([KMGT])(?:i?B)?|B)?\s*", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
MAX_SIZE = 1 << 60
MIN_STORE = 64 << 20


class ConfigError(Exception):
    """The configuration cannot be used; str() is one sentence that says which setting and why."""


class Size(int):
    """A number of bytes, written as 8G, 512M, 1GiB (powers of 1024) or a plain number."""

    @classmethod
    def parse(cls, value: object) -> "Size":
        """A Size from TOML's integer or text; ValueError says what is wrong."""
        if isinstance(value, int) and not isinstance(value, bool):
            number = value
        elif isinstance(value, str):
            match = _SIZE.fullmatch(value)
            if match is None:
                raise ValueError(f"{value!r} is not a size such as 8G, 512M or 1048576")
            number = int(match[1]) * _UNITS[(match[2] or "").upper()]
        else:
            raise ValueError(f"{value!r} is not a size such as 8G, 512M or 1048576")
        if not 0 <= number <= MAX_SIZE:
            raise ValueError(f"{value!r} is out of range")
        return cls(number)


class StoreConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[store]: the chunk store's file."""

    size: Size = Size(8 << 30)
    memory: Size = Size(512 << 20)
    shared: Size = Size(4 << 30)


class FuseConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[fuse]: how the mount is served."""

    native: bool = True
    """Reads and writes go past Python; false: pyfuse3 serves everything."""


class RemoteConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[remote]: the volume whose data is on chunk servers; without `url` all data is in `dir`."""

    url: str = ""
    """kvfs://HOST:PORT,HOST:PORT/TENANT/VOLUME"""
    token: Path | None = None
    transport: Literal["auto", "tcp", "rdma"] = "auto"
    connections: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2
    """To each target, over each of its rails."""
    deadline: Annotated[float, msgspec.Meta(ge=0.1, le=3600)] = 30.0
    """Seconds until an operation that no server has answered fails with ETIMEDOUT."""
    data_sums: bool = True
    rails: str = ""
    """Comma-separated patterns of RDMA devices, DEVICE/PORT or network devices; empty: all."""


class LogConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[log]: how much is logged, and how it is written."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class MetricsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[metrics]: where Prometheus text is served; port 0 serves none."""

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node's whole configuration."""

    dir: Path = msgspec.field(default_factory=lambda: default_directory(os.environ))
    mount: Path | None = None
    store: StoreConfig = StoreConfig()
    fuse: FuseConfig = FuseConfig()
    remote: RemoteConfig = RemoteConfig()
    log: LogConfig = LogConfig()
    metrics: MetricsConfig = MetricsConfig()

    @property
    def mount_point(self) -> Path:
        """Where the file system is mounted: `mount`, or DIR/mnt."""
        return self.mount if self.mount is not None else self.dir / "mnt"


SECTIONS: dict[str, type[msgspec.Struct]] = {
    "store": StoreConfig,
    "fuse": FuseConfig,
    "remote": RemoteConfig,
    "log": LogConfig,
    "metrics": MetricsConfig,
}
TOP_LEVEL = ("dir", "mount")


def default_directory(environ: Mapping[str, str]) -> Path:
    """The data directory when none is configured: the XDG data directory's kvfs."""
    base = environ.get("XDG_DATA_HOME") or os.path.join(environ.get("HOME") or "/root", ".local", "share")
    return Path(base) / "kvfs"


def hook(kind: type, value: object) -> object:
    """msgspec's dec_hook for Size and Path."""
    if kind is Size:
        return Size.parse(value)
    if kind is Path:
        if not isinstance(value, str) or not value or "\0" in value:
            raise ValueError(f"{value!r} is not a path")
        return Path(value).expanduser()
    raise NotImplementedError(kind)


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {os.strerror(error.errno or 0)}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {str(error) or type(error).__name__}") from error


def _known_keys(section: str) -> list[str]:
    if section:
        return list(SECTIONS[section].__struct_fields__)
    return [*TOP_LEVEL, *SECTIONS]


def explain(error: msgspec.ValidationError, known_keys: Callable[[str], Sequence[str]]) -> str:
    """msgspec's message as `store.size: ...`, with the nearest of the place's known keys for a misspelt one."""
    message, _, where = str(error).partition(" - at `$")
    place = where.rstrip("`").lstrip(".")
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", message, re.DOTALL)
    if unknown is not None:
        known = known_keys(place)
        close = difflib.get_close_matches(unknown[1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
        key = f"{place}.{unknown[1]}" if place else unknown[1]
        return f"{key}: unknown setting; {hint}"
    text = message[:1].lower() + message[1:].replace("`", "")
    return f"{place}: {text}" if place else text


def _environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings that environment variables give, shaped like the TOML file's."""
    settings: dict[str, Any] = {}
    for key in TOP_LEVEL:
        value = environ.get(f"KVFS_{key.upper()}")
        if value is not None:
            settings[key] = value
    for section in SECTIONS:
        prefix = f"KVFS_{section.upper()}_"
        known = _known_keys(section)
        for name in sorted(environ):
            if not name.startswith(prefix):
                continue
            key = name.removeprefix(prefix).lower()
            if key not in known:
                raise ConfigError(f"{name}: unknown setting; known are {', '.join(prefix + k.upper() for k in known)}")
            settings.setdefault(section, {})[key] = environ[name]
    return settings


def environment(config: Config) -> dict[str, str]:
    """The variables that give another process this configuration, whatever its file says. Paths become absolute."""
    variables: dict[str, str] = {}

    def put(name: str, value: object) -> None:
        if isinstance(value, bool):
            variables[name] = str(value).lower()
        elif isinstance(value, int | float | str):
            variables[name] = str(value)
        elif isinstance(value, Path):
            variables[name] = str(value.absolute())

    for key in TOP_LEVEL:
        put(f"KVFS_{key.upper()}", getattr(config, key))
    for section in SECTIONS:
        for key in _known_keys(section):
            put(f"KVFS_{section.upper()}_{key.upper()}", getattr(getattr(config, section), key))
    return variables


def _convert(settings: Mapping[str, Any], source: str, *, strict: bool) -> Config:
    try:
        return msgspec.convert(settings, Config, strict=strict, dec_hook=hook)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, _known_keys)}") from error


def load(path: Path | None = None, environ: Mapping[str, str] | None = None, **overrides: str | None) -> Config:
    """The configuration from the file (none: defaults), then the environment, then `overrides` (command line).

    An override is named like a variable without KVFS_, in lower case: dir, mount, store_size. None means not given.
    """
    environ = os.environ if environ is None else environ
    settings: dict[str, Any] = {}
    if path is not None:
        settings = read_toml(path)
        _convert(settings, str(path), strict=True)
    options = {f"KVFS_{name.upper()}": value for name, value in overrides.items() if value is not None}
    for source, variables in (("environment", environ), ("command line", options)):
        layer = _environment(variables)
        # Each layer alone first, so that an error names its source.
        _convert(layer, source, strict=False)
        for key, value in layer.items():
            if key in SECTIONS:
                settings[key] = {**cast("dict[str, Any]", settings.get(key, {})), **value}
            else:
                settings[key] = value
    config = _convert(settings, "configuration", strict=False)
    if config.store.size < MIN_STORE:
        raise ConfigError(f"store.size: {config.store.size} bytes is less than the {MIN_STORE >> 20} MiB a store needs")
    return config
