"""python -m benchmarks.kernels: see benchmarks.kernels.operator_benchmark."""

import sys

from benchmarks.kernels.operator_benchmark import main

if __name__ == "__main__":
    sys.exit(main())
