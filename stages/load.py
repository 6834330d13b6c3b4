"""How much the model has to do, as far as sessions must know of it."""

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Load:
    """Kept by Generate, seen by every session of a pipeline.

    `crowded`: steps known to be right fill the model's passes by themselves. Speculation buys latency with idle time of
    the model; while there is none, a guess is not decoded, since it would only take the place of certain work.
    """

    crowded: bool = False
