"""What importing costs."""

import subprocess
import sys

import pytest

HEAVY = {"diffusers", "datasets", "sklearn", "matplotlib", "yaml", "rich", "safetensors", "PIL"}


def loaded_by(statement):
    """Packages that a fresh process has loaded after a statement."""
    code = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_the_moe_layer_loads_torch_alone():
    loaded = loaded_by("from diffusion_moe.moe import MoEFeedForward; from diffusion_moe import RouterConfig")
    assert "torch" in loaded
    assert not loaded & HEAVY


def test_the_command_answers_mistakes_without_loading_torch():
    assert "torch" not in loaded_by("from diffusion_moe.cli import main; main(['train', 'digits', '--model.dept=3'])")


def test_public_names_are_there_and_others_are_not():
    import diffusion_moe

    assert all(hasattr(diffusion_moe, name) for name in diffusion_moe.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Dit'"):
        diffusion_moe.Dit  # noqa: B018
