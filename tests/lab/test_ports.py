"""Ports for the lab's servers."""

import socket
from pathlib import Path

import pytest

from appliance.contract.errors import WorldError
from appliance.lab import ports


@pytest.mark.parametrize(("outgoing", "where"), [("32768 60999", range(20_768, 32_768)), ("1024 50000", range(50_001, 62_001))])
def test_ports_lie_where_no_outgoing_connection_takes_them(
    outgoing: str, where: range, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Below the kernel's range, or above it where that begins at the bottom; neighbours are free too."""
    (tmp_path / "range").write_text(outgoing.replace(" ", "\t") + "\n")
    monkeypatch.setattr(ports, "_OUTGOING", tmp_path / "range")
    for _ in range(20):
        port = ports.free_port(neighbours=1)
        assert {port, port + 1} <= set(where)
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))


def test_without_any_free_port_the_error_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A kernel that may use every port for outgoing connections leaves none."""
    (tmp_path / "range").write_text("1024 65535")
    monkeypatch.setattr(ports, "_OUTGOING", tmp_path / "range")
    with pytest.raises(WorldError, match="found no free port"):
        ports.free_port()
