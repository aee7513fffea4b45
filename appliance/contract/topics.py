"""The whole MQTT tree, one function per topic. `docs/asyncapi.yaml` describes the same tree; a test compares them.

Shape: `v1/<region>/<who>/<name>/<direction>/<word>`. A device may write only below its own `up/` and read only its own `dn/`
and `bcast/`; the broker's ACL says so in patterns of `%u`, the name that its SVID proves.
"""

import re

from appliance.contract.errors import TheirsError

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def name(text: str) -> str:
    """Return `text` if it is a legal region or device name (a DNS label). Raises: TheirsError (`name`)."""
    if not _NAME.fullmatch(text):
        raise TheirsError("name", f"{text!r} is not a name: 1 to 63 of a-z, 0-9 and inner '-'", remedy="rename the device or region")
    return text


def vitals(region: str, device: str) -> str:
    """Device to region: `Vitals`, every heartbeat."""
    return f"v1/{region}/d/{device}/up/vitals"


def enrol(region: str, device: str) -> str:
    """Device to region, request: `EnrolAsk`, answered by `EnrolChallenge`."""
    return f"v1/{region}/d/{device}/up/ask/enrol"


def prove(region: str, device: str) -> str:
    """Device to region, request: `EnrolProof`, answered by `Enrolled`."""
    return f"v1/{region}/d/{device}/up/ask/prove"


def challenge(region: str, device: str) -> str:
    """Device to region, request: `ChallengeAsk`, answered by `Challenge`."""
    return f"v1/{region}/d/{device}/up/ask/challenge"


def attest(region: str, device: str) -> str:
    """Device to region, request: `Evidence`, answered by `Approval`."""
    return f"v1/{region}/d/{device}/up/ask/attest"


def key(region: str, device: str) -> str:
    """Device to region, request: `KeyAsk`, answered by `WrappedKey`."""
    return f"v1/{region}/d/{device}/up/ask/key"


def chunk(region: str, device: str) -> str:
    """Device to region, request: `ChunkAsk`, answered by raw bytes."""
    return f"v1/{region}/d/{device}/up/ask/chunk"


def ping(region: str, device: str) -> str:
    """Device to region, request: `Ping`, answered by the same."""
    return f"v1/{region}/d/{device}/up/ask/ping"


def deliver(region: str, device: str) -> str:
    """Device to region, request: `Deferred`, answered by `Receipt` after the region's commit."""
    return f"v1/{region}/d/{device}/up/ask/deliver"


def infer(region: str, device: str) -> str:
    """Device to region, request: an inference frame (`contract.remote`), answered by one."""
    return f"v1/{region}/d/{device}/up/ask/infer"


def neighbour(region: str, device: str) -> str:
    """Device to region, request: an inference frame that another device of the region should answer, answered by one."""
    return f"v1/{region}/d/{device}/up/ask/neighbour"


def lent(region: str, device: str) -> str:
    """Region to device, request: another device's inference frame, answered by one."""
    return f"v1/{region}/d/{device}/dn/ask/infer"


def lent_answer(region: str, device: str) -> str:
    """Device to region: its answers to the region's requests, told apart by correlation data."""
    return f"v1/{region}/d/{device}/up/answer"


def answer(region: str, device: str) -> str:
    """Region to device: the answers to the device's requests, told apart by correlation data."""
    return f"v1/{region}/d/{device}/dn/answer"


def release(region: str) -> str:
    """Region to all its devices, retained: `Release`, the signed metadata of everything that is offered."""
    return f"v1/{region}/bcast/release"


def beat(region: str) -> str:
    """Region to all its devices: `Beat`, the region's sign of life."""
    return f"v1/{region}/bcast/beat"


def price(region: str) -> str:
    """Region to all its devices, retained: `Price`, what the cloud costs now."""
    return f"v1/{region}/bcast/price"


def upstream_price(region: str) -> str:
    """Cloud to region, retained: `Price`."""
    return f"v1/{region}/r/dn/price"


def upstream_beat(region: str) -> str:
    """Cloud to region: `Beat`, the cloud's sign of life."""
    return f"v1/{region}/r/dn/beat"


def upstream_ping(region: str) -> str:
    """Region to cloud, request: `Ping`, answered by the same."""
    return f"v1/{region}/r/up/ask/ping"


def upstream_release(region: str) -> str:
    """Cloud to region, retained: `Release`."""
    return f"v1/{region}/r/dn/release"


def upstream_chunk(region: str) -> str:
    """Region to cloud, request: `ChunkAsk`, answered by raw bytes."""
    return f"v1/{region}/r/up/ask/chunk"


def upstream_key(region: str) -> str:
    """Region to cloud, request: `RegionKeyAsk`, answered by `RegionKey`."""
    return f"v1/{region}/r/up/ask/key"


def upstream_infer(region: str) -> str:
    """Region to cloud, request: an inference frame, answered by one."""
    return f"v1/{region}/r/up/ask/infer"


def upstream_answer(region: str) -> str:
    """Cloud to region: the answers to the region's requests, told apart by correlation data."""
    return f"v1/{region}/r/dn/answer"
