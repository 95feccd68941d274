"""Every family compiles whole, exports with dynamic sizes, and is the same in a process that has never seen it.

Limits of `torch.export` with dynamic height and width that are those of the stock models (Transformers 5.23 and 5.24):

- Learned square grids of positions (ViT, DeiT, I-JEPA, DINOv2 with and without registers, CLIP, SigLIP): one branch
  returns the grid as it is at the native size, so the program of any other size refuses images with exactly as many
  patches as the native one ("Guard failed"). DINOv3 has no such branch.
- DINOv2 with registers turns the grid into Python integers, which fixes it unless Dynamo traces (`strict=True`).
- With local mixing, `strict=True` takes a torch that traces the hook that tells the patch grid as a graph of its own:
  2.13 does, 2.8 raises "Tried to emit a second graph during export", those in between have not been tried.
- SigLIP 2 before Transformers 5.24 loops in Python over the images of a batch to fit positions to each grid: the batch
  size is fixed, the grids and the number of patches are dynamic. Since 5.24 the batch size is dynamic, too.
- CLIP and SigLIP with both towers keep the example's batch size here; the text beside the images would have to follow.
"""

import json
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
import transformers
from family_helpers import CASES, NATIVE, RECTANGULAR, inputs_of, is_vision_text, randomize, tensors, tiny_config
from packaging import version
from torch.export import Dim

from modeling_adala.modeling_adala import MODELS, stock_class

STRICT = {"dinov2_with_registers"}
ONE_GRAPH = version.parse(torch.__version__) < version.parse("2.13")  # see above
LOOPS_OVER_GRIDS = version.parse(transformers.__version__) < version.parse("5.24")  # SigLIP 2, see above
SIZES = (RECTANGULAR, (48, 40), (16, 56))
# one of each way to embed positions; `make test-all` compiles and exports the others, too
TYPICAL = ["vit", "dinov2_with_registers", "dinov3_vit", "siglip2_vision_model"]
FAMILIES = [pytest.param(name, marks=[] if name in TYPICAL else pytest.mark.long) for name in MODELS]


def tiny_model(name: str, head: str = "Model", layers: int = 1, **options):
    family = MODELS[name]
    torch.manual_seed(0)
    return randomize(family[head](tiny_config(family["Model"].config_class, num_hidden_layers=layers, **options)))


def assert_same_outputs(actual, expected) -> None:
    for ours, theirs in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def graphs_after_each_size(name: str, **options) -> list[int]:
    """The number of graphs that a model has been compiled to, with outputs that are those of the model itself."""
    torch._dynamo.reset()
    model, counter = tiny_model(name), torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, **options)  # its graphs run as "eager" does
    counts = []
    for size in SIZES:
        assert_same_outputs(compiled(**inputs_of(model, size)), model(**inputs_of(model, size)))
        counts.append(counter.frame_count)
    return counts


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_dynamic_compiles_whole_and_once_for_all_sizes(name):
    counts = graphs_after_each_size(name, dynamic=True)
    assert counts[0] == counts[-1] <= 2  # the model, and the hook that tells it the patch grid


@pytest.mark.parametrize(
    "name", ["vit", *(pytest.param(name, marks=pytest.mark.long) for name in TYPICAL if name != "vit")]
)
@torch.no_grad()
def test_compiles_whole_and_again_for_the_second_size_alone(name):
    counts = graphs_after_each_size(name)
    assert counts[0] == 1 and counts[1] == counts[2]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_exports_with_dynamic_batch_and_size(name):
    assert_exports(name, "Model")


@pytest.mark.long
@pytest.mark.parametrize("name", ["vit", "siglip2_vision_model"])
@torch.no_grad()
def test_dynamic_mixing_exports_with_dynamic_batch_and_size(name):
    assert_exports(name, "Model", dynamic_mixing=True)


@pytest.mark.long
@torch.no_grad()
def test_backbone_of_any_grid_exports_with_dynamic_batch_and_size():
    assert_exports("siglip2_vision_model", "Backbone")


def assert_exports(name: str, head: str, **options) -> None:
    options |= {"local_mixing": 0} if name in STRICT and ONE_GRAPH else {}
    model = tiny_model(name, head, **options)
    example = inputs_of(model, RECTANGULAR)
    fixed = is_vision_text(name) or ("siglip2" in name and LOOPS_OVER_GRIDS)
    batch = {} if fixed else {0: Dim.AUTO}
    shapes = {key: None for key in example} | {"pixel_values": batch | {2: Dim.AUTO, 3: Dim.AUTO}}
    if "spatial_shapes" in example:
        patches = batch | {1: Dim.AUTO}
        shapes |= {"pixel_values": patches, "pixel_attention_mask": patches, "spatial_shapes": batch}
    exported = torch.export.export(model, (), kwargs=example, dynamic_shapes=shapes, strict=name in STRICT).module()
    if name == "vit":  # no product of its own for each head
        assert not exported.graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default)
    for count, size in zip((2, 3, 5), SIZES):
        inputs = inputs_of(model, size, batch=2 if fixed else count)
        assert_same_outputs(exported(**inputs), model(**inputs))


# --- a fresh process -------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys, torch, transformers
torch.set_num_threads(1)
root = sys.argv[1]
cases = json.load(open(f"{root}/cases.json"))
stock_names = [name for name in json.load(open(f"{root}/stock.json"))]
modules = sorted({getattr(transformers, name).__module__ for name in stock_names})


def run(name):
    torch.manual_seed(0)
    model = getattr(transformers, name).from_pretrained(f"{root}/stock/{name}").eval()
    with torch.no_grad():
        return model(**torch.load(f"{root}/stock/{name}/inputs.pt"))[0]


def classes():
    found = [c for m in modules for c in vars(sys.modules[m]).values() if isinstance(c, type)]
    found = [c for c in found if c.__module__ in modules]
    return {c: {**vars(c)} for c in found}


def registered(name):
    mapping = transformers.conversion_mapping.get_checkpoint_conversion_mapping(name)
    config_class = getattr(transformers, name).config_class
    return repr(mapping), transformers.AutoModel._model_mapping[config_class], \\
        transformers.AutoConfig.for_model(config_class.model_type).__class__


outputs = {name: run(name) for name in stock_names}
before, mappings = classes(), {name: registered(name) for name in stock_names}
import modeling_adala
from modeling_adala.modeling_adala import MODELS
from modeling_adala.modeling_adala import AUTO_CLASSES

changed = [c.__name__ for c, attributes in classes().items() if attributes != before[c]]
changed += [name for name in stock_names if registered(name) != mappings[name]]
changed += [name for name in stock_names if not torch.equal(run(name), outputs[name])]
wrong = []
for name, head in cases:
    opener = MODELS[name][head]
    if head in AUTO_CLASSES:
        opener = getattr(transformers, AUTO_CLASSES[head])
    saved = torch.load(f"{root}/{name}-{head}.pt")
    model = opener.from_pretrained(f"{root}/{name}-{head}").eval()
    with torch.no_grad():
        output = model(**saved["inputs"])[0]
    output = output[0] if isinstance(output, tuple) else output
    if type(model) is not MODELS[name][head] or not torch.equal(output, saved["output"]):
        wrong.append(f"{name} {head}")
print(json.dumps({"changed": changed, "wrong": wrong, "checked": [len(before), len(cases)]}))
"""


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory) -> dict:
    """What one new interpreter says of all stock classes, before and after the import, and of all our checkpoints."""
    root, stock = tmp_path_factory.mktemp("fresh"), []
    for name, head in CASES:
        model = tiny_model(name, head)
        inputs = inputs_of(model, NATIVE)
        with torch.no_grad():
            output = model(**inputs)[0]
        model.save_pretrained(root / f"{name}-{head}")
        output = output[0] if isinstance(output, tuple) else output
        torch.save({"inputs": inputs, "output": output}, root / f"{name}-{head}.pt")
        if head == "Model":
            model_class = stock_class(MODELS[name]["Model"])
            stock.append(model_class.__name__)
            folder = root / "stock" / model_class.__name__
            model_class(tiny_config(model_class.config_class, num_hidden_layers=1)).save_pretrained(folder)
            torch.save(inputs, folder / "inputs.pt")
    (root / "cases.json").write_text(json.dumps(CASES))
    (root / "stock.json").write_text(json.dumps(stock))
    process = subprocess.run([sys.executable, "-c", SCRIPT, str(root)], capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout.splitlines()[-1])


def test_auto_classes_of_a_fresh_process_give_identical_outputs(fresh_process):
    assert fresh_process["wrong"] == []
    assert fresh_process["checked"][1] == len(CASES)


def test_the_import_changes_nothing_of_the_stock_classes(fresh_process):
    assert fresh_process["changed"] == []
    assert fresh_process["checked"][0] > 100
