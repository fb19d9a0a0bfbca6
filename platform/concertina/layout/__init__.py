"""Who is where: axes, the two grids, groups, boxes."""

from concertina.layout.axis import ATTENTION, EXPERT, GROUPS, Axis
from concertina.layout.box import Box, cut
from concertina.layout.draw import draw
from concertina.layout.fit import check_job
from concertina.layout.fold import Layout
from concertina.layout.grid import Grid

__all__ = ["ATTENTION", "EXPERT", "GROUPS", "Axis", "Box", "Grid", "Layout", "check_job", "cut", "draw"]
