"""Hugging Face Space: the demo of vit-adala, for the first model that README.md names.

python app.py
"""

from pathlib import Path

from huggingface_hub import metadata_load

from vit_adala.demo.app import serve

if __name__ == "__main__":
    metadata = metadata_load(Path(__file__).with_name("README.md")) or {}
    serve(next(iter(metadata["models"]), None))
