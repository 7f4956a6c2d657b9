"""A proof that text conditions images: prompts over coloured shapes, and a scorer without any learned part."""

from .judge import Verdict, judge, judge_all
from .parse import Found, parse
from .picture import picture
from .prompts import CATEGORIES, SPLITS, Prompt, Requirement, Wanted, evaluation_prompts, true_scenes
from .report import Report, Tally, score, table

__all__ = [
    "CATEGORIES",
    "SPLITS",
    "Found",
    "Prompt",
    "Report",
    "Requirement",
    "Tally",
    "Verdict",
    "Wanted",
    "evaluation_prompts",
    "judge",
    "judge_all",
    "parse",
    "picture",
    "score",
    "table",
    "true_scenes",
]
