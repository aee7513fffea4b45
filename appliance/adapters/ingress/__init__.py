"""The local API: Open Inference Protocol v2 over HTTP on loopback TCP and on a Unix socket, beside `/metrics` and `/status`.

One folder because one file could not hold it: `paths` says what an address means, `body` reads within bounds, `replies` says by whose
fault, `connection` keeps a caller from holding a connection for nothing, `sockets` binds, `server` joins them (`Ingress`).
"""

from appliance.adapters.ingress.bounds import Bounds
from appliance.adapters.ingress.server import Ingress

__all__ = ["Bounds", "Ingress"]
