"""The bases that make our models those of diffusers, added when diffusers is loaded or first needed.

Importing diffusers takes longer than importing torch, and training needs none of it. So `Backbone` begins as a plain
module. `pipelines.registration` calls `add_loaded_bases` whenever diffusers has loaded one of `HOMES`, and asking a
model for anything of theirs (`from_pretrained`, `add_adapter`, ...) loads them all.
"""

from __future__ import annotations

import sys
from importlib import import_module

from torch import nn

from ..nn.attention import use_loaded_diffusers

HOMES = {
    "ModelMixin": "diffusers.models.modeling_utils",
    "ConfigMixin": "diffusers.configuration_utils",
    "AttentionMixin": "diffusers.models.attention",
    "PeftAdapterMixin": "diffusers.loaders.peft",
}

NAMES = """
    active_adapters add_adapter attn_processors compile_repeated_blocks config_name delete_adapters dequantize
    disable_adapters disable_gradient_checkpointing disable_lora disable_npu_flash_attention
    disable_xformers_memory_efficient_attention disable_xla_flash_attention dtype enable_adapters
    enable_group_offload enable_lora enable_lora_hotswap enable_npu_flash_attention enable_parallelism
    enable_xformers_memory_efficient_attention enable_xla_flash_attention extract_init_dict fuse_lora
    fuse_qkv_projections get_config_dict get_memory_footprint has_compatibles ignore_for_config
    is_gradient_checkpointing load_lora_adapter num_parameters push_to_hub register_for_auto_class
    register_to_config reset_attention_backend save_config save_lora_adapter save_pretrained set_adapter
    set_adapters set_attention_backend set_attn_processor set_use_memory_efficient_attention_xformers
    set_use_npu_flash_attention set_use_xla_flash_attention to_json_file to_json_string unfuse_lora
    unfuse_qkv_projections unload_lora
"""
ATTRIBUTES = frozenset(NAMES.split())
"""Public names of the bases that `Backbone` does not have itself; asking an instance for one loads diffusers."""


def add_loaded_bases(model_class: type[nn.Module]) -> None:
    """Add those bases whose modules are loaded; none before `ModelMixin`."""
    found = [getattr(sys.modules.get(home), name, None) for name, home in HOMES.items()]
    if found[0] is not None:
        model_class.__bases__ = tuple(base for base in found if base is not None)
    use_loaded_diffusers()


def add_all_bases(model_class: type[nn.Module]) -> None:
    """Load diffusers and add all bases."""
    for home in (*HOMES.values(), "diffusers.models.attention_dispatch"):
        import_module(home)
    add_loaded_bases(model_class)
