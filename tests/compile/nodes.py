"""The nodes of autograd graphs."""


def nodes(y):
    """Return the names of the nodes of an autograd graph."""
    found, queue = [], [y.grad_fn]
    seen = set()
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.append(node.name())
            queue += [n for n, _ in node.next_functions]
    return found


def fused(module, *args, **kwargs):
    """Count norms fused with activation and convolutions, and those with activation alone."""
    names = nodes(module(*args, **kwargs))
    return (
        names.count("GroupNormActConvFunctionBackward"),
        names.count("GroupNormActFunctionBackward"),
    )
