"""What the cloud costs now, as it is told to regions and devices."""

from typing import Annotated, ClassVar

from msgspec import Meta

from appliance.contract.codec import Message

Dollars = Annotated[float, Meta(ge=0)]


class Price(Message, frozen=True, tag="price"):
    """Dollars: for an hour of one cloud worker (at spot, and on demand), and for each GB that leaves a site.

    The spot price holds until `valid_until` (seconds since the epoch); from then on the one on demand counts.
    """

    limit: ClassVar[int] = 512
    spot_per_h: Dollars
    on_demand_per_h: Dollars
    egress_per_gb: Dollars
    valid_until: float
