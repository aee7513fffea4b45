"""The Open Inference Protocol v2 over gRPC, with Triton's model repository: KServe's and Triton's own clients work unchanged.

One folder because one file could not hold it: `messages` describes the protocol as data, `wire` cuts large tensors out of a message without
a copy, `contents` reads numbers, `translation` turns messages into the contract's words and back, `statuses` says by whose fault, `intake`
bounds what is read, `server` joins them (`Rpc`).
"""

from appliance.adapters.rpc.intake import Bounds
from appliance.adapters.rpc.server import Rpc

__all__ = ["Bounds", "Rpc"]
