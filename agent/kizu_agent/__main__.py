"""The `kizu-agent` command line. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 cannot start."""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kizu_agent.errors import ConfigError
from kizu_contract.errors import KizuError

DEFAULT_CONFIG = Path("/etc/kizu/agent.toml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code; a command imports what it needs only when it is used."""
    parser = _parser()
    options = parser.parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except BrokenPipeError:  # the reader of our output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ConfigError as exc:
        print(f"kizu-agent: {exc}", file=sys.stderr)
        return 3
    except (KizuError, OSError) as exc:
        print(f"kizu-agent: {exc}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as exc:
        if exc.name != "onnxruntime":
            raise
        print(
            "kizu-agent: onnxruntime is not installed: pip install 'kizu[cpu]', 'kizu[gpu]' or 'kizu[openvino]'",
            file=sys.stderr,
        )
        return 3
    except KeyboardInterrupt:
        print("kizu-agent: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kizu-agent", description="Inspect camera frames at the edge; tell over MQTT."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('kizu')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="run the service")
    run.add_argument(
        "--config", type=Path, default=DEFAULT_CONFIG, metavar="FILE", help="TOML file (default: %(default)s)"
    )
    run.add_argument("--until-ended", action="store_true", help="stop when every camera has come to its end")
    run.set_defaults(command=_run)

    check = commands.add_parser("check", help="try configuration, cameras, broker and models; say what is wrong")
    check.add_argument(
        "--config", type=Path, default=DEFAULT_CONFIG, metavar="FILE", help="TOML file (default: %(default)s)"
    )
    check.set_defaults(command=_check)

    score = commands.add_parser("score", help="score pictures with a bundle, without any service")
    score.add_argument("bundle", type=Path, metavar="FILE.kizu")
    score.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="pictures, or folders of pictures")
    score.add_argument("--json", metavar="FILE", help="one JSON object a line, to FILE or - for standard output")
    score.add_argument("--maps", type=Path, metavar="DIR", help="write each map as float32 .npy of the picture's size")
    score.add_argument(
        "--provider", choices=("cpu", "cuda", "tensorrt", "openvino"), default="cpu", help="what runs it (default: cpu)"
    )
    score.set_defaults(command=_score)

    integrate = commands.add_parser("integrate", help="write what a SCADA, flow engine or database needs to take it in")
    integrate.add_argument("end", choices=("ignition", "node-red", "telegraf", "schemas"), help="for what")
    integrate.add_argument(
        "--config", type=Path, default=DEFAULT_CONFIG, metavar="FILE", help="TOML file (default: %(default)s)"
    )
    integrate.add_argument(
        "--out", type=Path, metavar="PATH", help="file, for schemas a folder (default: standard output)"
    )
    integrate.set_defaults(command=_integrate)

    zones = commands.add_parser("zones", help="make a page on which zones are drawn over a reference picture")
    zones.add_argument("picture", type=Path, metavar="PICTURE", help="a picture of the camera, at its full size")
    zones.add_argument("--config", type=Path, metavar="FILE", help="TOML file: begin with the zones of its camera")
    zones.add_argument("--camera", metavar="NAME", help="which camera; needed where there are several")
    zones.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="the page; open it in a browser")
    zones.set_defaults(command=_zones)

    demo = commands.add_parser("demo", help="train, export and inspect a simulated line in front of your eyes")
    demo.add_argument(
        "--seconds", type=float, metavar="S", help="let the line run this long, then sum up (default: until Ctrl-C)"
    )
    demo.add_argument(
        "--out", type=Path, default=Path("demo-out"), metavar="DIR", help="folder to work in (default: %(default)s)"
    )
    demo.add_argument("--part", choices=("plates", "gears", "screws"), default="plates", help="what the line makes")
    demo.set_defaults(command=_demo)
    return parser


@contextmanager
def _uncollected() -> Iterator[None]:
    """Import in the block without looking for garbage: there is little, and looking takes an eighth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Let an optional import of `module` fail in the block, where it has not been imported yet."""
    hidden: dict[str, Any] = {} if module in sys.modules else {module: None}
    sys.modules.update(hidden)
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _run(options: argparse.Namespace) -> int:
    from kizu_agent.threads import budget, limit

    # structlog imports rich where it can, for traces in colour: a tenth of a start, and memory, that no service needs.
    with _uncollected(), _without("rich"):
        limit()
        from kizu_agent.config import load_config
        from kizu_agent.supervisor import configure_logging, run

    config = load_config(options.config)
    limit(budget(config.engine.provider).opencv)
    configure_logging(config.agent)
    return run(config, until_ended=options.until_ended)


def _check(options: argparse.Namespace) -> int:
    from kizu_agent.check import check
    from kizu_agent.config import load_config
    from kizu_agent.supervisor import configure_logging

    config = load_config(options.config)
    configure_logging(config.agent)
    return check(config, options.config)


def _score(options: argparse.Namespace) -> int:
    from kizu_agent.threads import budget, limit

    limit(budget(options.provider).opencv)
    from kizu_agent.score import score_command

    return score_command(options.bundle, options.paths, options.json, options.maps, options.provider)


def _integrate(options: argparse.Namespace) -> int:
    from kizu_agent.integration.ends import write_end, write_schemas

    if options.end == "schemas":
        write_schemas(options.out)
        return 0
    from kizu_agent.config import load_config
    from kizu_agent.integration.site import Site

    write_end(options.end, Site.of(load_config(options.config)), options.out)
    return 0


def _zones(options: argparse.Namespace) -> int:
    from kizu_agent.config import load_config
    from kizu_agent.zone_editor import write_zone_page

    config = None if options.config is None else load_config(options.config)
    write_zone_page(config, options.camera, options.picture, options.out)
    print(f"{options.out}: open it in a browser, draw, and copy the lines into the camera's table")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from kizu_agent.demo import DemoOptions, run_demo

    return run_demo(DemoOptions(options.out, options.seconds, options.part))


if __name__ == "__main__":
    sys.exit(main())
