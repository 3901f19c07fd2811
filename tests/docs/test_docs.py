"""The documentation is held true: hooks, options, formats, recipes, examples, figures and links."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

import click
import pytest
import torch
from click.testing import CliRunner

from autoround_core import RECIPES, AffineWeight, QuantScheme, Registry, UnsupportedError, get_registry
from autoround_core import testing as kit
from autoround_export.awq_layout import AwqLayout
from autoround_export.gptq_layout import GptqLayout

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TUTORIAL = (DOCS / "plugin-tutorial.md").read_text(encoding="utf-8")
EXAMPLES = [ROOT / "tests" / "plugins" / f"autoround-{name}" for name in ("npz", "blas32")]
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("packages/*/*.md"),
                                 *ROOT.glob("changelog.d/*.md"), *ROOT.glob("benchmarks/*.md")])


def rows(text: str) -> list[list[str]]:
    """The cells of every line of every table."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|-: ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def section(text: str, heading: str) -> str:
    """What is between a heading and the next one of its level or above."""
    level = heading.index(" ")
    _, _, rest = text.partition(f"\n{heading}\n")
    assert rest, f"no heading `{heading}`"
    return re.split(rf"^#{{1,{level}}} ", rest, flags=re.MULTILINE)[0]


# --- hooks -------------------------------------------------------------------------------------------------


def signatures() -> list[str]:
    """The hooks as written in hookspecs.py, such as `autoround_formats() -> Iterable[CheckpointFormat]`."""
    path = ROOT / "packages" / "autoround-core" / "src" / "autoround_core" / "hookspecs.py"
    hooks = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    return [f"{hook.name}({ast.unparse(hook.args)}) -> {ast.unparse(hook.returns)}" for hook in hooks]


def test_every_hook_has_a_heading_with_its_exact_signature():
    headings = re.findall(r"^### `(autoround_.*)`$", TUTORIAL, flags=re.MULTILINE)
    assert headings == signatures()


@pytest.mark.parametrize("signature", signatures())
def test_every_hook_has_an_example_that_implements_it(signature):
    code = "\n".join(blocks(section(TUTORIAL, f"### `{signature}`"), "python"))
    assert f"@hookimpl\ndef {signature.split('(')[0]}(" in code


# --- examples of the tutorial ------------------------------------------------------------------------------


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def included() -> list[tuple[str, str]]:
    """(path, text) of the blocks that stand for a file."""
    return re.findall(r"^<!-- file: (.*?) -->\n```\w+\n(.*?)^```$", TUTORIAL, flags=re.MULTILINE | re.DOTALL)


def test_files_in_the_tutorial_are_those_of_the_tests():
    assert len(included()) >= 9
    for path, text in included():
        assert text == (ROOT / path).read_text(), f"{path} and its copy in the tutorial differ"


def run_block(hook: str | None, monkeypatch) -> Registry:
    """Execute the tutorial's example of a hook as a module, and load that as a plugin beside our own."""
    own = [code for code in blocks(TUTORIAL, "python") if f"def {hook}(" in code]
    module = ModuleType("tutorial_example")
    exec(compile(own[0], str(DOCS / "plugin-tutorial.md"), "exec"), vars(module))
    monkeypatch.setitem(sys.modules, "tutorial_example", module)
    points = [*entry_points(group="autoround"), EntryPoint("example", "tutorial_example", "autoround")]
    registry = Registry(points)
    assert registry.failures == []
    assert next(record for record in registry.plugins if record.name == "example").hooks == (hook,)
    return registry


@pytest.fixture
def examples_on_path(monkeypatch):
    for folder in EXAMPLES:
        monkeypatch.syspath_prepend(str(folder))


def test_the_number_family_of_the_tutorial_works(monkeypatch):
    registry = run_block("autoround_number_families", monkeypatch)
    family = registry.number_family("int_pow2")
    schemes = [QuantScheme(bits, 32, data_type="int_pow2") for bits in (4, 8)]
    assert kit.check_algorithm(registry.algorithm("rtn"), schemes=schemes, families=[family]).cells == 2
    assert "asym" in family.why_not(QuantScheme(4, 32, sym=False))


def test_the_algorithm_of_the_tutorial_works(monkeypatch):
    registry = run_block("autoround_algorithms", monkeypatch)
    assert kit.check_algorithm(registry.algorithm("least_squares")).cells == 5


def test_the_format_of_the_tutorial_works(monkeypatch, examples_on_path):
    assert "npz" in run_block("autoround_formats", monkeypatch).formats()


def test_the_backend_of_the_tutorial_works(monkeypatch, examples_on_path):
    assert "blas32" in run_block("autoround_backends", monkeypatch).backends()


def test_the_adapter_of_the_tutorial_works(monkeypatch):
    registry = run_block("autoround_model_adapter", monkeypatch)
    with pytest.raises(UnsupportedError, match="only decoders"):
        registry.adapter({"model_type": "t5", "is_encoder_decoder": True})
    assert type(registry.adapter({"model_type": "llama"})).__name__ == "CausalLM"


def test_the_command_of_the_tutorial_works(monkeypatch):
    cli = click.Group()
    run_block("autoround_commands", monkeypatch).add_commands(cli)
    result = CliRunner().invoke(cli, ["layers", str(ROOT / "examples" / "tiny-qwen3")])
    assert (result.output, result.exit_code) == ("0\n", 0)


def test_other_python_of_the_tutorial_runs():
    copies = [text for _, text in included()]
    others = [code for code in blocks(TUTORIAL, "python") if code not in copies and "@hookimpl" not in code]
    assert others
    for code in others:
        exec(compile(code, str(DOCS / "plugin-tutorial.md"), "exec"), {})


def test_the_kit_is_described_with_its_signatures():
    for name in ("check_layout", "check_format", "check_backend", "check_algorithm"):
        text = next(row[0] for row in rows(TUTORIAL) if row[0].startswith(f"`{name}("))
        written = ast.parse(f"def {text.strip('`')}: pass").body[0].args
        names = [argument.arg for argument in (*written.args, *written.kwonlyargs)]
        assert names == list(inspect.signature(getattr(kit, name)).parameters)


# --- the command line --------------------------------------------------------------------------------------

CLI = (DOCS / "cli.md").read_text(encoding="utf-8")


def commands() -> dict[str, click.Command]:
    cli = click.Group()
    Registry([point for point in entry_points(group="autoround") if point.name == "cli"]).add_commands(cli)
    return dict(cli.commands)


def documented(command: str) -> set[str]:
    """Options in the first cells of the tables below the headings that name the command."""
    found: set[str] = set()
    for part in re.split(r"^## ", CLI, flags=re.MULTILINE)[1:]:
        if re.search(rf"`autoround {command}\b", part.splitlines()[0]):
            found |= {option for row in rows(part) for option in re.findall(r"--\w+", row[0])}
    return found


@pytest.mark.parametrize("name", commands())
def test_options_are_documented_and_those_documented_exist(name):
    options = commands()[name].params
    spellings = (spelling for option in options for spelling in (*option.opts, *option.secondary_opts))
    assert documented(name) == {spelling for spelling in spellings if spelling.startswith("--")}


@pytest.mark.parametrize("name", commands())
def test_commands_are_documented_with_their_arguments(name):
    arguments = [p.name.upper() for p in commands()[name].params if isinstance(p, click.Argument)]
    heading = " ".join([f"autoround {name}", *arguments])
    assert any(f"`{heading}`" in line for line in CLI.splitlines() if line.startswith("## "))


def test_no_command_is_documented_that_does_not_exist():
    headings = [line for line in CLI.splitlines() if line.startswith("## ")]
    assert set(re.findall(r"`autoround (\w+)", " ".join(headings))) == commands().keys()


def test_documented_defaults_of_the_command_line_are_right():
    given = {(name, parameter.opts[0]): parameter.default for name, command in commands().items()
             for parameter in command.params if isinstance(parameter, click.Option) and not parameter.is_flag}
    for part in re.split(r"^## ", CLI, flags=re.MULTILINE)[1:]:
        for name in re.findall(r"`autoround (\w+)", part.splitlines()[0]):
            for option, default, _ in (row for row in rows(part) if len(row) == 3):
                value = given.get((name, option.strip("`").split("`")[0]))
                if isinstance(value, (str, int, float)):
                    assert default == str(value), f"{name} {option}"


# --- formats, recipes, figures -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(get_registry().formats()))
def test_every_format_is_specified(name):
    assert (DOCS / "formats" / f"{name}.md").read_text().startswith(f"# Format `{name}`")


def test_the_golden_vectors_of_the_specification_are_what_is_written():
    def words(tensor):
        return " ".join(f"{word & 0xFFFFFFFF:08x}" for word in tensor.flatten().tolist())

    text = (DOCS / "formats" / "auto_round.md").read_text()
    table = [[cell.strip("`") for cell in row] for row in rows(section(text, "### Golden vectors"))[1:]]
    assert [row[0] for row in table] == ["2", "3", "4", "5", "8"]
    for bits, *expected in table:
        scheme = QuantScheme(int(bits), 32)
        codes = (7 * torch.arange(32) % 2**scheme.bits).to(torch.uint8).repeat(32, 1)
        zero = torch.full((32, 1), 2 ** (scheme.bits - 1), dtype=torch.uint8)
        weight = AffineWeight(scheme, codes, torch.ones(32, 1, dtype=torch.float16), zero)
        first, second = (GptqLayout(offset).pack(weight) for offset in (1, 0))
        column, zeros = first["qweight"][:, 0], (layout["qzeros"][0, :1] for layout in (first, second))
        assert expected == [words(column), *map(words, zeros)]
    columns = torch.arange(8, dtype=torch.uint8).unsqueeze(1)
    scale = torch.ones(8, 1, dtype=torch.float16)
    weight = AffineWeight(QuantScheme(4, -1, sym=False), columns.repeat(1, 8), scale, columns)
    assert f"make the word `{words(AwqLayout().pack(weight)['qweight'][0])}`" in text


def test_the_recipe_table_is_the_recipes():
    text = section((DOCS / "algorithms.md").read_text(), "## Recipes")
    header, *table = rows(text)
    assert [row[0] for row in table] == list(RECIPES)
    for row in table:
        settings = RECIPES[row[0]]
        for name, cell in zip(header[1:], row[1:], strict=True):
            if cell == "":  # it makes no difference: nothing is calibrated or tuned
                assert name == "lr" or settings.algorithm == "rtn"
            elif cell == "1/iters":
                assert settings.lr is None
            else:
                assert cell == str(getattr(settings, name)), f"{row[0]} {name}"
    assert {settings.minmax_lr for settings in RECIPES.values()} == {None}
    assert {(s.gradient_accumulate_steps, s.seed) for s in RECIPES.values()} == {(1, 42)}


def test_figures_of_the_algorithms_are_those_of_the_code():
    from autoround_core import affine, int_family, model_block, signround

    text = (DOCS / "algorithms.md").read_text()
    numbers = {5: "five"}
    checks, samples = numbers[signround._CHECKS], model_block.VALIDATION_SAMPLES
    assert f"measured {checks} times on the same {samples} samples" in text
    first, second, last = (int_family._SEARCH_FACTORS[i] for i in (0, 1, -1))
    assert f"f = {first:.2f}, {second:.2f}, ... {last:.2f}" in text
    assert f"at least {affine.SMALLEST_SCALE:.0e}".replace("e-05", "e-5") in text


def test_the_layers_of_core_are_those_that_are_tested():
    tree = ast.parse((ROOT / "tests" / "test_imports.py").read_text())
    rooms = next(ast.literal_eval(node.value) for node in tree.body
                 if isinstance(node, ast.Assign) and node.targets[0].id == "ROOMS")
    table = section((DOCS / "design.md").read_text(), "## Packages")
    written = [row[1].split(", ") for row in rows(table) if len(row) == 2][1:]
    assert [sorted(room) for room in written] == [sorted(room) for room in rooms]


# --- links -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        assert (page.parent / path).exists(), f"{page.name} links to {target}"
        if anchor:
            linked = (page.parent / path if path else page).read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.*)$", linked, flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_backquotes_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:docs|tests|examples|packages|changelog\.d)/[\w./-]+)`", text):
        if not name.startswith("changelog.d/backends/"):  # an example of a fragment
            assert (ROOT / name).exists(), f"{page.name} names {name}"
