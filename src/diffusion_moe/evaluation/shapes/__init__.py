"""A proof that text conditions images: prompts over coloured shapes, and a scorer without any learned part."""

from .gallery import picture
from .judging import Verdict, judge, judge_all
from .parsing import Found, parse
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
