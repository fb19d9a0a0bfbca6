"""What holds for every test: fixed seeds, no telemetry, no colours, nothing written to the developer's home."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Before anything imports ray or mlflow; inherited by every process a test starts.
os.environ.update(
    {
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "NO_COLOR": "1",
        "HF_HUB_OFFLINE": "1",
    }
)
for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "FORCE_COLOR"):
    os.environ.pop(name, None)

# Derandomised: `make test` says the same twice. No deadline: it would be a wall clock in a test.
settings.register_profile(
    "fixed", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fixed")
