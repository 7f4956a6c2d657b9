"""Facts of each routing rule that the rest of the project uses, without torch.

A router class inherits from its rule (see `moe.routers`), so that one class holds all facts of a rule. Sizes, plans,
benchmarks, checks of a recipe, sampling and reports ask the rule and never compare names.
"""

from .rule import RoutingRule, RoutingSettings
from .rules import (
    RULES,
    DiffMoERule,
    DSMoERule,
    ExpertChoiceRule,
    NucleusRule,
    ProMoERule,
    RaceRule,
    ThresholdRule,
    TimeRule,
    TokenChoiceRule,
    names_with_thresholds,
    rule_of,
)

__all__ = [
    "RULES",
    "DSMoERule",
    "DiffMoERule",
    "ExpertChoiceRule",
    "NucleusRule",
    "ProMoERule",
    "RaceRule",
    "RoutingRule",
    "RoutingSettings",
    "ThresholdRule",
    "TimeRule",
    "TokenChoiceRule",
    "names_with_thresholds",
    "rule_of",
]
