"""What does a run write down of its job, so that it can be read, compared and loaded again?"""

from __future__ import annotations

import hashlib
import json

from concertina.config.schema import Job
from concertina.config.yaml12 import dump

__all__ = ["digest", "dump_job"]


def dump_job(job: Job) -> str:
    """YAML with every key, defaults included; `load_job` of it gives an equal job."""
    return dump(job.model_dump(mode="json"))


def digest(job: Job) -> str:
    """16 hex characters that differ when any key does; the same on every machine."""
    text = json.dumps(job.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
