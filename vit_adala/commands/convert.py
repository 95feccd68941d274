"""`vit-adala convert`: the untrained student of a softmax teacher."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from hub_cards import write_card
from hub_cards.records import MANIFEST, find_license, write_json
from modeling_adala.configuration_adala import LinearAttentionConfig, vision_config
from modeling_adala.conversion.convert import convert
from modeling_adala.conversion.loading import load_image_processor
from trainers.runs.facts import software_versions
from trainers.runs.output_folder import OutputFolder

from ..arguments import CommandParser
from ..interruption import writes_to
from .common import absolute, finished_before


@dataclass
class ConvertArguments:
    teacher: str = field(metadata={"help": "Softmax checkpoint: Hub id or folder.", "positional": "TEACHER"})
    output_dir: str = field(metadata={"help": "Folder for the student."})


def main(arguments: Sequence[str]) -> None:
    """Run `vit-adala convert TEACHER --output-dir O [--feature-map F] [--softmax-layers L ...]`."""
    parser = CommandParser(
        "convert",
        "Replace softmax by linear attention and save the student with its image processor and card. It has its"
        " teacher's weights and is untrained: of little use before stages 1 and 2.",
        "vit-adala convert facebook/dinov2-small --output-dir student --feature-map elu",
        ConvertArguments,
        LinearAttentionConfig,
    )
    args, linear = parser.parse(arguments)
    settings = absolute({"teacher": args.teacher} | asdict(linear))
    folder = OutputFolder(args.output_dir, "convert", settings, [args.teacher])
    writes_to(args.output_dir)
    if finished_before(folder):
        return
    student, processor = convert(args.teacher, linear), load_image_processor(args.teacher)
    vision = vision_config(student.config)
    found = find_license(vision.teacher_name_or_path, vision.teacher_revision, download=True)
    with folder.claim(), folder.staging() as staging:
        student.save_pretrained(staging)
        if processor is not None:
            processor.save_pretrained(staging)
        write_json(staging / MANIFEST, {"teacher_license": found, "versions": software_versions()})
        write_card(staging)
    print(
        f"converted {args.teacher} to {type(student).__name__}, untrained; saved {folder.path}\n"
        f"next: vit-adala distill {folder.path} --teacher {args.teacher} --dataset DATASET"
    )
