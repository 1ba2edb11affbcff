"""The kvfs command: version, help, exit codes, JSON, as a library and as a process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvfs import __version__
from kvfs.cli.app import app
from kvfs_tools import doctor

runner = CliRunner()
COMMANDS = [
    "config",
    "doctor",
    "up",
    "down",
    "status",
    "namespace",
    "put",
    "get",
    "stat",
    "rm",
    "replay",
    "bench",
    "ls",
    "mount",
    "usrbio",
]


def kvfs(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = "from kvfs.cli import main; main()"
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)


def test_version() -> None:
    done = kvfs("--version")
    assert (done.returncode, done.stdout) == (0, f"kvfs {__version__}\n")


def test_installed_script() -> None:
    script = Path(sys.executable).with_name("kvfs")
    if not script.exists():
        pytest.skip("kvfs is not installed in this environment (make setup installs it)")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"kvfs {__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str) -> None:
    result = runner.invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"kvfs {command}" in result.output.partition("Examples:")[2]


@pytest.mark.parametrize("arguments", [["no-such-command"], ["doctor", "--no-such-option"], ["doctor", "--dir"]])
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    done = kvfs(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_doctor_json_for_machines() -> None:
    done = kvfs("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1)
    assert {"kernel", "fuse", "fusermount3", "io_uring", "memlock", "rdma", "gpu"} <= {
        check["name"] for check in report["checks"]
    }
    assert report["ok"] == all(check["status"] != "missing" for check in report["checks"])


@pytest.mark.parametrize(("status", "code", "verdict"), [("ok", 0, "can run here"), ("missing", 1, "cannot run here")])
def test_doctor_exit_code(monkeypatch: pytest.MonkeyPatch, status: doctor.Status, code: int, verdict: str) -> None:
    check = doctor.Check("fuse", status, "[seen] as is", "Load [the] module." if code else "")

    def examine(directory: Path) -> doctor.Report:
        return doctor.Report(ok=code == 0, checks=[check])

    monkeypatch.setattr(doctor, "examine", examine)
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == code
    assert verdict in result.output
    assert "[seen] as is" in result.output
    assert ("Load [the] module." in result.output) == (code == 1)


def test_config_prints_what_will_be_used(tmp_path: Path) -> None:
    file = tmp_path / "kvfs.toml"
    file.write_text('dir = "/data"\n[store]\nsize = "1G"\n')
    result = runner.invoke(app, ["config", "-c", str(file)], env={"KVFS_STORE_MEMORY": "64M"})
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    assert (shown["dir"], shown["store"]) == ("/data", {"size": 1 << 30, "memory": 64 << 20, "shared": 4 << 30})


def test_wrong_config_exits_1_with_one_line(tmp_path: Path) -> None:
    file = tmp_path / "kvfs.toml"
    file.write_text("[store]\nsise = 1\n")
    result = runner.invoke(app, ["config", "-c", str(file)])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == f"kvfs: {file}: store.sise: unknown setting; did you mean 'size'?\n"


def test_a_volume_has_no_memory_of_its_own(tmp_path: Path) -> None:
    url = "kvfs://127.0.0.1:1/acme/home"
    mounted = runner.invoke(app, ["mount", url, str(tmp_path / "m"), "--dir", str(tmp_path / "d"), "--memory", "1G"])
    started = runner.invoke(app, ["up", "--dir", str(tmp_path / "d"), "--memory", "1G"], env={"KVFS_REMOTE_URL": url})
    for refused in (mounted, started):
        assert refused.exit_code == 2
        assert "--memory is for data" in refused.stderr
        assert "in the memory of its chunk servers" in refused.stderr
    assert list(tmp_path.iterdir()) == []
