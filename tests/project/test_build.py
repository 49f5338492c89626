"""What is built from a clean copy of the sources: exactly these files, with a compiler, without one, with a broken one."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def sources(pattern="*"):
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", pattern], cwd=ROOT, capture_output=True, text=True
    )
    return {line for line in listed.stdout.splitlines() if (ROOT / line).exists()}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for name in sources():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def build(copy, out, *options, **environment):
    command = [sys.executable, "-m", "build", "--outdir", str(out), *options, str(copy)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def built(copy, tmp_path_factory):
    """The source distribution, and the wheel built from it."""
    out = tmp_path_factory.mktemp("dist")
    found = build(copy, out, TINYGPT_CUDA="OFF")  # which would take minutes and add no file
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def packaged():
    """Files that a wheel holds, as they lie in it."""
    ours = {name for name in sources("tinygpt") | sources("kernels/tinygpt_kernels") if not name.endswith(".so")}
    return {name.removeprefix("kernels/") for name in ours}


def test_the_wheel_holds_exactly_the_packages_and_the_extension(built):
    names = {n for n in zipfile.ZipFile(built[1]).namelist() if ".dist-info/" not in n}
    extensions = {n for n in names if n.endswith((".so", ".pyd"))}
    assert len(extensions) == 1
    assert next(iter(extensions)).startswith("tinygpt_kernels/_C.")
    assert names - extensions == packaged()
    assert {"tinygpt/py.typed", "tinygpt_kernels/py.typed", "tinygpt_kernels/_C.pyi"} <= names


def test_the_source_distribution_holds_what_it_takes_to_build(built):
    with tarfile.open(built[0]) as archive:
        names = {n.partition("/")[2] for n in archive.getnames() if not archive.getmember(n).isdir()}
    needed = sources("tinygpt") | sources("kernels/tinygpt_kernels") | sources("csrc")
    needed |= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "MANIFEST.in"}
    made = {n for n in names if ".egg-info/" in n} | {"PKG-INFO", "setup.cfg"}
    tests = {n for n in names if n.startswith("tests/")}
    assert names - made - tests == needed


def test_without_a_compiler_the_wheel_is_whole_but_for_the_extension(copy, tmp_path):
    found = build(copy, tmp_path, "--wheel", CXX="none")
    assert found.returncode == 0, found.stderr
    assert "no C++ compiler found; installing without the C++ kernels" in found.stdout + found.stderr
    names = {n for n in zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist() if ".dist-info/" not in n}
    assert names == packaged()


def test_a_broken_compiler_is_one_message_with_the_remedy(copy, tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'cannot execute cc1plus' >&2\nexit 1\n")
    broken.chmod(0o755)
    found = build(copy, tmp_path, "--wheel", CXX=str(broken))
    assert found.returncode != 0
    output = found.stdout + found.stderr
    assert "cannot compile an empty program: cannot execute cc1plus" in output
    assert "CXX=none pip install -e ." in output
    assert "Traceback" not in output.split("tinygpt: the C++ compiler")[1].split("tinygpt: mend")[0]


@pytest.fixture(scope="module")
def without_nvcc():
    """A PATH on which there is no nvcc."""
    return os.pathsep.join(d for d in os.environ["PATH"].split(os.pathsep) if not Path(d, "nvcc").exists())


def test_without_nvcc_everything_else_is_built_and_cuda_says_how_to_get_it(copy, tmp_path, without_nvcc):
    found = build(copy, tmp_path, "--wheel", PATH=without_nvcc)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    assert "no nvcc found: built without CUDA kernels" in found.stdout + found.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    code = """
import torch
from tinygpt_kernels import _C, ops
assert not hasattr(_C, "cuda_architectures")
ops.layer_norm.on("cpp")(torch.ones(2, 4), torch.ones(4))
try: ops.layer_norm.on("cuda")(torch.ones(2, 4), torch.ones(4))
except Exception as error: print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, cwd=tmp_path,
                         capture_output=True, text=True, check=True)  # fmt: skip
    assert "was built without nvcc: install NVIDIA's CUDA toolkit" in run.stdout


def test_cuda_that_is_asked_for_and_not_there_is_an_error(copy, tmp_path, without_nvcc):
    found = build(copy, tmp_path, "--wheel", PATH=without_nvcc, TINYGPT_CUDA="ON")
    assert found.returncode != 0
    assert "there is no nvcc that works here" in found.stdout + found.stderr
