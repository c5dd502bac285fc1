"""What is said of an error in one line: what it was must be in it, wherever in the text it stands."""

import pytest

from tvmlab.compat import brief

LAUNCH = """CUDALaunch Error: CUDA_ERROR_ILLEGAL_ADDRESS
 grid=(64,1,1),  block=(256,1,1)
// func_name=main_kernel
// CUDA Source
extern "C" __global__ void main_kernel(float* x) {
  x[0] = 1.0f;
}
"""
NVRTC = """NVRTC: tvm_kernels.cu(3): error: identifier "nothing" is undefined
      x[threadIdx.x] = nothing;
                       ^

1 error detected in the compilation of "tvm_kernels.cu".
"""
CHILD = """some warning at the start of the process
Traceback (most recent call last):
  File "/somewhere/roofline.py", line 1, in <module>
    main()
RuntimeError: CUDA Runtime Error: cudaErrorInsufficientDriver (35): too old
 a second line, of what was called
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUNCH, ["CUDALaunch Error: CUDA_ERROR_ILLEGAL_ADDRESS"]),
        (NVRTC, ['error: identifier "nothing" is undefined', "1 error detected"]),
        ("x" * 400 + "\nthe last words", ["xxx", " … the last words"]),
        ("no good", ["no good"]),
        ("}", ["}"]),
    ],
)
def test_the_first_and_the_last_line_that_say_something(text, words):
    found = brief(text)
    assert all(word in found for word in words)
    assert "\n" not in found and len(found) <= 300 and "block=" not in found


def test_of_a_traceback_only_the_error():
    assert brief(CHILD) == "RuntimeError: CUDA Runtime Error: cudaErrorInsufficientDriver (35): too old"
    assert brief("") == brief(" \n") == ""
