"""The link to a region's broker: MQTT 5 over mTLS, one folder because one file could not hold it.

`session` is one connection, `inbox` what becomes of messages that arrive, `link` the connection that heals itself (`ports.Link`).
"""

from appliance.adapters.mqtt.link import LinkSettings, MqttLink
from appliance.adapters.mqtt.session import SessionSettings

__all__ = ["LinkSettings", "MqttLink", "SessionSettings"]
