"""Small programs on the machine itself: their results, and the faults of wrong ones."""

import numpy as np
import pytest
import torch

from tests.backends.triton.ptx.arithmetic import ERRORS, UnknownOpcode, arithmetic
from tests.backends.triton.ptx.machine import Launch, LaunchFault, Program
from tests.backends.triton.ptx.parser import parse

THREADS = 64
# %rd1, %rd2: the thread's own place of 4 bytes in x and y; %r3: in shared memory.
MODULE = """
.version 8.7
.target sm_80
.extern .shared .align 16 .b8 global_smem[];
.visible .entry wrong(
    .param .u64 .ptr .global .align 1 x,
    .param .u64 .ptr .global .align 1 y
)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    .loc 1 3 5  // wrong.py:3:5
    ld.param.b64 %rd1, [x];
    ld.param.b64 %rd2, [y];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mad.lo.s32 %r2, %r2, {threads}, %r1;
    shl.b32 %r3, %r1, 2;
    mad.wide.s32 %rd1, %r2, 4, %rd1;
    mad.wide.s32 %rd2, %r2, 4, %rd2;
    .loc 1 7 5  // wrong.py:7:5
    {body}
    ret;
}}
"""


def run(body, programs=2):
    """Run a body with x = 0, 1, …; return y and the launch."""
    x = np.arange(programs * THREADS, dtype=np.int32)
    y = np.full_like(x, -1)
    tensors = [(t.ctypes.data, t.nbytes) for t in (x, y)]
    program = Program.of(parse(MODULE.format(threads=THREADS, body=body)))
    arguments = [start.to_bytes(8, "little") for start, _ in tensors]
    return y, Launch(program, programs, 4 * THREADS, arguments, tensors)


COPY = "ld.global.b32 %r4, [ %rd1 + 0 ]; st.global.b32 [ %rd2 + 0 ], { %r4 };"
THERE = "ld.global.b32 %r4, [%rd1]; st.shared.b32 [%r3], %r4;"  # into shared memory
# What the neighbour, or the thread of another warp, has put there.
NEIGHBOUR = "xor.b32 %r5, %r3, 4; ld.shared.b32 %r4, [%r5]; st.global.b32 [%rd2], %r4;"
FAR = NEIGHBOUR.replace("%r3, 4", "%r3, 128")
ASYNC = "cp.async.ca.shared.global [ %r3 + 0 ], [ %rd1 + 0 ], 0x4; cp.async.commit_group;"
BACK = "ld.shared.b32 %r4, [%r3]; st.global.b32 [%rd2], %r4;"
WAIT = "cp.async.wait_group 0;"
BARRIER = "bar.sync 0;"
EVEN = "and.b32 %r5, %r1, 1; setp.eq.b32 %p1, %r5, 0;"


def test_a_copy_and_its_bytes():
    y, launch = run(COPY)
    assert (y == np.arange(2 * THREADS)).all()
    assert list(launch.memory.bytes_read + launch.memory.bytes_written) == [512, 512]


@pytest.mark.parametrize(
    "body, neighbour",
    [
        (THERE + BARRIER + NEIGHBOUR, 1),
        (THERE + BARRIER + FAR, 32),
        (THERE + "bar.warp.sync -1;" + NEIGHBOUR, 1),
        (ASYNC + WAIT + BARRIER + FAR, 32),
        (ASYNC + WAIT + BACK, 0),
        ("ld.global.b32 %r4, [%rd1]; shfl.sync.bfly.b32 %r4, %r4, 2, 31, -1;"
         "st.global.b32 [%rd2], %r4;", 2),
    ],
)  # fmt: skip
def test_what_is_ordered_is_right(body, neighbour):
    y, _ = run(body)
    assert (y == np.arange(2 * THREADS) ^ neighbour).all()


WRONG = {
    "out of bounds": ("ld.global.b32 %r4, [%rd1+4];", "program 1, thread 63: out of bounds: byte"
                      " 512 of a tensor of 512", "ld.global.b32 %r4, [%rd1+4]"),
    "before the start": ("add.s64 %rd1, %rd1, -8; ld.global.b32 %r4, [%rd1];",
                         "program 0, thread 0: out of bounds", "ld.global.b32"),
    "store out of bounds": ("st.global.b32 [%rd2+256], %r1;", "program 1, thread 0: out of bounds",
                            "st.global.b32"),
    "shared out of bounds": ("st.shared.b32 [%r3+4], %r1;", "thread 63: out of bounds: byte 256 of"
                             " 256", "st.shared.b32"),
    "parameter out of bounds": ("ld.param.b64 %rd1, [y+16];", "program 0, thread 0: out of bounds:"
                                " byte 32 of 32 of the parameters", "ld.param.b64 %rd1, [y+16]"),
    "misaligned": ("ld.global.v2.b32 {%r4, %r5}, [%rd1+4];", "thread 0: misaligned: 8 bytes",
                   "ld.global.v2.b32"),
    "shared misaligned": ("st.shared.b32 [%r3+2], %r1;", "thread 0: misaligned", "st.shared.b32"),
    "missing barrier": (THERE + NEIGHBOUR, "thread 0: race: thread 1 of program 0 wrote",
                        "ld.shared.b32 %r4, [%r5]"),
    "a barrier of the warp alone": (THERE + "bar.warp.sync -1;" + FAR,
                                    "thread 0: race: thread 32 of program 0 wrote", "ld.shared"),
    "overwritten while others read": (
        THERE + BARRIER + NEIGHBOUR + "st.shared.b32 [%r3], %r1;",
        "thread 0: race: thread 1 of program 0 read", "st.shared.b32 [%r3], %r1"),
    "overwritten while several read": (
        THERE + BARRIER + "ld.shared.b32 %r4, [global_smem]; st.shared.b32 [%r3], %r1;",
        "thread 0: race: other threads read", "st.shared.b32 [%r3], %r1"),
    "race in global memory": (
        "st.global.b32 [%rd2], %r1; xor.b32 %r4, %r1, 32; sub.s32 %r4, %r4, %r1;"
        "mad.wide.s32 %rd2, %r4, 4, %rd2; ld.global.b32 %r4, [%rd2];",
        "race: thread 32 of program 0 wrote", "ld.global.b32"),
    "race of programs": (
        "ld.param.b64 %rd2, [y]; mad.wide.s32 %rd2, %r1, 4, %rd2; mov.u32 %r4, %ctaid.x;"
        "setp.eq.b32 %p1, %r4, 0; @%p1 st.global.b32 [%rd2], %r1; bar.sync 0;"
        "@!%p1 ld.global.b32 %r4, [%rd2];", "program 1, thread 0: race: thread 0 of program 0",
        "ld.global.b32"),
    "two programs store the same": ("ld.param.b64 %rd2, [y]; st.global.b32 [%rd2], 7;",
                                    "of program 1 stores to the same place", "st.global.b32"),
    "two warps store to one place": ("st.shared.b32 [global_smem], %r1;", "race: thread",
                                     "st.shared.b32"),
    "missing wait": (ASYNC + BACK, "thread 0: reads what an asynchronous copy brings",
                     "ld.shared.b32 %r4, [%r3]"),
    "a wait for too little": (ASYNC + "cp.async.wait_group 1;" + BACK,
                              "reads what an asynchronous copy brings", "ld.shared.b32"),
    "no barrier after the wait": (ASYNC + WAIT + FAR, "race: thread 32 of program 0 wrote",
                                  "ld.shared.b32"),
    "divergent barrier": (EVEN + "@%p1 bra $L1; bar.sync 0; $L1:\n", "program 0, thread 1:"
                          " divergent barrier: 32 of 64 threads", "bar.sync 0"),
    "predicated barrier": (EVEN + "@%p1 bar.sync 0;", "thread 0: divergent barrier", "bar.sync 0"),
    "divergent shuffle": (EVEN + "@%p1 shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;",
                          "divergent shuffle: 16 of 32 threads", "shfl.sync"),
    "another width": ("mov.b32 %r4, 0; add.s64 %rd3, %r4, 1;", "%r4 is of uint32, expected uint64",
                      "add.s64"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_is_named(fault):
    body, what, instruction = WRONG[fault]
    with pytest.raises(LaunchFault) as raised:
        run(body.replace("$L1:\n", "\n$L1:\n"))
    message = str(raised.value)
    assert message.startswith("wrong, program ") and message.endswith("(wrong.py:7)")
    assert what in message and instruction in message


def test_threads_that_part_meet_again():
    """Covers code of some threads that lies after the code of all."""
    body = (
        EVEN
        + """
        @%p1 bra $L2;
    $L1:
        bar.sync 0;
        st.global.b32 [%rd2], %r1;
        ret;
    $L2:
        add.s32 %r1, %r1, 100;
        bra.uni $L1;"""
    )
    y, _ = run(body)
    thread = np.arange(2 * THREADS) % THREADS
    assert (y == thread + 100 * (thread % 2 == 0)).all()


def test_programs_that_part():
    """Each program runs a loop of as many turns as its number."""
    body = """
        mov.b32 %r4, 0;
        mov.u32 %r5, %ctaid.x;
    $L1:
        add.s32 %r4, %r4, 1;
        setp.le.s32 %p1, %r4, %r5;
        @%p1 bra $L1;
        st.global.b32 [%rd2], %r4;"""
    y, _ = run(body, programs=3)
    assert (y.reshape(3, -1) == [[1], [2], [3]]).all()


def test_a_table_of_branches():
    body = """
        mov.u32 %r5, %ctaid.x;
    $L_brx_0: .branchtargets
        $L1,
        $L2;
        brx.idx %r5, $L_brx_0;
    $L1:
        mov.b32 %r4, 5;
        bra.uni $L3;
    $L2:
        mov.b32 %r4, 6;
    $L3:
        st.global.b32 [%rd2], %r4;"""
    y, _ = run(body)
    assert (y.reshape(2, -1) == [[5], [6]]).all()


def test_memory_that_nobody_wrote_is_nan():
    y, _ = run("ld.shared.b32 %r4, [%r3]; st.global.b32 [%rd2], %r4;")
    assert np.isnan(y.view(np.float32)).all()


@pytest.mark.parametrize("opcode", ["wgmma.fence", "add.rz.f32", "shl.b8", "cvt.rpi.s32.f32"])
def test_unknown_instructions_are_refused(opcode):
    with pytest.raises(UnknownOpcode, match=opcode.partition(".")[0]):
        run(f"{opcode} %r4, %r1, %r2;")


def bits(values, dtype=np.float32):
    return np.array(values, dtype).view(f"u{np.dtype(dtype).itemsize}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_roundings_are_pytorchs(dtype):
    short = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    a, b = torch.randn(2, 10000, generator=torch.Generator().manual_seed(0)) * 30
    ties = (torch.arange(2000, dtype=torch.int32) * 0x8000 + 0x3F800000).view(torch.float32)
    for x in (a, ties):
        got = arithmetic(f"cvt.rn.{short}.f32").function(bits(x.numpy()))
        assert (got == x.to(dtype).view(torch.int16).numpy().view(np.uint16)).all()
    a, b = a.to(dtype), b.to(dtype)
    raw = [t.view(torch.int16).numpy().view(np.uint16) for t in (a, b)]
    for name, expected in (("add", a + b), ("mul", a * b), ("sub", a - b)):
        got = arithmetic(f"{name}.{short}").function(*raw)
        assert (got == expected.view(torch.int16).numpy().view(np.uint16)).all()
        pairs = [np.ascontiguousarray(r).view(np.uint32) for r in raw]
        got = arithmetic(f"{name}.{short}x2").function(*pairs).view(np.uint16)
        assert (got == expected.view(torch.int16).numpy().view(np.uint16)).all()


def test_integers():
    def of(opcode, *arguments, dtype=np.int32):
        got = arithmetic(opcode).function(*(np.array([a], dtype).view("u4") for a in arguments))
        return int(got.view(f"i{got.dtype.itemsize}")[0])

    assert of("div.s32", -7, 2) == -3 and of("rem.s32", -7, 2) == -1
    assert of("mul.wide.s32", -(2**30), 8) == -(2**33)
    assert of("mul.lo.s32", 2**30, 8) == 0
    assert of("shr.s32", -8, 1) == -4 and of("shr.s32", -8, 40) == -1 and of("shr.u32", 8, 40) == 0
    assert of("shl.b32", 1, 32) == 0 and of("shl.b32", 1, 31) == -(2**31)
    assert of("bfe.u32", 0b110100, 2, 3) == 0b101 and of("bfe.s32", 0b110100, 2, 3) == -3
    assert of("prmt.b32", 0x33221100, 0x77665544, 0x7142) == 0x77114422


def test_comparisons_with_nan():
    nan, one = bits([np.nan]), bits([1.0])
    for opcode, expected in (("ne", False), ("neu", True), ("ltu", True), ("le", False),
                             ("nan", True), ("num", False)):  # fmt: skip
        assert arithmetic(f"setp.{opcode}.f32").function(nan, one)[0] == expected
    assert arithmetic("max.f32").function(nan, one)[0] == one[0]
    assert np.isnan(arithmetic("max.NaN.f32").function(nan, one).view(np.float32)[0])


@pytest.mark.parametrize("name", ERRORS)
def test_approximations_are_as_far_off_as_documented(name):
    x = np.abs(np.random.default_rng(0).standard_normal(20000)).astype(np.float32) + 0.1
    arguments = (np.ones_like(x), x) if name.startswith("div") else (x,)
    got = arithmetic(f"{name}.f32").function(*map(bits, arguments)).view(np.float32)
    exact = {
        "ex2": np.exp2, "rcp": np.reciprocal, "div": np.reciprocal, "sqrt": np.sqrt,
        "rsqrt": lambda x: 1 / np.sqrt(x), "tanh": np.tanh,
    }[name.partition(".")[0]](x.astype(np.float64))  # fmt: skip
    error = np.abs(got / exact - 1).max() / ERRORS[name]
    assert 0.9 < error < 1 + 2**-24 / ERRORS[name]
    again = arithmetic(f"{name}.f32").function(*map(bits, arguments)).view(np.float32)
    assert (again == got).all()
