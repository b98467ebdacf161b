"""Every MQTT topic of an agent; docs/mqtt.md lists them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topics:
    """Every topic of the agent `agent` below the plant's path `prefix`; no payload topic lies under another."""

    prefix: str
    agent: str

    @property
    def base(self) -> str:
        """What all JSON topics begin with."""
        return f"{self.prefix}/{self.agent}"

    @property
    def status(self) -> str:
        """Retained: the agent itself; its last will goes here too."""
        return f"{self.base}/status"

    def state(self, camera: str) -> str:
        """Retained: the present verdict of `camera`."""
        return f"{self.base}/{camera}/state"

    def result(self, camera: str) -> str:
        """One message an inspection of `camera`."""
        return f"{self.base}/{camera}/result"

    def event(self, camera: str) -> str:
        """Open, update and close of the anomalies of `camera`."""
        return f"{self.base}/{camera}/event"

    def heatmap(self, camera: str) -> str:
        """Raw JPEG, beside the JSON topics so that no SCADA makes tags of it."""
        return f"image/{self.base}/{camera}/heatmap"

    @property
    def model(self) -> str:
        """What became of a dropped or stored model."""
        return f"{self.base}/model"

    def snapshot(self, camera: str) -> str:
        """Raw JPEG of a whole picture, sent when asked for."""
        return f"image/{self.base}/{camera}/snapshot"

    @property
    def product(self) -> str:
        """Retained: which product runs."""
        return f"{self.base}/product"

    @property
    def audit(self) -> str:
        """What commands changed."""
        return f"{self.base}/audit"

    def command(self, name: str) -> str:
        """Where the command `name` is awaited."""
        return f"{self.base}/cmd/{name}"

    def response(self, name: str) -> str:
        """Where the command `name` is answered."""
        return f"{self.base}/response/{name}"
