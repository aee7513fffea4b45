"""What a request's fault is counted as: one rule for every door and for the desk."""

from appliance.contract.errors import ApplianceError, TheirsError, WorldError
from appliance.contract.vocabulary import Outcome


def refused(error: ApplianceError) -> Outcome:
    """The desk's refusal: its reason where that is a word of the vocabulary, else by whose fault it was."""
    try:
        return Outcome(error.reason)
    except ValueError:
        return Outcome.MALFORMED if isinstance(error, TheirsError) else Outcome.INTERNAL


def turned_away(error: BaseException) -> Outcome:
    """A request that never reached the desk. What is no `Exception` (a cancellation), or a broken connection, is a caller that left."""
    if isinstance(error, TheirsError):
        return Outcome.MALFORMED
    if isinstance(error, WorldError):
        return Outcome.DEADLINE if error.reason == "deadline" else Outcome.BACKLOG_FULL
    if isinstance(error, ConnectionError) or not isinstance(error, Exception):
        return Outcome.CANCELLED
    return Outcome.INTERNAL
