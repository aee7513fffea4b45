"""The workshop: what an engineer does to a model before the fleet sees it, and how a device is measured afterwards."""
