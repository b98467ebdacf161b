"""The `kizu-export` command line. Exit codes: 0 done, 1 failed, 2 wrong usage.

`kizu-export RUN --out FILE` exports and has no command word; a run in a folder named like one of the commands is
written with its path: `kizu-export ./evaluate --out FILE`.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from kizu_contract.errors import KizuError
from kizu_export.errors import UsageError

if TYPE_CHECKING:
    from kizu_export.frame import FrameChoice, FrameReport

DONE, FAILED, WRONG_USAGE = 0, 1, 2
_PROVIDERS = ("cpu", "cuda", "tensorrt", "openvino")
_COMMANDS = """commands beside exporting:
  kizu-export evaluate FILE.kizu --data DIR   measure what ships, on the agent's engine
  kizu-export inspect FILE.kizu               show what is in a bundle
  kizu-export verify FILE.kizu [--key PUB]    check contents, signature and golden tiles
  kizu-export keygen --out DIR                make a key pair for signing
  kizu-export sign FILE.kizu --key KEY --out NEW.kizu   sign a bundle, or sign it anew
  kizu-export --version                       show kizu's own version
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Only exporting imports torch."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:  # with a value it is the model's
        print(f"kizu-export {version('kizu')}")
        return DONE
    commands = {"evaluate": _evaluate, "inspect": _inspect, "verify": _verify, "keygen": _keygen, "sign": _sign}
    command = commands.get(given[0]) if given else None
    try:
        return command(given[1:]) if command else _export(given)
    except KizuError as exc:
        print(f"kizu-export: {exc}", file=sys.stderr)
        return WRONG_USAGE if _is_usage(exc) else FAILED
    except OSError as exc:
        print(f"kizu-export: {exc}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("kizu-export: interrupted", file=sys.stderr)
        return FAILED


def _is_usage(exc: KizuError) -> bool:
    from kizu_train.errors import UsageError as TrainUsageError

    return isinstance(exc, UsageError | TrainUsageError)


def _export(arguments: Sequence[str]) -> int:
    options = _export_parser().parse_args(arguments)
    if options.precision != "fp32" and options.data is None:
        raise UsageError(
            f"--precision {options.precision} needs the pictures that the run was trained on, to measure what "
            "it loses: name their folder with --data DIR"
        )
    from kizu_contract.bundle import read_bundle, write_bundle
    from kizu_export.build import build_bundle
    from kizu_export.evidence import gather_evidence
    from kizu_export.keys import load_private_key
    from kizu_export.lower import Limits
    from kizu_export.show import loss_in_words
    from kizu_train.runs import open_run

    key = load_private_key(options.sign) if options.sign else None
    run = open_run(options.run, score=options.score)
    evidence = gather_evidence(run, options.data) if options.precision != "fp32" else None
    built = build_bundle(
        run,
        name=options.name,
        version=options.version,
        precision=options.precision,
        evidence=evidence,
        limits=Limits(options.most_loss, options.most_shift),
        frame=options.frame,
        is_frame_forced=options.force_frame,
    )
    write_bundle(built.bundle, options.out, key)
    written, parity = read_bundle(options.out), built.parity
    print(f"model     {written.manifest.name} {written.manifest.version} ({options.precision}, score {run.score})")
    print(f"parity    scores within {parity.score:.1e}, maps within {parity.map:.1e} of torch, relative")
    if written.manifest.precision is not None:
        print(f"loss      {loss_in_words(written.manifest.precision)}")
    if built.frame:
        print(f"frame     {_frame_line(built.frame)}")
    print(f"bundle    {options.out} ({options.out.stat().st_size:,} bytes{', signed' if key else ''})")
    print(f"content   {written.sha256}")
    return DONE


def _frame_line(report: "FrameReport") -> str:
    record = report.record
    kept = "kept" if report.is_kept else "not kept; --force-frame keeps it"
    how = "overlaps computed once" if record.form == "shared" else "tiles cut inside"
    return f"{record.size} whole ({how}): {record.speedup:.2f} times as fast as tiles, {kept}"


def _export_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kizu-export",
        description="Export a run to a bundle for the agent.",
        epilog=_COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder written by kizu-train fit")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.kizu", help="the bundle to write")
    parser.add_argument("--name", type=_name, help="name of the model (default: from the data folder)")
    parser.add_argument("--version", type=_version, help="version of the model (default: when the run finished)")
    parser.add_argument("--score", metavar="KIND", help="kind of score, such as m or l (default: the recipe's)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8"),
        default="fp32",
        help="of the graph; fp16 pays on GPUs, int8 on CPUs with VNNI and on GPUs; both need --data",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="what the run was trained on: lower precisions are judged by it"
    )
    parser.add_argument(
        "--most-loss", type=_limit, default=0.5, metavar="POINTS", help="of image AUROC, against fp32 (default: 0.5)"
    )
    parser.add_argument(
        "--most-shift",
        type=_limit,
        default=0.1,
        metavar="SHARE",
        help="of the reject threshold by which it and good pictures' scores may move (default: 0.1)",
    )
    parser.add_argument(
        "--frame",
        type=_frame,
        default="none",
        metavar="HxW|auto|none",
        help="add a graph that takes frames of this height and width whole, where it is faster; auto: the size of the "
        "training pictures (default: none)",
    )
    parser.add_argument("--force-frame", action="store_true", help="keep that graph even where it is slower")
    parser.add_argument("--sign", type=Path, metavar="KEY", help="sign with this Ed25519 private key (PEM)")
    return parser


def _frame(text: str) -> "FrameChoice":
    from kizu_export.frame import frame_choice

    try:
        return frame_choice(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def _name(text: str) -> str:
    from kizu_contract.manifest import NAME_PATTERN

    return _matching(text, NAME_PATTERN)


def _version(text: str) -> str:
    from kizu_contract.manifest import VERSION_PATTERN

    return _matching(text, VERSION_PATTERN)


def _limit(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} must lie between 0 and 100")
    return value


def _matching(text: str, pattern: str) -> str:
    import re

    if not re.fullmatch(pattern, text):
        raise argparse.ArgumentTypeError(f"{text!r} must match {pattern}")
    return text


def _evaluate(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="kizu-export evaluate", description="Measure what ships on test pictures.")
    parser.add_argument("bundle", type=Path, metavar="FILE.kizu")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="pictures in MVTec layout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a report for people")
    parser.add_argument("--provider", choices=_PROVIDERS, default="cpu", help="what runs the graph (default: cpu)")
    options = parser.parse_args(arguments)
    from rich.console import Console

    from kizu_agent.settings import EngineConfig
    from kizu_contract.bundle import read_bundle, write_atomically
    from kizu_export.evaluate import evaluate_bundle, write_bundle_report
    from kizu_train.evaluation.table import print_evaluation

    bundle, config = read_bundle(options.bundle), EngineConfig(provider=options.provider)
    evaluation = evaluate_bundle(bundle, options.data, config, show_progress=sys.stderr.isatty())
    print_evaluation(evaluation, Console())
    if options.json:
        write_atomically(options.json, evaluation.to_json())
    if options.report:
        write_bundle_report(options.report, evaluation, bundle, options.data, options.provider)
    return DONE


def _inspect(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="kizu-export inspect", description="Show what is in a bundle.")
    parser.add_argument("bundle", type=Path, metavar="FILE.kizu")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.add_argument(
        "--key", type=Path, action="append", default=[], metavar="PUB", help="signed by this key (PEM)?"
    )
    options = parser.parse_args(arguments)
    from rich.console import Console

    from kizu_contract.bundle import read_bundle
    from kizu_contract.signing import load_public_key
    from kizu_export.show import as_json, print_bundle

    bundle = read_bundle(options.bundle, [load_public_key(path) for path in options.key])
    if options.json:
        print(as_json(bundle))
    else:
        print_bundle(bundle, Console(highlight=False))
    return DONE


def _verify(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="kizu-export verify", description="Check a bundle's contents, signature and golden tiles."
    )
    parser.add_argument("bundle", type=Path, metavar="FILE.kizu")
    parser.add_argument("--key", type=Path, action="append", default=[], metavar="PUB", help="trusted public key (PEM)")
    parser.add_argument("--provider", choices=_PROVIDERS, default="cpu", help="what runs the graph (default: cpu)")
    options = parser.parse_args(arguments)
    from kizu_agent.inspector import load_inspector, self_test
    from kizu_agent.settings import EngineConfig, ModelsConfig
    from kizu_contract.bundle import read_bundle
    from kizu_contract.signing import load_public_key

    keys = [load_public_key(path) for path in options.key]
    bundle = read_bundle(options.bundle, keys, require_signature=bool(keys))
    inspector = load_inspector(bundle, EngineConfig(provider=options.provider))
    try:
        worst = self_test(bundle, inspector.engine, ModelsConfig().self_test_tolerance)
    finally:
        inspector.close()
    print(f"contents   whole: {bundle.sha256}")
    print(
        f"signature  {f'by the trusted key {bundle.signed_by}' if bundle.signed_by else 'not checked: no --key given'}"
    )
    frames = f" and a frame of {bundle.manifest.frame_graph.size}" if bundle.manifest.frame_graph else ""
    print(f"golden     {len(bundle.golden.tiles)} tiles{frames} within {worst:.1e} on {options.provider}, relative")
    return DONE


def _keygen(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="kizu-export keygen", description="Make an Ed25519 key pair.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the two keys")
    options = parser.parse_args(arguments)
    from kizu_contract.signing import fingerprint_of, load_public_key
    from kizu_export.keys import write_key_pair

    private, public = write_key_pair(options.out)
    fingerprint = fingerprint_of(load_public_key(public))
    print(f"private  {private}   keep it secret; sign with: kizu-export RUN --out FILE.kizu --sign {private}")
    print(f"public   {public}   give it to agents as models.trusted_keys")
    print(f"fingerprint  {fingerprint}   note it: reports name the key by it, and it is what a revocation lists")
    return DONE


def _sign(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="kizu-export sign", description="Sign a bundle, or sign it anew.")
    parser.add_argument("bundle", type=Path, metavar="FILE.kizu")
    parser.add_argument("--key", type=Path, required=True, metavar="KEY", help="Ed25519 private key (PEM)")
    parser.add_argument("--out", type=Path, required=True, metavar="NEW.kizu", help="the signed bundle to write")
    options = parser.parse_args(arguments)
    from kizu_contract.signing import fingerprint_of
    from kizu_export.keys import load_private_key, sign_bundle

    key = load_private_key(options.key)
    content = sign_bundle(options.bundle, options.out, key)
    print(f"content    {content}")
    print(f"signature  by the key {fingerprint_of(key.public_key())}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
