"""What a GPU does while candidates run on it: clocks, power, temperature, how busy it is, whether it holds itself back.

One line a batch in the run folder's device.jsonl, from NVML: reading it disturbs no kernel.
"""

from __future__ import annotations

import importlib
import threading
import time
from pathlib import Path
from typing import Any

import orjson

from tvmlab.targets import Target

__all__ = ["NoWatch", "Watch", "watch_of"]

# nvml.h, nvmlClocksEventReason*: why the clocks are lower than they could be. An idle GPU, and clocks that
# a person set, are left out.
_THROTTLED = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


_SAMPLE_S = 0.25  # NVML's own samples are of 1/6 to 1 s, by the product


class NoWatch:
    """For a device that tells nothing of itself: a CPU, or a GPU whose driver refuses."""

    def look(self) -> str:
        """Read the device now; returns why it is throttled, an empty string if it is not."""
        return ""

    def note(self, about: dict[str, Any]) -> None:
        """Write what was seen since the last note, with what is said `about` the batch."""

    def close(self) -> None:
        """End what it does beside."""


class Watch(NoWatch):
    """Watches the GPU of this UUID; `nvml` is the module pynvml or one like it.

    Use `open`, which gives a NoWatch where NVML does not answer. A line has `about`'s fields, time_s (Unix) and
    seconds, looks (how often it was read), sm_mhz and memory_mhz (least and most), power_w and temperature_c (most),
    throttled (the reasons seen, none if the batch ran at full clocks), busy (the share of these seconds in which a
    kernel ran, by anyone; None where the driver does not tell).
    """

    def __init__(self, uuid: str, path: Path, nvml: Any) -> None:
        self._nvml = nvml
        self._path = path
        nvml.nvmlInit()
        self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        self._read()  # raises now what it would raise later
        self._begin()
        self._closed = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True, name="GPU's busy share")
        self._sampler.start()

    @classmethod
    def open(cls, uuid: str, path: Path, nvml: Any = None) -> NoWatch:
        """A watch that writes to `path`; one that watches nothing if NVML refuses."""
        nvml = importlib.import_module("pynvml") if nvml is None else nvml
        try:
            return cls(uuid, path, nvml)
        except nvml.NVMLError as error:
            print(f"the GPU's clocks and temperature are not recorded: NVML says {error}", flush=True)
            return NoWatch()

    def _begin(self) -> None:
        self._started = time.time()
        self._seen: list[dict[str, int]] = []
        self._reasons: set[str] = set()
        self._percent: list[int] = []

    def _sample(self) -> None:
        """Read how busy the GPU is, evenly over the time: `look` comes when a kernel has just run."""
        while not self._closed.wait(_SAMPLE_S):
            try:
                self._percent.append(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu)
            except self._nvml.NVMLError:
                continue  # it may be reset, or never tell

    def _read(self) -> dict[str, int]:
        nvml, handle = self._nvml, self._handle
        return {
            "sm_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "power_mw": nvml.nvmlDeviceGetPowerUsage(handle),
            "temperature_c": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "reasons": nvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
        }

    def look(self) -> str:
        """Read the device now; returns why it is throttled, an empty string if it is not."""
        try:
            seen = self._read()
        except self._nvml.NVMLError:
            return ""  # a GPU that is being reset answers again later
        self._seen.append(seen)
        reasons = [name for bit, name in _THROTTLED.items() if seen["reasons"] & bit]
        self._reasons.update(reasons)
        return ", ".join(reasons)

    def note(self, about: dict[str, Any]) -> None:
        """Append a line on what was seen since the last one."""
        if self._seen:
            percent = self._percent
            values = {name: [seen[name] for seen in self._seen] for name in self._seen[0]}
            row = {
                **about,
                "time_s": round(time.time(), 3),
                "seconds": round(time.time() - self._started, 3),
                "looks": len(self._seen),
                "sm_mhz": [min(values["sm_mhz"]), max(values["sm_mhz"])],
                "memory_mhz": [min(values["memory_mhz"]), max(values["memory_mhz"])],
                "power_w": max(values["power_mw"]) / 1e3,
                "temperature_c": max(values["temperature_c"]),
                "throttled": sorted(self._reasons),
                "busy": round(sum(percent) / len(percent) / 100, 3) if percent else None,
            }
            with self._path.open("ab") as file:
                file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        self._begin()

    def close(self) -> None:
        """End the thread that samples."""
        self._closed.set()
        self._sampler.join()


def watch_of(target: Target, folder: Path) -> NoWatch:
    """A watch of a target's GPU that writes to the run folder; one that watches nothing for any other device."""
    uuid = target.details.get("uuid") if target.kind == "cuda" else None
    return Watch.open(uuid, folder / "device.jsonl") if uuid else NoWatch()
