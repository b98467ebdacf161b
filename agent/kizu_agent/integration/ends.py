"""Every ready-made end by its name, as `kizu-agent integrate` writes it."""

import json
from collections.abc import Callable
from pathlib import Path

from kizu_agent.integration.ignition import ignition_tags
from kizu_agent.integration.node_red import node_red_flow
from kizu_agent.integration.schemas import MESSAGES, schema_of, schema_text
from kizu_agent.integration.site import Site
from kizu_agent.integration.telegraf import telegraf_conf

ENDS: dict[str, Callable[[Site], str]] = {
    "node-red": node_red_flow,
    "ignition": ignition_tags,
    "telegraf": telegraf_conf,
}


def write_end(name: str, site: Site, out: Path | None) -> None:
    """Write the end `name` for `site` to the file `out`, or to standard output. Raises OSError."""
    text = ENDS[name](site)
    if out is None:
        print(text, end="")  # noqa: T201 - it is what was asked for
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")


def write_schemas(out: Path | None) -> None:
    """Write every JSON Schema into the folder `out`, or all as one object to standard output. Raises OSError."""
    if out is None:
        print(json.dumps({name: schema_of(name) for name in MESSAGES}, indent=2, ensure_ascii=False))  # noqa: T201
        return
    out.mkdir(parents=True, exist_ok=True)
    for name in MESSAGES:
        (out / f"{name}.json").write_text(schema_text(name), encoding="utf-8")
