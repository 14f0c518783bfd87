"""Big Transfer: recipes, data, training, evaluation and reports."""

from bitkern.transfer.data import (
    DataError,
    ImageSet,
    digits,
    few_shot,
    hold_out,
    image_dataset,
    image_folder,
    image_shards,
    image_table,
)
from bitkern.transfer.data.loader import train_batches
from bitkern.transfer.device_config import default_precision
from bitkern.transfer.inference import evaluate, predict
from bitkern.transfer.loop import TrainingError
from bitkern.transfer.ranks import RankError
from bitkern.transfer.recipes import Recipe
from bitkern.transfer.recipes.hyperrule import HyperRule, hyperrule
from bitkern.transfer.recipes.mixup import mixup, mixup_loss
from bitkern.transfer.recipes.pretraining import Pretraining, pretraining
from bitkern.transfer.report import check_report, scores, write_report
from bitkern.transfer.run import FinishedRun, RunError, load_run
from bitkern.transfer.selection import Selection
from bitkern.transfer.trainer import TrainResult
from bitkern.transfer.training import train

__all__ = ["DataError", "FinishedRun", "HyperRule", "ImageSet", "Pretraining", "RankError"]
__all__ += ["Recipe", "RunError", "Selection", "TrainResult", "TrainingError", "check_report"]
__all__ += ["default_precision", "digits", "evaluate", "few_shot", "hold_out", "hyperrule"]
__all__ += ["image_dataset", "image_folder", "image_shards", "image_table", "load_run", "mixup"]
__all__ += ["mixup_loss", "predict", "pretraining", "scores", "train", "train_batches"]
__all__ += ["write_report"]
