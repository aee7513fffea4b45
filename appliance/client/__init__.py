"""The client: what a local program imports to ask the appliance, and what `appliance infer` is made of."""
