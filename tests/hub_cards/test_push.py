"""Pushing with the real client against the loopback Hub: what goes up, what fails, and what is left then."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from family_helpers import stock_model
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer
from huggingface_hub import HfApi, ModelCard
from training_helpers import QUIET, NoiseImages, save_teacher
from transformers import AutoConfig, BitImageProcessorPil, Trainer, TrainingArguments

import modeling_adala
from hub_cards import card_data, write_card
from hub_cards.push import plan_push, push
from modeling_adala import AdaLADinov2Config, AdaLADinov2ForImageClassification, convert
from modeling_adala.configuration_adala import vision_config
from modeling_adala.conversion import loading
from modeling_adala.conversion.loading import load_student
from modeling_adala.errors import AdaLAError, CheckpointError, UsageError
from modeling_adala.inspection.towers import attention_modules
from modeling_adala.modeling_adala import MODELS
from trainers.base_trainer import AdaLATrainer
from vit_adala.cli import main

REPO = "org/model"
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
LABELS = ["cat", "dog <b>", "../bird"]
PACKAGE = Path(modeling_adala.__file__).parent
CODE = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
CORE = {"README.md", "config.json", "preprocessor_config.json", "model.safetensors", *CODE}


def save_model(directory: Path, seed: int = 0, **options) -> AdaLADinov2ForImageClassification:
    torch.manual_seed(seed)
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
    config = AdaLADinov2Config(image_size=28, patch_size=7, adala_stage="supervised", **TINY, **labels)
    model = AdaLADinov2ForImageClassification(config).eval()
    model.save_pretrained(directory, **options)
    size = {"height": 28, "width": 28}
    BitImageProcessorPil(size=size, crop_size=size).save_pretrained(directory)
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A stage folder inside a run, with pictures, and with what a run leaves that nobody should publish."""
    run = tmp_path_factory.mktemp("run")
    directory = run / "3-supervised"
    save_model(directory)
    (run / "manifest.json").write_text(json.dumps({"stages": {"supervised": {"seconds": 5.0}}, "data": "/home/me"}))
    (run / "blocks.png").write_bytes(b"\x89PNG blocks")
    (run / "features.png").write_bytes(b"\x89PNG features, which a card without an evaluation does not show")
    (run / "secret.png").write_bytes(b"\x89PNG secret")
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "checkpoint-5/optimizer.pt", "notes.txt"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"\x80\x04 pickled or private")
    return directory


def api(hub: HubServer, token: str | bool = WRITE_TOKEN) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def changes(plan) -> dict[str, str]:
    return {file.path: file.change for file in plan.files}


# --- what goes up ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lfs", [(".safetensors", ".png"), ()], ids=["lfs", "regular"])
def test_one_commit_holds_the_whole_model_and_nothing_else(hub, trained, lfs):
    hub.lfs_suffixes = lfs
    plan = plan_push(trained, REPO)
    assert set(changes(plan)) == CORE | {"blocks.png"}
    assert set(changes(plan).values()) == {"new"}
    assert hub.repositories == {}
    push(plan)
    files = hub.files(REPO)
    assert set(files) == CORE | {"blocks.png", ".gitattributes"}
    assert files["model.safetensors"] == (trained / "model.safetensors").read_bytes()
    config = json.loads(files["config.json"])
    assert config == json.loads((trained / "config.json").read_text())
    assert list(config["id2label"].values()) == LABELS
    assert len(hub.repositories[REPO].commits) == 2  # the empty one of a new repository, and ours
    assert bool(hub.lfs) == bool(lfs)
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert REPO in card.text
    assert "(blocks.png)" in card.text


def test_pushing_again_uploads_nothing(hub, trained):
    push(plan_push(trained, REPO))
    head = hub.head(REPO)
    plan = plan_push(trained, REPO)
    assert plan.exists
    assert set(changes(plan).values()) == {"same"}
    push(plan)
    assert hub.head(REPO) == head


def test_a_second_model_replaces_the_first_and_leaves_no_weights_of_it(hub, trained, tmp_path):
    api(hub).create_repo(REPO)
    for name in ("pytorch_model.bin", "model-00001-of-00002.safetensors", "notes.md"):
        api(hub).upload_file(path_or_fileobj=b"old", path_in_repo=name, repo_id=REPO)
    push(plan_push(trained, REPO))
    assert set(hub.files(REPO)) == CORE | {"blocks.png", "notes.md", ".gitattributes"}
    save_model(tmp_path / "sharded", seed=1, max_shard_size="20KB")
    plan = plan_push(tmp_path / "sharded", REPO)
    found = changes(plan)
    assert found["model.safetensors"] == "deleted"
    assert found["model.safetensors.index.json"] == "new"
    assert found["preprocessor_config.json"] == "same"
    push(plan)
    weights = {path.name for path in (tmp_path / "sharded").glob("*.safetensors")}
    assert {name for name in hub.files(REPO) if name.endswith(".safetensors")} == weights
    assert len(weights) > 1


def test_a_branch_is_created_from_main_and_main_stays(hub, trained, tmp_path):
    push(plan_push(trained, REPO))
    head = hub.head(REPO)
    save_model(tmp_path / "other", seed=1)
    push(plan_push(tmp_path / "other", REPO, revision="next"))
    assert hub.head(REPO) == head
    assert hub.files(REPO, "next")["model.safetensors"] == (tmp_path / "other" / "model.safetensors").read_bytes()
    api(hub).create_tag(REPO, tag="v1")
    with pytest.raises(UsageError, match="'v1' is a tag"):
        plan_push(trained, REPO, revision="v1")


def test_private_is_kept_private_and_a_public_repository_is_refused(hub, trained):
    push(plan_push(trained, REPO, private=True))
    assert hub.repositories[REPO].private
    assert set(changes(plan_push(trained, REPO, private=True)).values()) == {"same"}
    push(plan_push(trained, "org/public"))
    with pytest.raises(UsageError, match="org/public is public"):
        plan_push(trained, "org/public", private=True)


def test_the_code_and_the_auto_map_are_ours_whatever_lies_in_the_folder(hub, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "model")
    config = json.loads((trained / "config.json").read_text())
    theirs = config | {"auto_map": {"AutoModel": "evil.Model"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(theirs))
    (tmp_path / "model" / "evil.py").write_text("raise SystemExit")
    (tmp_path / "model" / "modeling_adala.py").write_text("raise SystemExit")
    push(plan_push(tmp_path / "model", REPO))
    files = hub.files(REPO)
    assert json.loads(files["config.json"])["auto_map"] == config["auto_map"]
    assert files["modeling_adala.py"] == (trained / "modeling_adala.py").read_bytes()
    assert "evil.py" not in files


def test_an_edited_card_is_announced(hub, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("# Mine\n![x](../../.ssh/id_rsa) ![y](/etc/passwd.png)\n")
    plan = plan_push(tmp_path / "model", REPO)
    assert any("README.md was edited by hand" in note for note in plan.notes)
    assert "# Mine" not in plan.card
    assert plan_push(trained, REPO).notes == []


def test_a_plan_opens_the_folder_once_and_gathers_its_facts_once(trained, tmp_path, monkeypatch):
    counts: Counter = Counter()
    shutil.copytree(trained, tmp_path / "model")
    write_card(tmp_path / "model")  # compared with the records, too

    def counted(owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(AutoConfig, "from_pretrained")
    counted(loading, "check_checkpoint")
    counted(card_data, "read_manifest")
    assert plan_push(tmp_path / "model", REPO, compare=False).notes == []
    assert counts == {"from_pretrained": 1, "check_checkpoint": 1, "read_manifest": 1}


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_checkpoint_is_refused_before_the_hub_is_asked(hub, trained, tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json; pass one of the folders in it \(3-supervised\)"):
        plan_push(trained.parent, REPO)
    with pytest.raises(UsageError, match="repo_id='a/b/c'"):
        plan_push(trained, "a/b/c")
    shutil.copytree(trained, tmp_path / "stock")
    config = json.loads((trained / "config.json").read_text())
    (tmp_path / "stock" / "config.json").write_text(json.dumps(config | {"model_type": "dinov2"}))
    with pytest.raises(UsageError, match="'dinov2', not an AdaLA model"):
        plan_push(tmp_path / "stock", REPO)
    shutil.copytree(trained, tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    (tmp_path / "empty" / "training_args.bin").unlink()
    with pytest.raises(CheckpointError):
        plan_push(tmp_path / "empty", REPO)
    shutil.copytree(trained, tmp_path / "linked")
    (tmp_path / "linked" / "model.safetensors").unlink()
    (tmp_path / "linked" / "model.safetensors").symlink_to(trained / "model.safetensors")
    with pytest.raises(CheckpointError, match="link"):
        plan_push(tmp_path / "linked", REPO)
    assert hub.requests == []


# --- what fails ------------------------------------------------------------------------------------------------------

FAULTS = {
    "upload cut off": ("PUT /lfs/", None, "the connection to"),
    "upload refused": ("PUT /lfs/", 500, "status 500"),
    "commit cut off": ("POST .*/commit/", None, "the connection to"),
    "commit refused": ("POST .*/commit/", 500, "status 500"),
    "conflict": ("POST .*/commit/", 409, "has changed since"),
    "no write access": ("POST .*/preupload/", 403, "may not write to org/model"),
    "token expired": ("GET /api/whoami", 401, "does not accept the token"),
    "too many requests": ("POST .*/commit/", 429, "status 429"),
    "login page instead of the branches": ("GET /api/models/.*/refs", 200, "something other than JSON"),
    "login page instead of the files": ("GET /api/models/.*/tree/", 200, "something other than JSON"),
    "login page instead of the user": ("GET /api/whoami", 200, "something other than JSON"),
    "login page instead of the upload": ("POST .*/preupload/", 200, "something other than JSON"),
    "login page instead of the commit": ("POST .*/commit/", 200, "something other than JSON"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_failed_push_is_one_line_and_changes_nothing_and_the_next_one_succeeds(name, hub, trained, tmp_path, capsys):
    pattern, status, message = FAULTS[name]
    push(plan_push(trained, REPO))
    before, head = hub.files(REPO), hub.head(REPO)
    save_model(tmp_path, seed=1)
    hub.fail(pattern, status, times=20)
    assert main(["push", str(tmp_path), REPO, "--yes"]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    ours = [line for line in errors if line.startswith("vit-adala push: ")]
    assert ours == errors[-1:]  # before it, the client tells of its further attempts
    assert message in ours[0]
    assert not any(WRITE_TOKEN in line for line in errors)
    assert hub.files(REPO) == before
    assert hub.head(REPO) == head
    hub.faults.clear()
    assert main(["push", str(tmp_path), REPO, "--yes"]) == 0
    assert hub.files(REPO)["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()


def test_a_first_push_that_dies_goes_on_without_being_asked(hub, trained, capsys):
    hub.fail("PUT /lfs/", None, times=20)
    assert main(["push", str(trained), REPO]) == 1
    assert set(hub.files(REPO)) == {".gitattributes"}
    hub.faults.clear()
    assert main(["push", str(trained), REPO]) == 0
    assert set(hub.files(REPO)) >= CORE


def test_a_push_in_between_is_not_overwritten(hub, trained, tmp_path):
    push(plan_push(trained, REPO))
    save_model(tmp_path, seed=1)
    plan = plan_push(tmp_path, REPO)
    api(hub).upload_file(path_or_fileobj=b"theirs", path_in_repo="notes.md", repo_id=REPO)
    with pytest.raises(AdaLAError, match="changed since it was looked at"):
        push(plan)
    assert hub.files(REPO)["model.safetensors"] == (trained / "model.safetensors").read_bytes()
    assert hub.files(REPO)["notes.md"] == b"theirs"


@pytest.mark.parametrize(
    ("token", "message"),
    [("hf_wrong", "does not accept the token"), (READ_TOKEN, "may not write"), ("", "no token for the Hub")],
)
def test_wrong_tokens(token, message, hub, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(AdaLAError, match=message):
        push(plan_push(trained, REPO))
    assert hub.repositories == {}


def test_offline_and_unreachable_are_told_apart(hub, trained, monkeypatch):
    unreachable = HfApi(endpoint="http://127.0.0.1:9", token=WRITE_TOKEN)
    with pytest.raises(AdaLAError, match=r"the connection to http://127\.0\.0\.1:9 broke"):
        plan_push(trained, REPO, api=unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdaLAError, match="HF_HUB_OFFLINE=1"):
        plan_push(trained, REPO)


@pytest.mark.parametrize("fault", ["POST .*/commit/", "GET /api/whoami", "GET /api/models/.*/refs", None])
def test_a_password_in_the_endpoint_is_never_said(fault, hub, trained, tmp_path, capsys, caplog, monkeypatch):
    push(plan_push(trained, REPO))
    hub.tokens["Basic dXNlcjpzM2NyZXRwdw=="] = "write"  # as the client sends user:s3cretpw
    save_model(tmp_path, seed=1)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url.replace("//", "//user:s3cretpw@"))
    if fault is not None:
        hub.fail(fault, 500, times=20)
    code = main(["push", str(tmp_path), REPO, "--yes"])
    captured = capsys.readouterr()
    assert code == (fault is not None), captured
    assert "127.0.0.1" in captured.out + captured.err
    said = captured.out + captured.err + caplog.text
    assert "s3cret" not in said and "user:" not in said and WRITE_TOKEN not in said


def test_weights_that_are_not_finite_are_neither_pushed_nor_carded(hub, trained, tmp_path, capsys):
    model = save_model(tmp_path / "sound")
    with torch.no_grad():
        attention_modules(model)[1].q_proj.weight[3, 4] = float("nan")
    for name, options in {"whole": {}, "sharded": {"max_shard_size": "20KB"}}.items():
        directory = tmp_path / name
        model.save_pretrained(directory, **options)
        for arguments in ([], ["--dry-run"]):
            assert main(["push", str(directory), REPO, *arguments]) == 1
            captured = capsys.readouterr()
            assert captured.out == ""
            (line,) = captured.err.strip().splitlines()
            assert "non-finite weights in 1 tensors (first: " in line and "q_proj.weight" in line
    assert hub.requests == []


def texts(files: dict[str, bytes]) -> str:
    return "\n".join(
        content.decode() for path, content in files.items() if not path.endswith((".safetensors", ".png"))
    )


@pytest.mark.parametrize("name", MODELS)
def test_no_path_of_this_machine_leaves_it_with_any_way_of_pushing(name, hub, tmp_path):
    """`vit-adala push`, `push_to_hub` of a model, and any upload of what `save_pretrained` wrote, as by `Trainer`."""
    teacher, home = tmp_path / "alice" / "teacher", tmp_path / "student"
    stock_model(name).save_pretrained(teacher)
    student = convert(str(teacher), check_parity=False)
    vision = vision_config(student.config)
    assert vision.teacher_name_or_path == str(teacher), "the run itself knows its teacher"
    student.save_pretrained(home)
    assert "alice" not in (home / "config.json").read_text()
    assert vision_config(load_student(str(home)).config).teacher_name_or_path == "teacher"
    if "text_config" in student.config.sub_configs:  # what other versions and tools leave behind
        change = {"vision_config": json.loads((home / "config.json").read_text())["vision_config"]}
        change["vision_config"] |= {"teacher_name_or_path": str(teacher), "_name_or_path": str(teacher)}
    else:
        change = {"teacher_name_or_path": str(teacher), "_name_or_path": str(teacher)}
    config = json.loads((home / "config.json").read_text()) | change
    (home / "config.json").write_text(json.dumps(config))
    push(plan_push(home, REPO))
    student.push_to_hub("org/other")
    for repo_id in (REPO, "org/other"):
        assert "alice" not in texts(hub.files(repo_id))
        assert '"teacher_name_or_path": "teacher"' in texts(hub.files(repo_id))


@pytest.mark.parametrize("trainer_class", [Trainer, AdaLATrainer])
def test_a_trainer_that_pushes_sends_no_path_of_its_teacher(trainer_class, hub, tmp_path):
    (tmp_path / "alice").mkdir()
    teacher = save_teacher(tmp_path / "alice" / "teacher")
    student = convert(teacher, check_parity=False)
    options = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": WRITE_TOKEN, "save_strategy": "steps"}
    args = TrainingArguments(str(tmp_path / "out"), max_steps=2, save_steps=1, **options, **QUIET)
    trainer = trainer_class(student, args, train_dataset=NoiseImages(4))
    trainer.train()
    trainer.push_to_hub()
    files = hub.files(REPO)
    pickled = files.pop("training_args.bin")  # upstream's, with output_dir in it
    assert b"teacher" not in pickled
    assert "alice" not in texts(files)


# --- the command -----------------------------------------------------------------------------------------------------


def test_dry_run_shows_files_sizes_and_card_and_uploads_nothing(hub, trained, capsys, monkeypatch):
    assert main(["push", str(trained), REPO, "--private", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "into a new private repository" in output
    assert all(name in output for name in CORE | {"blocks.png"})
    assert "library_name: transformers" in output
    assert hub.repositories == {}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert main(["push", str(trained), REPO, "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {file["path"]: file["size"] for file in result["files"]}["model.safetensors"] > 1000
    assert result["url"] is None
    assert "offline: not compared" in result["notes"][0]
    assert len(hub.requests) == asked


def test_an_existing_repository_changes_only_with_consent(hub, trained, tmp_path, capsys, monkeypatch):
    assert main(["push", str(trained), REPO]) == 0
    assert main(["push", str(trained), REPO]) == 0  # nothing would change, so nobody is asked
    assert "nothing has changed" in capsys.readouterr().out
    save_model(tmp_path, seed=1)
    before = hub.files(REPO)
    assert main(["push", str(tmp_path), REPO]) == 2
    assert "pass --yes" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for answer in ("", "n"):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        assert main(["push", str(tmp_path), REPO]) == 0
        assert hub.files(REPO) == before
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert main(["push", str(tmp_path), REPO]) == 0
    assert hub.files(REPO) != before


def test_help_and_wrong_usage(capsys):
    with pytest.raises(SystemExit):
        main(["push", "--help"])
    assert "DIR REPO_ID" in capsys.readouterr().out
    for arguments in (["push"], ["push", "dir"], ["push", "dir", "repo", "--what"]):
        assert main(arguments) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
