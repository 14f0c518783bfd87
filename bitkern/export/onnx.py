"""An ONNX file of standard operators, with classes and preprocessing as metadata."""

import copy
import json
from pathlib import Path

import torch
from torch import Tensor

from bitkern.backends import use_backend
from bitkern.convert import fold
from bitkern.export.common import preprocessing, with_suffix
from bitkern.transfer.run import FinishedRun

REQUIRES: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUT = "pixel_values", "logits"
LARGEST = 2**31 - 2**20  # bytes of tensors in one file, which is limited to 2 GiB


def write(run: FinishedRun, out: Path) -> None:
    with_suffix(out, ".onnx")
    model = fold(copy.deepcopy(run.model))
    images = torch.zeros(2, 3, run.crop, run.crop)
    with use_backend("reference"):
        program = torch.onnx.export(
            model,
            (images,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    properties = program.model.metadata_props
    properties["classes"] = json.dumps(run.classes)
    properties["preprocessing"] = preprocessing(run)
    properties["probabilities"] = "sigmoid" if run.multi_label else "softmax"
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    program.save(out, external_data=size > LARGEST)


def logits(run: FinishedRun, out: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    (result,) = session.run([OUTPUT], {INPUT: images.numpy()})
    return torch.from_numpy(result)
