"""The page of the demo. Nothing on it or behind it needs a network."""

import threading
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from modeling_adala.configuration_adala import vision_config
from trainers.base_config import evaluation_dtype
from trainers.runs.facts import describe_machine

from . import session
from .charts import COLORS
from .pair import Pair, check_models, open_pair
from .uploads import example_images
from .views import PICTURE

STYLE = Path(__file__).with_name("style.css")
INTRODUCTION = """<h1>vit-adala</h1><p>A softmax Vision Transformer and its linear-attention student on the same image.
Click into one of the pictures to see what that patch attends to; move the slider to see what resolution costs.</p>"""
FOOTNOTE = """Colors are the first three principal components of the teacher's patch features, for both models.
Attention is the mean over heads, each map to its own scale. Time and memory are those of a forward pass of the vision
tower for one image, memory being the most that tensors other than weights take at a time, measured while you look:"""
CAPTIONS = "a photo of a temple, a photo of a flower, a photo of a person"
MAX_FILE_SIZE = "50mb"


def build(pair: Pair) -> gr.Blocks:
    """Return the page for two models."""
    smallest, first, largest = pair.sides
    config = vision_config(pair.config)
    examples, layers = example_images(config.num_channels), config.num_hidden_layers
    with gr.Blocks(title="vit-adala", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as page:
        gr.HTML(INTRODUCTION, elem_id="introduction", padding=False)
        parts: dict[str, Any] = {"costs": gr.State({}), "point": gr.State(session.CENTER)}
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                upload = gr.Image(
                    examples[0],
                    label="Image",
                    sources=["upload", "clipboard"],
                    height=270,
                    buttons=[],
                    elem_id="upload",
                )
                parts["note"] = gr.HTML(padding=False)
                gr.Examples([[image] for image in examples], [upload], label="Examples")
                side = gr.Slider(smallest, largest, first, step=pair.step, label="Resolution in pixels")
                layer = gr.Slider(0, layers - 1, layers - 1, step=1, label="Layer of the attention")
                has_texts = pair.tokenizer is not None
                texts = gr.Textbox(CAPTIONS, label="Captions, separated by commas", visible=has_texts, max_lines=3)
            with gr.Column(scale=7):
                with gr.Row():
                    for role in pair.models:
                        parts |= _column(pair, role)
                with gr.Row():
                    parts["summary"] = gr.HTML(elem_id="summary", padding=False)
                    button = gr.Button("Measure all resolutions", size="sm", scale=0, min_width=200)
                parts["curves"] = gr.HTML(padding=False)
                gr.HTML(f'<p class="note">{FOOTNOTE} {escape(_machine())}</p>', padding=False)

        def on(triggers: Any, handler: Callable[..., Any], *inputs: Any) -> None:
            # one event at a time: the models are shared, and so is the time that is measured
            options = {"concurrency_id": "models", "concurrency_limit": 1, "trigger_mode": "always_last"}
            # an upload that is not an image would fail in `preprocess`, with a traceback instead of a message
            options |= {"preprocess": False, "show_progress": "hidden", "api_visibility": "private"}
            gr.on(triggers, handler, inputs, list(parts.values()), **options)

        def updates(handler: Callable[..., session.Updates], upload: Any, *args: Any) -> Any:
            for update in handler(pair, upload and upload["path"], *args):
                yield {parts[name]: value for name, value in update.items()}

        def click(upload: Any, side: float, layer: float, event: gr.SelectData) -> Any:
            x, y = event.index
            yield from updates(session.attend, upload, side, layer, (y / PICTURE, x / PICTURE))

        pictures = [parts[f"{role}_{name}"] for role in pair.models for name in ("features", "attention")]
        everything = (upload, side, layer, parts["point"], texts, parts["costs"])
        on([page.load, upload.change, side.change], partial(updates, session.show), *everything)
        on([picture.select for picture in pictures], click, upload, side, layer)
        on([layer.change], partial(updates, session.attend), upload, side, layer, parts["point"])
        on([texts.submit, texts.blur], partial(updates, session.score), upload, side, texts)
        on([button.click], partial(updates, session.sweep), upload, side, parts["costs"])
    return page


def serve(
    model: str | None = None,
    teacher: str | None = None,
    max_size: int | None = None,
    host: str | None = None,
    port: int | None = None,
) -> None:
    """Open two models and serve the page until the process is stopped.

    Args:
        model (`str`, *optional*), teacher (`str`, *optional*), max_size (`int`, *optional*): See `check_models`.
        host (`str`, *optional*): Address to listen at. Default: `GRADIO_SERVER_NAME`, else this machine alone.
        port (`int`, *optional*): Default: `GRADIO_SERVER_PORT`, else the first from 7860 on that is free.

    Raises:
        UsageError, DataError, CheckpointError: See `check_models` and `open_pair`.
    """
    page = build(open_pair(*check_models(model, teacher, max_size)))
    _, url, _ = page.launch(
        server_name=host, server_port=port, share=False, prevent_thread_lock=True, quiet=True,
        theme=gr.themes.Default(), css_paths=STYLE, footer_links=[], run_history=False, enable_monitoring=False,
        ssr_mode=False, pwa=False, mcp_server=False, max_file_size=MAX_FILE_SIZE,
    )  # fmt: skip
    print(f"demo: {url} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def _machine() -> str:
    dtype = str(evaluation_dtype() or "float32").removeprefix("torch.")
    threads = torch.get_num_threads()
    return f"{describe_machine()}, {threads} thread{'s' if threads > 1 else ''}, {dtype}."


def _column(pair: Pair, role: str) -> dict[str, gr.components.Component]:
    """Return the parts of the page that show one model, by name."""
    with gr.Column(min_width=320):
        name, text = escape(pair.names[role]), escape(pair.describe(role))
        gr.HTML(
            f'<h2 style="border-color:{COLORS[role]}">{role.capitalize()}<span>{name}</span></h2><p>{text}</p>',
            padding=False,
        )
        with gr.Row():
            options: Any = {"interactive": False, "format": "png", "buttons": [], "elem_classes": "picture"}
            features = gr.Image(label="Patch features as colors", min_width=120, **options)
            attention = gr.Image(label="Attention of the framed patch", min_width=120, **options)
        scores, costs = gr.HTML(padding=False), gr.HTML(padding=False)
    values = {"features": features, "attention": attention, "scores": scores, "costs": costs}
    return {f"{role}_{part}": value for part, value in values.items()}
