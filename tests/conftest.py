"""For all tests: onnxruntime's telemetry, on by default, is off before anything imports it."""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
