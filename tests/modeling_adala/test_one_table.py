"""One family table: no other file tests a model type or a class name by its beginning, its end or its value."""

import ast
import re
from pathlib import Path

import pytest

from modeling_adala import UsageError
from modeling_adala.families import FAMILIES, ROWS, find_family, get_family, is_adala
from modeling_adala.modeling_adala import MODELS, head_of, models_of, stock_class

ROOT = Path(__file__).parents[2]
PACKAGES = ("modeling_adala", "trainers", "hub_cards", "vit_adala", "benchmarks", "examples")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TABLES = {"families.py", "modeling_adala.py", "configuration_adala.py", "registration.py"}
AFFIX = {"startswith", "endswith", "removeprefix", "removesuffix"}
NAMES = re.compile(r"AdaLA|adala_|For[A-Z]\w+|Backbone$|Config$|Model$")
TYPES = {name for row in ROWS for name in (row.stock, row.adala, *row.aliases)}


def family_tests(tree: ast.AST) -> list[int]:
    """Lines that tell families or classes apart by text."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in AFFIX:
            texts = [c.value for a in node.args for c in ast.walk(a) if isinstance(c, ast.Constant)]
            found += [node.lineno for text in texts if isinstance(text, str) and NAMES.match(text)]
        elif isinstance(node, ast.Compare):
            texts = [
                c.value
                for side in (node.left, *node.comparators)
                for c in ast.walk(side)
                if isinstance(c, ast.Constant)
            ]
            found += [node.lineno for text in texts if isinstance(text, str) and text in TYPES]
    return found


@pytest.mark.parametrize(
    "line", ['x.startswith("adala_")', 'name.endswith("ForImageClassification")', 'kind == "vit"']
)
def test_such_a_line_is_found(line):
    assert family_tests(ast.parse(line)) == [1]


def test_no_other_file_tells_families_apart():
    assert len(FILES) > 90
    found = {
        str(path.relative_to(ROOT)): family_tests(ast.parse(path.read_text()))
        for path in FILES
        if path.name not in TABLES
    }
    assert not {path: lines for path, lines in found.items() if lines}


def test_a_row_is_found_by_every_name_and_no_name_is_in_two_rows():
    names = [name for row in ROWS for name in (row.stock, row.adala, *row.aliases)]
    assert len(names) == len(set(names))
    for row in ROWS:
        assert all(find_family(name) is row is get_family(name) for name in (row.stock, row.adala, *row.aliases))
    assert FAMILIES.keys() == MODELS.keys()
    assert find_family("swin") is None
    with pytest.raises(UsageError, match="'swin' is not supported; choose a teacher of vit, deit"):
        get_family("swin")


@pytest.mark.parametrize("name", MODELS)
def test_configurations_and_classes_know_their_row(name):
    row = FAMILIES[name]
    for head, model_class in MODELS[name].items():
        config = model_class.config_class()
        assert config.model_type == row.adala and is_adala(config)
        assert models_of(config) is MODELS[name]
        assert head_of(config, model_class.__name__) == head
        stock = stock_class(model_class)
        if stock is not None:
            assert head_of(config, stock.__name__) == head
            assert stock.config_class.model_type == row.stock and not is_adala(stock.config_class())
    assert (row.vision is not None) == ("text_config" in config.sub_configs)
    assert head_of(config, "SwinModel") is None
