"""TCP ports of the loopback for the lab's servers."""

import random
import socket
from pathlib import Path

from appliance.contract.errors import WorldError

_HOST = "127.0.0.1"
_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LEAST, _MOST, _SPAN = 1_024, 65_535, 12_000
_TRIES = 200
_chance = random.SystemRandom()


def free_port(neighbours: int = 0) -> int:
    """A port that is free now, as are so many after it. Raises: WorldError (`ports`).

    It lies outside of the range from which the kernel takes ports for outgoing connections: one of these would else take it before the server
    that it was found for has started, and again while that is started anew.
    """
    first, last = (int(word) for word in _OUTGOING.read_text().split())
    low, high = (max(_LEAST, first - _SPAN), first) if first - _LEAST > _MOST - last else (last + 1, min(_MOST, last + _SPAN))
    for _ in range(_TRIES if high - low > neighbours else 0):
        port = _chance.randrange(low, high - neighbours)
        if all(map(_is_free, range(port, port + neighbours + 1))):
            return port
    raise WorldError("ports", f"found no free port with {neighbours} more beside it between {low} and {high}", where=_HOST)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True
