"""Schema 1: read strictly, written canonically."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kizu_contract.errors import ManifestError
from kizu_contract.manifest import MAX_MANIFEST_BYTES, Manifest
from kizu_contract.tiles import FrameSize

OPEN = ("recipe", "metrics")
"""Objects whose keys the schema leaves open."""

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def places(raw: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON document, as a path of keys and indices."""
    if path:
        yield path
    items = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def changed(manifest: Manifest, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> bytes:
    raw = json.loads(manifest.to_json())
    at = raw
    for key in path[:-1]:
        at = at[key]
    change(at, path[-1])
    return json.dumps(raw).encode()


def refusal(data: bytes) -> str:
    with pytest.raises(ManifestError) as caught:
        Manifest.from_json(data)
    return str(caught.value)


def test_a_manifest_comes_back_as_it_was_written(manifest: Manifest) -> None:
    """Reading what was written gives the same manifest, and writing that gives the same bytes."""
    data = manifest.to_json()
    assert Manifest.from_json(data) == manifest
    assert Manifest.from_json(data).to_json() == data
    assert "傷".encode() in data


def test_no_key_may_be_missing(manifest: Manifest) -> None:
    """Every key that the schema names is needed, and its absence is reported by name."""
    paths = [path for path in places(json.loads(manifest.to_json())) if isinstance(path[-1], str)]
    named = [path for path in paths if not any(part in OPEN for part in path[:-1])]
    assert len(named) > 35
    for path in named:
        assert path[-1] in refusal(changed(manifest, path, lambda at, key: at.pop(key)))


def test_the_frame_may_be_absent(manifest: Manifest) -> None:
    """Manifests without a frame read as before, byte by byte; a frame is written, read back, bounded and never null."""
    assert "frame" not in json.loads(manifest.to_json())
    placed = replace(manifest, frame=FrameSize(48, 64))
    assert Manifest.from_json(placed.to_json()) == placed
    assert "frame" in refusal(changed(placed, ("frame",), lambda at, key: at.__setitem__(key, None)))
    for side in (0, -1, 2**40):
        assert "frame" in refusal(
            changed(placed, ("frame", "width"), lambda at, key, side=side: at.update({key: side}))
        )
    assert "width" in refusal(changed(placed, ("frame", "width"), lambda at, key: at.pop(key)))


def test_a_frame_of_another_size_does_not_fit(manifest: Manifest) -> None:
    """A model that knows one size of frames says so, and why another cannot be judged."""
    placed = replace(manifest, frame=FrameSize(48, 64))
    assert placed.misfit(48, 64) is None
    assert "64 × 48 pixels; model plates knows each place of frames of 48 × 64" in str(placed.misfit(64, 48))
    assert manifest.misfit(64, 48) is None


def test_no_key_may_be_added_or_renamed(manifest: Manifest) -> None:
    """An unknown key is refused at every level: a typing error cannot pass as a default."""
    named = [path for path in places(json.loads(manifest.to_json())) if isinstance(path[-1], str)]
    for path in named:
        if any(part in OPEN for part in path[:-1]):
            continue
        assert "extra" in refusal(changed(manifest, path, lambda at, _key: at.update(extra=1)))
        assert "missing" in refusal(changed(manifest, path, lambda at, key: at.update({f"{key}_": at.pop(key)})))


@pytest.mark.parametrize("value", [None, True, "", "x", [], {}, [[]], -1, 1.5, 2**62])
def test_no_value_may_change_its_type(manifest: Manifest, value: object) -> None:
    """A retyped value is either refused or of the field's own type: nothing is converted."""
    for path in places(json.loads(manifest.to_json())):
        if "recipe" in path:
            continue
        data = changed(manifest, path, lambda at, key: at.__setitem__(key, value))
        try:
            read = Manifest.from_json(data)
        except ManifestError:
            continue
        assert json.loads(read.to_json()) == json.loads(data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(data=st.data(), value=json_values)
def test_anything_in_any_place_is_refused_or_kept(manifest: Manifest, data: st.DataObject, value: object) -> None:
    """Whatever JSON value stands anywhere, reading raises ManifestError or gives a manifest that can be written."""
    path = data.draw(st.sampled_from(list(places(json.loads(manifest.to_json())))))
    try:
        read = Manifest.from_json(changed(manifest, path, lambda at, key: at.__setitem__(key, value)))
    except ManifestError:
        return
    assert Manifest.from_json(read.to_json()) == read


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(data=st.binary(max_size=200) | st.text().map(str.encode) | json_values.map(lambda v: json.dumps(v).encode()))
def test_garbage_is_refused(data: bytes) -> None:
    """Bytes that are no manifest raise ManifestError and nothing else."""
    refusal(data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(at=st.integers(0), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_read(manifest: Manifest, at: int, bit: int) -> None:
    """A damaged manifest raises ManifestError and nothing else."""
    damaged = bytearray(manifest.to_json())
    damaged[at % len(damaged)] ^= 1 << bit
    try:
        Manifest.from_json(bytes(damaged))
    except ManifestError:
        return


def test_whole_numbers_and_booleans_are_not_mixed(manifest: Manifest) -> None:
    """`true` is no 1, and 1.0 no whole number; a whole number does for a float."""

    def put(value: object) -> Callable[[Any, Any], None]:
        return lambda at, key: at.__setitem__(key, value)

    refusal(changed(manifest, ("schema",), put(True)))  # noqa: FBT003 - the point of the test
    refusal(changed(manifest, ("schema",), put(1.0)))
    refusal(changed(manifest, ("reduction", "smooth_sigma_px"), put(False)))  # noqa: FBT003 - the point of the test
    read = Manifest.from_json(changed(manifest, ("reduction", "smooth_sigma_px"), put(2)))
    assert isinstance(read.reduction.smooth_sigma_px, float)


@pytest.mark.parametrize(
    "text", ["NaN", "Infinity", "-Infinity", "1e400", "1" * 30, "1" * 5000, "-9223372036854775809"]
)
@pytest.mark.parametrize("place", ["beta", "seed"])
def test_numbers_that_others_cannot_hold_are_refused(manifest: Manifest, text: str, place: str) -> None:
    """No NaN, no infinity, no integer beyond 64 bits, in named fields and in the open ones."""
    raw = manifest.to_json().decode()
    data = raw.replace('"beta": 1.0', f'"beta": {text}') if place == "beta" else raw.replace("7,", f"{text},")
    assert data != raw
    assert len(refusal(data.encode())) < 400


def test_a_key_that_stands_twice_is_refused(manifest: Manifest) -> None:
    """Two readers could take two values from it."""
    raw = manifest.to_json().decode()
    assert "twice" in refusal(raw.replace('"seed": 7', '"seed": 7, "seed": 8').encode())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "latin-1"])
def test_only_utf8_is_read(manifest: Manifest, encoding: str) -> None:
    """The manifest is UTF-8 without a byte order mark."""
    name = "ü" if encoding == "latin-1" else "傷"
    refusal(manifest.to_json().decode().replace("傷", name).encode(encoding))


def test_a_lone_surrogate_is_refused(manifest: Manifest) -> None:
    """A string that nothing downstream could encode does not come in."""
    refusal(manifest.to_json().replace("傷".encode(), b"\\ud83d"))


@pytest.mark.parametrize("depth", [40, 5_000, 200_000])
def test_deep_nesting_is_refused(manifest: Manifest, depth: int) -> None:
    """Nesting beyond any recipe raises ManifestError, not RecursionError."""
    refusal(manifest.to_json().replace(b'"off": null', b'"off": ' + b"[" * depth + b"]" * depth))


def test_a_huge_manifest_is_refused_before_parsing(manifest: Manifest) -> None:
    """One byte over the limit is refused by its size."""
    assert "at most" in refusal(manifest.to_json() + b" " * MAX_MANIFEST_BYTES)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "../evil"),
        ("name", "a" * 65),
        ("name", ""),
        ("name", "a\n"),
        ("version", "1 0"),
        ("created", "2026-01-31T12:00:00Z"),
        ("created", "2026-13-31T12:00:00.000Z"),
        ("created", "2026-01-31T12:00:00.000Z\n"),
        ("created", "２０２６-01-31T12:00:00.000Z"),
        ("schema", 2),
        ("colour", "bgr"),
    ],
)
def test_values_that_do_not_fit_are_refused(manifest: Manifest, key: str, value: object) -> None:
    """Names, versions, times and choices follow their patterns to the last character."""
    assert key in refusal(changed(manifest, (key,), lambda at, place: at.__setitem__(place, value)))


def test_parts_that_contradict_each_other_are_refused(manifest: Manifest) -> None:
    """Grid, colour and graph must describe the same tiles."""
    with pytest.raises(ValueError, match="differs from the graph's"):
        replace(manifest, grid=replace(manifest.grid, tile_px=8))
    with pytest.raises(ValueError, match="does not fit a graph"):
        replace(manifest, colour="rgb")
    with pytest.raises(ValueError, match="must divide"):
        replace(manifest.graph, map_cell_px=3)
    with pytest.raises(ValueError, match="must rise"):
        replace(manifest.graph.batch, min=9)
    with pytest.raises(ValueError, match="opset"):
        replace(manifest.graph, opset=0)
    with pytest.raises(ValueError, match="false alarm rates"):
        replace(manifest.thresholds, reject_rate=0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), {1, 2}, "\ud800"])
def test_what_cannot_be_written_is_refused(manifest: Manifest, value: Any) -> None:
    """Writing a metric that is no number raises ManifestError that names the manifest."""
    broken = replace(manifest, provenance=replace(manifest.provenance, metrics={"image_auroc": value}))
    with pytest.raises(ManifestError, match="plates"):
        broken.to_json()
