"""Mixed precision and compiled networks: what learns with them, what refuses them, what becomes of a failure."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kizu_train.arithmetic import Arithmetic, Compiled, NotCompiled, choose_precision, exact
from kizu_train.checkpoint import load_checkpoint
from kizu_train.errors import UsageError
from kizu_train.fit import FitRequest, fit
from kizu_train.recipes import resolve_recipe
from kizu_train.runs import RunRecord

CPU = torch.device("cpu")
COMPILING = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
"""torch's compiler imports what torch itself has given up."""
SMALL = ("grid.tile_px=32", "grid.stride_px=16", "network.widths=[8,16]", "train.batch=8")


def _record(folder: Path, out: Path, recipe: str, *sets: str) -> RunRecord:
    return fit(FitRequest(resolve_recipe(recipe, sets), folder, out, "cpu", 2))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("recipe", ["patch_vae", "synthetic_defects"])
def test_learns_in_16_bits(
    good_folder: Path, tmp_path: Path, quick: tuple[str, ...], recipe: str, precision: str
) -> None:
    """A loss falls with 16-bit products about as far as in fp32, but not to the same bits, and weights stay fp32."""
    sets = (*(quick if recipe == "patch_vae" else SMALL), "train.steps=60")
    plain = _record(good_folder, tmp_path / "fp32", recipe, *sets)
    mixed = _record(good_folder, tmp_path / precision, recipe, *sets, f"train.precision={precision}")
    assert mixed.metrics["loss"] != plain.metrics["loss"]
    scale = max(1.0, abs(plain.metrics["loss"]))
    assert mixed.metrics["loss"] == pytest.approx(plain.metrics["loss"], abs=0.15 * scale)
    weights = load_file(tmp_path / precision / "weights.safetensors")
    assert {part.dtype for part in weights.values()} <= {torch.float32, torch.int64}


def test_fp16_goes_on_with_its_scale(good_folder: Path, tmp_path: Path, quick: tuple[str, ...]) -> None:
    """A checkpoint keeps the scale of losses, so that a resumed fit equals an uninterrupted one."""
    recipe = resolve_recipe("patch_vae", (*quick, "train.steps=60", "train.precision=fp16"))
    request = FitRequest(recipe, good_folder, tmp_path / "cut", "cpu", 3)
    fit(replace(request, stop_after_s=0.05))
    found = load_checkpoint(tmp_path / "cut")
    assert found is not None
    assert found[1]["scaler.scale"] > 1
    fit(replace(request, resume=True))
    fit(replace(request, out=tmp_path / "whole"))
    first, second = (load_file(tmp_path / name / "weights.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_overflow_is_left_out_and_the_scale_halved() -> None:
    """A gradient that overflows moves no weight in fp16, and the next scale is half of it."""
    net = nn.Linear(2, 1)
    before = net.weight.clone()
    arithmetic = Arithmetic(torch.float16, CPU)
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    scale = float(arithmetic.scaled(torch.ones(1)))
    arithmetic.scaled(net(torch.full((1, 2), torch.inf)).sum()).backward()  # type: ignore[no-untyped-call]
    arithmetic.step(optimizer)
    arithmetic.update()
    assert torch.equal(net.weight, before)
    assert float(arithmetic.tensors()["scaler.scale"]) == scale / 2
    other = Arithmetic(torch.float16, CPU)
    other.load(arithmetic.tensors())
    assert float(other.scaled(torch.ones(1))) == scale / 2
    assert Arithmetic(torch.float32, CPU).tensors() == {}


def test_a_loss_that_needs_fp32_refuses_16_bits(good_folder: Path, tmp_path: Path) -> None:
    """Asked for by name, 16 bits are refused where a loss takes small differences; `auto` leaves it in fp32."""
    sets = ("grid.tile_px=32", "grid.stride_px=32", "train.steps=2")
    with pytest.raises(UsageError, match=r"train\.precision = bf16: this detector's loss needs fp32"):
        _record(good_folder, tmp_path / "run", "ae_dense", *sets, "train.precision=bf16")
    for wanted in ("auto", "fp32"):
        assert choose_precision(wanted, CPU, can_mix=False) is torch.float32  # type: ignore[arg-type]


def test_exact_leaves_fp32_alone() -> None:
    """fp32 is given back as it is, 16 bits become fp32."""
    tensor = torch.ones(2)
    assert exact(tensor) is tensor
    assert exact(tensor.half()).dtype == torch.float32


def _fails(*_inputs: Tensor) -> Tensor:
    raise RuntimeError("no compiler here\nand much more")


@COMPILING
def test_a_failing_compiler_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Where compiled parts fail, one line says so and the same step is taken without; other failures stay failures."""
    net = nn.Sequential(nn.Linear(2, 1))
    compiled = Compiled(net, "on", CPU)
    net[0]._compiled_call_impl = _fails  # type: ignore[assignment]  # what torch calls in the part's place
    with caplog.at_level(logging.WARNING), pytest.raises(NotCompiled), compiled.attempt():
        net(torch.ones(1, 2))
    (line,) = (record.getMessage() for record in caplog.records if record.name == "kizu_train.arithmetic")
    assert line == "torch.compile fails here, training goes on without: RuntimeError: no compiler here"
    with compiled.attempt():
        assert net(torch.ones(1, 2)).shape == (1, 1)
    with pytest.raises(ZeroDivisionError), compiled.attempt():
        _ = 1 / 0


@COMPILING
def test_compiling_is_for_gpus_unless_asked_for() -> None:
    """`auto` compiles nothing on a CPU; `undo` leaves the module as it was, its names too."""
    net = nn.Sequential(nn.Linear(2, 1), nn.Identity())
    names = list(net.state_dict())
    Compiled(net, "auto", CPU)
    assert net[0]._compiled_call_impl is None
    compiled = Compiled(net, "on", CPU)
    assert net[0]._compiled_call_impl is not None
    assert net[1]._compiled_call_impl is None
    assert list(net.state_dict()) == names
    compiled.undo()
    assert net[0]._compiled_call_impl is None


@pytest.mark.parametrize("is_broken", [False, True])
@pytest.mark.slow
@COMPILING
def test_learns_compiled(
    good_folder: Path, tmp_path: Path, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, *, is_broken: bool
) -> None:
    """train.compile=on learns as plain training does, by other arithmetic; where it fails, to the same bits."""

    def break_it(part: nn.Module) -> None:
        part._compiled_call_impl = _fails  # type: ignore[assignment]

    if is_broken:
        monkeypatch.setattr(nn.Module, "compile", break_it)
    plain = _record(good_folder, tmp_path / "plain", "patch_vae", *quick)
    compiled = _record(good_folder, tmp_path / "on", "patch_vae", *quick, "train.compile=on")
    assert compiled.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=0 if is_broken else 0.05)
    first, second = (load_file(tmp_path / name / "weights.safetensors") for name in ("plain", "on"))
    assert all(torch.equal(first[name], second[name]) for name in first) == is_broken
