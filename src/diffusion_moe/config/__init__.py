"""Recipes: everything that defines a run, as frozen dataclasses, a file a section.

A recipe is a YAML file whose sections are the fields of `Recipe`; every field is also an option of the command, under
the same dotted name. This room imports nothing heavy, so that `--help` and a mistyped key answer at once.
"""

from .data import DataConfig, FolderClasses, ShapesLayout
from .diffusion import DiffusionConfig
from .evaluation import DDPM_SOLVERS, FLOW_SOLVERS, EvaluationConfig, Solver
from .initialization import InitConfig
from .logging import LoggingConfig
from .model import TEXT_FIELDS, Activation, Balance, ModelConfig, Position, Prediction, Process, Router
from .optimizer import OptimizerConfig
from .parallel import ParallelConfig
from .recipe import CHANGEABLE, CHANGEABLE_SECTIONS, SECTIONS, Recipe, difference, flatten, to_dict, to_yaml
from .require import require
from .training import TrainingConfig

__all__ = [
    "CHANGEABLE",
    "CHANGEABLE_SECTIONS",
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
    "difference",
    "flatten",
    "require",
    "to_dict",
    "to_yaml",
]
