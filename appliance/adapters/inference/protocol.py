"""The wire between the daemon and an inference child: one packet per message, descriptors beside it.

1. The socket is a SOCK_SEQPACKET pair: packets keep their borders, and the end of the peer reads as an empty packet.
2. `Run` and `Done` are the hot path: little-endian int64 values, no names, no types; both sides know them from the signature.
   All other messages are JSON of a tagged struct. The first byte tells them apart.
3. What may be long (weights, arena segments, a signature, outputs that did not fit) travels as a memfd (SCM_RIGHTS), never as bytes.
4. Batches are answered in the order in which they were sent, loads too; the two do not wait for each other.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from appliance.adapters.inference.backend import Options
from appliance.contract.errors import OursError
from appliance.contract.vocabulary import Platform

PACKET_BYTES = 65_536
"""The longest packet: 63 outputs of 16 axes need 10 KiB, an error's text 2 KiB."""
OUTPUTS_MAX = 63
"""The wanted outputs are bits of one signed int64."""
AXES_MAX = 16
RUN, DONE = 1, 2
_JSON = ord("{")
_DESCRIPTOR = struct.Struct("@i")
_BESIDE_BYTES = socket.CMSG_LEN(_DESCRIPTOR.size)
_RIGHTS = (socket.SOL_SOCKET, socket.SCM_RIGHTS)
_CUT = socket.MSG_TRUNC | socket.MSG_CTRUNC

Shape = tuple[int, ...]
Place = tuple[int, Shape]
"""Where an output lies: byte offset in its batch's segment (or memfd), and its shape."""
Source = tuple[int, int, Shape]
"""Where an input lies: number of its segment, byte offset in it, and its shape."""


class Load(msgspec.Struct, tag="load", frozen=True):
    """To the child: load the model in the descriptor beside this (`size` bytes) and call it `handle`."""

    id: int
    handle: int
    platform: Platform
    size: int
    options: Options


class Unload(msgspec.Struct, tag="unload", frozen=True):
    """To the child: forget a model and give its memory back; answered by `Measured`."""

    id: int
    handle: int


class Measure(msgspec.Struct, tag="measure", frozen=True):
    """To the child: say how much memory it holds; answered by `Measured`."""

    id: int


class Segment(msgspec.Struct, tag="segment", frozen=True):
    """To the child: map the shared memory in the descriptor beside this; what is `lent` belongs to a caller, and is only read."""

    number: int
    size: int
    lent: bool = False


class Drop(msgspec.Struct, tag="drop", frozen=True):
    """To the child: unmap a segment; no batch uses it any more."""

    number: int


class Memory(msgspec.Struct, frozen=True):
    """What the child holds now, in bytes.

    `held` is its anonymous memory: unlike `pss` it does not change when another process begins or ends to share a library, so it can be
    held against `base`, what python and the imported run-times took. `resting`: it has given back what it could since its last batch.
    """

    pss: int
    held: int
    base: int
    resting: bool


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """To the daemon: the child is up."""

    id: int
    memory: Memory


class Loaded(msgspec.Struct, tag="loaded", frozen=True):
    """To the daemon: the model runs on `provider`; its `Signature` as JSON is in the descriptor beside this.

    By `grew_bytes` the child's PSS grew in this load, run-time included; by `needs_bytes` what it holds, without the run-time.
    """

    id: int
    provider: str
    grew_bytes: int
    needs_bytes: int
    memory: Memory


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """To the daemon: a load or a batch failed."""

    id: int
    fault: Literal["model", "memory"]
    text: str


class Measured(msgspec.Struct, tag="measured", frozen=True):
    """To the daemon: what the child holds."""

    id: int
    memory: Memory


class Run(NamedTuple):
    """To the child: run a batch whose inputs lie at `sources`, in signature order, and write outputs into the room in `segment`."""

    id: int
    handle: int
    segment: int
    room_at: int
    room_bytes: int
    wanted: int
    sources: Sequence[Source]


class Done(NamedTuple):
    """To the daemon: the wanted outputs lie at `places`, in signature order.

    With `spilled_bytes` > 0 they did not fit their room and lie in the memfd beside this, which has that size.
    """

    id: int
    busy_ns: int
    spilled_bytes: int
    places: Sequence[Place]


ToChild = Load | Unload | Measure | Segment | Drop
ToDaemon = Hello | Loaded | Failed | Measured

_encoder = msgspec.json.Encoder()
_to_child = msgspec.json.Decoder(ToChild)
_to_daemon = msgspec.json.Decoder(ToDaemon)


def encode(message: ToChild | ToDaemon | Run | Done) -> bytes:
    """Encode any message."""
    if isinstance(message, Run):
        values = [RUN, *message[:-1]]
        for segment, offset, shape in message.sources:
            values += (segment, offset, len(shape), *shape)
        return struct.pack(f"<{len(values)}q", *values)
    if isinstance(message, Done):
        values = [DONE, *message[:-1]]
        for offset, shape in message.places:
            values += (offset, len(shape), *shape)
        return struct.pack(f"<{len(values)}q", *values)
    return _encoder.encode(message)


def decode_for_child(packet: bytes) -> ToChild | Run:
    """Decode what the daemon sent. Raises: OursError (`protocol`)."""
    if packet[0] == _JSON:
        with _as_ours():
            message: ToChild = _to_child.decode(packet)
            return message
    fields, sources = _unpack(packet, RUN, len(Run._fields) - 1, 2)
    return Run._make((*fields, sources))


def decode_for_daemon(packet: bytes) -> ToDaemon | Done:
    """Decode what a child sent; offsets and shapes are well-formed but not yet trusted. Raises: OursError (`protocol`)."""
    if packet[0] == _JSON:
        with _as_ours():
            message: ToDaemon = _to_daemon.decode(packet)
            return message
    fields, places = _unpack(packet, DONE, len(Done._fields) - 1, 1)
    return Done._make((*fields, places))


def send(sock: socket.socket, packet: bytes, fd: int | None = None) -> None:
    """Send one packet, with a descriptor if given. Raises: OSError."""
    if fd is None:
        sock.send(packet)
    else:
        socket.send_fds(sock, [packet], [fd])


def receive(sock: socket.socket) -> tuple[bytes, int | None]:
    """Receive one packet and the descriptor beside it; the caller owns it. An empty packet is the end of the peer.

    Raises: OSError (BlockingIOError when nothing has arrived), OursError (`protocol`).
    """
    packet, beside, flags, _ = sock.recvmsg(PACKET_BYTES, _BESIDE_BYTES, socket.MSG_CMSG_CLOEXEC)
    if not beside and not flags & _CUT:  # a batch, or its answer
        return packet, None
    fds = [fd for level, kind, data in beside if (level, kind) == _RIGHTS for (fd,) in _DESCRIPTOR.iter_unpack(data)]
    if flags & _CUT:
        for fd in fds:
            os.close(fd)
        raise OursError("protocol", f"a packet is longer than {PACKET_BYTES} bytes")
    return packet, fds[0] if fds else None


def _unpack(packet: bytes, kind: int, width: int, head: int) -> tuple[tuple[int, ...], list[Any]]:
    """Unpack `width` fields, and for each tensor a tuple of `head` numbers and its shape."""
    count, rest = divmod(len(packet), 8)
    values = struct.unpack(f"<{count}q", packet[: count * 8])
    if rest or count <= width or values[0] != kind:
        raise OursError("protocol", f"a packet of {len(packet)} bytes is no message of kind {kind}")
    tensors: list[Any] = []
    at = width + 1
    while at < count:
        shape_at = at + head + 1
        axes = values[shape_at - 1] if shape_at <= count else -1
        end = shape_at + axes
        if not 0 <= axes <= AXES_MAX or end > count or min(values[at:end]) < 0:
            raise OursError("protocol", "a tensor's place is malformed")
        tensors.append((*values[at : shape_at - 1], values[shape_at:end]))
        at = end
    return values[1 : width + 1], tensors


@contextlib.contextmanager
def _as_ours() -> Iterator[None]:
    try:
        yield
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise OursError("protocol", str(error)) from error
