"""Reach: how well it is connected, what goes where, and what is promised for later."""
