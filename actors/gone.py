"""What does a call to an actor raise whose process has ended, or could not begin?"""

from __future__ import annotations

from ray.exceptions import OutOfMemoryError, RayActorError, RuntimeEnvSetupError

__all__ = ["GONE"]

GONE = (RayActorError, OutOfMemoryError, RuntimeEnvSetupError)
"""The last two, of one that Ray killed for memory and of one whose environment Ray could not make, are no kind of the
first."""
