"""A user's mistakes; a strict type checker finds each on the line that says so."""

import torch
from torch import nn

import bitkern
from bitkern import transfer
from bitkern.nn import GroupNormAct, WSConv2d

x = torch.ones(1, 8, 2, 2)
bitkern.ops.group_norm_act(x, 4, act="tanh")  # error: arg-type
bitkern.ops.group_norm_act(x)  # error: call-arg
bitkern.ops.add_group_norm_act(x, None, 4)  # error: arg-type
bitkern.ops.weight_standardize([x])  # error: arg-type
bitkern.ops.ws_conv2d(x, x, scale="large")  # error: arg-type
bitkern.reference.group_norm_act(x, "4")  # error: arg-type
WSConv2d(3, 8, kernel_size="3")  # error: arg-type
WSConv2d(3, 8, 3, epsilon=1e-5)  # error: call-arg
GroupNormAct(4, 8, act=nn.ReLU)  # error: arg-type
bitkern.convert("R50x1")  # error: type-var
linear: nn.Linear = bitkern.convert(nn.Conv2d(1, 1, 1))  # error: assignment
bitkern.explain(x)  # error: call-overload
bitkern.use_backend(None)  # error: arg-type
bitkern.standardised(nn.Linear(1, 1))  # error: attr-defined
bitkern.create_model(50)  # error: call-overload
bitkern.create_model("R50x1", pretrained="yes")  # error: call-overload
bitkern.create_model("R50x1", cache_dir=1)  # error: call-overload
bitkern.create_model("R50x1", out_indices=(1,))  # error: call-overload
bitkern.create_model("R50x1", features_only=True).reset_classifier(3)  # error: operator
bitkern.models.load_npz("weights.npz", nn.Linear(1, 1))  # error: arg-type
rule = transfer.hyperrule(1000, 480)  # error: arg-type
transfer.train(nn.Linear(1, 1), "data", transfer.hyperrule(9, (8, 8)))  # error: arg-type
transfer.mixup(x, x, "0.3", x)  # error: arg-type
transfer.evaluate(nn.Linear(1, 1), transfer.digits("test"))  # error: call-arg
steps: str = transfer.hyperrule(1000, (480, 480)).steps  # error: assignment
