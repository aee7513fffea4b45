"""Fakes of ports, for tests of the loops."""
