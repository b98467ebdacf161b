"""The command `snapshot`: the newest picture of a camera as a JPEG beside the heatmaps, and where it is."""

import hashlib
import uuid
from collections.abc import Callable, Mapping
from typing import Annotated

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kizu_agent.answers import SnapshotAnswer
from kizu_agent.commands import Command
from kizu_agent.delivery import JPEG, with_comment
from kizu_agent.encoding import utc_text
from kizu_agent.errors import CommandError, OutboxError, unknown_camera
from kizu_agent.payloads import HeatmapPart
from kizu_agent.records import Frame, Message, Priority
from kizu_agent.requests import Request
from kizu_agent.topics import Topics

Newest = Callable[[], Frame | None]
Put = Callable[[list[Message]], object]


class SnapshotRequest(Request):
    """Publish the newest picture of `camera`, made smaller to `width_px` where it is wider."""

    camera: Annotated[str, Field(min_length=1, max_length=64)]
    width_px: Annotated[int, Field(ge=16, le=8192)] = 1920
    quality: Annotated[int, Field(ge=1, le=100)] = 85


def snapshot_command(
    topics: Topics, newest: Mapping[str, Newest], put: Put, expiry_s: int
) -> Command[SnapshotRequest, SnapshotAnswer]:
    """The command on the pictures that `newest` gives by camera; `put` takes the message."""
    snapshots = _Snapshots(topics, newest, put, expiry_s)
    return Command("snapshot", SnapshotRequest, SnapshotAnswer, snapshots.carry_out, is_kept=True)


class _Snapshots:
    def __init__(self, topics: Topics, newest: Mapping[str, Newest], put: Put, expiry_s: int) -> None:
        self._topics, self._newest, self._put, self._expiry_s = topics, newest, put, expiry_s

    def carry_out(self, request: SnapshotRequest, answer: SnapshotAnswer) -> SnapshotAnswer:
        """Answer `request`. Raises CommandError, and then nothing was published."""
        if request.camera not in self._newest:
            raise unknown_camera(request.camera, self._newest)
        frame = self._newest[request.camera]()
        if frame is None:
            raise CommandError("no_picture", f"camera {request.camera} has given no picture since the agent started")
        part, jpeg = self._encode(frame, request)
        message = Message(part.topic or "", jpeg, 1, False, JPEG, self._expiry_s, Priority.HEATMAP)  # noqa: FBT003
        try:
            self._put([message])
        except OutboxError as exc:
            raise CommandError("failed", f"the picture cannot be kept for the broker: {exc}") from exc
        captured_at = utc_text(frame.captured_ns)
        return answer.model_copy(
            update={"camera": frame.camera, "frame": frame.number, "captured_at": captured_at, "snapshot": part}
        )

    def _encode(self, frame: Frame, request: SnapshotRequest) -> tuple[HeatmapPart, bytes]:
        picture = _narrowed(frame.image, request.width_px)
        if picture.ndim == 3 and picture.shape[2] == 3:
            picture = np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), np.uint8)
        name = str(uuid.uuid4())
        encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, request.quality])[1].tobytes()
        jpeg = with_comment(encoded, f"kizu snapshot {name}")
        part = HeatmapPart(
            topic=self._topics.snapshot(frame.camera),
            id=name,
            width=picture.shape[1],
            height=picture.shape[0],
            bytes=len(jpeg),
            sha256=hashlib.sha256(jpeg).hexdigest(),
            content_type=JPEG,
        )
        return part, jpeg


def _narrowed(image: NDArray[np.uint8], width_px: int) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    if width <= width_px:
        return image
    size = (width_px, max(1, round(height * width_px / width)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
