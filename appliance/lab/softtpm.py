"""Software TPMs for the lab: made with an EK certificate of a private authority, then run by the lab's supervisor.

1. A TPM's state, its maker's keys and all configuration lie below the `state` directory that is given; nothing is read from or written to the
   system-wide places of swtpm (swtpm_setup alone makes a short-lived file for its process number in /tmp).
2. Several TPMs may share a maker: `maker` is the state directory whose `ca` signs. Its root is what a region is told to trust.
3. swtpm speaks TCP on two neighbouring ports of the loopback: libtss2 3.2 knows no other way to it (newer ones also know Unix sockets).
4. A TPM that just started has zero PCRs. `measured_boot` extends the ones that firmware and boot loader would.
"""

import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from appliance.contract.errors import WorldError
from appliance.lab import ports

BOOT_PCRS = (0, 4, 7, 11)
"""Firmware, boot loader, secure boot policy, kernel image."""

SETUP_TIMEOUT_S = 60.0
"""swtpm_setup takes about 1 s; making the authority's two 3072-bit RSA keys may take as long again."""

_HOST = "127.0.0.1"


class Extendable(Protocol):
    """A TPM whose PCRs can be extended."""

    async def extend(self, pcr: int, digest: bytes) -> None:
        """Extend a PCR by a 32-byte digest."""


def manufacture(state: Path, name: str, *, maker: Path | None = None, certificate: bool = True) -> None:
    """Make a TPM called `name` below `state`, with an EK certificate by the maker's authority or without; an old TPM there is replaced.

    Raises: WorldError (`swtpm`).
    """
    authority = (maker or state) / "ca"
    scratch = state / "tmp"
    for directory in (state / "tpm", scratch, authority):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    configuration = _configure(state, authority)
    command = ["swtpm_setup", "--tpm2", "--tpmstate", str(state / "tpm"), "--config", str(configuration)]
    command += ["--create-ek-cert"] if certificate else []
    command += ["--vmid", name, "--lock-nvram", "--pcr-banks", "sha256", "--overwrite", "--logfile", str(state / "setup.log")]
    try:
        done = subprocess.run(
            command, env={**os.environ, "TMPDIR": str(scratch)}, capture_output=True, timeout=SETUP_TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        raise WorldError("swtpm", "swtpm_setup is not installed", remedy="apt-get install swtpm swtpm-tools") from error
    except subprocess.TimeoutExpired as error:
        raise WorldError("swtpm", f"swtpm_setup did not end in {SETUP_TIMEOUT_S:.0f} s", where=str(state)) from error
    if done.returncode != 0:
        raise WorldError("swtpm", f"swtpm_setup failed: {_last_line(done.stderr)}", where=str(state), remedy=f"see {state / 'setup.log'}")


def roots(state: Path) -> list[bytes]:
    """The CA certificates (DER) of a maker: its root, and the intermediate that signs EK certificates. Raises: WorldError (`swtpm`)."""
    try:
        pems = [(state / "ca" / name).read_bytes() for name in ("swtpm-localca-rootca-cert.pem", "issuercert.pem")]
    except OSError as error:
        raise WorldError("swtpm", f"no maker's certificates: {error}", where=str(state), remedy="manufacture a TPM first") from error
    return [x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER) for pem in pems]


def free_port() -> int:
    """A port of the loopback that is free now, as is the one after it. Raises: WorldError (`ports`)."""
    return ports.free_port(neighbours=1)


def command(state: Path, port: int, host: str = _HOST) -> list[str]:
    """The process that runs the TPM of `state` on `port` and `port + 1` of `host`; SIGTERM ends it. Each start is a TPM reset."""
    listen = ["--server", f"type=tcp,port={port},bindaddr={host}", "--ctrl", f"type=tcp,port={port + 1},bindaddr={host}"]
    return ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state / 'tpm'}", *listen, "--flags", "not-need-init,startup-clear"]


def tcti(port: int, host: str = _HOST) -> str:
    """How the TSS reaches the TPM on `port`."""
    return f"swtpm:host={host},port={port}"


async def measured_boot(tpm: Extendable, what: str, *, pcrs: Sequence[int] = BOOT_PCRS) -> None:
    """Extend PCRs as a boot of `what` (an image's name) does: the same name gives the same values. Once after each start of the TPM."""
    for pcr in pcrs:
        await tpm.extend(pcr, hashlib.sha256(f"lab boot of {what}: PCR {pcr}".encode()).digest())


def _configure(state: Path, authority: Path) -> Path:
    """Write the configuration of swtpm_setup and swtpm_localca, and return the former's path."""
    options, localca, setup = (state / name for name in ("localca.options", "localca.conf", "setup.conf"))
    options.write_text("--platform-manufacturer Appliance\n--platform-version 1\n--platform-model lab\n")
    keys = {"statedir": "", "signingkey": "signkey.pem", "issuercert": "issuercert.pem", "certserial": "certserial"}
    localca.write_text("".join(f"{key} = {authority / file}\n" for key, file in keys.items()))
    tool = {"": "swtpm_localca", "_config": str(localca), "_options": str(options)}
    setup.write_text("".join(f"create_certs_tool{key} = {value}\n" for key, value in tool.items()) + "active_pcr_banks = sha256\n")
    return setup


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"
