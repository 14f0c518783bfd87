"""The BiT transfer recipe: the HyperRule and MixUp as pure functions, data, and one loop."""

from bitkern.transfer.hyperrule import HyperRule, hyperrule
from bitkern.transfer.mixup import mixup, mixup_loss

__all__ = ["HyperRule", "hyperrule", "mixup", "mixup_loss"]
