"""Errors by whose fault they are; each carries data that an operator's message is rendered from.

1. `OursError`: an invariant of ours broke. The process crashes and systemd restarts it.
2. `TheirsError`: a peer or caller sent something that cannot be accepted. Refuse it, count it, go on.
3. `WorldError`: network, disk, TPM or a child process failed. Retry, degrade, go on.

Every error says what is wrong, where, and what to do: no traceback is needed to act on it.
"""

import functools


class ApplianceError(Exception):
    """The root of all errors raised on purpose.

    Attributes:
        reason: a stable snake_case code, fit for a metric label and for a peer's `match`.
        what: what is wrong, with expected and seen values.
        where: the file, topic, field or device that is at fault; empty if `what` names it.
        remedy: what a person can do; empty if nothing but waiting helps.
        retry_after_s: seconds after which it is worth asking again; None where that is not known.
    """

    def __init__(self, reason: str, what: str, *, where: str = "", remedy: str = "", retry_after_s: float | None = None) -> None:
        """Keep the parts; `str(error)` renders them as one line."""
        super().__init__(reason, what, where, remedy)
        self.reason = reason
        self.what = what
        self.where = where
        self.remedy = remedy
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle and copy all parts; the inherited way passes the parts after `what` by position, and fails."""
        made = functools.partial(type(self), where=self.where, remedy=self.remedy, retry_after_s=self.retry_after_s)
        return made, (self.reason, self.what), self.__dict__

    def __str__(self) -> str:
        """Render `where: what (remedy)` without empty parts."""
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head} ({self.remedy})" if self.remedy else head


class OursError(ApplianceError):
    """An invariant of this program broke; going on could make it worse."""


class TheirsError(ApplianceError):
    """A peer or caller is at fault; nothing changed here."""


class WorldError(ApplianceError):
    """The outside failed (network, disk, TPM, child process); it may work later."""
