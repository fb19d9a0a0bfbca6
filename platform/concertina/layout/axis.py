"""Which axes are there, on which of the two grids, and which of them span a named group?

Both tables run from the fastest varying axis to the slowest: Megatron-Core's default order
`tp-cp-ep-dp-pp`. The pipeline comes last on both sides. Listing 1 of the folding paper (arXiv 2504.14960)
puts dp last instead, and then the pipeline groups of the two grids differ as soon as tp*cp != etp*ep:
`tests/layout/test_fold.py` shows it.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = ["ATTENTION", "ENDS", "EXPERT", "GROUPS", "STAGE", "Axis"]


class Axis(StrEnum):
    """An axis of the rank grids. Its size is a degree, a position on it a coordinate."""

    PP = "pp"
    """Pipeline stages, the same on both grids."""
    DP = "dp"
    """Data parallel replicas of attention."""
    CP = "cp"
    """Chunks of a sequence."""
    TP = "tp"
    """Slices of attention's heads and dense widths."""
    EDP = "edp"
    """Data parallel replicas of experts."""
    EP = "ep"
    """Groups the experts are spread over."""
    ETP = "etp"
    """Slices of one expert's width."""


ATTENTION = (Axis.TP, Axis.CP, Axis.DP, Axis.PP)
EXPERT = (Axis.ETP, Axis.EP, Axis.EDP, Axis.PP)

GROUPS: dict[str, tuple[Axis, ...]] = {
    "tp": (Axis.TP,),
    "cp": (Axis.CP,),
    "dp": (Axis.DP,),
    "dp_cp": (Axis.DP, Axis.CP),
    "tp_cp": (Axis.TP, Axis.CP),
    "pp": (Axis.PP,),
    "ep": (Axis.EP,),
    "etp": (Axis.ETP,),
    "edp": (Axis.EDP,),
    "etp_ep": (Axis.ETP, Axis.EP),
}
"""Group name -> the axes that vary inside it."""

STAGE = "dp_cp_tp"
"""The group of a whole pipeline stage: what every lane of tp holds alike is summed over it. `layout -o json` does not
list it: it is attention's grid without the pipeline."""

ENDS = "dp_cp_ends"
"""dp_cp of the first and of the last pipeline stage together: where a weight that embedding and head share is held."""
