"""What an operator may set on a region: one TOML file, usually /etc/appliance/region.toml. Defaults fit a real region."""

from typing import Annotated

from msgspec import Meta

from appliance.contract.settings import LABEL, PATH, Log, Section, Watchdog


class Site(Section, frozen=True, kw_only=True):
    """Which region this is and where it keeps its things."""

    name: Annotated[str, Meta(pattern=LABEL, description="The region's name: a DNS label")]
    state_dir: Annotated[str, Meta(pattern=PATH, description="Enrolments, cached artifacts and keys")] = "/var/lib/appliance-region"


class Reach(Section, frozen=True, kw_only=True):
    """The broker of this region, and the one on which the cloud is heard."""

    broker_host: Annotated[str, Meta(min_length=1, description="Host of the region's MQTT broker")]
    broker_port: Annotated[int, Meta(ge=1, le=65_535, description="Its TLS port")] = 8883
    heartbeat_s: Annotated[
        float, Meta(ge=0.2, le=300, description="Interval of signs of life, in seconds; the same on both ends of a hop")
    ] = 5.0
    ask_timeout_s: Annotated[float, Meta(ge=0.1, le=120, description="Longest wait for an answer of the cloud, in seconds")] = 10.0
    retry_cap_s: Annotated[float, Meta(ge=0.5, le=600, description="Longest pause between attempts to connect, in seconds")] = 30.0


class Trust(Section, frozen=True, kw_only=True):
    """Whom the region believes."""

    trust_domain: Annotated[str, Meta(pattern=r"^[a-z0-9._-]{1,255}\Z", description="SPIFFE trust domain of device, region and cloud")]
    workload_api: Annotated[str, Meta(pattern="^(unix|tcp):", description="SPIFFE Workload API endpoint")] = "unix:/run/spire/agent.sock"
    ek_roots: Annotated[str, Meta(description="Folder of TPM makers' CA certificates, PEM or DER")] = "/etc/appliance/ek-roots"
    keys_dir: Annotated[str, Meta(pattern=PATH, description="The region's signing keys, mode 0700")] = "/var/lib/appliance-region/keys"
    tuf_root: Annotated[str, Meta(pattern=PATH, description="First root of the signed metadata (TUF root.json)")] = (
        "/etc/appliance/root.json"
    )
    lease_h: Annotated[
        float, Meta(ge=0, le=720, description="How long a device may open its models without this region, in hours; 0: never")
    ] = 48.0
    lease_restarts: Annotated[int, Meta(ge=0, le=64, description="Restarts of the TPM that a lease allows within its term")] = 4
    images: Annotated[
        str, Meta(description="TOML file of approved images: a table for each, from PCR to digest in hex; empty for none")
    ] = ""
    trust_on_first_use: Annotated[bool, Meta(description="Take the PCRs of a device's first quote as its reference")] = False
    allow_zero_anchor: Annotated[
        bool, Meta(description="Accept PCRs that were never extended: for the lab, proves nothing about the boot")
    ] = False


class Region(Section, frozen=True, kw_only=True):
    """The whole file of a region."""

    region: Site
    reach: Reach
    trust: Trust
    log: Log = Log()
    watchdog: Watchdog = Watchdog()
