"""Launchers of the compiled kernels in ``bitkern._C``: tensors to addresses, outputs allocated."""

import torch

from bitkern.backend import extension

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ACTS = {"none": 0, "relu": 1, "silu": 2}


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _problem(x, num_groups, weight, bias, act):
    batch, channels = x.shape[:2]
    pixels = 1
    for size in x.shape[2:]:
        pixels *= size
    dtypes = [0 if p is None else _DTYPES[p.dtype] for p in (weight, bias)]
    channels_last = not x.is_contiguous()
    return batch, channels, pixels, num_groups, channels_last, _DTYPES[x.dtype], *dtypes, _ACTS[act]


def _forward(x, residual, num_groups, weight, bias, eps, act, total, y, mean, rstd, normalized):
    extension()[0].cpu.group_norm_act_forward(
        *_problem(x, num_groups, weight, bias, act),
        x.data_ptr(),
        _address(residual),
        _address(weight),
        _address(bias),
        eps,
        _address(total),
        y.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        normalized,
        torch.get_num_threads(),
    )


def group_norm_act_forward(x, residual, num_groups, weight, bias, eps, act):
    total = None if residual is None else torch.empty_like(x)
    y = torch.empty_like(x)
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    outs = total, y, mean, rstd
    _forward(x, residual, num_groups, weight, bias, eps, act, *outs, False)
    return outs


def group_norm_act_recompute(total, num_groups, weight, bias, mean, rstd, act):
    y = torch.empty_like(total)
    _forward(total, None, num_groups, weight, bias, 0.0, act, None, y, mean, rstd, True)
    return y


def group_norm_act_backward(
    dy, dtotal, total, num_groups, weight, bias, mean, rstd, act, need_dx, need_dparams
):
    dx = torch.empty_like(total) if need_dx else None
    dweight = torch.empty_like(weight) if need_dparams and weight is not None else None
    dbias = torch.empty_like(bias) if need_dparams and bias is not None else None
    extension()[0].cpu.group_norm_act_backward(
        *_problem(total, num_groups, weight, bias, act),
        dy.data_ptr(),
        _address(dtotal),
        total.data_ptr(),
        _address(weight),
        _address(bias),
        mean.data_ptr(),
        rstd.data_ptr(),
        _address(dx),
        _address(dweight),
        _address(dbias),
        torch.get_num_threads(),
    )
    return dx, dweight, dbias


def _filter_shape(weight):
    """Filters, inner and taps of a weight [O, I, *kernel]."""
    taps = 1
    for size in weight.shape[2:]:
        taps *= size
    return weight.shape[0], weight.shape[1], taps


def _launch_weight_standardize(name, weights, *args):
    """Calls the launcher of the weights' device, with its threads or its current stream."""
    module = extension()[0]
    device = weights[0].device
    if device.type == "cpu":
        getattr(module.cpu, name)(*args, torch.get_num_threads())
    else:
        with torch.cuda.device(device):
            getattr(module.cuda, name)(*args, torch.cuda.current_stream().cuda_stream)


def weight_standardize_forward(
    weights, gains, scales, eps, eps_outside, unbiased, dtype, channels_last
):
    format = torch.channels_last if channels_last else torch.contiguous_format
    outs = [torch.empty_like(w, dtype=dtype, memory_format=format) for w in weights]
    filters = sum(w.shape[0] for w in weights)
    stats = weights[0].new_empty((2, filters), dtype=torch.float32)
    mean, std = stats.data_ptr(), stats.data_ptr() + 4 * filters
    layers = []
    for i, (w, out) in enumerate(zip(weights, outs, strict=True)):
        gain = 0 if gains is None else gains[i].data_ptr()
        layouts = not w.is_contiguous(), not out.is_contiguous()
        addresses = w.data_ptr(), gain, mean, std, out.data_ptr(), 0, 0, 0
        layers.append((*_filter_shape(w), scales[i], *layouts, *addresses))
        mean += 4 * w.shape[0]
        std += 4 * w.shape[0]
    dtypes = _DTYPES[weights[0].dtype], _DTYPES[dtype]
    variant = eps, eps_outside, unbiased, *dtypes
    _launch_weight_standardize("weight_standardize_forward", weights, *variant, layers)
    return outs, stats


def weight_standardize_backward(douts, weights, gains, scales, stats, eps, eps_outside, unbiased):
    dweights = [torch.empty_like(w) for w in weights]
    dgains = None if gains is None else [torch.empty_like(g) for g in gains]
    mean, std = stats.data_ptr(), stats.data_ptr() + 4 * stats.shape[1]
    layers = []
    for i, (w, dout, dw) in enumerate(zip(weights, douts, dweights, strict=True)):
        gain, dgain = (0, 0) if gains is None else (gains[i].data_ptr(), dgains[i].data_ptr())
        layouts = not w.is_contiguous(), not dout.is_contiguous()
        addresses = w.data_ptr(), gain, mean, std, 0, dout.data_ptr(), dw.data_ptr(), dgain
        layers.append((*_filter_shape(w), scales[i], *layouts, *addresses))
        mean += 4 * w.shape[0]
        std += 4 * w.shape[0]
    dtypes = _DTYPES[weights[0].dtype], _DTYPES[douts[0].dtype]
    variant = eps, eps_outside, unbiased, *dtypes
    _launch_weight_standardize("weight_standardize_backward", weights, *variant, layers)
    return dweights, dgains
