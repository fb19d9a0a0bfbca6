"""How is Ray told that a node will go, and what does it know of such nodes? Ray's own drain, which everybody on the
cluster sees: nothing new is placed there. It ends nobody, and cannot be taken back. Ray reads its settings when it is
imported, which is not here."""

from __future__ import annotations

import time

__all__ = ["drain_node", "draining_nodes"]


def drain_node(node_id: str, left_s: float, why: str, address: str | None = None) -> None:
    """Node `node_id` will be gone in so many seconds. `address`: of the cluster, if this process has not joined it."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    deadline_ms = int((time.time() + left_s) * 1000)
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # one that a node cannot refuse
    gcs = ray._private.worker.global_worker.gcs_client if address is None else GcsClient(address=address)
    gcs.drain_node(node_id, reason, why, deadline_ms)


def draining_nodes() -> dict[str, float | None]:
    """Nodes that are drained, with the seconds that are left; None where nobody said. Of one that is dead nothing is
    known any more."""
    import ray

    now_ms = time.time() * 1000
    found = ray._private.state.state.get_draining_nodes()
    return {node: max(0.0, (at_ms - now_ms) / 1000) if at_ms else None for node, at_ms in found.items()}
