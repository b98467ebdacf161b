"""The table `[sparkplug]` of the configuration."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from kizu_agent.settings import Section

SparkplugId = Annotated[str, Field(pattern=r"^[^+#/\x00-\x1f\x7f]+$", max_length=200)]
"""Group, node and host ids: topic levels without wildcards (topic-structure-namespace-valid-…)."""


class SparkplugConfig(Section):
    """A Sparkplug B edge node, beside the JSON topics or instead of them."""

    enabled: bool = False
    group: SparkplugId | None = None
    """None: the levels of `agent.prefix`, joined by `separator`."""
    separator: Literal[":", "_"] = ":"
    node: SparkplugId | None = None
    """None: `agent.name`."""
    primary_host: SparkplugId | None = None
    """None: births need no host; else only while its STATE says that it is online."""
    include_datatype: bool = True
    """Also in data messages; the specification would leave it out, and common hosts then read null."""
    images: bool = False
    """Heatmaps as Bytes; off, only what is known of them."""
    history: Literal["live_first", "in_order"] = "live_first"
    history_per_s: Annotated[float, Field(gt=0, le=1e6)] = 100.0
    """Results of an outage a second, at most."""
    history_max_bytes: Annotated[int, Field(ge=2**20)] = 256 * 2**20
    history_max_age_s: Annotated[int, Field(ge=60)] = 7 * 86_400
    rebirth_pause_s: Annotated[float, Field(ge=0, le=60)] = 1.0
    """Rebirths asked for within this time after one are answered by one more at its end."""

    @field_validator("group")
    @classmethod
    def _not_state(cls, group: str | None) -> str | None:
        if group == "STATE":
            raise ValueError("STATE is where hosts say whether they are online; choose another group")
        return group
