"""Many images in shards: interrupted after some, then completed by the same call.

python examples/bulk.py demo/digits.engine bulk

The folder gets shard-00000.npz and so on, run.json, which says how they were made, and samples.npz at the end.
"""

import sys
from pathlib import Path

from engine import Sampler, SamplingOptions
from engine.bulk.job import BulkJob, BulkResult, generate, merge


def main(bundle: str, out: str, n: int = 300, steps: int = 20) -> BulkResult:
    folder = Path(out)
    options = SamplingOptions(steps=steps, seed=0, batch_size=32)
    job = BulkJob(n, options, labels_in_turn=tuple(range(10)), shard_size=n // 3)
    sampler = Sampler.open(bundle)

    def stop_half_way(done: int) -> None:
        if done > n // 2:
            raise KeyboardInterrupt  # what Ctrl-C does

    try:
        generate(sampler, job, folder, progress=stop_half_way)
    except KeyboardInterrupt:
        print("interrupted; whole shards stay:", *sorted(path.name for path in folder.glob("shard-*")))

    result = generate(sampler, job, folder)
    print(f"resumed: {result.kept} images were there, {result.made} made")
    print("joined:", merge(sampler, job, folder))
    sampler.close()
    return result


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
