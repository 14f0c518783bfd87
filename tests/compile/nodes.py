"""The nodes of autograd graphs."""


def fused(module, *args, **kwargs):
    """Count norms fused with activation and convolutions, and those with activation alone."""
    y = module(*args, **kwargs)  # kept, or PyTorch 2.11 frees nodes whose Python objects live on
    queue, seen = [y.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [n for n, _ in node.next_functions]
    names = [node.name() for node in seen]
    kinds = "GroupNormActConvFunctionBackward", "GroupNormActFunctionBackward"
    return tuple(map(names.count, kinds))
