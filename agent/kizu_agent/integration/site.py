"""What the ready-made ends are made for: one agent with its cameras, as configured."""

from dataclasses import dataclass

from kizu_agent.config import Config
from kizu_agent.topics import Topics


@dataclass(frozen=True)
class Site:
    """An agent's topics, its broker, and for each camera by name after how many seconds it is stale."""

    topics: Topics
    host: str
    port: int
    has_tls: bool
    is_v5: bool
    cameras: dict[str, float]

    @classmethod
    def of(cls, config: Config) -> "Site":
        """Take it from the agent's configuration."""
        return cls(
            Topics(config.agent.prefix, config.agent.name),
            config.mqtt.host,
            config.mqtt.port,
            config.mqtt.tls is not None,
            config.mqtt.protocol == "5",
            {camera.name: camera.stale_after_s for camera in config.cameras},
        )
