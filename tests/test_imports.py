"""What importing costs."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import diffusion_moe

HEAVY = {"diffusers", "datasets", "sklearn", "matplotlib", "yaml", "rich", "safetensors", "PIL"}


def loaded_by(statement):
    """Packages that a fresh process has loaded after a statement."""
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_the_command_answers_mistakes_without_loading_torch():
    assert "torch" not in loaded_by("from diffusion_moe.cli import main; main(['train', 'digits', '--model.dept=3'])")


SETTINGS = {"sample_size": 8, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 4, "expert_dim": 8}
MODEL = f"DiT(**{SETTINGS})"
LIBRARIES = {"diffusers", "transformers", "accelerate", "peft", "datasets", "sklearn", "pandas", "scipy", "matplotlib"}


def test_the_moe_layer_loads_torch_alone_and_models_neither_its_compiler_nor_diffusers():
    layer = "from diffusion_moe.moe import MoEFeedForward; from diffusion_moe import RouterConfig"
    model = f"from diffusion_moe import DiT; import copy; copy.deepcopy({MODEL})"
    check = f"assert not {HEAVY} & {{name.split('.')[0] for name in sys.modules}}"
    loaded = loaded_by(f"{layer}; {check}; {model}; assert 'torch._dynamo' not in sys.modules")
    assert "torch" in loaded and not loaded & LIBRARIES


def test_counting_and_listing_recipes_loads_no_torch():
    loaded = loaded_by(
        "import os; from diffusion_moe.cli import main; sys.stdout = open(os.devnull, 'w'); "
        "main(['recipes', '--flops']); sys.stdout = sys.__stdout__"
    )
    assert not loaded & {"torch", *LIBRARIES}


def test_plans_load_no_torch():
    loaded = loaded_by(
        "import os; from diffusion_moe.cli import main; sys.stdout = open(os.devnull, 'w'); "
        "assert main(['plan', 'dsmoe-l-e48', '--world=8']) == 0; sys.stdout = sys.__stdout__"
    )
    assert "yaml" in loaded and not loaded & {"torch", *LIBRARIES}


def test_a_whole_training_loads_nothing_that_it_does_not_use(tiny, tmp_path):
    options = [*tiny, "--training.steps=1", "--training.device=cpu", f"--output_dir={tmp_path / 'run'}"]
    train = f"from diffusion_moe.cli import main; assert main({['train', 'digits', *options]!r}) == 0"
    loaded = loaded_by(f"import os; sys.stdout = open(os.devnull, 'w'); {train}; sys.stdout = sys.__stdout__")
    assert "torch" in loaded and not loaded & {*LIBRARIES, "sympy"}, "sympy comes with torch's compiler"
    assert (tmp_path / "run" / "model" / "config.json").is_file()


BASES = (
    "from diffusers import ModelMixin, ConfigMixin; from diffusers.loaders import PeftAdapterMixin; "
    "from diffusers.models.attention import AttentionMixin, AttentionModuleMixin; "
    "assert all(isinstance(model, base) for base in (ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin)); "
    "assert isinstance(model.blocks[0].attn, AttentionModuleMixin); assert model.config.depth == 2"
)
"""A check that a model is diffusers', also one that was made before diffusers was loaded."""
MODULES = ["models.modeling_utils", "loaders.peft", "models.attention", "configuration_utils"]


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("first", ["diffusers", "diffusion_moe"])
def test_models_are_those_of_diffusers_whichever_is_imported_first(first, module):
    imports = [f"import diffusers.{module}", f"from diffusion_moe import DiT; model = {MODEL}"]
    loaded_by("; ".join([*(imports if first == "diffusers" else imports[::-1]), BASES]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["save_pretrained", "add_adapter", "set_attention_backend", "dtype"])
def test_asking_a_model_for_a_name_of_diffusers_loads_it(name):
    """A private name loads nothing; it would be asked for by copying and pickling. For one name
    tests/pipelines/test_registration.py shows it too."""
    code = f"from diffusion_moe import DiT; model = {MODEL}; assert not hasattr(model, '_nothing')"
    loaded_by(
        f"{code}; assert 'diffusers' not in sys.modules; model.{name}; assert 'diffusers' in sys.modules; {BASES}"
    )


def test_a_model_lacks_names_that_nobody_has():
    assert not hasattr(diffusion_moe.DiT(**SETTINGS), "nothing")


def test_public_names_are_there_and_others_are_not():
    assert all(hasattr(diffusion_moe, name) for name in diffusion_moe.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Dit'"):
        diffusion_moe.Dit  # noqa: B018


def test_a_class_name_means_one_class():
    """Readers and searches find one definition; private classes are their file's own."""
    package = Path(diffusion_moe.__file__).parent
    names = [
        node.name
        for file in package.rglob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert [name for name, count in Counter(names).items() if count > 1] == []
