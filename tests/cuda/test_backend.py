"""Backend `cuda` where its kernels cannot run: one reason, with the remedy, and never a crash."""

import subprocess
import sys

import pytest
import torch

from tinygpt_kernels import interpreter, ops
from tinygpt_kernels.dispatch import BackendError
from tinygpt_kernels.native.cuda import common

without_gpu = pytest.mark.skipif(interpreter.gpu_present(), reason="there is a GPU")


@pytest.fixture(autouse=True)
def asked_anew():
    common.unavailable.cache_clear()
    yield
    common.unavailable.cache_clear()


def refusal():
    with pytest.raises(BackendError) as told:
        ops.layer_norm.on("cuda")(torch.ones(2, 4), torch.ones(4))
    return str(told.value)


@without_gpu
def test_without_a_gpu_it_says_so_and_who_serves(monkeypatch):
    monkeypatch.setattr(common, "built_for", lambda: "80-real,90")
    assert "cuda  needs an NVIDIA GPU, and there is none here; cpp and torch serve on a CPU" in refusal()


def test_a_build_without_nvcc_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(common, "built_for", lambda: None)
    message = refusal()
    assert "was built without nvcc: install NVIDIA's CUDA toolkit" in message
    assert "then run `pip install -e .` again" in message


def test_code_for_other_gpus_is_found_by_a_probe(monkeypatch):
    monkeypatch.setattr(common, "built_for", lambda: "80-real,90")
    monkeypatch.setattr(common, "gpu_present", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        common, "_C", type("Module", (), {"cuda_probe": staticmethod(lambda: "no kernel image is available")})
    )
    message = refusal()
    assert "is built for sm_80, sm_90, which does not run here: no kernel image is available" in message
    assert "TINYGPT_CUDA_ARCHITECTURES" in message


def test_a_pytorch_for_cpus_is_named(monkeypatch):
    monkeypatch.setattr(common, "built_for", lambda: "80-real,90")
    monkeypatch.setattr(common, "gpu_present", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "needs a PyTorch that is built for CUDA" in refusal()


@without_gpu
def test_the_module_with_cuda_kernels_loads_and_probes_without_a_gpu():
    if common.built_for() is None:
        pytest.skip("this build has no CUDA kernels: there was no nvcc")
    code = "import torch; from tinygpt_kernels import _C; print(_C.cuda_architectures); print(_C.cuda_probe())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert found[0] == common.built_for()
    assert found[1], "a probe that finds nothing wrong without a GPU"


@without_gpu
def test_training_on_cuda_without_a_gpu_says_who_serves_instead(tmp_path):
    command = [sys.executable, "-m", "tinygpt", "train", "--backend", "cuda", "--data", "python", "--steps", "1", "--out",
               str(tmp_path / "run"), "--set", "model.layers=1", "--set", "training.eval_batches=1",
               "--set", "training.final_evaluation=false"]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("tinygpt: backend cuda will serve nothing on cpu: ") == 1
    assert "cuda -> torch for every op" in found.stdout
    strict = subprocess.run([*command, "--strict", "--overwrite"], capture_output=True, text=True)
    assert strict.returncode != 0
    assert "Traceback" not in strict.stderr


def test_buffers_that_do_not_fit_are_refused():
    x = torch.ones(2, 4)
    with pytest.raises(
        ValueError, match=r"layer_norm on cuda: an out buffer must be \(2, 4\) torch.float32, contiguous, on cpu"
    ):
        common.outputs.fits("layer_norm", torch.ones(4, 2).T, (2, 4), torch.float32, x.device)
