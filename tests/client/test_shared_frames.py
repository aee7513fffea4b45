"""Frames of both clients on the real ingress: shared where they can be, sent where they cannot, and never wrong."""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.adapters.inference.shares import lent
from appliance.client.exchange import address
from appliance.client.frames import Frame, Lender
from appliance.contract.errors import TheirsError

pytestmark = pytest.mark.slow  # real parts and real faults: seconds in all, too long for `make check`

ClientOf = Callable[..., Any]
VALUES = np.arange(8, dtype=np.float32).reshape(2, 4)


def memfds() -> int:
    """How many frames this process has open."""
    found = 0
    for each in Path("/proc/self/fd").iterdir():
        try:
            found += "memfd:frame" in str(each.readlink())
        except OSError:  # the one that reads the folder
            continue
    return found


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Any:
    before = memfds()
    yield
    gc.collect()
    assert memfds() == before


def test_a_frame_is_read_where_it_lies(daemon: Any, client_of: ClientOf) -> None:
    """The desk is given the caller's own memory, call after call, under one registration; closing takes it back."""
    with client_of(daemon.url) as client:
        with Frame((2, 4), np.float32) as frame:
            for factor in (1, 3):
                frame.array[:] = VALUES * factor
                assert np.array_equal(client.infer("double", {"x": frame}).outputs["y"], VALUES * 2 * factor)
                assert lent(daemon.desk.asked[-1].inputs["x"]) is not None
            daemon.desk.asked.clear()
            assert daemon.mapped == 1
        assert daemon.mapped == 0


def test_an_output_lands_in_a_frame(daemon: Any, client_of: ClientOf) -> None:
    """A result is a view of the frame that it was asked into, also where it fills only a part of it."""
    with client_of(daemon.url) as client, Frame((3, 4), np.float32) as room:
        result = client.infer("double", {"x": VALUES}, into={"y": room})
        assert np.array_equal(result.outputs["y"], VALUES * 2)
        assert np.array_equal(room.array[:2], VALUES * 2)
        assert np.shares_memory(result.outputs["y"], room.array)
        del result


def test_without_a_frames_socket_the_bytes_travel(daemon: Any, client_of: ClientOf) -> None:
    """The answer is the same, in the frame too, from a server that knows no frames."""
    daemon.stop()
    daemon.with_frames = False
    daemon.start()
    with client_of(daemon.url) as client, Frame((2, 4), np.float32) as frame:
        frame.array[:] = VALUES
        result = client.infer("double", {"x": frame}, into={"y": frame})
        assert np.array_equal(frame.array, VALUES * 2)
        assert np.shares_memory(result.outputs["y"], frame.array)
        assert lent(daemon.desk.asked[-1].inputs["x"]) is None
        del result


def test_a_daemon_that_began_anew_is_given_the_frame_again(daemon: Any, client_of: ClientOf) -> None:
    """The old name means nothing to it; the client registers once more, and the caller sees nothing of it."""
    with client_of(daemon.url) as client, Frame((2, 4), np.float32) as frame:
        frame.array[:] = VALUES
        for _ in range(2):
            assert np.array_equal(client.infer("double", {"x": frame}).outputs["y"], VALUES * 2)
            assert lent(daemon.desk.asked[-1].inputs["x"]) is not None
            daemon.desk.asked.clear()
            daemon.stop()
            assert daemon.mapped == 0
            daemon.start()


def test_more_frames_than_a_server_takes_travel(daemon: Any, client_of: ClientOf) -> None:
    """Beyond the server's bound the answer is right as well."""
    frames = [Frame((1, 4), np.float32) for _ in range(40)]
    with client_of(daemon.url) as client:
        for number, frame in enumerate(frames):
            frame.array[:] = number
            assert client.infer("double", {"x": frame}).outputs["y"].tolist() == [[2.0 * number] * 4]
        daemon.desk.asked.clear()
        assert daemon.mapped == 32
        for frame in frames:
            frame.close()
        assert daemon.mapped == 0
        with Frame((1, 4), np.float32) as frame:  # the answers to all those goodbyes are passed over
            frame.array[:] = 1
            client.infer("double", {"x": frame})
            assert daemon.desk.asked[-1].inputs["x"].base is not None
            daemon.desk.asked.clear()
            assert daemon.mapped == 1


def test_what_a_lender_is_told_late_is_not_taken_for_something_else(daemon: Any) -> None:
    """Taking a frame back waits for no answer; the answer that comes later is not the next frame's name."""
    lender = Lender(address(daemon.url).frames)
    with Frame((1,), np.uint8) as other:
        with Frame((1,), np.uint8) as first:
            taken_back = lender.lend(first, 1.0)
        assert lender.lend(other, 1.0) not in {None, taken_back}
        assert daemon.mapped == 1
    lender.close()


def test_closing_the_client_takes_all_frames_back(daemon: Any, client_of: ClientOf) -> None:
    """A frame outlives a client, and serves the next one."""
    with Frame((2, 4), np.float32) as frame:
        frame.array[:] = VALUES
        for _ in range(2):
            with client_of(daemon.url) as client:
                client.infer("double", {"x": frame})
                daemon.desk.asked.clear()
                assert daemon.mapped == 1
            assert daemon.mapped == 0


def test_a_closed_frame_is_refused_and_its_arrays_live_on(daemon: Any, client_of: ClientOf) -> None:
    """Nothing faults: the memory is there as long as an array looks at it."""
    frame = Frame((2, 4), np.float32)
    kept = frame.array
    kept[:] = VALUES
    frame.close()
    frame.close()
    assert np.array_equal(kept, VALUES)
    with client_of(daemon.url) as client, pytest.raises(TheirsError, match="closed"):
        client.infer("double", {"x": frame})


def test_a_frame_is_sealed() -> None:
    """Nobody, not even its owner, can shrink it under a reader."""
    with Frame((2, 4), np.float32) as frame, pytest.raises(PermissionError):
        os.ftruncate(frame.fd, 1)


@pytest.mark.parametrize(("shape", "dtype"), [((0, 4), np.float32), ((2,), object), ((2,), "U4"), ((2,), ">f4"), ((2,), np.complex64)])
def test_what_cannot_be_a_frame_is_refused(shape: tuple[int, ...], dtype: Any) -> None:
    """A shape that holds nothing, and types that the protocol lacks."""
    with pytest.raises(TheirsError):
        Frame(shape, dtype)


def test_a_result_that_does_not_fit_its_frame_is_an_error(daemon: Any, client_of: ClientOf) -> None:
    """Too small, or of another type: said by the server, or by the client where the bytes travelled."""
    with client_of(daemon.url) as client:
        for room in (Frame((1, 4), np.float32), Frame((2, 4), np.int32)):
            with room, pytest.raises(TheirsError):
                client.infer("double", {"x": VALUES}, into={"y": room})
