"""What an operator may set on a device: one TOML file, usually /etc/appliance/device.toml. Defaults fit a real device."""

from typing import Annotated, Literal

from msgspec import Meta

from appliance.contract.settings import LABEL, PATH, Log, Section, Watchdog


class Device(Section, frozen=True, kw_only=True):
    """Who this device is and where it keeps its things."""

    name: Annotated[str, Meta(pattern=LABEL, description="The device's name, unique in its region: a DNS label")]
    region: Annotated[str, Meta(pattern=LABEL, description="The region that this device belongs to: a DNS label")]
    state_dir: Annotated[str, Meta(pattern=PATH, description="Ciphertext models, enrolment and the outbox; survives reboots")] = (
        "/var/lib/appliance"
    )
    runtime_dir: Annotated[str, Meta(pattern=PATH, description="Sockets; emptied at each start")] = "/run/appliance"


class Serve(Section, frozen=True, kw_only=True):
    """The local API and the batcher behind it."""

    host: Annotated[str, Meta(min_length=1, description="Address of the local API; anything but loopback opens it to the network")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Meta(ge=0, le=65_535, description="TCP port of the local API; 0 takes any free one")] = 8000
    socket: Annotated[str, Meta(description="Unix socket of the local API; a bare name lies in device.runtime_dir, empty for none")] = (
        "api.sock"
    )
    frames_socket: Annotated[
        str, Meta(description="Unix socket on which local programs lend memory for large frames; as `socket`, empty for none")
    ] = "frames.sock"
    grpc: Annotated[bool, Meta(description="Serve the same API over gRPC too; callers are not told apart there, as on TCP")] = False
    grpc_port: Annotated[int, Meta(ge=0, le=65_535, description="TCP port of the API over gRPC; 0 takes any free one")] = 8001
    repository: Annotated[
        Literal["socket", "everywhere", "nowhere"], Meta(description="Where models may be loaded and unloaded by callers")
    ] = "socket"
    workers: Annotated[int, Meta(ge=1, le=32, description="Child processes that run models")] = 1
    threads: Annotated[int, Meta(ge=0, le=128, description="Threads per worker; 0 shares the processors among the workers")] = 0
    prepacking: Annotated[
        bool, Meta(description="Keep a second, faster copy of the weights: off saves memory for up to twice the run time")
    ] = True
    max_batch: Annotated[int, Meta(ge=1, le=256, description="Most requests in one batch")] = 8
    slo_ms: Annotated[
        float, Meta(ge=1, le=60_000, description="How soon an answer should come: batches are sized for it, in milliseconds")
    ] = 150.0
    standby: Annotated[
        bool, Meta(description="Keep the least local mode loaded, for requests that the present mode cannot answer in time")
    ] = False
    stale_mib: Annotated[
        int, Meta(ge=0, le=4096, description="Memory for old answers, kept for callers who accept them, in MiB; 0 for none")
    ] = 16
    fill_wait_ms: Annotated[float, Meta(ge=0, le=10, description="Longest wait for a batch to fill, in milliseconds")] = 10.0
    batch_deadline_s: Annotated[float, Meta(ge=0.1, le=600, description="A batch that runs longer costs its worker, in seconds")] = 10.0
    body_limit_mib: Annotated[int, Meta(ge=1, le=1024, description="Largest request body, in MiB")] = 32
    drain_s: Annotated[
        float, Meta(ge=0, le=8, description="Time for answers in flight at SIGTERM, in seconds; the unit kills after 10")
    ] = 4.0


class Queue(Section, frozen=True, kw_only=True):
    """The durable queue of what was promised for later."""

    max_mib: Annotated[int, Meta(ge=8, le=65_536, description="Disk space for everything that waits, in MiB")] = 192
    free_mib: Annotated[int, Meta(ge=0, le=65_536, description="Free disk space that is left to others, in MiB")] = 64


class Reach(Section, frozen=True, kw_only=True):
    """The way to the region's broker."""

    broker_host: Annotated[str, Meta(min_length=1, description="Host of the region's MQTT broker")]
    broker_port: Annotated[int, Meta(ge=1, le=65_535, description="Its TLS port")] = 8883
    heartbeat_s: Annotated[float, Meta(ge=0.2, le=300, description="Interval of vitals, in seconds")] = 5.0
    ask_timeout_s: Annotated[float, Meta(ge=0.1, le=120, description="Longest wait for an answer of the region, in seconds")] = 5.0
    retry_cap_s: Annotated[float, Meta(ge=0.5, le=600, description="Longest pause between attempts to connect, in seconds")] = 30.0
    cloud: Annotated[
        bool, Meta(description="Whether requests may go to the models in the cloud (mode D); a request's tags may forbid it")
    ] = True
    cloud_deadline_ms: Annotated[
        float, Meta(ge=1, le=60_000, description="Longest wait for the cloud's answer, round trip included, in milliseconds")
    ] = 150.0
    neighbours: Annotated[
        bool,
        Meta(
            description="Whether a full device asks its region for a neighbour, and answers for neighbours; a request's tags may forbid it"
        ),
    ] = True
    dollars_per_hour: Annotated[
        float, Meta(ge=0, le=1_000, description="What this device costs an hour, purchase and power: weighed against the cloud's price")
    ] = 0.1


class Trust(Section, frozen=True, kw_only=True):
    """Identity, TPM and signed metadata."""

    trust_domain: Annotated[str, Meta(pattern=r"^[a-z0-9._-]{1,255}\Z", description="SPIFFE trust domain of device, region and cloud")]
    workload_api: Annotated[str, Meta(pattern="^(unix|tcp):", description="SPIFFE Workload API endpoint")] = "unix:/run/spire/agent.sock"
    tcti: Annotated[str, Meta(pattern=r"^[a-z]+(:.*)?\Z", description="TPM, as a TCTI string of tpm2-tss")] = "device:/dev/tpmrm0"
    tuf_root: Annotated[
        str, Meta(pattern=PATH, description="First root of the signed metadata (TUF root.json), put there at the factory")
    ] = "/etc/appliance/root.json"
    reattest_s: Annotated[float, Meta(ge=5, le=86_400, description="Interval of proof to the region, in seconds")] = 3600.0


class Board(Section, frozen=True, kw_only=True):
    """Which sensors to read."""

    kind: Annotated[Literal["generic", "sim", "jetson", "jtop"], Meta(description="Where board readings come from")] = "generic"
    profile: Annotated[
        str, Meta(description="Board data for the first guess of latencies: a file such as orin-nano-8gb.toml; empty for none")
    ] = ""
    interval_s: Annotated[float, Meta(ge=0.05, le=60, description="Interval of board readings and mode decisions, in seconds")] = 0.5


class Modes(Section, frozen=True, kw_only=True):
    """How patient the change of modes is (docs/rooms/serve.md); all in seconds."""

    settle_s: Annotated[float, Meta(ge=0.1, le=600, description="High pressure lasts so long before one step down")] = 2.0
    critical_settle_s: Annotated[float, Meta(ge=0.1, le=60, description="Critical pressure steps down again after so long")] = 0.5
    calm_s: Annotated[float, Meta(ge=0.5, le=3600, description="Calm lasts so long before one step up")] = 10.0
    relapse_s: Annotated[float, Meta(ge=1, le=3600, description="A step down so soon after a step up doubles the calm that is asked")] = (
        30.0
    )
    calm_max_s: Annotated[float, Meta(ge=1, le=86_400, description="At most so much calm is asked")] = 160.0


class Sim(Section, frozen=True, kw_only=True):
    """The simulated board, used only if board.kind is "sim"; defaults are near an Orin Nano Super (synthetic, not measured)."""

    control: Annotated[str, Meta(description='JSON file that injects heat and memory, such as {"watts": 20}; empty for none')] = ""
    replay: Annotated[str, Meta(description="A recorded tegrastats log to replay instead of the model; empty for none")] = ""
    ambient_c: Annotated[float, Meta(ge=-40, le=85, description="Air temperature, in degrees Celsius")] = 25.0
    idle_w: Annotated[float, Meta(ge=0, le=200, description="Power at rest, in watts")] = 5.0
    busy_w: Annotated[float, Meta(ge=0, le=200, description="Power that full load adds at full clock, in watts")] = 16.5
    resistance_k_per_w: Annotated[float, Meta(ge=0.05, le=20, description="Thermal resistance to the air, in kelvin per watt")] = 1.4
    capacity_j_per_k: Annotated[float, Meta(ge=0.1, le=5000, description="Heat capacity, in joule per kelvin")] = 60.0
    throttle_c: Annotated[float, Meta(ge=30, le=120, description="Above this the clock steps down, in degrees Celsius")] = 99.0
    memory_mib: Annotated[int, Meta(ge=256, le=1_048_576, description="Memory of the board, in MiB")] = 7_607
    resting_mib: Annotated[int, Meta(ge=0, le=1_048_576, description="Memory in use at rest, in MiB")] = 519

    def __post_init__(self) -> None:
        """Hold the fields against each other."""
        if self.throttle_c <= self.ambient_c:
            raise ValueError("throttle_c must be above ambient_c")
        if self.resting_mib >= self.memory_mib:
            raise ValueError("resting_mib must be below memory_mib")


class Edge(Section, frozen=True, kw_only=True):
    """The whole file of a device."""

    device: Device
    serve: Serve = Serve()
    queue: Queue = Queue()
    reach: Reach
    trust: Trust
    board: Board = Board()
    modes: Modes = Modes()
    sim: Sim = Sim()
    log: Log = Log()
    watchdog: Watchdog = Watchdog()
