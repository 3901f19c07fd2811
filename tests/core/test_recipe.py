"""Recipes: which override wins, what an override may be, and that a misspelt one is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoround_core.errors import UnknownNameError, UsageError
from autoround_core.recipe import QuantRecipe, parse_layer_config
from autoround_core.scheme import QuantScheme

W2, W3, W4, W8 = (QuantScheme(bits=bits) for bits in (2, 3, 4, 8))
NAMES = [
    f"model.layers.{i}.{part}"
    for i in range(12)
    for part in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
]


def resolved(*overrides, names=NAMES):
    return QuantRecipe(W4, overrides).resolve(names)


def test_without_overrides_every_layer_has_the_default_in_the_models_order():
    assert list(resolved().items()) == [(name, W4) for name in NAMES]


def test_the_first_override_that_matches_wins():
    schemes = resolved(("down_proj", W8), ("layers.3.", None), ("mlp", W2))
    assert schemes["model.layers.3.mlp.down_proj"] == W8
    assert schemes["model.layers.3.mlp.gate_proj"] is None
    assert schemes["model.layers.4.mlp.gate_proj"] == W2
    assert schemes["model.layers.4.self_attn.q_proj"] == W4


def test_a_pattern_is_searched_anywhere_in_the_name():
    schemes = resolved((r"layers\.(0|11)\.", W8), ("_proj$", W3))
    assert [name for name, scheme in schemes.items() if scheme == W8] == NAMES[:3] + NAMES[-3:]
    assert set(schemes.values()) == {W8, W3}


def test_an_exact_name_is_no_pattern():
    # as a pattern, each of these names would also match the other: by a dot, and by being its beginning
    names = ["model.layers.1", "model.layers.10", "model_layers.1"]
    assert resolved(("model.layers.1", W8), names=names) == {names[0]: W8, names[1]: W4, names[2]: W4}


def test_an_override_that_is_wholly_covered_by_an_earlier_one_is_no_mistake():
    assert set(resolved((".", W8), ("gate_proj", W2)).values()) == {W8}


@given(st.data())
def test_resolving_agrees_with_looking_at_each_pair(data):
    overrides = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(["q_proj", "layers.1", r"layers\.1\.", "mlp", NAMES[4], NAMES[5]]),
                st.sampled_from([W2, W8, None]),
            ),
            max_size=4,
        )
    )
    schemes = QuantRecipe(W4, tuple(overrides)).resolve(NAMES)
    for name in NAMES:
        expected = W4
        for pattern, scheme in reversed(overrides):
            regex_hit = pattern not in NAMES and pattern.replace("\\", "") in name  # of these patterns only
            if name == pattern or regex_hit:
                expected = scheme
        assert schemes[name] == expected


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("model.layers.7.mlp.down_prj", "model.layers.7.mlp.down_proj"),
        ("model.layers.11.self_atn.q_proj", "model.layers.11.self_attn.q_proj"),
        ("model.layers.99.mlp.gate_proj", "model.layers.9.mlp.gate_proj"),
    ],
)
def test_an_override_that_matches_nothing_is_an_error_with_the_nearest_name(pattern, nearest):
    with pytest.raises(UnknownNameError) as caught:
        resolved(("q_proj", W8), (pattern, None))
    assert f"`{pattern}`" in str(caught.value) and f"did you mean `{nearest}`?" in str(caught.value)


def test_an_override_like_nothing_at_all_still_lists_a_few_names():
    with pytest.raises(UnknownNameError) as caught:
        resolved(("vision_tower", None))
    assert NAMES[0] in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("pattern", ["(", "[a-", "*proj", "(?P<x"])
def test_a_broken_regular_expression_is_refused(pattern):
    with pytest.raises(UsageError, match="no regular expression"):
        QuantRecipe(W4, ((pattern, W8),))


# --- layer_config -------------------------------------------------------------------------------------------


def test_no_layer_config():
    assert parse_layer_config(None, W2) == QuantRecipe(W2)
    assert parse_layer_config({}, W2) == QuantRecipe(W2)


@pytest.mark.parametrize(
    ("entry", "scheme"),
    [
        ("W8G32", QuantScheme(8, 32)),
        ("w2g64-asym", QuantScheme(2, 64, False)),
        (16, None),
        ("16", None),
        ("fp16", None),
        ("BF16", None),
        ({"bits": 16}, None),
        ({"bits": 16, "data_type": "float"}, None),
        ({"bits": 8}, QuantScheme(8, 64, False)),
        ({"group_size": -1}, QuantScheme(3, -1, False)),
        ({"sym": True}, QuantScheme(3, 64, True)),
        ({"bits": 2, "group_size": 32, "sym": True, "data_type": "int"}, QuantScheme(2, 32, True)),
        ({}, QuantScheme(3, 64, False)),
    ],
)
def test_entries(entry, scheme):
    # what an entry leaves out comes from the default
    assert parse_layer_config({"q_proj": entry}, QuantScheme(3, 64, False)).overrides == (("q_proj", scheme),)


CONFIG = {"q_proj": "W8G128", "model.layers.0": {"bits": 2}, r"mlp\..*": 16}


@pytest.mark.parametrize("form", ["mapping", "text", "file", "name of a file"])
def test_a_mapping_a_text_and_a_file_say_the_same_in_the_same_order(tmp_path, form):
    path = tmp_path / "layers.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    given = {"mapping": CONFIG, "text": f"  {json.dumps(CONFIG)}", "file": path, "name of a file": str(path)}[
        form
    ]
    assert parse_layer_config(given, W4).overrides == (
        ("q_proj", W8),
        ("model.layers.0", W2),
        (r"mlp\..*", None),
    )


@pytest.mark.parametrize("text", ["{", '{"a": }', "{'a': 8}", '{"a": 8} {"b": 8}'])
def test_bad_json_is_refused(text, tmp_path):
    with pytest.raises(UsageError, match="no valid JSON"):
        parse_layer_config(text, W4)
    (tmp_path / "config").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="no valid JSON"):
        parse_layer_config(tmp_path / "config", W4)


@pytest.mark.parametrize("text", ["no/such/file.json", "", "x" * 5000, "[1]", "a\0b", "."])
def test_a_file_that_cannot_be_read_is_refused(text):
    with pytest.raises(UsageError, match="neither JSON text nor a file"):
        parse_layer_config(text, W4)


def test_a_file_of_another_encoding_is_refused(tmp_path):
    (tmp_path / "config").write_bytes(b"{\xff\xfe}")
    with pytest.raises(UsageError, match="neither JSON text nor a file"):
        parse_layer_config(tmp_path / "config", W4)


def test_json_that_is_no_object_is_refused(tmp_path):
    path = Path(tmp_path, "list.json")
    path.write_text("[16]", encoding="utf-8")
    with pytest.raises(UsageError, match="must be an object"):
        parse_layer_config(path, W4)
    with pytest.raises(UsageError, match="must be an object"):
        parse_layer_config([("q_proj", 16)], W4)


@pytest.mark.parametrize("entry", [8, 4.5, None, True, ["W4"], False])
def test_an_entry_of_another_kind_is_refused(entry):
    with pytest.raises(UsageError, match="entry of `q_proj` must be a scheme, 16 or an object"):
        parse_layer_config({"q_proj": entry}, W4)


@pytest.mark.parametrize(("key", "nearest"), [("bit", "bits"), ("groupsize", "group_size"), ("symm", "sym")])
def test_an_unknown_key_is_refused_with_the_nearest(key, nearest):
    with pytest.raises(UnknownNameError, match=f"entry of `q_proj` `{key}`; did you mean `{nearest}`"):
        parse_layer_config({"q_proj": {key: 4}}, W4)


@pytest.mark.parametrize(
    "entry", ["W9", "int4", {"bits": 0}, {"bits": "4"}, {"group_size": 0}, {"sym": "no"}]
)
def test_a_scheme_out_of_range_is_refused(entry):
    with pytest.raises(UsageError):
        parse_layer_config({"q_proj": entry}, W4)


@pytest.mark.parametrize("pattern", [3, None, ("q", "k")])
def test_a_pattern_that_is_no_text_is_refused(pattern):
    with pytest.raises(UsageError, match="no layer name or pattern"):
        parse_layer_config({pattern: 16}, W4)
