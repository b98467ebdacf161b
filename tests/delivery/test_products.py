"""Which product runs, what judges for it, and the command that sets it."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kizu_agent.camera_settings import CameraConfig, ThresholdRates
from kizu_agent.commands import Commands
from kizu_agent.config import Config
from kizu_agent.errors import CommandError, ModelError
from kizu_agent.product_command import product_command
from kizu_agent.product_settings import ProductConfig
from kizu_agent.products import ProductBook, Running
from kizu_agent.records import CommandRequest, Inspection, ModelId, Part, Trigger
from kizu_agent.slot_names import NO_SLOT, route
from kizu_agent.thresholds import ThresholdBook
from kizu_contract.manifest import Manifest

SHA256 = "ab" * 32
CAMERAS = (CameraConfig(name="top", source="sim:gears"), CameraConfig(name="side", source="sim:gears", model="own"))
RATES = ThresholdRates(warn_rate=0.05, reject_rate=0.02)
PRODUCTS = (
    ProductConfig(name="a", model="gears"),
    ProductConfig(name="b", model="bolts", version="3", cameras=("top",), thresholds=RATES),
)


@pytest.fixture
def book(tmp_path: Path) -> ProductBook:
    """A book without anything set."""
    return ProductBook(tmp_path, PRODUCTS, CAMERAS)


def test_a_product_decides_slot_and_rates_of_its_cameras(book: ProductBook) -> None:
    """Named cameras judge by the product, the others as configured, and all as configured while none runs."""
    assert [book.slot_now(camera) for camera in ("top", "side")] == [None, "own"]
    book.set("b", "L1")
    assert [book.slot_now(camera) for camera in ("top", "side")] == ["bolts@3", "own"]
    assert (book.rates("top", "b"), book.rates("side", "b")) == (RATES, None)
    book.set("a", None)
    assert [book.slot_now(camera) for camera in ("top", "side")] == ["gears", "gears"]
    assert book.slots == {None, "own", "gears", "bolts@3"}


def test_what_runs_survives_a_restart(book: ProductBook, tmp_path: Path) -> None:
    """A new book on the same folder knows product and batch."""
    book.set("a", "L7")
    running = ProductBook(tmp_path, PRODUCTS, CAMERAS).running
    assert (running.product, running.batch, running.is_known) == ("a", "L7", True)


@pytest.mark.parametrize("left", [b'{"schema_version":1,"product":"gone","batch":null,"since":"x"}', b"{nonsense"])
def test_a_product_that_is_not_known_is_not_guessed(tmp_path: Path, left: bytes) -> None:
    """Where the configuration lost the product, or the disk its name, no model may judge until one is set."""
    (tmp_path / "product.json").write_bytes(left)
    book = ProductBook(tmp_path, PRODUCTS, CAMERAS)
    assert book.problem is not None
    assert [book.slot_now(camera) for camera in ("top", "side")] == [NO_SLOT, NO_SLOT]
    book.set("a", None)
    assert (book.problem, book.slot_now("top")) == (None, "gears")


def test_a_frame_belongs_to_what_ran_when_it_was_captured(
    book: ProductBook, inspect: Callable[..., Inspection]
) -> None:
    """A frame that waited for its inspection during a change is judged by the product before it."""
    book.set("a", "L1")
    frame = inspect().frame
    book.set("b", "L2")
    later = inspect().frame
    marked, slot = book.mark(frame)
    assert (marked.part, slot) == (Part(None, "L1", "a"), "gears")
    marked, slot = book.mark(later)
    assert (marked.part, slot) == (Part(None, "L2", "b"), "bolts@3")
    trigger = Trigger(1, "top", None, Part("p9", "own batch"), frame.captured_mono_ns)
    marked, slot = book.mark(dataclasses.replace(later, trigger=trigger))
    assert (marked.part, slot) == (Part("p9", "own batch", "a"), "gears")


def test_what_the_disk_refuses_does_not_run(tmp_path: Path) -> None:
    """A product that cannot be kept is not set, and an unknown one neither."""
    book = ProductBook(tmp_path / "gone", PRODUCTS, CAMERAS)
    with pytest.raises(OSError, match="No such file"):
        book.set("a", None)
    with pytest.raises(CommandError, match="there are: a, b"):
        book.set("x", None)
    assert book.running.product is None


def test_a_pin_is_a_slot_of_its_own() -> None:
    """A version, and a hash, make another slot than the bare name."""
    pins = ("3", "sha256:abababab", None)
    slots = [ProductConfig(name="p", model="gears", version=pin).slot for pin in pins]
    assert slots == ["gears@3", "gears#abababab", "gears"]


def test_models_go_to_the_most_particular_slot() -> None:
    """Hash before version before name before any."""
    slots = [None, "gears", "gears@3", "gears#abab", "gears#ababab"]
    assert route(ModelId("gears", "3", SHA256), slots) == "gears#ababab"
    assert route(ModelId("gears", "3", "cd" * 32), slots) == "gears@3"
    assert route(ModelId("gears", "4", "cd" * 32), slots) == "gears"
    assert route(ModelId("bolts", "4", "cd" * 32), slots) is None
    with pytest.raises(ModelError, match="ask for gears"):
        route(ModelId("bolts", "4", "cd" * 32), ["gears"])


def test_thresholds_of_a_product_are_its_own(tmp_path: Path, manifest: Manifest) -> None:
    """The product's rates judge while it runs; what a command sets for it holds for no other, over restarts too."""
    products = ProductBook(tmp_path, PRODUCTS, CAMERAS)
    book = ThresholdBook(tmp_path, CAMERAS, products.rates)
    wanted = manifest.calibration.thresholds(0.05, 0.02)
    assert book.describe("top", manifest, SHA256, "b").origin == "product"
    assert book.get("top", manifest, SHA256, "b") == wanted
    assert book.describe("top", manifest, SHA256, "a").origin == "bundle"
    other = ThresholdRates(warn_rate=0.1, reject_rate=0.01)
    book.set("top", other, manifest, SHA256, "a")
    again = ThresholdBook(tmp_path, CAMERAS, products.rates)
    for known in (book, again):
        assert known.describe("top", manifest, SHA256, "a").origin == "command"
        assert known.get("top", manifest, SHA256, "b") == wanted
        assert known.describe("top", manifest, SHA256).origin == "bundle"
    book.reset("top", "a")
    assert book.describe("top", manifest, SHA256, "a").origin == "bundle"


Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def changes() -> list[Running]:
    """What the command told of changes."""
    return []


@pytest.fixture
def ask(book: ProductBook, changes: list[Running]) -> Ask:
    """Send the command `product`; only the model of product `a`, and the cameras' own, are there."""
    models = {slot: ModelId(slot or "any", "1", SHA256) for slot in (None, "own", "gears")}
    commands = Commands("box1", (product_command(book, {"top": 0, "side": 0}, models.get, changes.append),))

    def ask(payload: dict[str, Any]) -> dict[str, Any]:
        handled = commands.handle(CommandRequest("product", json.dumps(payload).encode()))
        assert handled is not None
        answer: dict[str, Any] = json.loads(handled.payload)
        return answer

    return ask


def test_the_command_sets_and_tells(ask: Ask, changes: list[Running]) -> None:
    """A product with its batch, a new batch of it, none again: each answer has old, new and the models."""
    answer = ask({"product": "a", "batch": "L1"})
    assert (answer["old"]["product"], answer["new"]["product"], answer["new"]["batch"]) == (None, "a", "L1")
    assert [camera["model"]["name"] for camera in answer["cameras"]] == ["gears", "gears"]
    assert ask({"batch": "L2"})["new"] | {"since": None} == {"product": "a", "batch": "L2", "since": None}
    assert ask({})["new"]["batch"] == "L2"
    assert ask({"product": None})["new"]["product"] is None
    assert [change.batch for change in changes] == ["L1", "L2", None]


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        ({"product": "b"}, "no_model"),
        ({"product": "x"}, "unknown_product"),
        ({"product": ""}, "invalid"),
        ({"product": "a", "action": "get"}, "invalid"),
        ({"action": "set"}, "invalid"),
        ({"batch": "a\nb"}, "invalid"),
    ],
)
def test_what_is_refused_changes_nothing(ask: Ask, book: ProductBook, payload: dict[str, Any], code: str) -> None:
    """A product without its model, or one that is none, leaves everything as it was."""
    before = book.running
    answer = ask(payload)
    assert (answer["ok"], answer["error"]["code"]) == (False, code)
    assert book.running is before


@pytest.mark.parametrize(
    ("products", "words"),
    [
        ([{"name": "a", "model": "m", "cameras": ["nowhere"]}], "there is no camera nowhere"),
        ([{"name": "a", "model": "m"}, {"name": "a", "model": "n", "cameras": ["top"]}], "given twice for camera top"),
        ([{"name": "a", "model": "m", "version": "sha256:xyz"}], "version"),
        ([{"name": f"p{n}", "model": f"m{n}"} for n in range(9)], "models.max_loaded is 8"),
    ],
)
def test_tables_that_make_no_sense_are_refused(config: Config, products: list[dict[str, Any]], words: str) -> None:
    """The configuration says what is wrong with its products."""
    with pytest.raises(ValueError, match=words):
        Config.model_validate({**dict(config), "products": products})


def test_history_is_bounded_and_the_oldest_holds_for_what_is_older(book: ProductBook) -> None:
    """A frame older than all that is remembered belongs to the first of it."""
    long_ago = time.monotonic_ns() - 10**9
    for number in range(300):
        book._history.append(Running("a", str(number), "x", time.monotonic_ns()))
    assert len(book._history) == 256
    assert book.at(long_ago).batch == "44"
