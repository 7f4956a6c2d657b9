"""Recipes: everything that defines a run, as frozen dataclasses, a file a section.

A recipe is a YAML file whose sections are the fields of `Recipe`; every field is also an option of the command, under
the same dotted name. This room imports nothing heavy, so that `--help` and a mistyped key answer at once.
"""

from .build import as_text, build, unknown_name
from .data import DataConfig, FolderClasses, ShapesLayout
from .diffusion import DiffusionConfig
from .evaluation import DDPM_SOLVERS, FLOW_SOLVERS, EvaluationConfig, Solver
from .fields import names_where, older_values, require, setting
from .initialization import InitConfig
from .logging import LoggingConfig
from .model import TEXT_FIELDS, Activation, Balance, ModelConfig, Position, Prediction, Process, Router, unread_by
from .optimizer import OptimizerConfig
from .parallel import ParallelConfig
from .reading import find_recipe, read_recipe, read_sections, read_yaml, recipe_names
from .recipe import SECTIONS, Recipe, difference, to_dict, to_yaml
from .renamed import current_names
from .training import TrainingConfig

__all__ = [
    "DDPM_SOLVERS",
    "FLOW_SOLVERS",
    "SECTIONS",
    "TEXT_FIELDS",
    "Activation",
    "Balance",
    "DataConfig",
    "DiffusionConfig",
    "EvaluationConfig",
    "FolderClasses",
    "InitConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Position",
    "Prediction",
    "Process",
    "Recipe",
    "Router",
    "ShapesLayout",
    "Solver",
    "TrainingConfig",
    "as_text",
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
    "setting",
    "to_dict",
    "to_yaml",
    "unknown_name",
    "unread_by",
]
