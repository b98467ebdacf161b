"""Commands on their way to the handler and answers on their way back, off the thread that talks to the broker."""

import contextlib
import queue
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import structlog

from kizu_agent.records import CommandAnswer, CommandRequest, Message
from kizu_agent.stages import Stage

log = structlog.get_logger(__name__)

URGENT = frozenset({"inspect"})
"""Commands with a queue and a thread of their own: a part must not wait for a disk that keeps a setting."""
MOST_ANSWERS = 1000
"""Answers that wait for the broker; the oldest go first."""
_QUEUE_LENGTH = 16
_URGENT_LENGTH = 256
_IDLE_S = 0.5

Handle = Callable[[CommandRequest], CommandAnswer | None]


class Answer(NamedTuple):
    """One message that answers a command, with the correlation data that goes along in MQTT 5."""

    message: Message
    correlation: bytes | None


class CommandLane:
    """Runs `handle` for one command after the other in a thread of its own; `wake` tells that answers are there.

    What `handle` raises is logged, and that command stays unanswered; None is no answer, or one that `answer` takes
    later. A slow handler holds nobody up: commands beyond 16 waiting ones (256 urgent ones) are dropped, and
    `on_dropped` hears their names.
    """

    def __init__(
        self,
        base_topic: str,
        handle: Handle,
        wake: Callable[[], None],
        on_failure: Callable[[], None],
        on_dropped: Callable[[str], None] = lambda _name: None,
    ) -> None:
        self.dropped = 0
        self._base_topic = base_topic
        self._handle = handle
        self._wake = wake
        self._on_dropped = on_dropped
        self._queues: dict[bool, queue.Queue[CommandRequest | None]] = {
            False: queue.Queue(_QUEUE_LENGTH),
            True: queue.Queue(_URGENT_LENGTH),
        }
        self._answers: deque[Answer] = deque(maxlen=MOST_ANSWERS)
        self._stages = [
            Stage("urgent commands" if is_urgent else "commands", partial(self._work, waiting), on_failure)
            for is_urgent, waiting in self._queues.items()
        ]

    def start(self) -> None:
        """Start the threads; idempotent."""
        for stage in self._stages:
            stage.start()

    def stop(self, deadline_s: float) -> None:
        """Let the running command end, at most `deadline_s`."""
        for stage in self._stages:
            stage.stop(0.0)  # first: whoever is woken must not go to sleep again
        for waiting in self._queues.values():
            with contextlib.suppress(queue.Full):  # else it is not asleep
                waiting.put_nowait(None)
        stopped = [stage.stop(deadline_s) for stage in self._stages]
        if not all(stopped):
            log.warning("a command did not end in time")

    @property
    def failure(self) -> BaseException | None:
        """The bug that ended a thread, None while both live."""
        return next((stage.failure for stage in self._stages if stage.failure is not None), None)

    def submit(self, request: CommandRequest) -> None:
        """Queue `request`; never blocks."""
        try:
            self._queues[request.name in URGENT].put_nowait(request)
        except queue.Full:
            self.dropped += 1
            self._on_dropped(request.name)

    def answer(self, request: CommandRequest, answer: CommandAnswer) -> None:
        """Answer a request, from any thread."""
        for topic in self._answer_topics(request):
            message = Message(topic, answer.payload, content_type=answer.content_type)
            self._answers.append(Answer(message, request.correlation))
        self._wake()

    def next_answer(self) -> Answer | None:
        """Give the oldest answer not yet sent, None where there is none."""
        try:
            return self._answers.popleft()
        except IndexError:
            return None

    def _work(self, waiting: "queue.Queue[CommandRequest | None]") -> None:
        try:
            request = waiting.get(timeout=_IDLE_S)
        except queue.Empty:
            return
        if request is None:
            return
        try:
            answer = self._handle(request)
        except Exception:
            log.exception("command failed", command=request.name)
            return
        if answer is not None:
            self.answer(request, answer)

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
