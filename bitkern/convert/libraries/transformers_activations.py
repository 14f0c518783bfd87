"""Activations of transformers (https://github.com/huggingface/transformers), of all its models."""

from typing import Any

from transformers.activations import GELUActivation, MishActivation, SiLUActivation

from bitkern.nn.activations import ACTS

ACTS.update({SiLUActivation: "silu", GELUActivation: "gelu", MishActivation: "mish"})
LAYERS: dict[type, Any] = {}
BLOCKS: dict[type, Any] = {}
