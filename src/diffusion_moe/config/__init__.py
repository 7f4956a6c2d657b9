"""Recipes: everything that defines a run, as frozen dataclasses.

A recipe is a YAML file whose sections are the fields of `Recipe`; every field is also an option of the command, under
the same dotted name. This room imports nothing heavy, so that `--help` and a mistyped key answer at once.
"""

from .build import build, unknown_name
from .data import DataConfig, FolderClasses, ShapesLayout
from .evaluation import DDPM_SOLVERS, FLOW_SOLVERS, EvaluationConfig
from .fields import names_where, older_values, require
from .model import TEXT_FIELDS, ModelConfig, Prediction, Process, unread_by
from .reading import find_recipe, read_recipe, read_sections, read_yaml, recipe_names
from .recipe import SECTIONS, Recipe, difference, to_dict, to_yaml
from .renamed import current_names
from .training import DiffusionConfig, InitConfig, LoggingConfig, OptimizerConfig, ParallelConfig, TrainingConfig

__all__ = [
    "DDPM_SOLVERS",
    "FLOW_SOLVERS",
    "SECTIONS",
    "TEXT_FIELDS",
    "DataConfig",
    "DiffusionConfig",
    "EvaluationConfig",
    "FolderClasses",
    "InitConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Prediction",
    "Process",
    "Recipe",
    "ShapesLayout",
    "TrainingConfig",
    "build",
    "current_names",
    "difference",
    "find_recipe",
    "names_where",
    "older_values",
    "read_recipe",
    "read_sections",
    "read_yaml",
    "recipe_names",
    "require",
    "to_dict",
    "to_yaml",
    "unknown_name",
    "unread_by",
]
