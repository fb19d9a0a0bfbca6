"""What does a call to an actor raise whose process has ended, or could not begin?"""

from __future__ import annotations

from ray.exceptions import (
    ActorPlacementGroupRemoved,
    ActorUnschedulableError,
    OutOfMemoryError,
    RayActorError,
    RuntimeEnvSetupError,
)

__all__ = ["GONE", "HAS_NO_ROOM"]

HAS_NO_ROOM = (ActorPlacementGroupRemoved, ActorUnschedulableError)
"""The room it was to have is gone, as of a node that is cut off before Ray knows, and lost when it does."""

GONE = (RayActorError, OutOfMemoryError, RuntimeEnvSetupError, *HAS_NO_ROOM)
"""All but the first, of one that Ray killed for memory, whose environment Ray could not make, or that has no room, are
no kind of the first."""
