"""Errors travel whole: through pickle, through copy, into one line."""

import copy
import pickle
from collections.abc import Callable

import pytest

from appliance.contract.errors import ApplianceError, OursError, TheirsError, WorldError


def pickled(error: ApplianceError) -> ApplianceError:
    back: ApplianceError = pickle.loads(pickle.dumps(error))  # noqa: S301  (bytes of the line itself)
    return back


@pytest.mark.parametrize("kind", [OursError, TheirsError, WorldError])
@pytest.mark.parametrize("again", [pickled, copy.copy, copy.deepcopy])
def test_an_error_comes_back_whole(kind: type[ApplianceError], again: Callable[[ApplianceError], ApplianceError]) -> None:
    """Kind, parts, text and notes are those of the original: a process may hand its error to another."""
    error = kind("memory", "no room", where="arena", remedy="close something", retry_after_s=1.5)
    error.add_note("seen twice")
    back = again(error)
    assert type(back) is kind
    assert (back.reason, back.what, back.where, back.remedy, back.retry_after_s) == ("memory", "no room", "arena", "close something", 1.5)
    assert str(back) == str(error) == "arena: no room (close something)"
    assert back.args == error.args
    assert back.__notes__ == ["seen twice"]
