"""Gradients in several processes against those of one, for DDP and FSDP2."""

import contextlib
import functools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import bitkern
from bitkern import ops
from bitkern.models import ResNetV2
from bitkern.testing import assert_accurate
from bitkern.transfer import ranks

MICRO_BATCHES = 2


def batches():
    """The same in every process; each of 2 or 4 takes as many images of them."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 17, 20, generator=generator) for _ in range(MICRO_BATCHES)]


def build(frozen=False, checkpointing=False):
    torch.manual_seed(0)
    model = ResNetV2((2, 1, 1, 1), 0.5, num_classes=7)
    torch.nn.init.normal_(model.head.fc.weight, std=0.1)
    for name, p in model.named_parameters():
        if "norm" in name:  # gamma and beta of both signs, not 1 and 0
            torch.nn.init.normal_(p)
    model.set_grad_checkpointing(checkpointing)
    if frozen:
        for name, p in model.named_parameters():
            p.requires_grad_("stages.1" in name or name.startswith("head"))
    return model


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def no_preparation(last):
    return contextlib.nullcontext()


def accumulate(model, rank, size, before=no_preparation):
    """The gradients of the sum of squares over all images, of which this process sees its own."""
    for i, x in enumerate(batches()):
        with before(i == MICRO_BATCHES - 1):
            # Times size: both DDP and FSDP2 average over the processes.
            (model(x.chunk(size)[rank].to(model.dtype)).square().sum() * size).backward()


def gradients(model):
    return {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def gradients_of_one(frozen, dtype):
    model = build(frozen).to(dtype)
    model.dtype = dtype
    accumulate(model, 0, 1)
    return gradients(model)


@functools.cache
def expected(frozen):
    """Gradients of a single process: at float32, and at float64."""
    dtypes = torch.float32, torch.float64
    return [ranks.run_on_rank0(gradients_of_one, frozen, dtype) for dtype in dtypes]


def assert_gradients(model, frozen=False):
    peer, exact = expected(frozen)
    got = {name.removeprefix("module."): grad for name, grad in gradients(model).items()}
    assert got.keys() == exact.keys()
    for name in exact:
        assert_accurate(got[name], peer[name], exact[name], name)


def mesh_of(size):
    """The mesh and process group of ``size`` processes that this one belongs to."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // size, size), mesh_dim_names=("a", "b"))
    return mesh["b"]


def ddp_of(model, size, **options):
    ddp = DistributedDataParallel(model, process_group=mesh_of(size).get_group(), **options)
    ddp.dtype = torch.float32
    return ddp


def unsynced(ddp):
    return lambda last: contextlib.nullcontext() if last else ddp.no_sync()


def ddp_gradients_equal_those_of_one_process(folder):
    for size, standardized, frozen, checkpointing, views in (
        (2, False, False, False, True),
        (4, False, True, True, False),
        (2, True, True, False, True),
        (4, True, False, True, False),
    ):
        ddp = ddp_of(build(frozen, checkpointing), size, gradient_as_bucket_view=views)
        for _ in range(2):  # DDP rebuilds its buckets after the first step
            ddp.zero_grad()
            with bitkern.standardized(ddp) if standardized else contextlib.nullcontext():
                accumulate(ddp, dist.get_rank() % size, size, unsynced(ddp))
            assert_gradients(ddp, frozen)


def ddp_that_looks_for_unused_parameters(folder):
    """Works, but not with the weights standardized once a step: their gradients come too late."""
    x = batches()[0].chunk(2)[dist.get_rank() % 2]
    for options in ({"find_unused_parameters": True}, {"static_graph": True}):
        model = build()
        ddp = ddp_of(model, 2, **options)
        for module in (ddp, model):
            message = "without find_unused_parameters and static_graph"
            with pytest.raises(ValueError, match=message), bitkern.standardized(module):
                ddp(x)
    ddp = ddp_of(build(), 2, find_unused_parameters=True)
    accumulate(ddp, dist.get_rank() % 2, 2, unsynced(ddp))
    assert_gradients(ddp)
    ddp = ddp_of(build(), 2, static_graph=True)  # whose first step PyTorch wants without no_sync
    accumulate(ddp, dist.get_rank() % 2, 2)
    assert_gradients(ddp)


def blocks(model):
    return [block for stage in model.stages for block in stage.blocks]


def shard(model, mesh, parts, **options):
    for part in parts(model):
        fully_shard(part, mesh=mesh, **options)
    fully_shard(model, mesh=mesh)
    model.dtype = torch.float32
    return model


def synced(model, keep_weights=False):
    def before(last):
        model.set_requires_gradient_sync(last)
        if keep_weights:
            model.set_reshard_after_backward(last)
        return contextlib.nullcontext()

    return before


# Which parts of the model FSDP2 wraps besides the whole.
PARTS = {
    "nothing": lambda model: [],
    "blocks": blocks,
    "stages and stem": lambda model: [*model.stages, model.stem],
    "layers": lambda model: [m for m in model.modules() if hasattr(m, "weight")],
}


def fsdp_gradients_equal_those_of_one_process(folder):
    """The last row keeps weights between micro-batches: parts then start with whole ones."""
    for size, parts, standardized, frozen, checkpointing, keep in (
        (4, "nothing", True, False, False, False),
        (2, "nothing", False, True, True, False),
        (2, "blocks", True, False, True, False),
        (4, "blocks", False, True, False, False),
        (2, "stages and stem", False, False, True, False),
        (2, "layers", True, False, False, False),
        (2, "blocks", False, False, False, True),
    ):
        options = {"reshard_after_forward": False} if keep else {}
        model = shard(build(frozen, checkpointing), mesh_of(size), PARTS[parts], **options)
        with bitkern.standardized(model) if standardized else contextlib.nullcontext():
            accumulate(model, dist.get_rank() % size, size, synced(model, keep))
        assert_gradients(model, frozen)


def fsdp_standardizes_in_one_launch(folder):
    launch, calls = ops.weight_standardize_all, []

    def counted(weights, *arguments, **options):
        calls.append(len(weights))
        return launch(weights, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "weight_standardize_all", counted)
        for parts, convs in (("nothing", [20]), ("blocks", [1])):
            model = shard(build(), mesh_of(4), PARTS[parts])
            calls.clear()
            with bitkern.standardized(model):
                model(batches()[0])
            assert calls == convs, f"{parts}: {calls}"


def fsdp_trains_as_one_process(folder):
    """Two optimizer steps in float64, to the last digits."""
    alone, model = build().double(), shard(build().double(), mesh_of(4), blocks)
    for net, rank, size, before in (
        (alone, 0, 1, no_preparation),
        (model, dist.get_rank(), 4, synced(model)),
    ):
        net.dtype = torch.float64
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9)
        for _ in range(2):
            accumulate(net, rank, size, before)
            optimizer.step()
            optimizer.zero_grad()
    for name, p in alone.named_parameters():
        torch.testing.assert_close(whole(model.get_parameter(name)), p, msg=name)


def fsdp_needs_its_hooks(folder):
    """A method past them meets sharded weights, which no kernel may read."""
    alone, model = build(), shard(build(), mesh_of(4), blocks)
    x = batches()[0]
    with pytest.raises(RuntimeError, match="got mixed torch.Tensor and DTensor"):
        model.forward_features(x)
    register_fsdp_forward_method(model, "forward_features")
    torch.testing.assert_close(model.forward_features(x), alone.forward_features(x))


CHECKS = (
    ddp_gradients_equal_those_of_one_process,
    ddp_that_looks_for_unused_parameters,
    fsdp_gradients_equal_those_of_one_process,
    fsdp_standardizes_in_one_launch,
    fsdp_trains_as_one_process,
    fsdp_needs_its_hooks,
)
