"""What a finished study took, by kind of step, from its store: seconds, bytes and steps as tests/plan_truths.json has.

taskvec run STUDY --out OUT --store STORE      # both folders new, on a quiet machine
python benchmarks/truths.py STUDY STORE [--write]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch

from taskvec.core.compute import processor
from taskvec.core.machine import cores
from taskvec.engine.store import RECORD, artifact_record, step_name

TRUTHS = Path(__file__).parents[1] / "tests" / "plan_truths.json"
Taken = dict[str, dict[str, float]]


def taken(store: Path) -> Taken:
    """Return steps, seconds and bytes of every kind of step that a store holds."""
    kinds: defaultdict[str, dict[str, float]] = defaultdict(lambda: {"steps": 0, "seconds": 0.0, "bytes": 0})
    for path in store.glob(f"??/*/{RECORD}"):
        record = artifact_record(path.parent)
        assert record is not None, path
        kind = kinds[step_name(record["about"])]
        kind["steps"] += 1
        kind["seconds"] = round(kind["seconds"] + record["about"]["seconds"], 3)
        kind["bytes"] += sum((path.parent / name).stat().st_size for name in record["files"])
    return dict(sorted(kinds.items()))


def main() -> None:
    """Print what was taken, or put it into the file that tests read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("store", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    truth = taken(options.store)
    if not options.write:
        print(json.dumps(truth, indent=1))
        return
    known = json.loads(TRUTHS.read_text("utf-8"))
    known["machine"] = f"{processor()}, {cores()} cores and workers, torch {torch.__version__}, quiet"
    known["studies"][options.study] = truth
    TRUTHS.write_text(json.dumps(known, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
