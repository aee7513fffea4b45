"""The device: async loops that join mind and hands; `daemon` is the composition root."""
