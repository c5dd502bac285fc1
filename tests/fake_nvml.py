"""A stand-in for pynvml over a list of cards."""

from types import SimpleNamespace

import pynvml


class FakeNvml:
    """As much of pynvml as tvmlab calls, over a list of cards: (name, compute capability, GiB).

    `cuda` is the driver's version of CUDA as NVML gives it, `free` the free memory of each card in GiB (None: all),
    `processes` the pids on each. `looks` are the readings of clocks and power that `Watch` gets in turn, the last one
    again and again: (SM MHz, W, deg C, reasons), or an error code to raise. `busy` are the percentages of time in which
    kernels ran, likewise.
    """

    NVMLError = pynvml.NVMLError
    NVML_ERROR_LIBRARY_NOT_FOUND = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    NVML_CLOCK_SM, NVML_CLOCK_MEM = pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU

    def __init__(
        self, *cards, init_error=None, broken=(), cuda=13000, driver="580.65.06", free=None, processes=(), looks=(),
        busy=(),
    ):  # fmt: skip
        self.cards, self.init_error, self.broken, self.open = cards, init_error, broken, 0
        self.cuda, self.driver, self.free, self.processes = cuda, driver, free, processes
        self.looks = list(looks) or [(1980, 350, 45, 0)]
        self.busy = list(busy) or [50]

    def nvmlInit(self):
        if self.init_error is not None:
            raise pynvml.NVMLError(self.init_error)
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlSystemGetDriverVersion(self):
        return self.driver

    def nvmlSystemGetCudaDriverVersion(self):
        return self.cuda

    def nvmlDeviceGetCount(self):
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index):
        if index in self.broken:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):
        for handle in range(len(self.cards)):
            if self.nvmlDeviceGetUUID(handle) == uuid:
                return handle
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetName(self, handle):
        return self.cards[handle][0].encode()  # older bindings return bytes

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return self.cards[handle][1]

    def nvmlDeviceGetMemoryInfo(self, handle):
        total = self.cards[handle][2] << 30
        return SimpleNamespace(total=total, free=total if self.free is None else int(self.free[handle] * 2**30))

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-{handle}abc"

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        if self.processes is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [SimpleNamespace(pid=pid) for pid in dict(enumerate(self.processes)).get(handle, ())]

    def nvmlDeviceGetClockInfo(self, handle, kind):
        if kind != self.NVML_CLOCK_SM:
            return 3201
        self.now = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]  # a look begins with this
        if isinstance(self.now, int):
            raise pynvml.NVMLError(self.now)
        return self.now[0]

    def nvmlDeviceGetUtilizationRates(self, handle):
        percent = self.busy.pop(0) if len(self.busy) > 1 else self.busy[0]
        if percent < 0 or percent > 100:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(gpu=percent, memory=1)

    def nvmlDeviceGetPowerUsage(self, handle):
        return self.now[1] * 1000

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return self.now[2]

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return self.now[3]


H200, T4 = ("NVIDIA H200", (9, 0), 141), ("Tesla T4", (7, 5), 16)
