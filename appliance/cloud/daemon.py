"""The composition root: opens adapters, builds minds, starts loops."""
