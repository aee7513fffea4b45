"""The cloud: signs and publishes models."""
