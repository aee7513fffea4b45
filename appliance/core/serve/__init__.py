"""Serve: an answer, always: the best that this hardware, heat and memory allow now."""
