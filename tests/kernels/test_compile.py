"""torch.compile, fake tensors, operator checks and autocast."""

import pytest
import torch

from tinygpt_kernels import autograd, dispatch, ops, parity
from tinygpt_kernels.cases import CASES, cases
from tinygpt_kernels.dispatch import all_ops

KERNEL_BACKENDS = ("cpp", "triton")


def one_case_per_op():
    return [pytest.param(cases(name)[1], id=name) for name in all_ops()]


@pytest.mark.parametrize("case", one_case_per_op())
def test_every_op_compiles_into_one_graph_and_gives_the_same_numbers(case):
    op = all_ops()[case.op]
    # PyTorch itself keeps its fused optimizer out of graphs.
    for backend in KERNEL_BACKENDS if op.in_place else ("torch", "reference", *KERNEL_BACKENDS):
        if dispatch.reason(backend, parity.call_of(op, case, torch.float32)) is not None:
            continue
        torch._dynamo.reset()
        compiled = torch.compile(lambda *a, b=backend, **k: op.on(b)(*a, **k), fullgraph=True, backend="aot_eager")
        parity.check(case, compiled, torch.float32)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_a_kernel_inside_a_compiled_model_really_is_that_kernel(backend):
    op = ops.layer_norm
    seen = []
    graph_backend = lambda graph, inputs: seen.append(graph) or graph  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w, b: op.on(backend)(x, w, b) * 2, fullgraph=True, backend=graph_backend)
    (x, w, b), _ = cases("layer_norm")[4].build()
    torch.testing.assert_close(compiled(x, w, b), op.on("torch")(x, w, b) * 2)
    assert any(f"layer_norm_{backend}" in str(node.target) for node in seen[0].graph.nodes)


def test_inductor_takes_kernels_with_gradients():
    torch._dynamo.reset()
    parity.check(cases("layer_norm")[4], torch.compile(ops.layer_norm.on("cpp"), fullgraph=True), torch.float32)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("case", [c for c in CASES if c.op == "layer_norm" and "every second" not in c.name], ids=str)
def test_opcheck(backend, case):
    op = all_ops()["layer_norm"]
    name = autograd.register_operators(op, dispatch.impls["layer_norm", backend])
    args, kwargs = case.build()
    flat = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in op.flatten(*args, **kwargs)]
    torch.library.opcheck(getattr(torch.ops.tinygpt_kernels, name).default, tuple(flat),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))  # fmt: skip
    if case.name == "17x128":
        torch.library.opcheck(getattr(torch.ops.tinygpt_kernels, name).default, tuple(flat))


def test_shapes_on_the_meta_device():
    for name, op in all_ops().items():
        if not op.in_place:
            args, kwargs = cases(name)[1].build()
            found = op.on("reference")(*args, **kwargs)
            from torch._subclasses.fake_tensor import FakeTensorMode

            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = op.on("reference")(
                    *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args), **kwargs
                )
            for real, imagined in zip(
                found if isinstance(found, tuple) else (found,),
                fake if isinstance(fake, tuple) else (fake,),
                strict=True,
            ):
                assert real.shape == imagined.shape
                assert real.dtype == imagined.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_where_pytorchs_own_modules_do(dtype):
    q = torch.randn(1, 8, 2, 16)
    hidden, weight, targets = torch.randn(6, 16), torch.randn(9, 16), torch.randint(9, (6,))
    with torch.autocast("cpu", dtype):
        own = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, is_causal=True)
        for backend in ("torch", "reference", "auto"):
            out = ops.attention.on(backend)(q, q, q, causal=True)
            assert out.dtype == own.dtype == dtype
            assert ops.attention_qkv.on(backend)(torch.randn(1, 8, 6, 16), 2, 2).dtype == dtype
            loss = ops.linear_cross_entropy.on(backend)(hidden, weight, targets)
            assert loss.dtype == torch.float32
            rounded = torch.nn.functional.cross_entropy(hidden.to(dtype).float() @ weight.to(dtype).float().T, targets)
            torch.testing.assert_close(loss, rounded, rtol=2e-2, atol=2e-2)
            assert ops.layer_norm.on(backend)(hidden, torch.ones(16), None).dtype == torch.float32
            assert ops.gelu.on(backend)(hidden.to(dtype)).dtype == dtype
