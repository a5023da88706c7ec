"""metrics.jsonl: a line for every record of training."""

import json
from pathlib import Path
from typing import Any

from jaxprune import files


class MetricsLog:
    """metrics.jsonl: begun anew by every call, then a line for every record.

    A killed run may leave lines of epochs that its checkpoint does not hold. The records that travel in the checkpoints
    are the truth, and a stage that is taken up again hands them all over once more.
    """

    def __init__(self, path: Path, before: list[dict[str, Any]], seed: int):
        self.path, self.seed, self.earlier_steps = path, seed, 0
        self.records: list[dict[str, Any]] = []
        files.write(path, "".join(json.dumps(record) + "\n" for record in before))

    def add(self, record: dict[str, Any]) -> None:
        """A record of this stage, with the step counted through all stages."""
        self.records.append({"seed": self.seed, **record, "step": record["step"] + self.earlier_steps})
        with self.path.open("a") as file:
            file.write(json.dumps(self.records[-1]) + "\n")

    def close_stage(self) -> None:
        """What comes now is of the next stage."""
        self.earlier_steps = self.records[-1]["step"] if self.records else 0
