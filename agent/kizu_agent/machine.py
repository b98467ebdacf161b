"""What this machine is, as far as measured figures and compiled engines depend on it. Standard library alone."""

import ctypes
import platform
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
_DRIVER_VERSION = Path("/proc/driver/nvidia/version")
# CUdevice_attribute of cuda.h
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_NVINFER = tuple(f"libnvinfer.so.{major}" for major in (12, 11, 10, 9, 8))
_TENSORRT_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
_NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """The first GPU, which the CUDA and TensorRT providers use; `driver` as the kernel module or CUDA names it."""

    name: str
    capability: str
    driver: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability}, driver {self.driver})"


@cache
def cpu_name() -> str:
    """The processor's model where Linux tells it (x86), else the kind of processor."""
    try:
        lines = _CPU_INFO.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


def waited_s() -> float:
    """Seconds for which this process's threads were ready and another process had the core; 0 where nobody counts."""
    return sum(_waited_ns(task) for task in Path("/proc/self/task").iterdir()) / 1e9


@cache
def gpu() -> Gpu | None:
    """Ask the CUDA driver for its first GPU; None where there is no driver or no GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, name, driver = ctypes.c_int(), ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    cuda.cuDeviceGetName(name, _NAME_BYTES, device)
    cuda.cuDriverGetVersion(ctypes.byref(driver))
    capability = [_attribute(cuda, kind, device) for kind in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR)]
    named = name.value.decode(errors="replace")
    return Gpu(named, ".".join(map(str, capability)), _driver() or f"CUDA {driver.value}")


@cache
def tensorrt_version() -> str | None:
    """TensorRT's version by the library that onnxruntime will load, else by its package; None where there is none."""
    found = (ask(name) for ask, names in ((_by_library, _NVINFER), (_by_package, _TENSORRT_PACKAGES)) for name in names)
    return next(filter(None, found), None)


def _waited_ns(task: Path) -> int:
    """The second number of schedstat (kernel documentation, scheduler/sched-stats)."""
    try:
        return int((task / "schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):  # the thread may have ended
        return 0


def _by_library(name: str) -> str | None:
    try:
        return str(int(ctypes.CDLL(name).getInferLibVersion()))
    except (OSError, AttributeError):
        return None


def _by_package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _attribute(cuda: ctypes.CDLL, kind: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    cuda.cuDeviceGetAttribute(ctypes.byref(value), kind, device)
    return value.value


def _driver() -> str | None:
    """The kernel module's version: `NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  …`."""
    try:
        words = _DRIVER_VERSION.read_text(errors="replace").splitlines()[0].split()
    except (OSError, IndexError):
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)
