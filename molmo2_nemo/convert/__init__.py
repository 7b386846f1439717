"""Conversion between Hugging Face folders (safetensors only) and Megatron checkpoints, and the start of stage 1."""

from molmo2_nemo.convert.checkpoints import export_checkpoint, import_checkpoint
from molmo2_nemo.convert.initial import init_checkpoint
from molmo2_nemo.errors import ConversionError

import_hf = import_checkpoint
export_hf = export_checkpoint

__all__ = ["ConversionError", "export_checkpoint", "export_hf", "import_checkpoint", "import_hf", "init_checkpoint"]
