"""Commands on their way to the handler and answers on their way back, off the thread that talks to the broker."""

import contextlib
import queue
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import structlog

from kizu_agent.records import CommandAnswer, CommandRequest, Message
from kizu_agent.stages import Stage

log = structlog.get_logger(__name__)

_QUEUE_LENGTH = 16
_IDLE_S = 0.5


class Answer(NamedTuple):
    """One message that answers a command, with the correlation data that goes along in MQTT 5."""

    message: Message
    correlation: bytes | None


class CommandLane:
    """Runs `handle` for one command after the other in a thread of its own; `wake` tells that answers are there.

    What `handle` raises is logged, and that command stays unanswered. A slow handler holds nobody up: commands
    beyond 16 waiting ones are dropped and counted.
    """

    def __init__(
        self,
        base_topic: str,
        handle: Callable[[CommandRequest], CommandAnswer],
        wake: Callable[[], None],
        on_failure: Callable[[], None],
    ) -> None:
        self.dropped = 0
        self._base_topic = base_topic
        self._handle = handle
        self._wake = wake
        self._requests: queue.Queue[CommandRequest | None] = queue.Queue(_QUEUE_LENGTH)
        self._answers: deque[Answer] = deque()
        self._stage = Stage("commands", self._work, on_failure)

    def start(self) -> None:
        """Start the thread; idempotent."""
        self._stage.start()

    def stop(self, deadline_s: float) -> None:
        """Let the running command end, at most `deadline_s`."""
        with contextlib.suppress(queue.Full):  # else it is not asleep
            self._requests.put_nowait(None)
        if not self._stage.stop(deadline_s):
            log.warning("a command did not end in time")

    @property
    def failure(self) -> BaseException | None:
        """The bug that ended the thread, None while it lives."""
        return self._stage.failure

    def submit(self, request: CommandRequest) -> None:
        """Queue `request`; never blocks."""
        try:
            self._requests.put_nowait(request)
        except queue.Full:
            self.dropped += 1
            log.warning("command dropped: too many wait", command=request.name)

    def next_answer(self) -> Answer | None:
        """Give the oldest answer not yet sent, None where there is none."""
        return self._answers.popleft() if self._answers else None

    def _work(self) -> None:
        try:
            request = self._requests.get(timeout=_IDLE_S)
        except queue.Empty:
            return
        if request is None:
            return
        try:
            answer = self._handle(request)
        except Exception:
            log.exception("command failed", command=request.name)
            return
        for topic in self._answer_topics(request):
            message = Message(topic, answer.payload, content_type=answer.content_type)
            self._answers.append(Answer(message, request.correlation))
        self._wake()

    def _answer_topics(self, request: CommandRequest) -> list[str]:
        topics = [f"{self._base_topic}/response/{request.name}"]
        wanted = request.response_topic
        if wanted and wanted != topics[0]:
            # Into our own tree an answer would pass for a result, or come back as a command.
            if f"/{self._base_topic}/" in f"/{wanted}/":
                log.warning("response topic ignored: it lies among the agent's own", topic=wanted)
            else:
                topics.append(wanted)
        return topics
