"""The lab's SPIFFE Workload API: one gRPC server on one unix socket for each workload.

1. The socket stands for process attestation: a real agent asks the kernel who is calling, the lab gives each workload a socket of its own in
   a directory of mode 0700. Only the path that a workload is given differs from production, no code does.
2. A call without the header `workload.spiffe.io: true` is refused (INVALID_ARGUMENT), one without an entry is denied (PERMISSION_DENIED), as
   in the SPIFFE Workload API specification, sections 3 and 4.
3. A stream gets the present SVID at once and a new one at half of its life; all streams of one workload see the same SVID.
4. JWT-SVIDs are not implemented (UNIMPLEMENTED): nothing here uses them.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from spiffe._proto import workload_pb2, workload_pb2_grpc

from appliance.contract.errors import OursError, WorldError
from appliance.lab.authority import Authority, Svid, Workload

_HEADER = ("workload.spiffe.io", "true")
_SOCKET_LIMIT = 107
"""Bytes of a unix socket's path (unix(7), sun_path less its end)."""
_STREAMS = 16
"""Open streams and calls of one workload; each holds a thread. One source uses one, a few more during its restart."""


class WorkloadApi:
    """All workloads' sockets under one directory. Thread-safe; start and stop from anywhere."""

    def __init__(self, authority: Authority, directory: Path, *, wall: Callable[[], float] = time.time) -> None:
        self._authority = authority
        self._directory = directory
        self._wall = wall
        self._desks: dict[str, _Desk] = {}
        self._servers: dict[str, tuple[grpc.Server, ThreadPoolExecutor]] = {}

    def start(self) -> None:
        """Make the directory (mode 0700). Raises: WorldError (`disk`)."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._directory.chmod(0o700)
        except OSError as error:
            raise WorldError("disk", f"cannot make the directory for sockets: {error}", where=str(self._directory)) from error

    def register(self, workload: Workload) -> str:
        """Add an entry, serve it, and return its address, fit for SPIFFE_ENDPOINT_SOCKET. Raises: WorldError (`socket`)."""
        self._desks[workload.spiffe_id] = _Desk(workload, self._authority, self._wall)
        return self.serve(workload.spiffe_id)

    def serve(self, spiffe_id: str) -> str:
        """Open (again) the socket of a registered workload and return its address. Raises: WorldError (`socket`)."""
        desk = self._desks[spiffe_id]
        path = self._path(desk.workload)
        threads = ThreadPoolExecutor(_STREAMS, thread_name_prefix="workload-api")
        server = grpc.server(threads)
        workload_pb2_grpc.add_SpiffeWorkloadAPIServicer_to_server(desk, server)  # type: ignore[no-untyped-call]  # generated
        try:
            server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise WorldError("socket", f"cannot listen: {error}", where=str(path), remedy="choose another state directory") from error
        desk.reopen()
        server.start()
        self._servers[spiffe_id] = server, threads
        return f"unix:{path}"

    def hang_up(self, spiffe_id: str) -> None:
        """Close one workload's socket as a dying agent would; `serve` opens it again."""
        self._desks[spiffe_id].close()
        server, threads = self._servers.pop(spiffe_id)
        server.stop(None).wait()
        threads.shutdown()

    def revoke(self, spiffe_id: str) -> None:
        """Remove the entry behind a socket: streams end and calls are denied from now on."""
        self._desks[spiffe_id].revoke()

    def renew(self, spiffe_id: str) -> None:
        """Issue a new SVID now and push it on all streams."""
        self._desks[spiffe_id].renew()

    def svid(self, spiffe_id: str) -> Svid:
        """Return the workload's present SVID. Raises: WorldError (`workload_api`) after `revoke`."""
        svid = self._desks[spiffe_id].present()
        if svid is None:
            raise WorldError("workload_api", "no identity is issued to this workload", where=spiffe_id)
        return svid

    def stop(self) -> None:
        """Close all sockets and wait for their threads."""
        for spiffe_id in list(self._servers):
            self.hang_up(spiffe_id)

    def _path(self, workload: Workload) -> Path:
        path = self._directory / f"{workload.dns_name}.sock"
        if len(bytes(path)) > _SOCKET_LIMIT:
            remedy = "choose a shorter state directory"
            raise WorldError(
                "socket", f"{len(bytes(path))} bytes, a socket's path has at most {_SOCKET_LIMIT}", where=str(path), remedy=remedy
            )
        return path


class _Desk(workload_pb2_grpc.SpiffeWorkloadAPIServicer):
    """Answers for one workload; inherited JWT methods answer UNIMPLEMENTED."""

    def __init__(self, workload: Workload, authority: Authority, wall: Callable[[], float]) -> None:
        self.workload = workload
        self._authority = authority
        self._wall = wall
        self._turn = threading.Condition()
        self._svid: Svid | None = None
        self._entry = True
        self._open = True

    def FetchX509SVID(self, _request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802 - named by the protocol
        """Stream the workload's SVID, key and bundle at each change."""
        for svid in self._changes(context):
            own = workload_pb2.X509SVID(
                spiffe_id=svid.workload.spiffe_id, x509_svid=svid.chain_der, x509_svid_key=svid.key_der, bundle=self._authority.root_der
            )
            yield workload_pb2.X509SVIDResponse(svids=[own])

    def FetchX509Bundles(self, _request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802 - named by the protocol
        """Stream the trust domain's bundle; the root never changes here, so once and then whenever an SVID does."""
        for _svid in self._changes(context):
            yield workload_pb2.X509BundlesResponse(bundles={f"spiffe://{self._authority.trust_domain}": self._authority.root_der})

    def present(self) -> Svid | None:
        """Return the SVID that is valid now, renewed if half of its life is over; None without an entry."""
        with self._turn:
            if self._entry and (self._svid is None or self._wall() >= self._svid.renew_at):
                self._svid = self._authority.issue(self.workload)
                self._turn.notify_all()
            return self._svid if self._entry else None

    def renew(self) -> None:
        """Forget the present SVID and wake all streams."""
        with self._turn:
            self._svid = None
            self._turn.notify_all()

    def revoke(self) -> None:
        """Remove the entry and wake all streams."""
        with self._turn:
            self._entry = False
            self._turn.notify_all()

    def close(self) -> None:
        """End all streams."""
        with self._turn:
            self._open = False
            self._turn.notify_all()

    def reopen(self) -> None:
        """Allow streams again."""
        self._open = True

    def _changes(self, context: grpc.ServicerContext) -> Iterator[Svid]:
        """Yield the present SVID and every later one until the caller or this server goes away."""
        if _HEADER not in context.invocation_metadata():
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "security header missing from request")
        context.add_callback(self._wake)
        last: Svid | None = None
        while self._open and context.is_active():
            svid = self.present()
            if svid is None:
                context.abort(grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
                raise OursError("unreachable", "abort returned")
            if svid is not last:
                last = svid
                yield svid
            with self._turn:
                if self._open and self._entry and self._svid is svid and context.is_active():
                    self._turn.wait(timeout=max(0.0, svid.renew_at - self._wall()) + 0.01)

    def _wake(self) -> None:
        with self._turn:
            self._turn.notify_all()
