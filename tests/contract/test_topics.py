"""The MQTT tree in code and in docs/asyncapi.yaml are one and the same."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from appliance.contract import attest, codec, deferral, models, prices, topics, vitals
from appliance.contract.errors import TheirsError

ROOT = Path(__file__).parent.parent.parent
DOCUMENT: dict[str, Any] = yaml.safe_load((ROOT / "docs/asyncapi.yaml").read_text())


def in_code() -> dict[str, str]:
    found = {}
    for name, function in inspect.getmembers(topics, inspect.isfunction):
        parameters = list(inspect.signature(function).parameters)
        if parameters[0] == "region":
            found[name] = function(*(f"{{{parameter}}}" for parameter in parameters))
    return found


def references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if "$ref" in node else []
        return own + [found for value in node.values() for found in references(value)]
    if isinstance(node, list):
        return [found for value in node for found in references(value)]
    return []


def test_every_topic_is_documented_and_nothing_else() -> None:
    """Each topic function is a channel with the same address, and each channel is a topic function."""
    assert {name: channel["address"] for name, channel in DOCUMENT["channels"].items()} == in_code()


def test_no_reference_dangles() -> None:
    """Every $ref of the document leads somewhere."""
    for reference in references(DOCUMENT):
        node: Any = DOCUMENT
        for part in reference.removeprefix("#/").split("/"):
            assert part in node, reference
            node = node[part]


def test_every_message_is_one_of_the_contract() -> None:
    """The document names no message that the code does not have (Chunk and Frame are raw bytes)."""
    known = {
        name for module in (attest, codec, deferral, models, prices, vitals) for name, _ in inspect.getmembers(module, inspect.isclass)
    }
    assert set(DOCUMENT["components"]["messages"]) - {"Chunk", "Frame"} <= known


@pytest.mark.parametrize("text", ["", "-a", "a-", "A", "a/b", "a+", "#", "a" * 64, "a\nb", "ä"])
def test_a_name_cannot_escape_its_place_in_the_tree(text: str) -> None:
    """Region and device names are DNS labels: no separator, no wildcard."""
    with pytest.raises(TheirsError, match="is not a name"):
        topics.name(text)


def test_topics_fit_the_pattern_of_the_acl() -> None:
    """Everything that a device writes lies below its own up/, everything it reads alone below its own dn/."""
    for address in in_code().values():
        if "{device}" in address:
            assert re.fullmatch(r"v1/\{region\}/d/\{device\}/(up|dn)/[a-z/]+", address)


def test_the_document_is_asyncapi_3() -> None:
    """docs/asyncapi.yaml is valid against the published schema (tests/schemas, from the npm package @asyncapi/specs, Apache-2.0)."""
    schema = json.loads((ROOT / "tests/schemas/asyncapi-3.0.0.json").read_text())
    faults = [
        f"{'/'.join(map(str, fault.absolute_path))}: {fault.message[:120]}" for fault in Draft7Validator(schema).iter_errors(DOCUMENT)
    ]
    assert faults == []
