"""Activations of transformers (https://github.com/huggingface/transformers), of all its models."""

from transformers.activations import GELUActivation, MishActivation, SiLUActivation

from bitkern.nn.activations import ACTS

ACTS.update({SiLUActivation: "silu", GELUActivation: "gelu", MishActivation: "mish"})
