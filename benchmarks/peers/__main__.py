"""python -m benchmarks.peers: see benchmarks.peers.peer_benchmark."""

import sys

from benchmarks.peers.peer_benchmark import main

if __name__ == "__main__":
    sys.exit(main())
