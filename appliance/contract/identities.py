"""SPIFFE IDs of every workload, and the name by which the broker knows each.

1. An ID is `spiffe://<trust domain>/<path>`; the path says role and place (SPIFFE ID specification, sections 2.1 and 2.2).
2. A workload's SVID carries exactly one DNS name, its *username*; SPIRE copies it into the subject's common name, which is what a stock
   mosquitto maps to a user (docs/decisions/0006). Usernames of roles are therefore reserved: no device may bear them.
3. A username fits a common name: at most 64 characters (RFC 5280, ub-common-name).
"""

from appliance.contract.errors import TheirsError
from appliance.contract.topics import name

TRUST_DOMAIN = "appliance.lab"
"""The lab's trust domain; production gives its own to each function here."""

BROKER = "broker"
"""The username of every region's broker."""

CLOUD = "cloud"
"""The username of the cloud."""

QUARANTINED = "quarantined"
"""The user that a broker gives to all devices that their region has cut off."""

_REGION_PREFIX = "region-"
_COMMON_NAME_LIMIT = 64


def device_user(device: str) -> str:
    """Return a device's username, which is its name. Raises: TheirsError (`name`) if it is no name or is reserved for a role."""
    if device in {BROKER, CLOUD, QUARANTINED} or device.startswith(_REGION_PREFIX):
        raise TheirsError("name", f"{device!r} is reserved for a role; a device may not bear it", remedy="rename the device")
    return name(device)


def region_user(region: str) -> str:
    """Return the username of a region's aggregator. Raises: TheirsError (`name`), also when it would not fit a common name."""
    user = _REGION_PREFIX + name(region)
    if len(user) > _COMMON_NAME_LIMIT:
        limit = _COMMON_NAME_LIMIT - len(_REGION_PREFIX)
        raise TheirsError(
            "name", f"region {region!r} has {len(region)} characters, at most {limit} are allowed", remedy="rename the region"
        )
    return user


def device(region: str, device: str, *, trust_domain: str = TRUST_DOMAIN) -> str:
    """Return a device's SPIFFE ID. Raises: TheirsError (`name`)."""
    return f"spiffe://{trust_domain}/region/{name(region)}/device/{device_user(device)}"


def broker(region: str, *, trust_domain: str = TRUST_DOMAIN) -> str:
    """Return the SPIFFE ID of a region's broker. Raises: TheirsError (`name`)."""
    return f"spiffe://{trust_domain}/region/{name(region)}/{BROKER}"


def aggregator(region: str, *, trust_domain: str = TRUST_DOMAIN) -> str:
    """Return the SPIFFE ID of a region's aggregator. Raises: TheirsError (`name`)."""
    return f"spiffe://{trust_domain}/region/{name(region)}/aggregator"


def cloud(*, trust_domain: str = TRUST_DOMAIN) -> str:
    """Return the cloud's SPIFFE ID."""
    return f"spiffe://{trust_domain}/{CLOUD}"
