"""How does a driver join a Ray cluster, ours or somebody else's?"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from concertina.errors import NotFoundError, UserError
from infra.keeper_spec import JOIN_FILE, ray_environment

__all__ = ["ClusterAccess"]

_HEARD_S = 10.0  # the keeper looks once a second


@dataclass(frozen=True)
class ClusterAccess:
    """Where a cluster is, and the token of it when it is a local one of ours (its nodes are on 127.0.0.1)."""

    address: str
    token_path: Path | None = None

    def ask_for_node(self) -> None:
        """Have the keeper of a local cluster of ours start one more node; it is there some seconds later.

        Raises UserError for a cluster that is not ours.
        """
        if self.token_path is None:
            raise UserError(
                f"the cluster at {self.address} is not ours: `ray start --address=...` on a new machine adds it"
            )
        wish = self.token_path.with_name(JOIN_FILE)
        deadline = time.monotonic() + _HEARD_S
        while wish.exists():  # one wish at a time
            if time.monotonic() > deadline:
                raise NotFoundError(f"the keeper of the cluster at {self.address} does not answer: is it gone?")
            time.sleep(0.05)
        wish.touch()

    def environment(self) -> dict[str, str]:
        """Variables a process needs before it imports ray; empty for a cluster that is not ours."""
        return {} if self.token_path is None else ray_environment(self.token_path)

    def connect(self, namespace: str) -> None:
        """`ray.init` with nothing printed and no log streamed.

        Installs Ray's SIGTERM handler in the main thread: install your own afterwards.
        """
        if self.token_path is not None:
            self._prepare_own()
        import ray
        from ray._private import worker

        # Even without logs Ray prints "(raylet) A worker died" to stdout, which holds our own output and nothing else.
        worker._worker_logs_enabled = False
        ray.init(
            address=self.address,
            namespace=namespace,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )

    def _prepare_own(self) -> None:
        """Ray may have been imported before: then its copies of these settings are renewed as well."""
        os.environ.pop("RAY_AUTH_TOKEN", None)  # would outrank the path
        os.environ.update(self.environment())
        from ray._private import ray_constants
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        ray_constants.ENABLE_RAY_CLUSTER = False
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
