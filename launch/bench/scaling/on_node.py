"""The launcher of one node of a trial under srun: `srun --ntasks-per-node=1 python -m launch.bench.scaling.on_node TRIAL.json`.

The file, which `negpool bench scaling --slurm` wrote, says which module the ranks run, with which arguments, how many they are on
a node, and where rank 0 reports.
"""

import json
import os
import sys
from pathlib import Path

from launch.leave import ctrl_c_in_one_line
from launch.node import Place, launch_ranks
from launch.ranks import ARGUMENTS, REPORT
from trainer.errors import EXIT_REFUSED, InputError


def main() -> int:
    """Start this node's ranks of a trial, and return 0 or the exit code of the first that failed."""
    try:
        start, place = json.loads(Path(sys.argv[1]).read_text()), Place.of_step(os.environ)
    except (InputError, OSError, ValueError) as error:
        print(f"negpool: {error}", file=sys.stderr)
        return EXIT_REFUSED
    os.environ |= {ARGUMENTS: json.dumps(start["arguments"]), REPORT: start["report"], "TOKENIZERS_PARALLELISM": "false"}
    return launch_ranks(place, start["ranks_per_node"], ["-u", "-m", start["worker"]])


if __name__ == "__main__":
    with ctrl_c_in_one_line():
        sys.exit(main())
