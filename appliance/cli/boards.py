"""What a device knows of its own speed: the board's data, and the profile that the running daemon has measured of each model."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

from appliance.daily.naming import read_profile
from appliance.edge.settings import Edge

TIMEOUT_S = 3.0
ANSWER_MAX = 4 << 20


def explain(settings: Edge) -> Iterator[str]:
    """The board and each model's profile in words. Raises: TheirsError (`board_profile`), WorldError (`unreadable`)."""
    board = read_profile(settings.board.profile)
    if board is None:
        yield "board: no data is named in board.profile; latencies rest on measurement alone"
        yield "  mend: name one of bsp/jetson/profiles, or measure this machine with `appliance check --profile --measure FILE`"
    else:
        yield f"board {board.name}: {board.description}"
        yield f"  memory for models {board.memory_budget_bytes / 2**30:.1f} GiB, {board.bandwidth_bytes_s / 1e9:.4g} GB/s"
        yield "  " + ", ".join(f"{precision} {flops / 1e9:.4g} GFLOP/s" for precision, flops in board.peak_flops.items())
        yield from (f"  {name}: {source}" for name, source in board.sources.items())
    path = Path(settings.device.runtime_dir) / settings.serve.socket
    try:
        profiles = running(path)
    except (OSError, ValueError) as error:
        yield f"models: the daemon does not answer on {path} ({error}); start it to see what it measured"
        return
    for model, lines in profiles.items():
        yield f"model {model}:"
        yield from (f"  {line}" for line in lines)
    if not profiles:
        yield "models: none is served yet"


def running(path: Path) -> dict[str, list[str]]:
    """The profiles that the daemon behind a Unix socket tells. Raises: OSError, ValueError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(str(path))
        connection.sendall(b"GET /status HTTP/1.0\r\nHost: appliance\r\nConnection: close\r\n\r\n")
        received = bytearray()
        while (part := connection.recv(65_536)) and len(received) < ANSWER_MAX:
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise ValueError("it answers no status")
    profiles: dict[str, list[str]] = json.loads(body)["profile"]
    return profiles
