"""SPIFFE IDs and broker usernames."""

import pytest

from appliance.contract import identities
from appliance.contract.errors import TheirsError


def test_ids_say_role_and_place() -> None:
    """Each workload has its path below the trust domain."""
    assert identities.device("eu-1", "jetson-1") == "spiffe://appliance.lab/region/eu-1/device/jetson-1"
    assert identities.broker("eu-1") == "spiffe://appliance.lab/region/eu-1/broker"
    assert identities.aggregator("eu-1", trust_domain="example.org") == "spiffe://example.org/region/eu-1/aggregator"
    assert identities.cloud() == "spiffe://appliance.lab/cloud"


@pytest.mark.parametrize("name", ["cloud", "broker", "region-eu-1", "region-", "", "A", "a/b", "a+b", "#", "-a", "a" * 64])
def test_no_device_bears_the_name_of_a_role(name: str) -> None:
    """A device called `cloud` would get the cloud's permissions; so would one with a wildcard get everybody's."""
    with pytest.raises(TheirsError) as caught:
        identities.device_user(name)
    assert caught.value.reason == "name"


def test_a_regions_username_fits_a_common_name() -> None:
    """X.509 allows a common name of 64 characters."""
    assert len(identities.region_user("r" * 57)) == 64
    with pytest.raises(TheirsError, match="at most 57"):
        identities.region_user("r" * 58)
