"""The units, users and directories that systemd is given: silent in `verify`, tight in `security`, and true to the daemon's settings."""

import ctypes.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.cloud.settings import Site as CloudSite
from appliance.contract.settings import document
from appliance.edge.settings import Device, Edge
from appliance.regional.settings import Site as RegionSite

ROOT = Path(__file__).parent.parent
UNITS = ROOT / "systemd"
BACKOFF = UNITS / "appliance-.service.d/10-backoff.conf"
JETSON = ROOT / "bsp/jetson/appliance-device.service.d"
EXPOSURE = {"device": 2.0, "region": 2.5, "cloud": 2.5}
VERBS = {"device": "run", "region": "region", "cloud": "cloud"}
KINDS = pytest.mark.parametrize("kind", list(EXPOSURE))


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not shutil.which(program), reason=f"{program} is missing: sudo apt-get install systemd")


def systemd_version() -> int:
    answer = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"\d+", answer)[0])


def planted(folder: Path, kind: str, *, jetson: bool = False) -> Path:
    """Copy a unit with its drop-ins beside it; only the program, which is not installed here, is replaced."""
    unit = folder / f"appliance-{kind}.service"
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", (UNITS / unit.name).read_text(), flags=re.MULTILINE))
    if systemd_version() >= 254:
        shutil.copytree(BACKOFF.parent, folder / BACKOFF.parent.name)
    if jetson:
        shutil.copytree(JETSON, folder / JETSON.name)
    return unit


def values(text: str, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", text, flags=re.MULTILINE)


@needs("systemd-analyze")
@KINDS
def test_units_are_clean(kind: str, tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say."""
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", planted(tmp_path, kind)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@needs("systemd-analyze")
def test_the_jetson_drop_in_is_clean(tmp_path: Path) -> None:
    """With the board's drop-in beside it the device unit still verifies."""
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", planted(tmp_path, "device", jetson=True)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@needs("systemd-analyze")
@KINDS
def test_exposure_is_small(kind: str, tmp_path: Path) -> None:
    """`systemd-analyze security` rates the device at most 2.0, the others at most 2.5."""
    answer = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", planted(tmp_path, kind)],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    rated = re.search(r"Overall exposure level for \S+: ([\d.]+)", answer)
    assert rated, answer
    assert float(rated[1]) <= EXPOSURE[kind], answer


@KINDS
def test_a_unit_keeps_its_promises(kind: str) -> None:
    """Watchdog, restart, stop, secrets in memory and the absolute command are what docs and daemon count on."""
    text = (UNITS / f"appliance-{kind}.service").read_text()
    for key, value in {
        "Type": "notify",
        "NotifyAccess": "main",
        "WatchdogSec": "30",
        "Restart": "always",
        "KillMode": "mixed",
        "TimeoutStopSec": "10",
        "StartLimitIntervalSec": "0",
        "LimitCORE": "0",
        "MemorySwapMax": "0",
        "ExecStart": f"/opt/appliance/bin/appliance {VERBS[kind]} --config /etc/appliance/{kind}.toml",
    }.items():
        assert values(text, key) == [value], key
    assert "RestartSteps" not in text, "unknown before systemd 254: belongs into the drop-in"


@pytest.mark.parametrize(("kind", "room"), [("device", Device), ("region", RegionSite), ("cloud", CloudSite)])
def test_directories_agree_with_the_settings(kind: str, room: type[Device | RegionSite | CloudSite]) -> None:
    """What systemd makes and opens for writing is what the daemon uses by default, and tmpfiles makes the same."""
    text = (UNITS / f"appliance-{kind}.service").read_text()
    defaults = {setting.key: setting.default for setting in document(room)}
    (state,), (user,) = values(text, "StateDirectory"), values(text, "User")
    assert defaults["state_dir"] == f'"/var/lib/{state}"'
    expected = [defaults["runtime_dir"]] if "runtime_dir" in defaults else []
    assert [f'"/run/{runtime}"' for runtime in values(text, "RuntimeDirectory")] == expected
    rows = [line.split() for line in (UNITS / "appliance.tmpfiles.conf").read_text().splitlines() if line.startswith("d ")]
    assert ["d", f"/var/lib/{state}", values(text, "StateDirectoryMode")[0], user, user, "-"] in rows


def test_the_drain_fits_into_the_stop_time_and_the_watchdog_outlasts_a_stall() -> None:
    """The manager kills only after the daemon has given up by itself."""
    ranges = {f"{setting.section}.{setting.key}": setting for setting in document(Edge)}
    text = (UNITS / "appliance-device.service").read_text()
    assert float(ranges["serve.drain_s"].range.split(" to ")[1]) < float(values(text, "TimeoutStopSec")[0])
    assert float(ranges["watchdog.stalled_s"].default) < float(values(text, "WatchdogSec")[0])


@needs("systemd-sysusers")
def test_users_are_made_and_every_unit_finds_its_own(tmp_path: Path) -> None:
    """systemd-sysusers accepts the file in an empty root, and users and groups of the units are then there."""
    (tmp_path / "etc").mkdir()
    result = subprocess.run(
        ["systemd-sysusers", f"--root={tmp_path}", "--dry-run", UNITS / "appliance.sysusers.conf"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    said = result.stdout + result.stderr
    for kind in EXPOSURE:
        text = (UNITS / f"appliance-{kind}.service").read_text()
        assert f"Creating user '{values(text, 'User')[0]}'" in said
        for group in values(text, "Group") + values(text, "SupplementaryGroups"):
            assert f"Creating group '{group}'" in said


@needs("systemd-tmpfiles")
@pytest.mark.skipif(os.geteuid() != 0, reason="changing owners needs root: sudo .venv/bin/python -m pytest tests/test_systemd.py")
def test_directories_are_made(tmp_path: Path) -> None:
    """Users and directories: systemd-sysusers and systemd-tmpfiles together fill an empty root, twice without complaint."""
    (tmp_path / "etc").mkdir()
    subprocess.run(["systemd-sysusers", f"--root={tmp_path}", UNITS / "appliance.sysusers.conf"], capture_output=True, check=True)
    for _ in range(2):
        subprocess.run(
            ["systemd-tmpfiles", f"--root={tmp_path}", "--create", UNITS / "appliance.tmpfiles.conf"],
            capture_output=True,
            text=True,
            check=True,
        )
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "var/lib").iterdir()}
    assert modes == {"appliance": 0o700, "appliance-region": 0o700, "appliance-cloud": 0o700}
    assert (tmp_path / "etc/appliance").stat().st_mode & 0o777 == 0o755


WORK = """
import numpy, onnx, onnxruntime
from onnx import TensorProto, helper
weights = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], numpy.eye(4, dtype="f").ravel())
shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", shapes[:1], shapes[1:], [weights])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
given = numpy.ones((1, 4), "f")
assert (session.run(None, {"x": given})[0] == given).all()
import aiohttp, aiomqtt, apsw, asyncio, fcntl, grpc, os, socket, spiffe, subprocess, tempfile, tpm2_pytss, tuf.api.metadata, uvloop, zstandard
from multiprocessing import shared_memory
from ai_edge_litert.interpreter import Interpreter
from cryptography.hazmat.primitives.asymmetric import ec
ec.generate_private_key(ec.SECP256R1())
sealed = os.memfd_create("weights", os.MFD_ALLOW_SEALING)
os.write(sealed, b"x")
fcntl.fcntl(sealed, 1033, 15)  # F_ADD_SEALS, all of them
block = shared_memory.SharedMemory(create=True, size=4096)
block.close(), block.unlink()
subprocess.run([sys.executable, "-c", "pass"], check=True)
with tempfile.NamedTemporaryFile() as file:
    base = apsw.Connection(file.name)
    base.execute("pragma journal_mode=wal; pragma synchronous=full; create table t(x); insert into t values(1)")
async def echo():
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    assert await reader.read() == b""
    writer.close()
    server.close()
asyncio.run(echo())
"""

UNDER_MDWE = """
import ctypes, sys
PR_SET_MDWE, REFUSE_EXEC_GAIN = 65, 1
if ctypes.CDLL(None).prctl(PR_SET_MDWE, REFUSE_EXEC_GAIN, 0, 0, 0):
    sys.exit(77)
"""

UNDER_SECCOMP = """
import ctypes, os, sys
library = ctypes.CDLL("libseccomp.so.2")
library.seccomp_init.restype = ctypes.c_void_p
refuse, allow = 0x00050001, 0x7FFF0000  # errno EPERM; allow
filter = ctypes.c_void_p(library.seccomp_init(refuse))
for name in sys.argv[1].split():
    number = library.seccomp_syscall_resolve_name(name.encode())
    if number >= 0:
        assert library.seccomp_rule_add(filter, allow, number, 0) == 0, name
assert library.seccomp_load(filter) == 0
try:
    os.chroot("/")
except PermissionError:
    pass
else:
    sys.exit("the filter does not bite")
"""


def at_work(prelude: str, *arguments: str) -> None:
    """Do what a device does (infer, seal, share, store, listen, spawn) after the prelude has tied this process's hands."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", prelude + WORK, *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    if result.returncode == 77:
        pytest.skip("prctl(PR_SET_MDWE) is refused: needs Linux 6.3")
    assert result.returncode == 0, result.stderr


def test_the_daemons_work_runs_without_executable_memory() -> None:
    """MemoryDenyWriteExecute= can stay on: the kernel's own switch for it hinders nothing."""
    at_work(UNDER_MDWE)


def members(group: str) -> set[str]:
    """The system calls of a systemd group, groups inside it resolved."""
    listed = subprocess.run(["systemd-analyze", "syscall-filter", group], capture_output=True, text=True, check=True).stdout
    found: set[str] = set()
    for word in (line.strip() for line in listed.splitlines() if line.startswith("    ")):
        if word and not word.startswith("#"):
            found |= members(word) if word.startswith("@") else {word}
    return found


@needs("systemd-analyze")
@pytest.mark.skipif(not ctypes.util.find_library("seccomp"), reason="libseccomp is missing: sudo apt-get install libseccomp2")
def test_the_daemons_work_runs_under_the_units_system_calls() -> None:
    """SystemCallFilter= of the device unit, loaded as the same kind of filter, hinders nothing that the daemon does."""
    allowed: set[str] = set()
    for line in values((UNITS / "appliance-device.service").read_text(), "SystemCallFilter"):
        named: set[str] = set()
        for word in line.removeprefix("~").split():
            named |= members(word) if word.startswith("@") else {word}
        allowed = allowed - named if line.startswith("~") else allowed | named
    at_work(UNDER_SECCOMP, " ".join(sorted(allowed)))
