"""Change the number of experts of a model: grow, shrink, freeze what was there, and observe what is used."""

from peerlm.growth.freezing import freeze_grown
from peerlm.growth.growing import grow, set_opening, to_shells
from peerlm.growth.observation import observe
from peerlm.growth.shrinking import shrink

__all__ = ["freeze_grown", "grow", "observe", "set_opening", "shrink", "to_shells"]
