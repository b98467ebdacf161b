"""A real broker for each test that asks, and outboxes on real files."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kizu_agent.config import OutboxConfig
from kizu_agent.outbox import Outbox


@pytest.fixture
def outbox_path(tmp_path: Path) -> Path:
    """Where a test keeps its outbox."""
    return tmp_path / "state" / "outbox.sqlite3"


@pytest.fixture
def outbox(outbox_path: Path) -> Iterator[Outbox]:
    """An empty outbox with the default caps."""
    box = Outbox(outbox_path, OutboxConfig())
    yield box
    box.close()
