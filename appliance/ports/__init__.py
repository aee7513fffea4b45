"""What the loops ask of the world. Each Protocol is implemented by one adapter and, in tests, by one fake.

Adapters raise only `appliance.contract.errors`; anything foreign is translated at the border.
"""

from appliance.ports.durable import Inbox, Outbox
from appliance.ports.machine import Board, Clock, Notifier
from appliance.ports.models import Counter, Desk, Engine, LoadedModel, ModelCard, Share
from appliance.ports.network import Identity, Inbound, Link, Upstream
from appliance.ports.trusted import Depot, Metadata, SealedKey, Sight, Tpm, Weights

__all__ = [
    "Board",
    "Clock",
    "Counter",
    "Depot",
    "Desk",
    "Engine",
    "Identity",
    "Inbound",
    "Inbox",
    "Link",
    "LoadedModel",
    "Metadata",
    "ModelCard",
    "Notifier",
    "Outbox",
    "SealedKey",
    "Share",
    "Sight",
    "Tpm",
    "Upstream",
    "Weights",
]
