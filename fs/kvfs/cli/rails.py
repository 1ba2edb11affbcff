"""`kvfs rails`: this host's RDMA devices, and which of them would be used."""

from typing import Annotated

import typer

from kvfs.cli.output import print_json

EXAMPLES = "Examples:  kvfs rails   |   kvfs rails --devices 'mlx5_*'   |   kvfs rails --json"


def rails(
    devices: Annotated[
        str, typer.Option("--devices", metavar="PATTERN", help="Comma-separated, as in remote.rails (default: all).")
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")] = False,
) -> None:
    """List RDMA devices, ports, GIDs, speeds and states. Exits 0 also where there are none: TCP needs none."""
    from kvfs.cluster.rails import examine

    report = examine(devices)
    if json:
        print_json(report)
        return
    if report.note:
        typer.echo(f"{report.note}; read from /sys/class/infiniband")
    if not report.ports:
        typer.echo("no RDMA devices here: rdma:// addresses cannot be used, tcp:// ones can")
    for port in report.ports:
        speed = f"{port.speed / 1000:g} Gbit/s" if port.speed else "speed unknown"
        use = f"used, GID {port.gid}" if port.used else f"not used: {port.why_not}"
        typer.echo(f"{port.device} port {port.port}: {port.state}, {port.link_layer}, {speed}; {use}")
        for gid in port.gids:
            typer.echo(f"    GID {gid.index}: {gid.address} ({gid.type}){' on ' + gid.netdev if gid.netdev else ''}")
