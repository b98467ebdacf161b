"""What the plant may order while the agent runs: products, pauses, inspections, and the commands for all of it."""

from collections.abc import Callable, Mapping
from functools import partial

from kizu_agent.audit import Audit
from kizu_agent.basic_commands import ping_command, rebirth_command, status_command
from kizu_agent.capture import Capture
from kizu_agent.commands import AnyCommand, Commands
from kizu_agent.config import Config
from kizu_agent.encoding import to_bytes, utc_now
from kizu_agent.health import Figures
from kizu_agent.inspect_command import inspect_command
from kizu_agent.model_command import Keeper, model_command
from kizu_agent.outbox import Outbox
from kizu_agent.pause_command import pause_commands
from kizu_agent.pauses import PauseBook
from kizu_agent.payloads import ProductPayload, StatusPayload
from kizu_agent.product_command import ModelIn, product_command
from kizu_agent.products import ProductBook, Running
from kizu_agent.publisher import Publisher
from kizu_agent.rate_limit import Gate, TokenBucket
from kizu_agent.records import Frame, Message, Trigger
from kizu_agent.request_memory import RequestMemory
from kizu_agent.settings import CommandsConfig
from kizu_agent.snapshot_command import snapshot_command
from kizu_agent.thresholds import ThresholdBook
from kizu_agent.thresholds_command import CameraModel, thresholds_command
from kizu_agent.topics import Topics
from kizu_agent.triggers import Triggers
from kizu_agent.zone_book import ZoneBook
from kizu_agent.zones_command import zones_command


class Operation:
    """Owns what commands change, but for models; `triggers` has a thread of its own."""

    def __init__(
        self,
        config: Config,
        topics: Topics,
        products: ProductBook,
        outbox: Outbox,
        publisher: Publisher,
        on_failure: Callable[[], None],
    ) -> None:
        self._config, self._topics, self._outbox, self._publisher = config, topics, outbox, publisher
        self.products = products
        self.pauses = PauseBook(config.agent.state_dir)
        self.zones = ZoneBook(config.agent.state_dir, config.cameras)
        self.triggers = Triggers(self._shoot, on_failure)
        self.audit = Audit(topics, outbox, publisher.wake)
        self._captures: Mapping[str, Capture] = {}

    def attach(self, captures: Mapping[str, Capture]) -> None:
        """Take the cameras that orders are for; those that were paused are so again."""
        self._captures = captures
        self._apply_pauses()

    def commands(
        self,
        version: str,
        status: Callable[[], StatusPayload],
        thresholds: ThresholdBook,
        camera_model: CameraModel,
        model_in: ModelIn,
        keeper: Keeper,
        rebirth: Callable[[], None] | None = None,
    ) -> Commands:
        """All commands; `rebirth` is that of a Sparkplug node, None where there is none."""
        cameras = {camera.name: camera for camera in self._config.cameras}
        newest = {name: partial(self.newest, name) for name in cameras}
        every: tuple[AnyCommand, ...] = (
            ping_command(version),
            status_command(status),
            inspect_command(self.triggers, self.products, cameras),
            thresholds_command(thresholds, camera_model, lambda: self.products.running.product),
            zones_command(self.zones, self.newest),
            product_command(self.products, cameras, model_in, self._tell_product),
            model_command(keeper),
            *pause_commands(self.pauses, tuple(cameras), self._apply_pauses),
            snapshot_command(self._topics, newest, self._put, self._config.mqtt.heatmap_expiry_s),
            rebirth_command(rebirth),
        )
        return Commands(
            self._topics.agent,
            every,
            self._publisher.answer,
            _gate(self._config.commands, [command.name for command in every]),
            RequestMemory(self._config.agent.state_dir, self._config.commands.remembered),
            self.audit,
        )

    @property
    def problems(self) -> list[str | None]:
        """What is wrong with what commands had set, in words."""
        return [self.products.problem, self.pauses.problem, self.zones.problem]

    def start(self) -> None:
        """Watch deadlines, and tell which product runs."""
        self.triggers.stage.start()
        self._tell_product(self.products.running)

    def stop(self, deadline_s: float) -> bool:
        """Answer every trigger that waits; tell whether the thread is gone. Idempotent."""
        self.triggers.stop()
        return self.triggers.stage.stop(deadline_s)

    def newest(self, camera: str) -> Frame | None:
        """The last picture of `camera`, None where it has given none."""
        capture = self._captures.get(camera)
        return None if capture is None else capture.newest

    def figures(self) -> Figures:
        """Give the numbers behind the metrics."""
        triggers = self.triggers.counts()
        return {
            "triggers_total": [({"camera": camera, "outcome": how}, n) for (camera, how), n in triggers.items()],
            "triggers_waiting": [({}, self.triggers.waiting())],
            "camera_paused": [
                ({"camera": camera.name}, camera.name in self.pauses.paused) for camera in self._config.cameras
            ],
        }

    def _shoot(self, trigger: Trigger) -> None:
        self._captures[trigger.camera].shoot(trigger)

    def _put(self, messages: list[Message]) -> None:
        self._outbox.put(messages)
        self._publisher.wake()

    def _apply_pauses(self) -> None:
        for name, capture in self._captures.items():
            capture.is_paused = name in self.pauses.paused

    def _tell_product(self, running: Running) -> None:
        payload = ProductPayload(
            agent=self._topics.agent,
            product=running.product,
            batch=running.batch,
            since=running.since,
            known=running.is_known,
            published_at=utc_now(),
        )
        self._publisher.publish_retained(self._topics.product, to_bytes(payload))


def _gate(config: CommandsConfig, names: list[str]) -> Gate:
    buckets = {name: TokenBucket(config.per_s, config.burst) for name in names}
    # A second's worth at once: the parts of several cameras come together.
    buckets["inspect"] = TokenBucket(config.inspect_per_s, max(config.burst, round(config.inspect_per_s)))
    return Gate(buckets, TokenBucket(config.per_s, config.burst))
