"""python -m benchmarks.quality: see benchmarks.quality.quality_benchmark."""

import sys

from benchmarks.quality.quality_benchmark import main

if __name__ == "__main__":
    sys.exit(main())
