"""The mind: decides, and touches nothing. Time, chance and bytes are arguments."""
