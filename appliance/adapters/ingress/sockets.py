"""The Unix sockets of the local API: bound without a moment in which everybody may connect, and never taken from a living process."""

import socket
import stat
from pathlib import Path

from appliance.contract.errors import WorldError

MODE = 0o660
"""The daemon's user and group (systemd/appliance-edge.service); nobody else."""
MAX_PATH = 107
"""sizeof(sockaddr_un.sun_path) less the final NUL (unix(7))."""


def bind_unix(path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """Return a bound socket that does not listen yet. Raises: WorldError (`listen`)."""
    if len(str(path).encode()) > MAX_PATH:
        raise _refused(path, f"the path has {len(str(path).encode())} bytes, a socket's at most {MAX_PATH}")
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        _clear(path, kind)
        bound = socket.socket(socket.AF_UNIX, kind)
        try:
            bound.setblocking(False)
            bound.bind(str(path))
            path.chmod(MODE)  # before it listens: nobody can have connected
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        raise _refused(path, error.strerror or str(error)) from error
    return bound


def unbind_unix(path: Path) -> None:
    """Remove the socket's file; not an error if it is gone."""
    path.unlink(missing_ok=True)


def _clear(path: Path, kind: socket.SocketKind) -> None:
    """Remove what a dead process left."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise _refused(path, "something that is not a socket is in its place")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        else:
            raise _refused(path, "another process serves it")


def _refused(path: Path, why: str) -> WorldError:
    return WorldError("listen", f"cannot listen: {why}", where=str(path), remedy="choose another address in [serve]")
