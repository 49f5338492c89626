"""The rules of the house that a machine can hold."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def tracked(*patterns):
    found = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *patterns], cwd=ROOT, capture_output=True, text=True
    )
    files = [ROOT / line for line in found.stdout.splitlines()]
    if not files:  # an unpacked source distribution
        files = [p for pattern in patterns for p in ROOT.rglob(pattern)]
    return [f for f in files if f.exists()]


def test_no_python_file_is_too_long_to_read_in_one_sitting():
    long = {str(f.relative_to(ROOT)): n for f in tracked("*.py") if (n := len(f.read_text().splitlines())) > 400}
    assert long == {}


def test_the_package_kernels_on_pypi_keeps_working_beside_ours():
    assert not (ROOT / "kernels/__init__.py").exists()


def test_no_folder_of_a_package_is_called_triton():
    assert [
        f
        for f in tracked("*.py")
        if "triton" in f.relative_to(ROOT).parts[:-1] and f.relative_to(ROOT).parts[0] != "tests"
    ] == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "csrc/README.md", "kernels/README.md"])
def test_pages_link_only_to_what_is_there(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_dependency_is_justified():
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)^\]", project, re.S | re.M)[1]
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    for package in re.findall(r'^\s*"([a-z]+)', listed, re.M):
        assert f"| {package}" in contributing, package


def test_the_workflow_runs_what_ci_runs():
    assert ".ci/run" in (ROOT / ".github/workflows/ci.yml").read_text()
