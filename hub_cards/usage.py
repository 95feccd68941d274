"""Python examples of a card, which run as they are pasted."""

from .card_data import AdaLACardData
from .exports import FOLDER as ONNX

FOLDER = "path/to/this/folder"
# a use of the output, by the Auto class that opens the model
_OUTPUTS = {
    "AutoModel": "features = model(**inputs).last_hidden_state",
    "AutoModelForImageClassification": "print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])",
    "AutoModelForSemanticSegmentation": "classes = model(**inputs).logits.argmax(1)",
    "AutoBackbone": "feature_maps = model(**inputs).feature_maps",
}


def usage(data: AdaLACardData, *, trust_remote_code: bool = False) -> str:
    """Return code that opens a checkpoint and runs it on an image, with the package or the code beside the weights.

    From the records, it takes a valid repo id and the name of a class of this package only.
    """
    arguments = f'"{data.repo_id or FOLDER}"' + (", trust_remote_code=True" if trust_remote_code else "")
    head = data.head
    lines = [] if trust_remote_code else ["import modeling_adala  # registers the classes with Transformers"]
    if head.pipeline_tag == "zero-shot-image-classification":
        lines += ["from transformers import pipeline", ""]
        lines += [f'classifier = pipeline("{head.pipeline_tag}", model={arguments})']
        lines += ['print(classifier("image.jpg", candidate_labels=["a cat", "a dog"]))']
        return "\n".join(lines)
    # without this package, AutoBackbone refuses local folders (transformers 5.24)
    local = trust_remote_code and not data.repo_id
    name = data.class_name if head.auto_class == "AutoBackbone" and local else head.auto_class
    imported = [name] if name.startswith("Auto") else []
    if not imported:
        lines = [f"from modeling_adala import {name}"]
    if data.has_processor:
        lines += ["from PIL import Image"]
        imported = ["AutoImageProcessor", *imported]
    if imported:
        lines += [f"from transformers import {', '.join(imported)}"]
    lines += ["", f"model = {name}.from_pretrained({arguments}).eval()"]
    if data.has_processor:
        lines += [f'processor = AutoImageProcessor.from_pretrained("{data.repo_id or FOLDER}")']
        lines += ['inputs = processor(Image.open("image.jpg"), return_tensors="pt")']
        lines += [_OUTPUTS.get(head.auto_class, "outputs = model(**inputs)")]
    return "\n".join(lines)


# a use of the outputs of a graph, by the Auto class that opens the model
_ONNX_OUTPUTS = {
    "AutoModelForImageClassification": 'print(outputs["logits"].argmax(-1))',
    "AutoModelForSemanticSegmentation": 'classes = outputs["logits"].argmax(1)',
    "AutoBackbone": 'feature_map = outputs["feature_maps.0"]',
}


def onnx_usage(data: AdaLACardData) -> str:
    """Return code that runs the first ONNX graph of a repository on an image, without PyTorch."""
    export, repo, head = data.exports[0], f'"{data.repo_id}"', data.head
    both = head.pipeline_tag == "zero-shot-image-classification"
    lines = ["import onnxruntime", "from huggingface_hub import hf_hub_download", "from PIL import Image"]
    lines += [f"from transformers import AutoImageProcessor{', AutoTokenizer' if both else ''}", ""]
    lines += [f'hf_hub_download({repo}, "{ONNX}/{path.name}")  # its weights' for path in export.files[1:]]
    lines += [f'session = onnxruntime.InferenceSession(hf_hub_download({repo}, "{export.name}"))']
    lines += [f"processor = AutoImageProcessor.from_pretrained({repo})"]
    size = ""
    if len(export.sizes) == 1:
        height, width = export.sizes[0].split("x")
        sides = f'{{"height": {height}, "width": {width}}}'
        size = f", size={sides}, crop_size={sides}"
    lines += [f'inputs = processor(Image.open("image.jpg"){size}, return_tensors="np")']
    if both:
        lines += [f'tokenizer = AutoTokenizer.from_pretrained("{data.base_model or data.repo_id}")']
        lines += [
            'inputs["input_ids"] = tokenizer(["a cat", "a dog"], padding=True, return_tensors="np")["input_ids"]'
        ]
    lines += ["values = session.run(None, {item.name: inputs[item.name] for item in session.get_inputs()})"]
    lines += ["outputs = {item.name: value for item, value in zip(session.get_outputs(), values)}"]
    other = 'print(outputs["logits_per_image"])' if both else "print(list(outputs))"
    features = 'features = outputs["last_hidden_state"]' if head.auto_class == "AutoModel" and not both else other
    return "\n".join([*lines, _ONNX_OUTPUTS.get(head.auto_class, features)])
