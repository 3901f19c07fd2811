"""The registry: strangers' plugins are found, a broken one harms nobody, an error says whose fault it is.

Plugins are modules and distributions written to a temporary directory, found as installed ones are.
"""

from __future__ import annotations

import sys
import textwrap
from importlib.metadata import EntryPoint, distributions, entry_points

import pytest

from autoround_core import registry as registry_module
from autoround_core.errors import PluginError, UnknownNameError
from autoround_core.hookspecs import PROJECT
from autoround_core.registry import Registry, get_registry
from autoround_core.scheme import BLOCK_TYPES

BUILTIN = EntryPoint("core", "autoround_core.builtin", PROJECT)


class Site:
    """A directory of distributions, on sys.path."""

    def __init__(self, path, monkeypatch):
        self.path, self._monkeypatch = path, monkeypatch
        monkeypatch.syspath_prepend(str(path))

    def add(self, name, source, *, point=None, version="1.2", module=None):
        """Install `name` with one module and one entry point; return the entry point."""
        module = module or name.replace("-", "_")
        (self.path / f"{module}.py").write_text(textwrap.dedent(source))
        info = self.path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[{PROJECT}]\n{point or module} = {module}\n")
        self._monkeypatch.delitem(sys.modules, module, raising=False)
        found = next(dist for dist in distributions(path=[str(self.path)]) if dist.name == name)
        return next(iter(found.entry_points))


@pytest.fixture
def site(tmp_path, monkeypatch):
    return Site(tmp_path, monkeypatch)


def plugin(hook, *names, attribute="name"):
    """Source of a plugin whose hook contributes objects of these names."""
    return f"""
        from types import SimpleNamespace
        from autoround_core import hookimpl

        @hookimpl
        def {hook}():
            return [SimpleNamespace({attribute}=name) for name in {names!r}]
    """


def failure(registry):
    (record,) = registry.failures
    return record


# --- finding ------------------------------------------------------------------------------------------------


def test_our_own_plugins_are_found_as_any_others():
    names = {record.name: record for record in get_registry().plugins}
    assert {"core", "export", "backends", "cli"} <= names.keys()
    assert names["core"].distribution == "autoround-core" and names["core"].error is None
    assert names["core"].hooks == (
        "autoround_algorithms",
        "autoround_model_adapter",
        "autoround_number_families",
    )
    assert {"rtn", "opt_rtn", "signround"} <= get_registry().algorithms().keys()
    assert {"auto_round", "dense"} <= get_registry().formats().keys()
    assert get_registry().backends()["reference"].priority == 0
    assert get_registry().number_families().keys() == {"int", "fp", "mx_fp", "nv_fp", *BLOCK_TYPES}
    assert get_registry() is get_registry()


def test_an_installed_plugin_is_found_and_described(site):
    site.add("autoround-sparse", plugin("autoround_formats", "sparse"))
    registry = Registry()
    record = next(record for record in registry.plugins if record.name == "autoround_sparse")
    assert (record.distribution, record.version, record.module) == (
        "autoround-sparse",
        "1.2",
        "autoround_sparse",
    )
    assert record.hooks == ("autoround_formats",) and record.error is None
    assert registry.format("sparse").name == "sparse"
    assert registry.format("dense").name == "dense"


def test_entry_points_of_other_groups_are_not_loaded(site):
    site.add("autoround-x", "raise SystemExit('loaded')")
    info = next(site.path.glob("*.dist-info"))
    (info / "entry_points.txt").write_text("[console_scripts]\nx = autoround_x\n")
    assert all(record.module != "autoround_x" for record in Registry().plugins)


def test_every_hook_is_collected(site):
    points = [
        site.add("autoround-f", plugin("autoround_formats", "f1", "f2")),
        site.add("autoround-b", plugin("autoround_backends", "b")),
        site.add("autoround-a", plugin("autoround_algorithms", "a")),
        site.add("autoround-n", plugin("autoround_number_families", "n", attribute="data_type")),
    ]
    registry = Registry(points)
    assert registry.formats().keys() == {"f1", "f2"} and registry.backends().keys() == {"b"}
    assert registry.algorithm("a").name == "a" and registry.number_family("n").data_type == "n"
    assert registry.failures == []


def test_a_hook_may_return_nothing_or_a_generator(site):
    nothing = site.add(
        "autoround-nothing",
        """
        from autoround_core import hookimpl
        @hookimpl
        def autoround_formats():
            pass
    """,
    )
    lazy = site.add(
        "autoround-lazy",
        """
        from types import SimpleNamespace
        from autoround_core import hookimpl
        @hookimpl
        def autoround_formats():
            yield SimpleNamespace(name="lazy")
    """,
    )
    assert Registry([nothing, lazy]).formats().keys() == {"lazy"}


def test_an_adapter_of_a_stranger_comes_before_the_built_in_one(site):
    point = site.add(
        "autoround-mine",
        """
        from autoround_core import hookimpl
        @hookimpl
        def autoround_model_adapter(config):
            return "mine" if config["model_type"] == "mine" else None
    """,
    )
    for points in ([BUILTIN, point], [point, BUILTIN]):
        registry = Registry(points)
        assert registry.adapter({"model_type": "mine"}) == "mine"
        assert type(registry.adapter({"model_type": "llama"})).__name__ == "CausalLM"


def test_commands_are_added(site):
    point = site.add(
        "autoround-hello",
        """
        from autoround_core import hookimpl
        @hookimpl
        def autoround_commands(cli):
            cli.append("hello")
    """,
    )
    cli = []
    Registry([point]).add_commands(cli)
    assert cli == ["hello"]


def test_a_variant_is_asked_of_the_format(site):
    point = site.add(
        "autoround-v",
        """
        from autoround_core import hookimpl
        class Format:
            name = "v"
            def variant(self, text):
                return f"v with {text}"
        @hookimpl
        def autoround_formats():
            return [Format()]
    """,
    )
    registry = Registry([point])
    assert registry.format("v:a:b") == "v with a:b"
    assert registry.format("v").name == "v"
    with pytest.raises(UnknownNameError, match="unknown format `w`"):
        registry.format("w:a")


# --- a broken plugin ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "import a_module_that_is_not_there",
            "ModuleNotFoundError: No module named 'a_module_that_is_not_there'",
        ),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError:"),
        ("raise RuntimeError('first\\nsecond')", "RuntimeError: first"),
        ("raise ValueError", "ValueError: "),
        ("raise SystemExit('no GPU here')", "SystemExit: no GPU here"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
    ],
)
def test_a_broken_import_is_recorded_and_harms_nobody(site, source, says):
    bad, good = (
        site.add("autoround-bad", source),
        site.add("autoround-good", plugin("autoround_formats", "good")),
    )
    for points in ([BUILTIN, bad, good], [good, bad, BUILTIN]):
        registry = Registry(points)
        assert failure(registry).distribution == "autoround-bad"
        assert failure(registry).error.startswith(says) and "second" not in failure(registry).error
        assert failure(registry).hooks == ()
        assert registry.formats().keys() == {"good"} and "rtn" in registry.algorithms()


def test_an_entry_point_that_names_nothing(site):
    point = site.add("autoround-gone", "x = 1")
    missing = EntryPoint(point.name, "autoround_gone:plugin", PROJECT)
    record = failure(Registry([BUILTIN, missing]))
    assert record.error.startswith("AttributeError") and record.module == "autoround_gone:plugin"
    assert (record.distribution, record.version) == ("?", "?")  # constructed by hand, not installed


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("autoround_format", "autoround_formats"),
        ("autoround_backend", "autoround_backends"),
        ("autoround_command", "autoround_commands"),
        ("auto_round_algorithms", "autoround_algorithms"),
    ],
)
def test_a_misspelt_hook_is_reported_with_its_nearest_match(site, written, meant):
    record = failure(Registry([BUILTIN, site.add("autoround-typo", plugin(written, "typo"))]))
    assert record.error == f"`{written}` is no hook; did you mean `{meant}`?"


def test_a_misspelt_hook_switches_the_whole_plugin_off(site):
    point = site.add(
        "autoround-half", plugin("autoround_formats", "half") + plugin("autoround_bakends", "half")
    )
    registry = Registry([point])
    assert "autoround_backends" in failure(registry).error and registry.formats() == {}


def test_a_plain_function_with_a_likely_name_is_no_hook(site):
    point = site.add(
        "autoround-helper", plugin("autoround_formats", "x") + "\n        def autoround_helper(): return 1\n"
    )
    assert Registry([point]).failures == []


def test_a_hook_may_have_another_name_in_the_plugin(site):
    point = site.add(
        "autoround-named",
        """
        from types import SimpleNamespace
        from autoround_core import hookimpl
        @hookimpl(specname="autoround_formats")
        def mine():
            return [SimpleNamespace(name="named")]
    """,
    )
    assert Registry([point]).formats().keys() == {"named"}


def test_a_hook_with_an_argument_that_does_not_exist(site):
    bad = site.add(
        "autoround-args",
        """
        from autoround_core import hookimpl
        @hookimpl
        def autoround_formats(device):
            return []
    """,
    )
    registry = Registry([bad, site.add("autoround-good", plugin("autoround_formats", "good"))])
    assert "PluginValidationError" in failure(registry).error
    assert registry.formats().keys() == {"good"}


@pytest.mark.parametrize(
    "body",
    [
        "import a_module_that_is_not_there",
        "return 3",
        "return [object()]",
        "yield from [1 / 0]",
    ],
)
def test_a_hook_that_fails_when_it_is_called_is_recorded_and_harms_nobody(site, body):
    bad = site.add(
        "autoround-late",
        f"""
        from autoround_core import hookimpl
        @hookimpl
        def autoround_formats():
            {body}
    """,
    )
    good = site.add("autoround-good", plugin("autoround_formats", "good"))
    registry = Registry([good, bad])
    assert registry.failures == []
    assert registry.formats().keys() == {"good"} == registry.formats().keys()
    assert failure(registry).name == "autoround_late" and failure(registry).error.startswith(
        "autoround_formats: "
    )
    with pytest.raises(UnknownNameError, match="plugin `autoround_late` failed: autoround_formats: "):
        registry.format("late")


def test_a_command_that_cannot_be_added_is_recorded_and_harms_nobody(site):
    bad = site.add(
        "autoround-bad",
        """
        from autoround_core import hookimpl
        @hookimpl
        def autoround_commands(cli):
            cli.no_such_attribute
    """,
    )
    good = site.add(
        "autoround-good",
        """
        from autoround_core import hookimpl
        @hookimpl
        def autoround_commands(cli):
            cli.append("good")
    """,
    )
    for points in ([bad, good], [good, bad]):
        registry, cli = Registry(points), []
        registry.add_commands(cli)
        assert cli == ["good"] and failure(registry).error.startswith("autoround_commands: AttributeError")


def test_unknown_names_mention_the_plugins_that_failed(site):
    points = [
        BUILTIN,
        site.add("autoround-bad", "raise ImportError('needs CUDA 14')"),
        site.add("autoround-formats", plugin("autoround_formats", "sparse")),
    ]
    registry = Registry(points)
    for ask, kind in (
        (registry.format, "format"),
        (registry.algorithm, "algorithm"),
        (registry.number_family, "number family"),
    ):
        with pytest.raises(UnknownNameError) as caught:
            ask("sprase")
        assert str(caught.value).startswith(f"unknown {kind} `sprase`")
        assert str(caught.value).endswith("; plugin `autoround_bad` failed: ImportError: needs CUDA 14")
    with pytest.raises(UnknownNameError, match=r"did you mean `sparse`\? .known: sparse."):
        registry.format("sprase")


def test_without_failures_none_is_mentioned(site):
    registry = Registry([site.add("autoround-formats", plugin("autoround_formats", "sparse"))])
    with pytest.raises(UnknownNameError) as caught:
        registry.format("x")
    assert "failed" not in str(caught.value)


# --- names claimed twice ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "attribute", "ask"),
    [
        ("autoround_formats", "name", Registry.formats),
        ("autoround_backends", "name", Registry.backends),
        ("autoround_algorithms", "name", Registry.algorithms),
        ("autoround_number_families", "data_type", Registry.number_families),
    ],
)
def test_a_name_claimed_twice_is_an_error_naming_both_owners(site, hook, attribute, ask):
    points = [
        site.add("autoround-one", plugin(hook, "same", "own", attribute=attribute)),
        site.add("autoround-two", plugin(hook, "other", "same", attribute=attribute)),
    ]
    with pytest.raises(PluginError, match=f"`same` is registered twice .{hook}.") as caught:
        ask(Registry(points))
    assert "autoround_one" in str(caught.value) and "autoround_two" in str(caught.value)


def test_a_stranger_cannot_replace_a_built_in(site):
    with pytest.raises(PluginError, match=r"`rtn` is registered twice .*core"):
        Registry([BUILTIN, site.add("autoround-evil", plugin("autoround_algorithms", "rtn"))]).algorithms()


def test_two_distributions_may_call_their_entry_points_alike(site):
    points = [
        site.add("autoround-one", plugin("autoround_formats", "one"), point="extra"),
        site.add("autoround-two", plugin("autoround_formats", "two"), point="extra"),
        site.add("autoround-bad", "1 / 0", point="extra"),
    ]
    for order in (points, points[::-1]):
        registry = Registry(order)
        assert registry.formats().keys() == {"one", "two"}
        assert failure(registry).distribution == "autoround-bad"
        assert len({record.name for record in registry.plugins}) == 3


# --- the allow-list -----------------------------------------------------------------------------------------


def test_the_allow_list_keeps_everything_else_from_being_loaded(site):
    site.add("autoround-good", plugin("autoround_formats", "good"))
    site.add("autoround-bad", "raise RuntimeError('loaded')")
    registry = Registry(allowed=["core", "autoround_good"])
    assert {record.name for record in registry.plugins} == {"core", "autoround_good"}
    assert registry.formats().keys() == {"good"} and "autoround_bad" not in sys.modules
    assert Registry(allowed=[]).plugins == []


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("core,export", {"core", "export"}),
        (" core , export,", {"core", "export"}),
        ("core", {"core"}),
        ("", set()),
        ("nothing-of-this-name", set()),
    ],
)
def test_the_allow_list_of_the_environment(monkeypatch, value, names):
    monkeypatch.setenv("AUTOROUND_PLUGINS", value)
    fresh = registry_module.get_registry.__wrapped__()
    assert {record.name for record in fresh.plugins} == names


def test_without_the_variable_everything_is_loaded(monkeypatch):
    monkeypatch.delenv("AUTOROUND_PLUGINS", raising=False)
    fresh = registry_module.get_registry.__wrapped__()
    assert {record.name for record in fresh.plugins} >= {point.name for point in entry_points(group=PROJECT)}
