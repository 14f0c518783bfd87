"""Operands that instructions read."""

from collections.abc import Callable

import numpy as np

from tests.backends.triton.ptx.arithmetic import UNSIGNED, UnknownOpcode
from tests.backends.triton.ptx.memory import Fault
from tests.backends.triton.ptx.parser import SIZES

# Of a register that nothing was written to: half of a pair that nobody looks at, or else a NaN.
UNWRITTEN = {1: True, 2: 0x7FFF, 4: 0x7FFFDEAD, 8: 0x7FFFDEAD7FFFDEAD}


def expect(known, instruction):
    if not known:
        raise UnknownOpcode(instruction.text)


def source(operand: str, kind: str, relaxed: bool = False) -> Callable:
    """Return a function from a group to an operand's bits; ``relaxed`` takes the lower ones."""
    size = SIZES[kind]
    dtype = np.bool_ if kind == "pred" else UNSIGNED[size]
    if operand in ("%tid.x", "%ctaid.x"):
        name = operand[1:-2]
        return lambda group: getattr(group, name)
    if operand.startswith("%"):
        unwritten = np.full(1, UNWRITTEN[size], dtype)

        def register(group):
            value = group.registers.get(operand, unwritten)
            if relaxed and value.dtype.itemsize > size:
                return value.astype(dtype)
            if value.dtype != dtype:
                raise Fault(0, f"{operand} is of {value.dtype}, expected {dtype.__name__}")
            return value

        return register
    if operand.startswith("0f"):
        constant = int(operand[2:], 16)
    else:
        constant = int(operand.removesuffix("U"), 0)
    if kind == "pred":
        value = np.full(1, constant != 0)
    else:
        value = np.full(1, constant & ((1 << 8 * size) - 1), dtype)
    return lambda group: value
