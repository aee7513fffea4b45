"""A region's mosquitto for the lab: its configuration, its permissions, and its SVID in memory.

1. Identity is the SVID: mTLS 1.3 only, and `svid_gate.c`, a plugin that is compiled here, makes the URI of the certificate the user, refuses
   a client id that is not its own, ends a connection whose SVID has expired, and puts those that the region has cut off
   (regional/cutting.py) under the user `quarantined`, who may only enrol and attest (docs/decisions/0023).
2. A device may write only below its own `up/` and read only its own `dn/` and the region's `bcast/`; the region and the cloud may do what
   contract/topics.py says of them, nothing else. Whatever is not allowed is denied.
3. The key never becomes a file: chain and key lie in a memfd that mosquitto inherits and reads as `/proc/self/fd/N`, at its start and again
   at each SIGHUP (also after it changed its user: a process may always open its own descriptors). Started as root it stays root, because the
   lab's state directory is root's then; production runs it as a user of its own from the start.
4. Roots lie in a hash directory, which mosquitto looks into at each handshake: a new one is trusted at once, and nobody is disconnected. An
   old one stays trusted until mosquitto is restarted.
5. PUBACK is not durability: after kill -9 the broker knows what it wrote last, at most `autosave_s` ago (docs/decisions/0004).
"""

import functools
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from appliance.contract import identities, topics
from appliance.contract.errors import WorldError
from appliance.lab.issuing import Credential
from appliance.regional.cutting import CONTROL

MAX_PACKET_BYTES = 4_200_000
"""The largest inference frame (`contract.remote`), its topic and its properties; a `Release` has at most 1 MiB."""

_TRUST = (topics.enrol, topics.prove, topics.challenge, topics.attest)
"""What a device may ask that has been cut off: this is how it comes back."""


@functools.cache
def compiled() -> bytes:
    """The plugin `svid_gate.c` as a shared library. Raises: WorldError (`cc`)."""
    source = Path(__file__).with_name("svid_gate.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "svid_gate.so"
        command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-lcrypto"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise WorldError("cc", f"no C compiler: {error}", where=str(source), remedy="apt-get install gcc libssl-dev") from error
        if done.returncode:
            raise WorldError("cc", done.stderr.strip()[-500:], where=str(source), remedy="apt-get install gcc libc6-dev libssl-dev")
        return library.read_bytes()


class Broker:
    """One region's broker; who starts `command()` must pass on `fds` and call `rotate` when the SVID is due.

    Args:
        state: the directory for configuration and persistence; nothing secret lies there.
        port: TCP port on `host`.
        region: the region whose topics the permissions are for.
        root_pem: the trust bundle.
        issue: gives the broker's present SVID.
        autosave_s: how often sessions, queues and retained messages are written to disk, in whole seconds.
    """

    def __init__(
        self,
        state: Path,
        port: int,
        *,
        region: str,
        root_pem: bytes,
        issue: Callable[[], Credential],
        host: str = "127.0.0.1",
        autosave_s: int = 5,
    ) -> None:
        self._state = state
        self._port = port
        self._host = host
        self._region = region
        self._root_pem = root_pem
        self._issue = issue
        self._autosave_s = autosave_s
        self._memory = os.memfd_create("broker-svid", os.MFD_CLOEXEC)
        self.not_after = 0.0
        self.renew_at = 0.0

    @property
    def fds(self) -> tuple[int, ...]:
        """Descriptors that the process must inherit, as `subprocess.Popen(pass_fds=...)` takes them."""
        return (self._memory,)

    def prepare(self) -> None:
        """Write configuration, permissions, plugin and trust bundle, and fetch the SVID. Raises: WorldError (`disk`, `cc`, `workload_api`)."""
        try:
            (self._state / "store").mkdir(mode=0o700, parents=True, exist_ok=True)
            (self._state / "svid_gate.so").write_bytes(compiled())
            (self._state / "mosquitto.conf").write_text(self.config())
            (self._state / "acl").write_text(self.permissions())
            for name in ("mosquitto.conf", "acl"):
                (self._state / name).chmod(0o600)
        except OSError as error:
            raise WorldError("disk", f"cannot write the broker's configuration: {error}", where=str(self._state)) from error
        self.trust(self._root_pem)
        self._load()

    def command(self) -> list[str]:
        """Return the command line of mosquitto."""
        return ["mosquitto", "-c", str(self._state / "mosquitto.conf")]

    def rotate(self, process_pid: int) -> None:
        """Put a new SVID into the inherited memory and have mosquitto read it; live clients keep their connections."""
        self._load()
        with suppress(ProcessLookupError):  # it died meanwhile: whoever restarts it gives it the new SVID
            os.kill(process_pid, signal.SIGHUP)

    def trust(self, pem: bytes) -> None:
        """Trust more roots, from the next handshake on; live clients notice nothing. Raises: WorldError (`disk`)."""
        folder = self._state / "roots"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            for root in re.findall(
                rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", pem, re.DOTALL
            ):  # rehash reads one in each file
                (folder / f"root-{len(list(folder.glob('*.pem')))}.pem").write_bytes(root + b"\n")
            done = subprocess.run(["openssl", "rehash", str(folder)], capture_output=True, text=True, check=False)
        except OSError as error:
            raise WorldError("disk", f"cannot write the broker's roots: {error}", where=str(folder)) from error
        if done.returncode:
            raise WorldError("disk", f"openssl rehash: {done.stderr.strip()}", where=str(folder))

    def close(self) -> None:
        """Give the memory back; the broker process keeps its own descriptor until it ends."""
        os.close(self._memory)

    def config(self) -> str:
        """Return mosquitto.conf (mosquitto 2.0.11 or newer; every limit is from the measurements behind docs/decisions/0003)."""
        own = f"/proc/self/fd/{self._memory}"
        user = "user root\n" if os.geteuid() == 0 else ""
        region = self._region
        return f"""\
{user}listener {self._port} {self._host}
capath {self._state / "roots"}
certfile {own}
keyfile {own}
tls_version tlsv1.3
require_certificate true
plugin {self._state / "svid_gate.so"}
plugin_opt_devices {identities.device(region, "x")[:-1]}
plugin_opt_as_{identities.region_user(region)} {identities.aggregator(region)}
plugin_opt_as_{identities.CLOUD} {identities.cloud()}
allow_anonymous false
acl_file {self._state / "acl"}
set_tcp_nodelay true
max_connections -1
persistence true
persistence_location {self._state / "store"}/
autosave_interval {self._autosave_s}
max_inflight_messages 20
max_inflight_bytes 8388608
max_queued_messages 1000
max_queued_bytes 16777216
max_packet_size {MAX_PACKET_BYTES}
memory_limit 268435456
log_dest stderr
log_type error
log_type warning
log_type notice
"""

    def permissions(self) -> str:
        """Return the ACL file; `%u` is the user, `%c` the name that the SVID proves: they differ for those that are cut off.

        `bcast` is a pattern only because a pattern applies to everyone.
        """
        region = f"v1/{self._region}"
        trust = "".join(f"pattern write {word(self._region, '%c')}\n" for word in _TRUST)
        return f"""\
{trust}pattern read {topics.answer(self._region, "%c")}
pattern write {region}/d/%u/up/#
pattern read {region}/d/%u/dn/#
pattern read {region}/bcast/#

user {identities.QUARANTINED}
topic deny {region}/bcast/#
topic deny {region}/d/{identities.QUARANTINED}/#

user {identities.region_user(self._region)}
topic write {CONTROL}
topic read {region}/d/+/up/#
topic write {region}/d/+/dn/#
topic write {region}/bcast/#
topic write {region}/r/up/#
topic read {region}/r/dn/#

user {identities.CLOUD}
topic read {region}/r/up/#
topic write {region}/r/dn/#
"""

    def _load(self) -> None:
        svid = self._issue()
        os.ftruncate(self._memory, 0)
        os.pwrite(self._memory, svid.pem, 0)
        self.not_after = svid.not_after
        self.renew_at = svid.renew_at
