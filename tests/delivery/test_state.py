"""What a subscriber sees that only looks at retained topics."""

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest

from kizu_agent.camera_state import Inspected
from kizu_agent.config import Config
from kizu_agent.records import CameraCondition, CameraStatus, Inspection, ModelId
from kizu_agent.sinks import JsonSink
from kizu_agent.state import StateBoard, Vitals, offline_status

MakeInspection = Callable[..., Inspection]
BASE = "acme/osaka/press/line2/box1"
TOP, STATUS = f"{BASE}/top/state", f"{BASE}/status"


class Broker:
    """Keeps what was published retained, and how often."""

    def __init__(self) -> None:
        self.history: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, topic: str, payload: bytes) -> None:
        self.history.append((topic, json.loads(payload)))

    def __getitem__(self, topic: str) -> dict[str, Any]:
        return [payload for seen, payload in self.history if seen == topic][-1]

    def count(self, topic: str) -> int:
        return sum(seen == topic for seen, _ in self.history)


@pytest.fixture
def broker() -> Broker:
    """What subscribers see."""
    return Broker()


@pytest.fixture
def make_board(config: Config, broker: Broker) -> Callable[[float], StateBoard]:
    """Make a board whose cameras go stale after so many seconds."""

    def make(stale_after_s: float) -> StateBoard:
        cameras = tuple(camera.model_copy(update={"stale_after_s": stale_after_s}) for camera in config.cameras)
        changed = config.model_copy(update={"cameras": cameras})
        return StateBoard(changed, [JsonSink(changed, broker)], "0.1.0", time.time_ns())

    return make


@pytest.fixture
def tick(model: ModelId) -> Callable[..., None]:
    """Tell the board that both cameras run with a model, but for what is said otherwise."""

    def tick(
        board: StateBoard,
        condition: CameraCondition = "running",
        model: ModelId | None = model,
        vitals: Vitals = Vitals("cpu"),  # noqa: B008 - frozen
    ) -> None:
        cause = None if condition in ("running", "idle") else "unreachable"
        drops = {"queue_full": 2, "damaged": 1}
        cameras = [CameraStatus(name, condition, cause, time.time_ns(), 7, 1, drops) for name in ("top", "side")]
        board.tick(cameras, {"top": model, "side": model}, vitals)

    return tick


def inspected(inspection: Inspection, number: int = 1) -> Inspected:
    """An inspection that was committed as result `number`."""
    return Inspected(inspection, f"result-{number}", number, None)


def utc(text: str) -> float:
    """Seconds since the epoch."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc).timestamp()


def test_before_the_first_result_the_verdict_is_unknown(
    make_board: Callable[[float], StateBoard], broker: Broker, tick: Callable[..., None]
) -> None:
    """A camera that just started is unknown, without an end of validity."""
    tick(make_board(5))
    state = broker[TOP]
    assert (state["verdict"], state["reason"], state["valid_until"]) == ("unknown", "starting", None)
    assert (state["condition"], state["score"], state["last_result_id"]) == ("running", None, None)


def test_a_result_shows_at_once_and_is_valid_for_the_stale_time(
    make_board: Callable[[float], StateBoard], broker: Broker, tick: Callable[..., None], inspect: MakeInspection
) -> None:
    """The verdict goes out with the inspection itself; valid_until lies stale_after_s after it."""
    board = make_board(5)
    tick(board)
    board.inspected(inspected(inspect(0.5)))
    state = broker[TOP]
    assert (state["verdict"], state["reason"], state["score"], state["ratio"]) == ("ok", None, 0.5, 0.25)
    assert (state["last_result_id"], state["last_result_seq"]) == ("result-1", 1)
    assert utc(state["valid_until"]) == pytest.approx(time.time() + 5, abs=0.5)
    tick(board)
    counters = broker[TOP]["counters"]
    assert (counters["inspected"], counters["ok"], counters["reject"]) == (1, 1, 0)
    assert (counters["captured"], counters["dropped"], counters["losses"]) == (7, 3, 1)
    assert counters["drop_causes"] == "damaged 1, queue_full 2"


def test_without_new_inspections_the_state_becomes_unknown(
    make_board: Callable[[float], StateBoard], broker: Broker, tick: Callable[..., None], inspect: MakeInspection
) -> None:
    """An ok that nobody renewed turns into unknown, stale; the next inspection brings it back."""
    board = make_board(0.1)
    tick(board)
    board.inspected(inspected(inspect(0.5)))
    time.sleep(0.12)
    tick(board)
    assert (broker[TOP]["verdict"], broker[TOP]["reason"]) == ("unknown", "stale")
    board.inspected(inspected(inspect(0.5)))
    assert broker[TOP]["verdict"] == "ok"


@pytest.mark.parametrize("condition", ["lost", "ended"])
def test_a_camera_that_is_gone_is_unknown_at_once(
    make_board: Callable[[float], StateBoard],
    broker: Broker,
    tick: Callable[..., None],
    inspect: MakeInspection,
    condition: CameraCondition,
) -> None:
    """However fresh its last ok is, and even where an inspection of an earlier frame is still on its way."""
    board = make_board(60)
    tick(board)
    board.inspected(inspected(inspect(0.5)))
    tick(board, condition)
    board.inspected(inspected(inspect(0.5)))
    tick(board, condition)
    assert (broker[TOP]["verdict"], broker[TOP]["reason"]) == ("unknown", f"camera_{condition}")
    assert (broker[TOP]["condition"], broker[TOP]["cause"]) == (condition, "unreachable")


def test_a_camera_that_waits_for_its_trigger_is_unknown_and_no_problem(
    make_board: Callable[[float], StateBoard], broker: Broker, tick: Callable[..., None], inspect: MakeInspection
) -> None:
    """It is idle before its first part and when its last verdict is stale, not sooner; the agent stays online."""
    board = make_board(0.2)
    tick(board, "idle")
    assert (broker[TOP]["verdict"], broker[TOP]["reason"]) == ("unknown", "camera_idle")
    tick(board, "running")
    board.inspected(inspected(inspect(0.5)))
    tick(board, "idle")
    assert broker[TOP]["verdict"] == "ok"
    time.sleep(0.22)
    tick(board, "idle")
    assert (broker[TOP]["verdict"], broker[TOP]["reason"]) == ("unknown", "camera_idle")
    assert (broker[TOP]["condition"], broker[STATUS]["state"]) == ("idle", "online")


def test_losses_are_told_by_their_causes(make_board: Callable[[float], StateBoard], broker: Broker) -> None:
    """Counters name each cause with its number, in one order, and null where there was none."""
    board = make_board(60)
    for causes, told in (({}, None), ({"lost": 2, "hang": 1}, "hang 1, lost 2")):
        losses = sum(causes.values())
        status = CameraStatus("top", "lost", "hang", time.time_ns(), 7, losses, {}, causes)
        board.tick([dataclasses.replace(status, condition="running" if told is None else "lost")], {}, Vitals("cpu"))
        assert (broker[TOP]["counters"]["losses"], broker[TOP]["counters"]["loss_causes"]) == (losses, told)


def test_without_a_model_the_state_is_unknown(
    make_board: Callable[[float], StateBoard], broker: Broker, tick: Callable[..., None], inspect: MakeInspection
) -> None:
    """A model that goes away takes its verdict with it."""
    board = make_board(60)
    tick(board)
    board.inspected(inspected(inspect(0.5)))
    tick(board, model=None)
    assert (broker[TOP]["verdict"], broker[TOP]["reason"]) == ("unknown", "model_missing")
    assert broker[TOP]["model"] == {"name": None, "version": None, "sha256": None}


def test_the_model_shown_is_the_one_that_gave_the_verdict(
    make_board: Callable[[float], StateBoard],
    broker: Broker,
    tick: Callable[..., None],
    inspect: MakeInspection,
    model: ModelId,
) -> None:
    """After a swap the state shows the old model until a frame was judged by the new one."""
    board, newer = make_board(60), ModelId("gears", "2", "cd" * 32)
    tick(board, model=model)
    board.inspected(inspected(inspect(0.5)))
    tick(board, model=newer)
    assert (broker[TOP]["model"]["version"], broker[STATUS]["cameras"]["top"]["model"]["version"]) == ("1", "2")
    board.inspected(inspected(dataclasses.replace(inspect(0.5), model=newer)))
    assert broker[TOP]["model"]["version"] == "2"


def test_while_results_flow_valid_until_never_lies_in_the_past_and_few_states_go_out(
    make_board: Callable[[float], StateBoard], broker: Broker, tick: Callable[..., None], inspect: MakeInspection
) -> None:
    """Fifty results in half a second with a stale time of 0.15 s: about ten heartbeats, each renewed in time."""
    board = make_board(0.15)
    tick(board)
    before = broker.count(TOP)
    for number in range(50):
        board.inspected(inspected(inspect(0.5), number))
        assert utc(broker[TOP]["valid_until"]) > time.time()
        time.sleep(0.01)
    assert 5 <= broker.count(TOP) - before <= 15


def test_every_change_of_verdict_goes_out_and_since_tells_when(
    make_board: Callable[[float], StateBoard], broker: Broker, tick: Callable[..., None], inspect: MakeInspection
) -> None:
    """ok, ok, reject, unknown, ok: four states; `since` stays while the verdict stays."""
    board = make_board(60)
    tick(board)
    before = broker.count(TOP)
    for score in (0.1, 0.2, 3.0, math.nan, 0.1):
        time.sleep(0.002)
        board.inspected(inspected(inspect(score)))
    states = [payload for topic, payload in broker.history if topic == TOP][before:]
    assert [state["verdict"] for state in states] == ["ok", "reject", "unknown", "ok"]
    assert states[2]["reason"] == "scoring failed"
    assert len({state["since"] for state in states}) == 4


def test_at_the_end_every_camera_is_unknown_and_the_agent_offline(
    make_board: Callable[[float], StateBoard], broker: Broker, tick: Callable[..., None], inspect: MakeInspection
) -> None:
    """Nothing that comes later makes a stopped agent's camera look ok."""
    board = make_board(60)
    tick(board)
    board.inspected(inspected(inspect(0.5)))
    board.stop()
    board.inspected(inspected(inspect(0.5)))
    tick(board)
    board.stop()
    for camera in ("top", "side"):
        state = broker[f"{BASE}/{camera}/state"]
        assert (state["verdict"], state["reason"], state["condition"]) == ("unknown", "stopped", "unknown")
    assert (broker[STATUS]["state"], broker[STATUS]["reason"]) == ("offline", "stopped")
    assert board.status().state == "offline"


def test_status_says_what_degrades_the_agent(
    make_board: Callable[[float], StateBoard], broker: Broker, tick: Callable[..., None]
) -> None:
    """Lost cameras, missing models, a weaker provider, losses and other problems are counted and put into words."""
    board = make_board(5)
    tick(board)
    assert (broker[STATUS]["state"], broker[STATUS]["reason"]) == ("online", None)
    tick(
        board,
        "lost",
        None,
        Vitals(
            "cpu",
            is_provider_degraded=True,
            outbox_losses=Counter({("bytes", "ok"): 2, ("age", "warn"): 1}),
            problems=("disk full",),
        ),
    )
    status = broker[STATUS]
    assert status["state"] == "degraded"
    for words in ("camera top lost (unreachable)", "camera side has no model", "gave up 3 messages", "disk full"):
        assert words in status["reason"]
    assert status["problems"] == {
        "cameras_lost": 2,
        "models_missing": 2,
        "provider_degraded": True,
        "outbox_losing": True,
        "certificates_expiring": 0,
        "other": 1,
    }
    outbox = status["outbox"]
    assert (outbox["losses"], outbox["lost_by_cause"]["bytes"], outbox["lost_by_kind"]["warn"]) == (3, 2, 1)
    assert utc(status["valid_until"]) > time.time() + 20


def test_status_says_what_is_being_compiled(
    make_board: Callable[[float], StateBoard], broker: Broker, tick: Callable[..., None]
) -> None:
    """The file's name at once when it begins, null when it is over; it is no problem, for the old model goes on."""
    board = make_board(5)
    seen = []
    for building in (None, "plates-2.kizu", None):
        tick(board, vitals=Vitals("tensorrt", building=building))
        seen.append((broker[STATUS]["provider"]["building"], broker[STATUS]["state"]))
    assert seen == [(None, "online"), ("plates-2.kizu", "online"), (None, "online")]
    assert broker.count(STATUS) == 3


def test_status_goes_out_on_change_and_not_at_every_tick(
    make_board: Callable[[float], StateBoard], broker: Broker, tick: Callable[..., None]
) -> None:
    """Ticks without news publish nothing before the heartbeat is due."""
    board = make_board(5)
    for messages in range(5):
        tick(board, vitals=Vitals("cpu", outbox_messages=messages))
    assert broker.count(STATUS) == 1
    tick(board, "lost")
    tick(board)
    assert broker.count(STATUS) == 3


def test_states_and_status_never_change_their_shape(
    config: Config,
    make_board: Callable[[float], StateBoard],
    broker: Broker,
    tick: Callable[..., None],
    inspect: MakeInspection,
) -> None:
    """From start over verdicts and losses to the end, and in the last will, keys are the same in the same order."""
    board = make_board(60)
    tick(board, "starting", None)
    tick(board)
    for score in (0.1, 3.0, math.nan):
        board.inspected(inspected(inspect(score)))
    tick(board, "lost")
    board.stop()
    statuses = [payload for topic, payload in broker.history if topic == STATUS]
    statuses.append(json.loads(offline_status(config, "0.1.0", time.time_ns())))
    states = [payload for topic, payload in broker.history if topic == TOP]
    for payloads in (statuses, states):
        assert len(payloads) >= 4
        assert len({str(keys(payload)) for payload in payloads}) == 1


def keys(value: object) -> object:
    """The keys of JSON data, nested as they are."""
    return {key: keys(item) for key, item in value.items()} if isinstance(value, dict) else None
