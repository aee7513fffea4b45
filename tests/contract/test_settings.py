"""The grammar of settings, and the three rooms' files that are written in it."""

import contextlib
from typing import Annotated

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.cloud.settings import Cloud
from appliance.contract.errors import TheirsError
from appliance.contract.settings import Section, document, parse, render
from appliance.edge.settings import Edge
from appliance.regional.settings import Region

MINIMAL = {
    Edge: """
[device]
name = "shelf-1"
region = "north"

[reach]
broker_host = "broker.north.example"

[trust]
trust_domain = "example.org"
""",
    Region: """
[region]
name = "north"

[reach]
broker_host = "localhost"

[trust]
trust_domain = "example.org"
""",
    Cloud: """
[cloud]
regions = ["north", "south"]

[reach]
broker_host = "localhost"

[trust]
trust_domain = "example.org"
""",
}
EDGE = MINIMAL[Edge]
ROOMS = pytest.mark.parametrize("room", list(MINIMAL), ids=lambda room: room.__name__)


class Inner(Section, frozen=True, kw_only=True):
    text: Annotated[str, msgspec.Meta(description="any")] = "x"
    ratio: Annotated[float, msgspec.Meta(ge=-1e9, le=1e9, description="any")] = 0.5
    flag: Annotated[bool, msgspec.Meta(description="any")] = False
    words: Annotated[tuple[str, ...], msgspec.Meta(description="any")] = ()


class Outer(Section, frozen=True, kw_only=True):
    whole: Annotated[int, msgspec.Meta(ge=-(2**60), le=2**60, description="any")]
    inner: Inner = Inner()


texts = st.text(st.characters(exclude_categories=["Cs"]))
outers = st.builds(
    Outer,
    whole=st.integers(-(2**60), 2**60),
    inner=st.builds(Inner, text=texts, ratio=st.floats(-1e9, 1e9), flag=st.booleans(), words=st.lists(texts, max_size=3).map(tuple)),
)


@given(outers)
def test_what_is_rendered_parses_to_the_same(settings: Outer) -> None:
    """`parse(render(x)) == x` for every tree of values in range, whatever letters the texts hold."""
    assert parse(render(settings), "made.toml", Outer) == settings


@ROOMS
def test_a_minimal_file_is_enough_and_survives_rendering(room: type[Section]) -> None:
    """Only names, broker and trust domain must be given, and the rendered configuration means the same."""
    settings = parse(MINIMAL[room], "file.toml", room)
    assert parse(render(settings), "file.toml", room) == settings


@ROOMS
def test_every_setting_has_a_description_and_every_number_a_range(room: type[Section]) -> None:
    """An operator can read what each setting means and how far it goes."""
    for setting in document(room):
        assert setting.description, setting
        assert not setting.description.endswith("."), setting
        if setting.type in {"a number", "a whole number"}:
            low, _, high = setting.range.partition(" to ")
            assert float(low) < float(high), setting
            if setting.default:
                assert float(low) <= float(setting.default) <= float(high), setting


@ROOMS
def test_quantities_name_their_unit(room: type[Section]) -> None:
    """A number that is not a plain count ends in its unit."""
    units = ("_s", "_ms", "_mib", "_c", "_w", "_k_per_w", "_j_per_k", "_days", "_factor", "_h", "_per_hour", "_per_gb")
    counts = {"port", "broker_port", "grpc_port", "workers", "threads", "max_batch", "waiting", "lease_restarts"}
    for setting in document(room):
        if setting.type in {"a number", "a whole number"}:
            assert setting.key.endswith(units) or setting.key in counts, setting


@pytest.mark.parametrize(
    ("text", "line", "what", "remedy"),
    [
        (EDGE + "[serve]\nprot = 1\n", 12, "serve.prot is not a setting", "did you mean `port`?"),
        (EDGE + "[sevre]\n", 11, "sevre is not a setting", "did you mean `serve`?"),
        (EDGE + "[log]\nport = 1\n", 12, "log.port is not a setting", "it belongs under [serve]"),
        (EDGE + "[serve]\n\nport = 70000\n", 13, "serve.port = 70000 is not allowed", "give a whole number: 0 to 65535"),
        (EDGE + "[serve]\nport = 'http'\n", 12, 'serve.port = "http" is not allowed', "give a whole number: 0 to 65535"),
        (EDGE + "[serve]\nport = true\n", 12, "serve.port = true is not allowed", "give a whole number: 0 to 65535"),
        (EDGE + "[serve]\nfill_wait_ms = nan\n", 12, "serve.fill_wait_ms = nan is not allowed", "give a number: 0 to 10"),
        (EDGE + f"[serve]\nfill_wait_ms = 1{'0' * 400}\n", 12, "is not allowed", "give a number: 0 to 10"),
        (EDGE + "[log]\nlevel = 'loud'\n", 12, 'log.level = "loud" is not allowed', "one of: debug | error | info | warning"),
        (EDGE + "[serve]\nport = 1\nport = 2\n", 13, "given twice", "keep one of the two"),
        (EDGE + "[trust]\n", 11, "given twice", "keep one of the two"),
        (EDGE + "[serve\n", 11, "not TOML", "texts need quotes"),
        (EDGE + "[sim]\nambient_c = 80\nthrottle_c = 50\n", 11, "throttle_c must be above ambient_c", ""),
        (EDGE.replace('"north"', '"North"'), 4, 'device.region = "North" is not allowed', "matching"),
        (EDGE.replace('"shelf-1"', '"shelf-1\\n"'), 3, "device.name =", "matching"),
        (EDGE.replace('region = "north"', ""), 2, "device.region must be given", "add `region = …`"),
        ("serve = 1\n" + EDGE, 1, "serve is a section, got int", "write `[serve]`"),
        ("", 1, "device.name must be given", "add `name = …`"),
        ("a = " + "[" * 5000, 1, "not TOML", ""),
        (MINIMAL[Edge] + 'note = """\n[serve]\nport = 1\n"""\n', 11, "trust.note is not a setting", "known here"),
    ],
)
def test_a_mistake_is_named_with_file_line_and_cure(text: str, line: int, what: str, remedy: str) -> None:
    """Every mistake in a file is refused with its place and with what to write instead."""
    with pytest.raises(TheirsError) as caught:
        parse(text, "device.toml", Edge)
    error = caught.value
    assert (error.reason, error.where) == ("settings", f"device.toml:{line}")
    assert what in error.what
    assert remedy in error.remedy


def test_a_region_given_twice_is_refused() -> None:
    """Rules between values of one section are kept too."""
    with pytest.raises(TheirsError, match="names one region twice"):
        parse(MINIMAL[Cloud].replace("south", "north"), "cloud.toml", Cloud)


@given(
    st.text(max_size=200) | st.lists(st.sampled_from([*EDGE.splitlines(), "[", "=", "[serve]", "x.y = 1", "'", '"""', "\\"])).map("\n".join)
)
def test_garbage_is_refused_and_never_crashes(text: str) -> None:
    """Whatever a file holds, the only errors are ours and they name a line of it."""
    with contextlib.suppress(TheirsError):
        assert parse(text, "device.toml", Edge).device.name == "shelf-1"
        return
    with pytest.raises(TheirsError) as caught:
        parse(text, "device.toml", Edge)
    assert 1 <= int(caught.value.where.rpartition(":")[2]) <= text.count("\n") + 1


def test_rendering_marks_what_differs_from_the_default() -> None:
    """The default stands beside a changed value and nowhere else."""
    settings = parse(EDGE + "[serve]\nmax_batch = 4\n", "device.toml", Edge)
    marked = [line for line in render(settings).splitlines() if "# default:" in line]
    assert marked == ["max_batch = 4  # default: 8"]
