"""What makes the libraries compute as on a processor without wide vectors.

python tests/plain_processor.py [PYTEST OPTIONS]    run the tests so, on one core (`make test-portable`)
"""

import os
import sys

from numpy._core._multiarray_umath import __cpu_dispatch__

ENVIRONMENT = {
    "OPENCV_CPU_DISABLE": "AVX512-SKX,AVX2,FMA3,FP16,AVX,SSE4.2,SSE4.1",
    "OPENCV_IPP": "disabled",
    "OPENCV_LOG_LEVEL": "ERROR",  # it warns of the line before on stdout, which tests read
    "NPY_DISABLE_CPU_FEATURES": " ".join(__cpu_dispatch__),
    "OPENBLAS_CORETYPE": "Nehalem",
    "JSIMD_FORCENONE": "1",  # libjpeg-turbo, in OpenCV and Pillow
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX2,-FMA",  # exp, sin and their like
}

if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.execve(sys.executable, [sys.executable, "-m", "pytest", *sys.argv[1:]], os.environ | ENVIRONMENT)
