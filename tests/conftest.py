"""For all tests: no telemetry from onnxruntime, and no verdict by the clock from hypothesis."""

import os

from hypothesis import HealthCheck, settings

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # on by default, and read while the library is imported

# Time is no verdict in this suite: the first example of a fresh clone builds hypothesis's table of characters, which takes over a second here.
# What is generated and what is asserted is as before; a test that hangs still ends at pytest's timeout.
# `make check` draws fewer examples (EXAMPLES=25), to stay under 90 s; `make test` draws hypothesis's usual hundred.
settings.register_profile(
    "appliance", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=int(os.environ.get("EXAMPLES", "100"))
)
settings.load_profile("appliance")
