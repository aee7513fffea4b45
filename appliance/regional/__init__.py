"""The region: attests devices, relays releases, gathers vitals."""
