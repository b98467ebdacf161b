"""Names in Sparkplug's topic namespace: spBv1.0/group/type/node[/device]."""

from dataclasses import dataclass
from typing import Literal

from kizu_agent.config import Config

NAMESPACE = "spBv1.0"

NodeMessage = Literal["NBIRTH", "NDATA", "NDEATH", "NCMD"]
DeviceMessage = Literal["DBIRTH", "DDATA", "DDEATH", "DCMD"]


@dataclass(frozen=True)
class EdgeNode:
    """The edge node's descriptor, which no other node of the plant may have."""

    group: str
    node: str

    @classmethod
    def of(cls, config: Config) -> "EdgeNode":
        """The configured ids, or those that follow from the agent's place in the plant."""
        sparkplug, agent = config.sparkplug, config.agent
        group = sparkplug.group or sparkplug.separator.join(agent.prefix.split("/"))
        return cls(group, sparkplug.node or agent.name)

    def topic(self, kind: NodeMessage) -> str:
        """Topic of a message about the node."""
        return f"{NAMESPACE}/{self.group}/{kind}/{self.node}"

    def device_topic(self, kind: DeviceMessage, device: str) -> str:
        """Topic of a message about a device; `+` for those of all."""
        return f"{NAMESPACE}/{self.group}/{kind}/{self.node}/{device}"


def state_topic(host: str) -> str:
    """Where a host application says whether it is online."""
    return f"{NAMESPACE}/STATE/{host}"
