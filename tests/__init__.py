"""The tests; `tests.fakes` holds the fakes of ports."""
