"""`vit-adala push`: upload a checkpoint folder to the Hub in one commit, and a Space that shows it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import is_offline_mode
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from hub_cards.push import PushPlan, plan_push, push
from hub_cards.push_space import plan_space
from modeling_adala.errors import UsageError

from ..arguments import CommandParser, print_json

STYLES = {"new": "green", "changed": "yellow", "deleted": "red", "same": "dim"}


@dataclass
class PushArguments:
    directory: str = field(
        metadata={"help": "Checkpoint folder, such as the 3-supervised/ of a run.", "positional": "DIR"}
    )
    repo_id: str = field(
        metadata={"help": "Name or organization/name; created if it does not exist.", "positional": "REPO_ID"}
    )
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    space: str | None = field(
        default=None,
        metadata={"help": "Also upload the demo of this model as a Space, organization/name; created if need be."},
    )
    revision: str = field(default="main", metadata={"help": "Branch; created from main if it does not exist."})
    with_onnx: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders that vit-adala export wrote from DIR; their graphs go into onnx/."},
    )
    dry_run: bool = field(default=False, metadata={"help": "Show files and card, upload nothing."})
    yes: bool = field(default=False, metadata={"help": "Do not ask before an existing repository changes."})
    json: bool = field(default=False, metadata={"help": "Print JSON and nothing else on stdout."})


def main(arguments: Sequence[str]) -> None:
    """Run `vit-adala push DIR REPO_ID [--space ID] [--private] [--revision BRANCH] [--with-onnx O ...] ...`.

    Raises:
        UsageError: If an existing repository would change and no terminal is there to ask, or see `plan_push`.
        AdaLAError: See `plan_push`, `plan_space` and `push`.
    """
    parser = CommandParser(
        "push",
        "Upload weights, configuration, image processor, code, card and pictures in one commit.",
        "vit-adala push out/3-supervised my-org/vit-adala-digits",
        PushArguments,
    )
    (args,) = parser.parse(arguments)
    compare = not (args.dry_run and is_offline_mode())
    target = {"revision": args.revision, "private": args.private}
    plans = [plan_push(args.directory, args.repo_id, **target, compare=compare, with_onnx=args.with_onnx)]
    if args.space is not None:
        plans.append(plan_space(args.space, args.repo_id, private=args.private, compare=compare))
    for plan in plans:
        if not compare:
            plan.notes.append("offline: not compared with the Hub, everything counts as new")
        if not args.json:
            _show(plan, card=args.dry_run)
    urls: list[str | None] = [None] * len(plans)
    may_ask = sys.stdin.isatty() and not args.json
    if not args.dry_run and all(_agreed(plan, args.yes, may_ask) for plan in plans):
        for index, plan in enumerate(plans):
            urls[index] = push(plan)
            if not args.json:
                print(f"pushed {urls[index]}" if plan.changes else f"nothing has changed: {urls[index]}")
    if args.json:
        model, *space = (_result(plan, url, args.dry_run) for plan, url in zip(plans, urls, strict=True))
        print_json(model | ({"space": space[0]} if space else {}))


def _result(plan: PushPlan, url: str | None, card: bool) -> dict[str, Any]:
    files = [{"path": file.path, "change": file.change, "size": file.size} for file in plan.files]
    result = {"repo_id": plan.repo_id, "revision": plan.revision, "notes": plan.notes, "url": url, "files": files}
    return result | ({"card": plan.card} if card else {})


def _show(plan: PushPlan, card: bool) -> None:
    table = Table("file", "size", "", title=escape(f"{plan.repo_id}, {plan.revision}"), title_justify="left")
    sizes: dict[tuple[bool, str, str], list[int]] = {}  # of the files of a folder together
    for file in plan.files:
        folder, slash, _ = file.path.rpartition("/")
        name = f"{folder.partition('/')[0]}/" if slash else file.path
        sizes.setdefault((file.change == "same", name, file.change), []).append(file.size)
    for (_, name, change), found in sorted(sizes.items()):
        name += f" ({len(found)} files)" if name.endswith("/") else ""
        table.add_row(escape(name), decimal(sum(found)), f"[{STYLES[change]}]{change}[/]")
    console = Console(soft_wrap=True)
    console.print(table)
    upload = sum(file.size for file in plan.changes if file.source is not None)
    visibility = "" if plan.parent_commit else f" into a new {'private' if plan.private else 'public'} repository"
    console.print(f"{decimal(upload)} to upload{visibility}")
    for note in plan.notes:
        console.print(f"[yellow]note:[/] {escape(note)}")
    if card:
        print(f"\n{plan.card}")


def _agreed(plan: PushPlan, yes: bool, may_ask: bool) -> bool:
    if yes or not plan.exists or not plan.changes:
        return True
    if not may_ask:
        raise UsageError(f"{plan.repo_id} exists and would change; check with --dry-run, then pass --yes.")
    answer = input(f"{plan.repo_id} exists. Change {len(plan.changes)} files in it? [y/N] ")
    return answer.strip().lower() in ("y", "yes")
