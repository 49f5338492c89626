"""Opcodes that move data, branch, wait or need a warp: snippets of PTX whose threads each leave one number, and what it must be."""

import re

import numpy as np
import pytest
from ptx import parse, transfer, warp
from ptx_snippets import run

TID = "mad.wide.u32 %rd9, %r0, 4, %rd0;"
PUT = TID + "st.global.u32 [%rd9], %r1;"
TYPES = {"u8": "%rs", "s8": "%rs", "b8": "%rs", "u16": "%rs", "s16": "%rs", "b16": "%rs", "u32": "%r", "s32": "%r", "b32": "%r",
         "u64": "%rd1", "s64": "%rd1", "b64": "%rd1", "f32": "%f", "f64": "%fd"}  # fmt: skip
BYTES = {t: int(t[1:]) // 8 for t in TYPES}
SPACES = {"global": "mad.wide.u32 %rd9, %r0, {n}, %rd1;", "shared": "mad.lo.u32 %r9, %r0, {n}, dynamic;",
          "local": "mov.u64 %rd9, own;"}  # fmt: skip


def copies():
    """Every width of ld and st, alone and in vectors: from memory, through a space, and back."""
    for type, register in TYPES.items():
        for count in (1, 2, 4):
            for space in SPACES:
                if (n := BYTES[type] * count) > 16:
                    continue
                names = ", ".join(f"{register}{i + 1}" for i in range(count))
                some, v = (f"{{{names}}}" if count > 1 else names), f".v{count}" * (count > 1)
                other = "%r9" if space == "shared" else "%rd9"
                body = f"""mad.wide.u32 %rd8, %r0, {n}, %rd0; ld.global{v}.{type} {some}, [%rd8];
                    {SPACES[space].format(n=n)} st.{space}{v}.{type} [{other}], {some};
                    ld.{space}{v}.{type} {some}, [{other}]; st.global{v}.{type} [%rd8+{32 * n}], {some};"""
                yield pytest.param(body, n, id=f"{space}{v}.{type}")


@pytest.mark.parametrize(("body", "n"), list(copies()))
def test_loads_and_stores_keep_every_byte(body, n):
    data, other = np.zeros(64 * n, np.uint8), np.zeros(32 * n + 16, np.uint8)
    data[: 32 * n] = np.random.default_rng(n).integers(0, 256, 32 * n)
    run(body, [data, other], declarations=".local .align 16 .b8 own[16];", shared_bytes=32 * n)
    assert (data[: 32 * n] == data[32 * n :]).all()


# Each leaves %r1 of thread i in out[i]; what it must be, of i.
SIGNED = (1 << 32) - 1
SNIPPETS = {
    "mov of special registers": (
        "mov.u32 %r1, %laneid; mov.u32 %r2, %warpid; mad.lo.u32 %r1, %r2, 100, %r1;",
        lambda i: i // 32 * 100 + i % 32,
    ),
    "mov of sizes": (
        "mov.u32 %r1, %ntid.x; mov.u32 %r2, %nctaid.x; mad.lo.u32 %r1, %r2, 1000, %r1; "
        "mov.u32 %r2, %ctaid.x; add.u32 %r1, %r1, %r2;",
        lambda i: 1064,
    ),
    "mov of lane masks": (
        "mov.u32 %r1, %lanemask_lt; mov.u32 %r2, %lanemask_ge; not.b32 %r2, %r2; "
        "mov.u32 %r3, %lanemask_eq; sub.u32 %r3, %r3, 1; mov.u32 %r4, %lanemask_le; "
        "shr.u32 %r4, %r4, 1; mov.u32 %r5, %lanemask_gt; not.b32 %r5, %r5; shr.u32 %r5, %r5, 1; "
        "xor.b32 %r1, %r1, %r2; xor.b32 %r3, %r3, %r4; or.b32 %r1, %r1, %r3; xor.b32 %r2, %r2, %r5; "
        "or.b32 %r1, %r1, %r2;",
        lambda i: 0,
    ),
    "mov together, apart": (
        "cvt.u16.u32 %rs1, %r0; mov.u16 %rs2, 7; mov.b32 %r2, {%rs1, %rs2}; "
        "mov.b32 {%rs3, %rs4}, %r2; mov.b32 %r3, {%rs4, %rs3}; mov.b64 %rd2, {%r2, %r3}; "
        "mov.b64 {%r4, %r5}, %rd2; sub.u32 %r1, %r5, %r4;",
        lambda i: (i << 16) + 7 - (7 << 16) - i,
    ),
    "mov keeps bits": (
        "mov.f32 %f1, 0fC0200000; mov.b32 %r1, %f1; mov.f64 %fd1, 0d3FF0000000000000; "
        "mov.b64 %rd2, %fd1; mov.s32 %r2, -5; mov.u64 %rd3, 3; mov.s64 %rd4, -3; mov.b16 %rs1, 1; "
        "mov.s16 %rs2, -1; add.s64 %rd3, %rd3, %rd4; shr.u64 %rd2, %rd2, 52; "
        "add.s64 %rd2, %rd2, %rd3; cvt.u32.u64 %r3, %rd2; add.u32 %r1, %r1, %r3; "
        "add.s32 %r1, %r1, %r2;",
        lambda i: 0xC0200000 + 0x3FF - 5,
    ),
    "mov of a predicate": (
        "setp.lt.u32 %p1, %r0, 5; mov.pred %p2, %p1; selp.u32 %r1, 3, 4, %p2;",
        lambda i: 3 if i < 5 else 4,
    ),
    "setp of both": (
        "setp.lt.u32 %p1|%p2, %r0, 5; selp.u32 %r1, 1, 0, %p1; selp.u32 %r2, 10, 0, %p2; add.u32 %r1, %r1, %r2;",
        lambda i: 1 if i < 5 else 10,
    ),
    "predication": (
        "mov.u32 %r1, 9; setp.lt.u32 %p1, %r0, 40; @%p1 mov.u32 %r1, 1; @!%p1 add.u32 %r1, %r1, %r0;",
        lambda i: 1 if i < 40 else 9 + i,
    ),
    "unknown to no thread": ("mov.u32 %r1, 9; setp.gt.u32 %p1, %r0, 400; @%p1 mov.u32 %r1, 1;", lambda i: 9),
    "branches": (
        "setp.lt.u32 %p1, %r0, 10; @%p1 bra $small; mov.u32 %r1, 2; bra.uni $end; $small: mov.u32 %r1, 1; $end:",
        lambda i: 1 if i < 10 else 2,
    ),
    "a loop of its own length": (
        "mov.u32 %r1, 0; mov.u32 %r2, %r0; $again: setp.eq.u32 %p1, %r2, 0; @%p1 bra $end; "
        "add.u32 %r1, %r1, %r2; sub.u32 %r2, %r2, 1; bra $again; $end:",
        lambda i: i * (i + 1) // 2,
    ),
    "who parts meets again": (
        "setp.lt.u32 %p1, %r0, 3; mov.u32 %r1, 1; @%p1 bra $end; mov.u32 %r1, 5; "
        "$end: shfl.sync.bfly.b32 %r1, %r1, 1, 31, -1;",
        lambda i: 1 if (i ^ 1) < 3 else 5,
    ),
    "ret of some": (
        TID + "mov.u32 %r1, 6; setp.lt.u32 %p1, %r0, 7; @%p1 st.global.u32 [%rd9], %r1; @%p1 ret; mov.u32 %r1, 8;",
        lambda i: 6 if i < 7 else 8,
    ),
    "exit of some": (
        TID + "mov.u32 %r1, 6; setp.lt.u32 %p1, %r0, 7; @%p1 st.global.u32 [%rd9], %r1; @%p1 exit; "
        "bar.sync 0; mov.u32 %r1, 8;",
        lambda i: 6 if i < 7 else 8,
    ),
    "a scope of its own": (
        "{ .reg .b32 x; mov.b32 x, 3; mov.b32 %r1, x; } { .reg .b16 x; mov.b16 x, 4; "
        "cvt.u32.u16 %r2, x; } add.u32 %r1, %r1, %r2;",
        lambda i: 7,
    ),
    **{
        f"{barrier}": (
            f"shl.b32 %r2, %r0, 2; add.u32 %r2, %r2, dynamic; st.shared.u32 [%r2], %r0; {barrier} 0; "
            f"xor.b32 %r3, %r0, 32; shl.b32 %r3, %r3, 2; ld.shared.u32 %r1, [dynamic]; "
            f"add.u32 %r3, %r3, dynamic; ld.shared.u32 %r1, [%r3];",
            lambda i: i ^ 32,
        )
        for barrier in ("bar.sync", "barrier.sync", "barrier.cta.sync")
    },
    "bar.warp.sync": (
        "mov.u32 %r1, 2; bar.warp.sync 0xffffffff; setp.lt.u32 %p1, %laneid, 16; @!%p1 bra $end; "
        "bar.warp.sync 0xffff; mov.u32 %r1, 3; $end:",
        lambda i: 3 if i % 32 < 16 else 2,
    ),
    **{
        fence: (f"{fence}; mov.u32 %r1, 4;", lambda i: 4)
        for fence in ("membar.cta", "membar.gl", "membar.sys", "fence.sc.gpu", "fence.acq_rel.cta", "fence.acq_rel.sys")
    },
    "generic addresses": (
        "cvta.shared.u64 %rd2, 0; mov.u32 %r2, dynamic; cvt.u64.u32 %rd3, %r2; "
        "cvta.shared.u64 %rd3, %rd3; mov.u64 %rd4, own; cvta.local.u64 %rd4, %rd4; "
        "cvta.global.u64 %rd5, %rd0; setp.lt.u32 %p1, %r0, 20; selp.b64 %rd6, %rd3, %rd4, %p1; "
        "mov.u32 %r3, 5; st.u32 [%rd6], %r3; bar.sync 0; ld.u32 %r1, [%rd6]; "
        "cvta.to.shared.u64 %rd7, %rd3; ld.shared.u32 %r4, [%rd7]; add.u32 %r1, %r1, %r4; "
        "cvta.to.local.u64 %rd4, %rd4; st.local.u32 [%rd4], %r0; ld.local.u32 %r4, [%rd4]; "
        "add.u32 %r1, %r1, %r4; cvta.to.global.u64 %rd5, %rd5; st.global.u32 [%rd5], %r1;",
        lambda i: 10 + i,
    ),
    "ld.param of every width": (
        "ld.param.u8 %rs1, [more+1]; cvt.u32.u16 %r1, %rs1; ld.param.s8 %rs1, [more+7]; "
        "cvt.s32.s16 %r2, %rs1; add.s32 %r1, %r1, %r2; ld.param.u16 %rs2, [more+2]; "
        "cvt.u32.u16 %r2, %rs2; add.u32 %r1, %r1, %r2; ld.param.u32 %r2, [more+4]; "
        "add.u32 %r1, %r1, %r2; ld.param.v2.u32 {%r2, %r3}, [more+8]; add.u32 %r1, %r1, %r3; "
        "mov.b64 %rd2, more; add.s64 %rd2, %rd2, 16; ld.param.u64 %rd3, [%rd2+-8]; "
        "cvt.u32.u64 %r2, %rd3; add.u32 %r1, %r1, %r2; ld.param.f32 %f1, [more+12]; "
        "mov.b32 %r2, %f1; add.u32 %r1, %r1, %r2; ld.param.s32 %r2, [more+4]; shr.s32 %r2, %r2, 28; add.u32 %r1, %r1, %r2;",
        lambda i: -8 + 1 + (0x87 - 256) + 0x0302 + 0x87060504 + 0x0F0E0D0C + 0x0B0A0908 + 0x0F0E0D0C,
    ),
    "cached loads": (
        "mov.u32 %r2, 7;" + TID + "st.global.wb.u32 [%rd9], %r2; ld.global.nc.u32 %r1, [%rd9]; "
        "ld.volatile.global.u32 %r2, [%rd9]; add.u32 %r1, %r1, %r2; "
        "ld.global.nc.L1::no_allocate.L2::128B.u32 %r2, [%rd9]; add.u32 %r1, %r1, %r2; "
        "st.relaxed.gpu.global.u32 [%rd9], %r1; ld.acquire.gpu.global.u32 %r1, [%rd9];",
        lambda i: 21,
    ),
    **{
        f"cp.async of {n} bytes": (
            f"shl.b32 %r2, %r0, 4; add.u32 %r3, %r2, dynamic; mad.wide.u32 %rd3, %r0, 16, %rd1; "
            f"and.b32 %r4, %r0, 1; mul.lo.u32 %r4, %r4, {n}; "
            f"cp.async.ca.shared.global [%r3], [%rd3], {n}{', %r4' if n > 4 else ''}; "
            f"ld.shared.u32 %r5, [%r3]; cp.async.commit_group; {wait}; ld.shared.u32 %r1, [%r3+{n - 4}]; "
            f"and.b32 %r5, %r5, 0x10000; add.u32 %r1, %r1, %r5;",
            lambda i, n=n: 0x10000 + (i * 4 + n // 4 - 1 if i % 2 or n == 4 else 0),
        )
        for n, wait in ((4, "cp.async.wait_all"), (8, "cp.async.wait_group 0"), (16, "cp.async.wait_all"))
    },
    **{
        f"shfl {mode} {by} {c:#x}": (
            f"shfl.sync.{mode}.b32 %r1|%p1, %r0, {by}, {c}, -1; selp.u32 %r2, 1000, 0, %p1; add.u32 %r1, %r1, %r2;",
            right,
        )
        for mode, by, c, right in (
            ("bfly", 5, 31, lambda i: 1000 + (i ^ 5)),
            ("bfly", 8, 0x1807, lambda i: 1000 + (i ^ 8) if i % 32 & 8 else i),
            ("down", 7, 31, lambda i: i + 1007 if i % 32 < 25 else i),
            ("down", 1, 0x1C03, lambda i: i + 1001 if i % 4 < 3 else i),
            ("up", 3, 0, lambda i: i + 997 if i % 32 >= 3 else i),
            ("up", 1, 0x1C00, lambda i: i + 999 if i % 4 else i),
            ("idx", 9, 31, lambda i: 1000 + i // 32 * 32 + 9),
            ("idx", 6, 0x1C03, lambda i: 1000 + i // 4 * 4 + 2),
        )
    },
    "vote": (
        "setp.lt.u32 %p1, %r0, 40; vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, %p1, -1; "
        "vote.sync.uni.pred %p4, %p1, -1; selp.u32 %r1, 1, 0, %p2; selp.u32 %r2, 2, 0, %p3; "
        "add.u32 %r1, %r1, %r2; selp.u32 %r2, 4, 0, %p4; add.u32 %r1, %r1, %r2;",
        lambda i: 7 if i < 32 else 1,
    ),
    "vote ballot": (
        "and.b32 %r2, %r0, 3; setp.eq.u32 %p1, %r2, 1; vote.sync.ballot.b32 %r1, %p1, -1;",
        lambda i: 0x22222222,
    ),
    "activemask": (
        "mov.u32 %r1, 0; setp.lt.u32 %p1, %laneid, 5; @!%p1 bra $end; activemask.b32 %r1; $end:",
        lambda i: 31 if i % 32 < 5 else 0,
    ),
    **{
        f"redux {op}.{t}": (f"sub.s32 %r2, %laneid, 9; redux.sync.{op}.{t} %r1, %r2, -1;", lambda i, right=right: right)
        for op, t, right in (
            ("add", "s32", 31 * 16 - 9 * 32),
            ("add", "u32", 31 * 16 - 9 * 32),
            ("min", "s32", -9),
            ("max", "s32", 22),
            ("min", "u32", 0),
            ("max", "u32", -1),
            ("and", "b32", 0),
            ("or", "b32", -1),
            ("xor", "b32", -32),
        )
    },
}


def threads_of(body):
    return {"threads": 64, "arguments": (bytes([*range(7), 0x87, *range(8, 16)]),), "shared_bytes": 1024,
            "declarations": ".local .align 8 .b8 own[8];"}  # fmt: skip


@pytest.mark.parametrize("name", SNIPPETS)
def test_a_snippet_leaves_what_the_manual_says(name):
    body, right = SNIPPETS[name]
    out, more = np.full(64, 77, np.uint32), np.arange(256, dtype=np.uint32)
    run(body + PUT, [out, more], **threads_of(body))
    assert out.tolist() == [right(i) & SIGNED for i in range(64)]


# Of 64 threads, each with its number, on one word that was 10: what it is then, and whether the old values are all different.
ATOMICS = {
    "add.u32": 10 + 2016, "add.s32": 10 + 2016, "min.u32": 0, "max.u32": 63, "min.s32": 0, "max.s32": 63, "and.b32": 0, "or.b32": 63,
    "xor.b32": 10, "inc.u32": None, "dec.u32": None, "exch.b32": 63, "cas.b32": 3, "add.u64": 10 + 2016, "add.f32": None,
}  # fmt: skip


def atomic(name, space, kind):
    wide, f32 = name.endswith("64"), name.endswith("f32")
    value, old = ("%rd3", "%rd4") if wide else ("%f1", "%f2") if f32 else ("%r2", "%r1")
    value += ", 3" if name.startswith("cas") else ""
    value = value.replace("%r2", "10") if name.startswith("cas") else value
    at = {"global": "[%rd1]", "shared": "[dynamic]", "": "[%rd1]"}[space]
    space = f".{space}" * bool(space)
    call = f"atom{space}.{name} {old}, {at}, {value};" if kind == "atom" else f"red{space}.{name} {at}, {value};"
    start = end = ""
    if space == ".shared":
        start = "setp.eq.u32 %p1, %r0, 0; ld.global.u64 %rd5, [%rd1]; @%p1 st.shared.u64 [dynamic], %rd5; bar.sync 0;"
        end = "bar.sync 0; ld.shared.u64 %rd5, [dynamic]; st.global.u64 [%rd1], %rd5;"
    make = {True: "cvt.u64.u32 %rd3, %r0;", False: "cvt.rn.f32.u32 %f1, %r0;" if f32 else "mov.u32 %r2, %r0;"}[wide]
    return f"{start} {make} {call} {end}"


@pytest.mark.parametrize(("space", "kind"), [("global", "atom"), ("shared", "atom"), ("", "atom"), ("global", "red")])
@pytest.mark.parametrize("name", ATOMICS)
def test_atomics_come_one_after_the_other(name, space, kind):
    word = np.array([10, 0], np.uint32)
    if name == "add.f32":
        word[:1] = np.array([0.5], np.float32).view(np.uint32)
    run(atomic(name, space, kind), [np.zeros(1, np.uint32), word], threads=64, shared_bytes=16)
    if name == "add.f32":
        assert word[:1].view(np.float32)[0] == 2016.5
    elif name == "inc.u32":  # thread i: back to 0 where the old value is i or more
        value = 10
        for i in range(64):
            value = 0 if value >= i else value + 1
        assert word[0] == value
    elif name == "dec.u32":
        value = 10
        for i in range(64):
            value = i if value == 0 or value > i else value - 1
        assert word[0] == value
    else:
        assert word.tolist() == [ATOMICS[name], 0]


def test_an_atomic_gives_the_value_before():
    out, word = np.zeros(64, np.uint32), np.array([10], np.uint32)
    run("atom.global.add.u32 %r1, [%rd1], 2;" + PUT, [out, word], threads=64)
    assert sorted(out.tolist()) == list(range(10, 138, 2))


WRONG = {
    "an opcode that is not known": ("wgmma.fence.sync.aligned;", "the opcode wgmma.fence.sync.aligned is not known"),
    "a modifier that is not known": ("add.rn.sat.relu.f32 %f1, %f2, %f3;", "the opcode add.rn.sat.relu.f32 is not known"),
    "a register that is not there": ("add.u32 %r1, %r99, 1;", "%r99"),
    "a loop without end": ("$again: bra $again;", "runs on and on"),
    "a trap": ("trap;", "traps"),
    "a null pointer": ("mov.u64 %rd2, 0; ld.global.u32 %r1, [%rd2];", "thread 0: line .*reads 4 bytes outside"),
    "no address of shared memory": ("mov.u32 %r2, 8; ld.shared.u32 %r1, [%r2];", "reads 4 bytes outside"),
    "across the end": ("ld.global.u64 %rd2, [%rd1+1020];", "no multiple of 8"),
    "past the end": ("mad.wide.u32 %rd2, %r0, 32, %rd1; ld.global.u32 %r1, [%rd2];", "thread 32: .*outside"),
    "cp.async of too much": (
        "mov.u32 %r2, 17; cp.async.cg.shared.global [dynamic], [%rd1], 16, %r2;", "cp.async reads 17 bytes for 16"),
    "a shuffle of some": ("setp.lt.u32 %p1, %r0, 9; @%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;", "lanes of the mask are elsewhere"),
    "a matrix of some": (
        "setp.lt.u32 %p1, %r0, 9; "
        "@%p1 ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1, %r2}, [dynamic];", "not all 32 lanes"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_with_its_line(name):
    body, words = WRONG[name]
    with pytest.raises(parse.PtxError, match=words):
        run(body, [np.zeros(64, np.uint32), np.zeros(256, np.uint32)], **threads_of(body))


def covered():
    """The opcodes that this file tests."""
    bodies = [body for body, _ in SNIPPETS.values()] + [p.values[0] for p in copies()]
    bodies += [
        atomic(name, space, kind) for name in ATOMICS for space in ("global", "shared", "") for kind in ("atom", "red")
    ]
    found = re.findall(r"(?:^|[;:{}])\s*(?:@!?%\w+\s+)?([a-z]\w*(?:\.[\w:]+)*)(?=[ ;])", "\n".join(bodies))
    return {"ld.param.u64", "mov.u32", "ret", *found}


def test_every_pattern_has_an_opcode_that_is_tested():
    patterns = [p for m in (transfer, warp) for p in vars(m).values() if isinstance(p, re.Pattern)]
    assert len(patterns) >= 12
    others = {warp.MATRICES, warp.PRODUCT}  # by the wrappers' kernels: test_ptx.py
    assert [p.pattern for p in set(patterns) - others if not any(p.fullmatch(o) for o in covered())] == []
