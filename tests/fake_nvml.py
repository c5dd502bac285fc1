"""A stand-in for pynvml over a list of cards."""

from types import SimpleNamespace

import pynvml


class FakeNvml:
    """As much of pynvml as tvmlab calls, over a list of cards."""

    NVMLError = pynvml.NVMLError
    NVML_ERROR_LIBRARY_NOT_FOUND = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND

    def __init__(self, *cards, init_error=None, broken=()):
        self.cards, self.init_error, self.broken, self.open = cards, init_error, broken, 0

    def nvmlInit(self):
        if self.init_error is not None:
            raise pynvml.NVMLError(self.init_error)
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlSystemGetDriverVersion(self):
        return "580.65.06"

    def nvmlDeviceGetCount(self):
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index):
        if index in self.broken:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    def nvmlDeviceGetName(self, handle):
        return self.cards[handle][0].encode()  # older bindings return bytes

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return self.cards[handle][1]

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=self.cards[handle][2] << 30)

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-{handle}abc"


H200, T4 = ("NVIDIA H200", (9, 0), 141), ("Tesla T4", (7, 5), 16)
