"""Layers: ``WSConv2d`` for ``nn.Conv2d`` and ``GroupNormAct`` for ``nn.GroupNorm`` + activation."""

from bitkern.nn.layers import GroupNormAct, WSConv2d

__all__ = ["GroupNormAct", "WSConv2d"]
