"""What an operator may set on the cloud's publisher: one TOML file, usually /etc/appliance/cloud.toml."""

from typing import Annotated

from msgspec import Meta

from appliance.contract.settings import LABEL, PATH, Log, Section, Watchdog


class Site(Section, frozen=True, kw_only=True):
    """Which regions it serves and where it keeps its things."""

    regions: Annotated[
        tuple[Annotated[str, Meta(pattern=LABEL)], ...], Meta(min_length=1, description="Regions that get the releases: DNS labels")
    ]
    state_dir: Annotated[str, Meta(pattern=PATH, description="Encrypted artifacts and signed metadata")] = "/var/lib/appliance-cloud"
    models_dir: Annotated[str, Meta(pattern=PATH, description="Plaintext models that are to be published")] = (
        "/var/lib/appliance-cloud/models"
    )

    def __post_init__(self) -> None:
        """Hold the regions against each other."""
        if len(set(self.regions)) < len(self.regions):
            raise ValueError("regions names one region twice")


class Answer(Section, frozen=True, kw_only=True):
    """The models that are computed here, for devices that cannot."""

    workers: Annotated[int, Meta(ge=0, le=256, description="Child processes that run models; 0: the cloud computes nothing")] = 1
    threads: Annotated[int, Meta(ge=0, le=128, description="Threads per worker; 0 shares the processors among the workers")] = 0
    waiting: Annotated[
        int, Meta(ge=0, le=64, description="Requests that may wait for each worker; beyond that they are refused at once")
    ] = 4
    dollars_per_hour: Annotated[
        float,
        Meta(ge=0, le=10_000, description="What one worker's machine costs on demand; told with each answer where no series is given"),
    ] = 0.5
    egress_per_gb: Annotated[float, Meta(ge=0, le=100, description="What a GB costs that leaves a site for the cloud, in dollars")] = 0.09
    prices: Annotated[
        str, Meta(description="Series of spot prices, a CSV file with a column spot_per_h; empty: dollars_per_hour holds")
    ] = ""
    price_every_s: Annotated[
        float, Meta(ge=0.1, le=86_400, description="Each price of the series holds so long and is told to the regions, in seconds")
    ] = 300.0


class Reach(Section, frozen=True, kw_only=True):
    """The broker on which the regions are reached."""

    broker_host: Annotated[str, Meta(min_length=1, description="Host of the MQTT broker")]
    broker_port: Annotated[int, Meta(ge=1, le=65_535, description="Its TLS port")] = 8883
    heartbeat_s: Annotated[
        float, Meta(ge=0.2, le=300, description="Interval of signs of life, in seconds; the same on both ends of a hop")
    ] = 5.0
    retry_cap_s: Annotated[float, Meta(ge=0.5, le=600, description="Longest pause between attempts to connect, in seconds")] = 30.0


class Trust(Section, frozen=True, kw_only=True):
    """Identity, and the keys that sign releases."""

    trust_domain: Annotated[str, Meta(pattern=r"^[a-z0-9._-]{1,255}\Z", description="SPIFFE trust domain of device, region and cloud")]
    workload_api: Annotated[str, Meta(pattern="^(unix|tcp):", description="SPIFFE Workload API endpoint")] = "unix:/run/spire/agent.sock"
    keys_dir: Annotated[str, Meta(pattern=PATH, description="Signing keys of the metadata and data keys of the models, mode 0700")] = (
        "/var/lib/appliance-cloud/keys"
    )
    metadata_days: Annotated[
        int, Meta(ge=1, le=365, description="Signed metadata expires after so many days; it is renewed at half of them")
    ] = 30


class Cloud(Section, frozen=True, kw_only=True):
    """The whole file of the cloud."""

    cloud: Site
    answer: Answer = Answer()
    reach: Reach
    trust: Trust
    log: Log = Log()
    watchdog: Watchdog = Watchdog()
