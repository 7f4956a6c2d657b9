"""Scenes of coloured shapes, drawn by the project itself, with captions from a closed list of words."""

from .captions import WORDS
from .dataset import Shapes
from .drawing import render
from .sampling import Scenes, draw_scenes
from .scene import Content, Item, Look, Scene

__all__ = ["WORDS", "Content", "Item", "Look", "Scene", "Scenes", "Shapes", "draw_scenes", "render"]
