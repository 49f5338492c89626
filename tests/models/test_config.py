"""Settings: every one reachable by name, every mistake answered with the remedy."""

import json

import pytest

from tinygpt.config import PRESETS, RunConfig, from_dict, override, preset, to_dict
from tinygpt.errors import UserError


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_stores_its_whole_config(name):
    assert from_dict(json.loads(json.dumps(to_dict(PRESETS[name])))) == PRESETS[name]
    assert PRESETS[name].preset == name


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("model.layers=2", ("model", "layers"), 2),
        ("training.eval_every=50", ("training", "eval_every"), 50),
        ("optim.lr=3e-4", ("optim", "lr"), 3e-4),
        ("optim.clip=none", ("optim", "clip"), None),
        ("model.kv_heads=2", ("model", "kv_heads"), 2),
        ("model.bias=true", ("model", "bias"), True),
        ("training.precision=bfloat16", ("training", "precision"), "bfloat16"),
        ("data.sources=a.txt,b.txt", ("data", "sources"), ("a.txt", "b.txt")),
    ],
)
def test_override(assignment, path, value):
    config = override(RunConfig(), [assignment])
    assert getattr(getattr(config, path[0]), path[1]) == value


def test_overrides_are_checked_together_not_one_by_one():
    assert override(RunConfig(), ["model.width=96", "model.heads=3"]).model.head_dim == 32


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.layer=2", "did you mean 'model.layers'"),
        ("training.precision=bfloat", "did you mean 'bfloat16'"),
        ("model.layers", "not of the form key=value"),
        ("model.layers=two", "not a whole number"),
        ("optim.lr=fast", "not a number"),
        ("model.bias=maybe", "not true or false"),
        ("model.heads=3", "model.heads=3 does not divide model.width=128; set a width of 126 or 129"),
        ("model.kv_heads=3", "must divide model.heads=4"),
        ("model.dropout=1.0", "below 1"),
        ("optim.min_lr=1", "between 0 and optim.lr"),
        ("training.steps=0", "at least 1"),
    ],
)
def test_mistakes_name_the_remedy(assignment, message):
    with pytest.raises(UserError, match=message):
        override(RunConfig(), [assignment])


def test_unknown_names_offer_the_nearest():
    with pytest.raises(UserError, match="did you mean 'char-cpu'"):
        preset("char-cp")
    values = to_dict(RunConfig())
    values["model"]["layer"] = 3
    with pytest.raises(UserError, match=r"run\.json: unknown setting 'model.layer'; did you mean 'model.layers'"):
        from_dict(values, where="run.json")


@pytest.mark.parametrize(("section", "value"), [("model", 3), ("optim", {"lr": "fast"}), ("data", {"sources": "x"})])
def test_values_of_the_wrong_type_are_named(section, value):
    with pytest.raises(UserError, match=section):
        from_dict({section: value})
