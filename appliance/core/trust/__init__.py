"""Trust: nothing unproven runs or connects."""
