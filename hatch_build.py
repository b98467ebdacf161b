"""Compiles the Sparkplug B schema when a wheel or an editable installation is built (docs/decisions/0018)."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROTO = Path("agent/kizu_agent/sparkplug/sparkplug_b.proto")


def compile_schema(proto: Path, target: Path) -> None:
    """Write the serialized FileDescriptorSet of `proto` to `target`. Raises RuntimeError where protoc refuses it."""
    from grpc_tools import protoc  # noqa: PLC0415 - so that the compiler is needed for compiling only

    arguments = ["protoc", f"--proto_path={proto.parent}", f"--descriptor_set_out={target}", str(proto)]
    if protoc.main(arguments) != 0:
        raise RuntimeError(f"protoc cannot compile {proto}")


class SchemaHook(BuildHookInterface):  # type: ignore[type-arg]  # the configuration is of no interest here
    """Puts `sparkplug_b.binpb` beside the .proto, and with it into the wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the files are gathered; `version` is `standard` or `editable`."""
        del version
        proto = Path(self.root) / PROTO
        target = proto.with_suffix(".binpb")
        compile_schema(proto, target)
        build_data["artifacts"].append(str(target.relative_to(self.root)))
