"""Wrong inline assembly is found: operands that change places, instructions that are left out, other modifiers.

Mutants are made of the assembly's text by rules, so that no wrapper of simt.cuh can be forgotten. Most are made in what nvcc emitted,
where an instruction stands as it does in simt.cuh; the slow ones in simt.cuh itself, and compiled.
"""

import re
import shutil
from contextlib import suppress
from itertools import combinations

import pytest
import simulation
import test_ptx
import test_simt
from ptx import device, parse

pytestmark = pytest.mark.skipif(not device.nvcc(), reason="there is no nvcc")
OPERAND = re.compile(r"%\w+|\b\d+\b")
INLINE = re.compile(r"// begin inline asm\n\s*([\w.:]+[^;{}]*(?:\{[^;]*)?;)")
# Modifiers that change what is meant, and into what.
MODIFIERS = {".bf16.bf16.": ".f16.f16.", ".f16.f16.": ".bf16.bf16.", ".trans": "", ".x4.shared": ".x4.trans.shared",
             ".x2.shared": ".x2.trans.shared", ".x4": ".x2", "ex2": "lg2"}  # fmt: skip
CHECKS = [
    *((test_simt.test_mma_multiplies_fragments_as_the_manual_lays_them_out, name) for name in test_simt.FORMATS),
    *((test_simt.test_ldmatrix_hands_out_matrices_as_the_manual_draws_them, n, t) for n in (2, 4) for t in (False, True)),
    (test_simt.test_copies_arrive_group_by_group_and_zeros_where_not_valid,),
    (test_simt.test_powers_of_two,),
    (test_simt.test_vectors_are_stored_whole,),
]  # fmt: skip


def mutants(text, *, neighbours=False):
    """(what is done, the new text) for an instruction; of the swaps only those of neighbours, if wished."""
    opcode, _, rest = text.partition(" ")
    places = list(OPERAND.finditer(rest))
    for a, b in combinations(places, 2):
        if a[0] != b[0] and not (neighbours and places.index(b) - places.index(a) > 1):
            swapped = rest[: a.start()] + b[0] + rest[a.end() : b.start()] + a[0] + rest[b.end() :]
            yield f"{places.index(a)} and {places.index(b)} swapped", f"{opcode} {swapped}"
    for before, after in MODIFIERS.items():
        if before in opcode:
            yield f"{before} is {after or 'gone'}", f"{opcode.replace(before, after)} {rest}"
    if match := re.fullmatch(r"(cp\.async\.wait_group) (\d+);", text):
        yield "waits for one less", f"{match[1]} {int(match[2]) + 1};"
    yield "left out", ""


def statements():
    """The inline assembly of simt.cuh: (the text between its quotes as one line, where it begins and ends in the file)."""
    text = (device.ROOT / "csrc/cuda/simt.cuh").read_text()
    for match in re.finditer(r'\basm\s*(?:volatile\s*)?\(\s*((?:"[^"]*"\s*)+)', text):
        yield "".join(re.findall(r'"([^"]*)"', match[1])), match.span(1)


def found_wrong(module, kernels, checks):
    """Whether one of the checks of the wrappers goes red on these kernels."""
    for check, *args in checks:
        with device.interpreted(module, kernels) as simt:
            try:
                check(simt, "ptx", *args)
            except (AssertionError, parse.PtxError):
                return True
    return False


def launched(module, kernels, check, *args):
    with device.interpreted(module, kernels, only_names=True) as simt, suppress(AssertionError):
        check(simt, "ptx", *args)
    return set(simt.launched)


@pytest.fixture(scope="module")
def module():
    return simulation.build()


@pytest.fixture(scope="module")
def launches(module):
    """The kernels that each check launches."""
    return {check: launched(module, device.library(80), *check) for check in CHECKS}


def with_body(architecture, kernel, body):
    """The kernel with another body."""
    text = next(t for t in (device.compiled(s, architecture) for s in device.sources()) if kernel.body in t)
    return parse.kernels(text.replace(kernel.body, body))[kernel.name]


def inline(kernel, opcode):
    """Its instructions of inline assembly with this opcode, each once."""
    return [i for i in dict.fromkeys(INLINE.findall(kernel.body)) if re.split("[ ;]", i)[0] == opcode]


@test_ptx.ARCHITECTURES
@pytest.mark.parametrize("opcode", sorted(test_ptx.assembly()))
def test_every_mutant_of_what_nvcc_emitted_is_found(module, launches, opcode, architecture):
    kernels = device.library(architecture)
    survivors, tried = [], 0
    for name, kernel in kernels.items():
        checks = [check for check, names in launches.items() if name in names]
        if checks:
            assert not found_wrong(module, kernels, checks)
            for instruction in inline(kernel, opcode):
                for what, mutant in mutants(instruction):
                    wrong = with_body(architecture, kernel, kernel.body.replace(instruction, mutant))
                    tried += 1
                    if not found_wrong(module, kernels | {name: wrong}, checks):
                        survivors.append(f"{name}: `{instruction}`: {what}")
    assert tried
    assert survivors == []


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(list(statements()))))
def test_mutants_of_simt_cuh_are_found_once_compiled(module, launches, number, tmp_path):
    shutil.copytree(device.ROOT / "csrc", tmp_path / "csrc")
    header = tmp_path / "csrc/cuda/simt.cuh"
    source = header.read_text()
    statement, (begin, end) = list(statements())[number]
    survivors, tried = [], 0
    for what, mutant in mutants(statement, neighbours=True):
        header.write_text(source[:begin] + f'"{mutant}"\n' + source[end:])
        try:
            kernels = device.named(device.compiled(device.WRAPPERS, 80, tmp_path / "csrc"))
        except parse.PtxError:  # nvcc does not take it
            continue
        tried += 1
        if not found_wrong(module, kernels, CHECKS):
            survivors.append(what)
    assert tried
    assert survivors == [], statement


@pytest.mark.slow
@pytest.mark.parametrize("opcode", sorted(o for o in test_ptx.assembly() if ".x2" not in o and "st.global" not in o))
def test_mutants_of_attention_are_found(module, opcode):
    """In all instructions of a forward kernel the same two operands change places, or all are left out."""
    p = next(
        p for p in test_ptx.GRID if p.id == f"attention T65 D64-{'float16' if '.f16.f16.' in opcode else 'bfloat16'}"
    )
    kernels = device.library(80)
    name = test_ptx.run(module, *p.values, kernels)[1][0]
    found, survivors = inline(kernels[name], opcode), []
    for number, (what, _) in enumerate(mutants(found[0], neighbours=True)):
        body = kernels[name].body
        for instruction in found:
            body = body.replace(instruction, [text for _, text in mutants(instruction, neighbours=True)][number])
        try:
            results, _ = test_ptx.run(module, *p.values, kernels | {name: with_body(80, kernels[name], body)})
            if not test_ptx.wrong(*p.values, results):
                survivors.append(what)
        except parse.PtxError:
            pass
    assert survivors == []
