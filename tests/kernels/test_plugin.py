"""A third party's backend, offered through the entry point group by a package of its own, is served, chosen and covered by name."""

import subprocess
import sys
import textwrap

import pytest

BACKEND = """
    import torch
    from tinygpt_kernels import Impl, register, register_backend

    def fwd(x, weight, bias, eps, *, out=None):
        y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        fwd.calls += 1
        return y, mean.flatten(), rstd.flatten()
    fwd.calls = 0

    def bwd(dy, x, weight, bias, mean, rstd, eps, *, needs, out=None):
        shape = (*x.shape[:-1], 1)
        found = torch.ops.aten.native_layer_norm_backward(
            dy.contiguous(), x, weight.shape, mean.view(shape), rstd.view(shape), weight, bias, list(needs))
        return tuple(g if need else None for g, need in zip(found, needs))

    register_backend("toy", lambda device: None if device == "cpu" else "toys run on a CPU")
    register(Impl("layer_norm", "toy", fwd=fwd, bwd=bwd, dtypes=(torch.float32,)))
"""


@pytest.fixture
def run(tmp_path):
    """Run code in a process that sees the plugin as an installed package."""

    def python(code, module=BACKEND):
        (tmp_path / "toy_backend.py").write_text(textwrap.dedent(module))
        info = tmp_path / "toy_backend-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-backend\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[tinygpt.backends]\ntoy = toy_backend\n")
        code = f"import sys; sys.path[:0] = {[str(tmp_path), *sys.path]!r}\n{textwrap.dedent(code)}"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    return python


def test_a_plugin_passes_the_same_cases_and_compiles(run):
    found = run("""
        import torch
        from tinygpt_kernels import dispatch, ops, parity
        from tinygpt_kernels.cases import cases
        for case in cases("layer_norm"):
            if dispatch.reason("toy", parity.call_of(ops.layer_norm, case, torch.float32)) is None:
                parity.check(case, "toy", torch.float32)
        import toy_backend
        assert toy_backend.fwd.calls > 10
        compiled = torch.compile(lambda **k: ops.layer_norm.on("toy")(**k), fullgraph=True, backend="aot_eager")
        parity.check(cases("layer_norm")[4], compiled, torch.float32)
        print(ops.layer_norm.on("toy,torch")(torch.ones(2, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)).sum().item())
    """)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "0.0"


def test_a_plugin_is_known_to_specs_without_torch(run):
    found = run("""
        from tinygpt_kernels.spec import known_backends, parse_spec
        assert known_backends()[-1] == "toy" and parse_spec("toy,torch").backends() == {"toy", "torch"}
        assert "torch" not in sys.modules and "toy_backend" not in sys.modules
    """)
    assert found.returncode == 0, found.stderr


def test_a_plugins_own_bug_is_raised_not_hidden(run):
    found = run("from tinygpt_kernels import dispatch; dispatch.load_backend('toy')", module="import no_such_module")
    assert "No module named 'no_such_module'" in found.stderr
