"""Options of `sample`. This file imports nothing heavy."""

from __future__ import annotations

Weights = str
"""ema: as the folder publishes them; model: of a run's newest checkpoint, not averaged; or the decay of a further
average that the run has kept, as 0.999."""
