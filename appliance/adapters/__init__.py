"""The hands: one file, one outside thing, one third-party library."""
