"""`appliance check` on machines that the test builds."""

import json
import os
import re
import socket
import stat
import tempfile
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from appliance.cli import probes
from appliance.cli.check import check
from appliance.cli.probes import Machine
from appliance.contract.errors import TheirsError
from appliance.core.serve.board import parse_board

DEVICE = """
[device]
name = "shelf-1"
region = "north"
[serve]
max_batch = 4
[reach]
broker_host = "broker.north.example"
[trust]
trust_domain = "example.org"
"""
REGION = '[region]\nname = "north"\n[reach]\nbroker_host = "localhost"\n[trust]\ntrust_domain = "example.org"\n'
CLOUD = '[cloud]\nregions = ["north"]\n[reach]\nbroker_host = "localhost"\n[trust]\ntrust_domain = "example.org"\n'


@pytest.fixture
def root() -> Iterator[Path]:
    """A short folder that plays the root of a machine; Unix socket paths are limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="ap-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def whole(root: Path) -> Iterator[Machine]:
    """A machine that has everything."""
    for folder in ("proc", "run/spire", "dev", "etc/appliance/ek-roots"):
        (root / folder).mkdir(parents=True)
    for name in ("appliance", "appliance-region/keys", "appliance-cloud/keys", "appliance-cloud/models"):
        (root / "var/lib" / name).mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 4000000 kB\n")
    (root / "etc/appliance/root.json").write_text("{}")
    (root / "dev/tpmrm0").write_text("")
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(root / "run/spire/agent.sock"))
        agent.listen()
        yield Machine(root=root, python=(3, 12), importable=lambda _: "", synchronised=lambda: True, reachable=lambda *_: "")


def run(machine: Machine, tmp_path: Path, text: str = DEVICE, *more: str) -> Result:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    return CliRunner().invoke(check, ["--config", str(file), *more], obj=machine)


@pytest.mark.parametrize(("kind", "text"), [("device", DEVICE), ("region", REGION), ("cloud", CLOUD)])
def test_a_machine_that_has_everything_passes(whole: Machine, tmp_path: Path, kind: str, text: str) -> None:
    """Exit 0, no line says missing, and the effective configuration is printed."""
    result = run(whole, tmp_path, text, "--kind", kind)
    assert result.exit_code == 0, result.output
    assert "missing" not in result.output
    assert "advised" not in result.output
    assert 'trust_domain = "example.org"' in result.output


def test_the_effective_configuration_marks_what_was_changed(whole: Machine, tmp_path: Path) -> None:
    """An operator sees each value, and beside a changed one its default."""
    output = run(whole, tmp_path).output
    assert "max_batch = 4  # default: 8" in output
    assert "port = 8000\n" in output


def test_an_empty_machine_is_told_everything_with_commands(root: Path, tmp_path: Path) -> None:
    """Exit 1, and each missing thing comes with a command on a line of its own."""
    bare = Machine(root=root, python=(3, 10), importable=lambda _: "no module", synchronised=lambda: False, reachable=lambda *_: "refused")
    result = run(bare, tmp_path)
    assert result.exit_code == 1
    for command in (
        "sudo apt-get install python3.12 python3.12-venv",
        "sudo install -d -m 0700 -o appliance -g appliance /var/lib/appliance",
        "sudo systemctl enable --now spire-agent",
        "sudo timedatectl set-ntp true",
        "openssl s_client -connect broker.north.example:8883",
    ):
        assert f"  {command}\n" in result.output
    assert result.output.count("missing ") == 7
    assert result.output.count("advised ") == 2
    assert "Traceback" not in result.output


def test_what_is_only_advised_does_not_fail(whole: Machine, tmp_path: Path) -> None:
    """A device may start in a partition with a free-running clock."""
    result = run(replace(whole, synchronised=lambda: False, reachable=lambda *_: "refused"), tmp_path)
    assert result.exit_code == 0
    assert result.output.count("advised ") == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DEVICE.replace("max_batch", "max_bach"), "settings.toml:6: serve.max_bach is not a setting (did you mean `max_batch`?)"),
        (DEVICE + "]", "settings.toml:11: not TOML"),
        ("", "device.name must be given"),
    ],
)
def test_a_bad_file_is_one_line_and_no_traceback(whole: Machine, tmp_path: Path, text: str, said: str) -> None:
    """Exit 1 with file, line and cure; nothing else is printed."""
    result = run(whole, tmp_path, text)
    assert result.exit_code == 1
    assert said in result.output
    assert result.output.count("\n") == 1


def test_a_file_that_is_absent_or_not_text_is_named(tmp_path: Path) -> None:
    """Neither ends in a traceback."""
    absent = CliRunner().invoke(check, ["--config", str(tmp_path / "none.toml")])
    assert (absent.exit_code, "none.toml: No such file" in absent.output) == (1, True)
    (tmp_path / "binary.toml").write_bytes(b"a = '\xff'")
    binary = CliRunner().invoke(check, ["--config", str(tmp_path / "binary.toml")])
    assert (binary.exit_code, "not UTF-8" in binary.output) == (1, True)


@pytest.mark.parametrize(
    ("tcti", "ok", "seen"),
    [
        ("device:/dev/tpmrm0", True, "/dev/tpmrm0"),
        ("device:/dev/tpm7", False, "/dev/tpm7 does not exist"),
        ("swtpm:path=/run/spire/agent.sock", True, "swtpm:path="),
        ("swtpm:path=/etc/appliance/root.json", False, "is no socket"),
        ("swtpm:host=localhost,port=2321", True, "swtpm:host="),
        ("swtpm:port=many", False, "'many' is no number"),
        ("tabrmd", True, "not looked at"),
    ],
)
def test_the_tpm_is_looked_for_where_the_tcti_says(whole: Machine, tcti: str, ok: bool, seen: str) -> None:
    """Nodes, Unix sockets and TCP ports are told apart."""
    finding = probes.tpm(whole, tcti, "appliance")
    assert (finding.ok, seen in finding.seen) == (ok, True), finding


def test_a_workload_api_that_nobody_serves_is_missing(whole: Machine, root: Path) -> None:
    """A socket file left behind by a dead agent is not enough."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(root / "run/dead.sock"))
    assert probes.workload_api(whole, "unix:///run/spire/agent.sock").ok
    finding = probes.workload_api(whole, "unix:/run/dead.sock")
    assert (finding.ok, finding.seen) == (False, "/run/dead.sock: Connection refused")


def test_probing_changes_nothing(whole: Machine, root: Path, tmp_path: Path) -> None:
    """The tree is the same before and after."""

    def tree() -> dict[str, tuple[int, int]]:
        return {str(path): (stat.S_IFMT(path.stat().st_mode), path.stat().st_mtime_ns) for path in root.rglob("*")}

    before = tree()
    run(whole, tmp_path)
    assert tree() == before


def test_the_real_probes_answer_on_this_machine() -> None:
    """Imports, clock and sockets are asked for real and never raise."""
    assert probes.importable("onnxruntime") == ""
    assert "no_such_module" in probes.importable("no_such_module")
    assert probes.synchronised() in {True, False}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert probes.reachable("127.0.0.1", port) == ""
    assert probes.reachable("127.0.0.1", port) == "Connection refused"


def profile(root: Path, more: str = "", *options: str) -> Result:
    file = root / "device.toml"
    file.write_text(DEVICE.replace("[reach]", f"{more}\n[reach]").replace('region = "north"', f'region = "north"\nruntime_dir = "{root}"'))
    return CliRunner().invoke(check, ["--config", str(file), "--profile", *options], standalone_mode=False)


def test_the_profile_explains_board_and_models(root: Path) -> None:
    """The board's numbers come with their sources, the models' with what the running daemon measured; without it, it says so."""
    data = Path(__file__).parents[2] / "bsp/jetson/profiles/orin-nano-8gb.toml"
    board = f'[board]\nprofile = "{data}"'
    silent = profile(root, board)
    assert "board orin-nano-8gb" in silent.output
    assert "68 GB/s" in silent.output
    assert "the daemon does not answer" in silent.output
    body = json.dumps({"profile": {"reader": ["mode A, batch 1: 5.4 ms, 185 samples/s, measured 12 times"]}}).encode()
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(root / "api.sock"))
        daemon.listen(1)

        def answer() -> None:
            connection, _ = daemon.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + body)

        thread = threading.Thread(target=answer)
        thread.start()
        told = profile(root, board)
        thread.join()
    assert "model reader:" in told.output
    assert "measured 12 times" in told.output


def test_a_machine_can_be_measured_and_the_file_is_board_data(root: Path) -> None:
    """`--measure` writes a file that `board.profile` takes, named as the board, with the day, the processor and the source of each number."""
    written = root / "measured-here.toml"
    result = profile(root, "", "--measure", str(written))
    assert result.exception is None
    assert "board measured-here" in result.output
    text = written.read_text()
    assert re.match(r"# Measured on \d{4}-\d{2}-\d{2} by `appliance check", text)
    measured = parse_board(tomllib.loads(text), "measured-here")
    assert f"of its {os.cpu_count()} processors" in measured.description
    assert measured.bandwidth_bytes_s > 1e8
    assert measured.peak_flops["fp32"] > 1e8
    assert "measured" in measured.sources["peak_flops"]


def test_board_data_that_is_none_is_named(root: Path) -> None:
    """A wrong file is one sentence with its name."""
    (root / "odd.toml").write_text("name = ")
    result = profile(root, f'[board]\nprofile = "{root / "odd.toml"}"')
    assert isinstance(result.exception, TheirsError)
    assert "odd.toml: not TOML" in str(result.exception)
