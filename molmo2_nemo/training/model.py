"""The model that a stage trains: chosen, configured for Megatron, built on this rank, frozen where nothing trains."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer import TransformerConfig

from molmo2_nemo.data.config import FeatureCacheConfig
from molmo2_nemo.features.frozen import FrozenFeatures
from molmo2_nemo.model.config import KernelConfig, MemoryConfig, Molmo2Config, Trainable, with_options
from molmo2_nemo.model.decoder import transformer_config
from molmo2_nemo.model.init import initialize, leave_to_checkpoint
from molmo2_nemo.model.molmo2 import Molmo2Model
from molmo2_nemo.parallel.context import ContextSettings
from molmo2_nemo.settings.run import ModelSelection, ParallelConfig, StageConfig
from molmo2_nemo.training.groups import group_of, is_adapter
from molmo2_nemo.training.precision import FP8


def chosen_model(model: ModelSelection | Molmo2Config | str | None, stage: StageConfig) -> Molmo2Config:
    """The configuration of the selected model, with the stage's adapters."""
    if isinstance(model, Molmo2Config):
        return with_options(model, lora=stage.lora, attention=model.attention)
    if isinstance(model, str):
        model = ModelSelection(preset=model)
    return (model or ModelSelection()).model_config(stage.lora)


def megatron_config(
    model_config: Molmo2Config, memory: MemoryConfig, parallel: ParallelConfig, *, precision: str, variable_length: bool
) -> TransformerConfig:
    """Megatron's settings of the model; the host adds the sizes of the layout.

    Args:
        precision: `cluster.precision`; parameters are bf16 for "fp8", too.
        variable_length: packs of one run differ in length, so pipeline stages send each other the shapes.
    """
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return transformer_config(
        model_config,
        memory,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # of what pipeline stages send each other
        variable_seq_lengths=variable_length or parallel.dynamic_context or parallel.cut_padding,
        bf16=precision != "fp32",
        gradient_accumulation_fusion=weight_gradient_library() is not None and parallel.fsdp == "none",
        **(FP8 if precision == "fp8" else {}),
        use_cpu_initialization=not torch.cuda.is_available(),
    )


def weight_gradient_library() -> str | None:
    """The library that adds products for weight gradients straight to the gradients of earlier micro-batches; None:
    each product is written and then added. What Megatron's linear layers need for it: Transformer Engine, whose layers
    the decoder then has, or an extension of Apex."""
    if not torch.cuda.is_available():
        return None
    if HAVE_TE:  # as decoder.py asks when it chooses the layers
        return "Transformer Engine"
    return "Apex" if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None else None


Loaded = Literal["nothing", "all", "all but adapters"]  # of a model's parameters


def build_model(
    model_config: Molmo2Config,
    config: Any,
    *,
    stage: StageConfig,
    memory: MemoryConfig,
    parallel: ParallelConfig,
    seed: int,
    kernels: KernelConfig | None = None,
    loaded: Loaded = "nothing",
) -> Molmo2Model:
    """This pipeline stage's part of the model, once the process groups exist.

    Args:
        config: Megatron's TransformerConfig, with the layout in it.
        seed: fresh parameters are drawn from it, alike under every layout.
        loaded: what a checkpoint will bring; it is not drawn.
    """
    model = Molmo2Model(
        model_config,
        config,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        training=stage.training_options(),
        memory=memory,
        kernels=kernels,
        context=ContextSettings(parallel.context_ulysses, parallel.cp_comm_type, parallel.dynamic_context),
        seed=seed if loaded == "nothing" else None,
    )
    if loaded == "all":
        leave_to_checkpoint(model)
    elif loaded == "all but adapters":
        leave_to_checkpoint(model, lambda name: not is_adapter(name))
        initialize(model, seed, is_adapter)
    freeze(model, stage.trainable(model_config))
    return model


def frozen_features(model: Molmo2Model, config: FeatureCacheConfig) -> FrozenFeatures | None:
    """What computes the features of a frozen encoder once, where the run asks for it and this rank has the encoder.

    Raises:
        UserError: the encoder is trained.
    """
    if not model.pre_process or (config.path is None and config.together is None):
        return None
    vision = model.model_config.vision
    return FrozenFeatures(
        model.vision,
        (vision.num_patches, vision.feature_size),
        config,
        settings=(vision, model.choices["vision"].name),
        processes=torch.distributed.get_world_size(),
    )


def freeze(model: Molmo2Model, trainable: Trainable) -> None:
    """Switches off gradients of parts that are not trainable. Parameters' names decide; `OptimConfig` has the
    groups."""
    for name, parameter in model.named_parameters():
        part = group_of(name)
        if name == "embedding.base.weight":
            part = "base_embedding"
        elif name == "output_layer.weight":
            part = "head"
        elif is_adapter(name):
            part = "adapters"
        elif part == "llm" and "norm" in name.rsplit(".", 2)[-2]:
            part = "norms"
        parameter.requires_grad_(getattr(trainable, part))
