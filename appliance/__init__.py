"""Appliance: an inference appliance that can be trusted, whatever happens to its network, heat and memory."""
