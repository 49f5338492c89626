"""Backend specs parse, name what is wrong, and need no torch."""

import subprocess
import sys

import pytest

from tinygpt_kernels.spec import parse_spec


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("auto", ("auto",)),
        ("cpp", ("cpp",)),
        ("cuda, triton", ("cuda", "triton")),
        ("attention=triton", ("auto",)),
        ("layer_norm=torch", ("torch",)),
        ("cpp,layer_norm=triton,layer_norm=torch", ("triton", "torch")),
    ],
)
def test_order_for_layer_norm(text, order):
    assert parse_spec(text).order("layer_norm") == order


def test_an_exception_leaves_other_ops_alone():
    spec = parse_spec("cpp,layer_norm=torch")
    assert spec.order("gelu") == ("cpp",)
    assert spec.backends() == {"cpp", "torch"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tritn", "did you mean 'triton'"),
        ("cpp,,torch", "empty item"),
        ("", "empty item"),
        ("=cpp", "empty item"),
        ("gelu=cp", "did you mean 'cpp'"),
    ],
)
def test_errors_name_the_remedy(text, message):
    with pytest.raises(ValueError, match=message):
        parse_spec(text)


def test_parsing_imports_no_torch():
    code = (
        "import sys; from tinygpt_kernels.spec import parse_spec; parse_spec('cuda'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
