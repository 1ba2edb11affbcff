"""`kvfs token`: keys, and tokens that say what a client may do."""

import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvfs.cli.output import USAGE, fail, print_json
from kvfs.cluster import capability, file
from kvfs.cluster.capability import Capability, CapabilityError, Grant
from kvfs.config import ConfigError

app = typer.Typer(help="Make keys and tokens, which prove to chunk servers what a client may do.", no_args_is_help=True)
KEYGEN_EXAMPLES = "Examples:  kvfs token keygen cluster.key   (and cluster.key.pub, for the servers)"
ISSUE_EXAMPLES = (
    "Examples:  kvfs token issue --key cluster.key --cluster cluster.toml --tenant acme "
    "--namespace llama:rw --namespace weights:ro --expires 30d -o acme.token"
)
SHOW_EXAMPLES = "Examples:  kvfs token show acme.token   |   kvfs token show acme.token --key cluster.key.pub --json"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class GrantReport(msgspec.Struct, frozen=True):
    namespace: int
    name: str
    """Empty without --cluster, or if the cluster has no such namespace."""
    rights: str
    files: bool
    cache: bool


class TokenReport(msgspec.Struct, frozen=True):
    """What `kvfs token show --json` prints."""

    tenant: str
    not_before: int
    expires: int
    serial: str
    grants: list[GrantReport]
    verified: bool | None
    """None: no key was given."""


def seconds(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if match is None:
        fail(f"{text!r} is no time such as 30d, 12h, 90m or 60s", code=USAGE)
    return int(match[1]) * _UNITS[match[2]]


@app.command("keygen", epilog=KEYGEN_EXAMPLES)
def keygen(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="For the signing key; FILE.pub: the other.")],
) -> None:
    """Make a key pair: the signing key stays with who issues tokens, the public key goes to the chunk servers."""
    secret, public = capability.key_files(capability.SigningKey.generate())
    beside = path.with_name(path.name + ".pub")
    if beside.exists():
        fail(f"{beside} is there already")
    try:
        capability.write_secret(path, secret)
        beside.write_text(public)
    except CapabilityError as e:
        fail(str(e))
    except OSError as e:
        fail(f"{beside} cannot be written: {e.strerror}")
    typer.echo(f"{path}: signing key; {beside}: public key")


@app.command("issue", epilog=ISSUE_EXAMPLES)
def issue(
    key: Annotated[Path, typer.Option("--key", help="The signing key.")],
    cluster: Annotated[Path, typer.Option("--cluster", help="The cluster file, which knows the namespaces.")],
    tenant: Annotated[str, typer.Option("--tenant")],
    namespace: Annotated[
        list[str],
        typer.Option(
            "--namespace",
            help="NAME or NAME:RIGHTS: ro, rw, put (no delete), or some of read+write+delete+list. Repeat it.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The token's file.")],
    expires: Annotated[str, typer.Option("--expires", help="From now on, such as 30d or 12h.")] = "30d",
) -> None:
    """Issue a token for namespaces of one tenant. It cannot be taken back before it expires."""
    try:
        known = file.load_map(cluster)
        grants: list[Grant] = []
        for text in namespace:
            name, _, rights = text.partition(":")
            found = known.find(tenant, name)
            if found is None:
                fail(f"{cluster} has no namespace {tenant}/{name}")
            grants.append(Grant.on(found, capability.parse_rights(rights or "rw")))
        until = int(time.time()) + seconds(expires)
        token = Capability.issue(capability.read_signing_key(key), tenant, grants, expires=until)
        capability.write_secret(output, token.text())
    except (ConfigError, CapabilityError) as e:
        fail(str(e))
    typer.echo(f"{output}: {tenant}, {len(grants)} namespaces, until {_when(until)}")


@app.command("show", epilog=SHOW_EXAMPLES)
def show(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The token.")],
    key: Annotated[Path | None, typer.Option("--key", help="A public key: exits 1 if it did not sign.")] = None,
    cluster: Annotated[
        Path | None, typer.Option("--cluster", help="A cluster file, for the namespaces' names.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")] = False,
) -> None:
    """Print what a token says."""
    try:
        token = capability.read_token(path)
        verified = None if key is None else token.verify(capability.read_public_key(key))
        names = {} if cluster is None else {n.id: n.name for n in file.load_map(cluster).namespaces}
    except (ConfigError, CapabilityError) as e:
        fail(str(e))
    grants = [
        GrantReport(
            g.namespace,
            names.get(g.namespace, ""),
            capability.name_rights(g.rights),
            capability.Kinds.FILE in g.kinds,
            g.cache,
        )
        for g in token.grants
    ]
    found = TokenReport(token.tenant, token.not_before, token.expires, token.serial.hex(), grants, verified)
    if json:
        print_json(found)
    else:
        typer.echo(f"tenant   {found.tenant}\nvalid    {_when(found.not_before)} to {_when(found.expires)}")
        typer.echo(f"serial   {found.serial}")
        for grant in found.grants:
            kind = "volume" if grant.files else "cache" if grant.cache else "durable"
            typer.echo(f"grants   {grant.name or grant.namespace}: {grant.rights} ({kind})")
    if verified is False:
        fail(f"{path} was not signed with the key of {key}")


def _when(at: int) -> str:
    try:
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return "the end of time"
