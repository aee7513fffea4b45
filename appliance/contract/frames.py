"""The frames socket: how a program on this machine lends the appliance memory, so that large tensors need not travel.

1. One message is one packet (SOCK_SEQPACKET) of JSON; each is answered by one packet, in order.
2. What is registered is a memfd (memfd_create(2)), one descriptor by SCM_RIGHTS, sealed against shrinking: memory that its owner can truncate
   would fault whoever reads it (SIGBUS). Triton's /dev/shm files cannot be sealed, so they are not taken.
3. The answer names the region by a word that cannot be guessed: only who was told it can read what another process put there.
4. Regions belong to the connection that registered them, and end with it. Whoever dies leaves nothing behind.
5. An infer request uses a region by Triton's words: `shared_memory_region`, `shared_memory_offset`, `shared_memory_byte_size`.
"""

from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from appliance.contract.errors import TheirsError

SOCKET = "frames.sock"
"""The socket's name, beside the local API's own."""
MAX_MESSAGE_BYTES = 4_096


class Register(msgspec.Struct, tag_field="ask", tag="register", frozen=True):
    """Lend `byte_size` bytes, from the beginning of the descriptor that comes with the message."""

    byte_size: int


class Unregister(msgspec.Struct, tag_field="ask", tag="unregister", frozen=True):
    """Take a region back; requests that use it now are answered."""

    region: str


class Registered(msgspec.Struct, frozen=True):
    """The answer to both: the region that is meant."""

    region: str


Ask = Register | Unregister

encode = msgspec.json.Encoder().encode
_ask = msgspec.json.Decoder(Ask)


def decode_ask(packet: bytes) -> Ask:
    """Read a message. Raises: TheirsError (`malformed`)."""
    try:
        ask: Ask = _ask.decode(packet)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as fault:
        raise TheirsError("malformed", str(fault), where="frames message") from fault
    return ask


class Regions(Protocol):
    """The memory that callers lent, by the names that they were told."""

    def lend(self, region: str, offset: int, size: int, *, writable: bool) -> npt.NDArray[np.uint8]:
        """Return a part of a region as an array [size]; it stays mapped until that and every array that is a view of it are gone.

        Raises: TheirsError (`unknown_region`, `shared_memory`: the part does not lie in it).
        """
