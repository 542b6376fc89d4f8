"""Attacks on what a run reads and where it writes: pickles, links out of the folder, secrets in what it says."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from finetune.checkpoint import manifest, snapshots
from finetune.checkpoint.identity import differences
from finetune.commands.checkpoints import export_checkpoint
from finetune.commands.cli import app
from finetune.commands.train import train_in_place
from finetune.engine.optimizer import make_optimizer
from finetune.engine.settings import EngineSettings
from finetune.engine.start import start_engine
from finetune.errors import UserError
from finetune.launch.strategy import one_process
from finetune.model.facts import read_facts
from finetune.model.load import load_model
from finetune.model.tokenizer import load_tokenizer
from finetune.objectives.sft import SummedLoss
from finetune.recipe.load import load_recipe
from finetune.report import redact, run_folder
from tests.support.forked import run, train
from tests.support.launch import ROOT, environment, launch_file, program
from tests.support.saved_runs import COMMON
from tests.support.tiny_models import small_recipe, tiny_model

pytestmark = pytest.mark.slow


# ---- pickles: whoever loads one of these runs a command that leaves a file behind


class Bomb:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path):
    """The folder that a bomb makes; at the end of the test it must not be there."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "a pickle was loaded"


def bombs(canary: Path) -> dict[str, bytes]:
    """The same attack as a bare pickle, as torch's old and new file, and as numpy's."""
    zipped, old, array = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"module": Bomb(canary)}, zipped)
    torch.save({"module": Bomb(canary)}, old, _use_new_zipfile_serialization=False)
    np.save(array, np.array([Bomb(canary)], dtype=object), allow_pickle=True)
    return {
        "pickle": pickle.dumps(Bomb(canary)),
        "torch": zipped.getvalue(),
        "old torch": old.getvalue(),
        "numpy": array.getvalue(),
    }


def seal_again(folder: Path) -> None:
    """Forge the manifest: it vouches for what lies there now."""
    there = manifest.examine(folder, hashes=False)
    names = [name for name in manifest.walk(folder)[0] if name != manifest.MANIFEST]
    manifest.write_manifest(folder, there.step, there.facts, manifest.digest(folder, names))


def test_the_bombs_are_live(tmp_path):
    for kind, content in bombs(tmp_path / "canary").items():
        with open(tmp_path / "bomb", "wb") as file:
            file.write(content)
        if kind == "pickle":
            pickle.loads(content)
        elif kind == "numpy":
            np.load(tmp_path / "bomb", allow_pickle=True)
        else:
            torch.load(tmp_path / "bomb", weights_only=False)
        (tmp_path / "canary").rmdir()


@pytest.mark.parametrize("kind", ["plain", "ZeRO-2"])
def test_a_bomb_that_the_manifest_does_not_know_is_never_opened(kind, saved_runs, tmp_path, canary):
    work = Path(shutil.copytree(saved_runs[kind], tmp_path / "run"))
    step = work / "checkpoints/step-4"
    names = [path.relative_to(step) for path in step.rglob("*") if path.is_file()]
    assert len(names) >= 4
    for name in [*names, Path("stray.pt"), Path("deepspeed/zero_pp_rank_9_mp_rank_00_optim_states.pt")]:
        before = (step / name).read_bytes() if (step / name).exists() else None
        (step / name).parent.mkdir(exist_ok=True)
        for content in bombs(canary).values():
            (step / name).write_bytes(content)
            said: list[str] = []
            assert snapshots.newest(work / "checkpoints", said.append).step == 2
            assert name.name in said[0] and "step-4 is damaged" in said[0]
            with pytest.raises(UserError, match="step-4 is damaged and not exported"):
                export_checkpoint(str(work), "4", tmp_path / "out")
            assert CliRunner().invoke(app, ["checkpoints", str(work)]).exit_code == 2
        if before is None:
            (step / name).unlink()
        else:
            (step / name).write_bytes(before)
        for parent in [p for p in (step / name).parents if p != step and step in p.parents and not list(p.iterdir())]:
            parent.rmdir()
    assert snapshots.newest(work / "checkpoints", pytest.fail).step == 4, "all put back"


@pytest.fixture(scope="module")
def engine(saved_runs):
    """An engine in this process, as a resume of the plain run has it."""
    loaded = load_recipe(saved_runs.recipe, COMMON)
    strategy = one_process(use_cpu=True)
    engine = start_engine(EngineSettings(strategy, 4, 2, 1.0))
    network = load_model(loaded, strategy, read_facts(loaded), engine.device)
    engine.prepare(SummedLoss(network), make_optimizer(network, loaded.recipe.training, strategy))
    yield engine
    engine.release()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "optimizer.json"])
def test_a_bomb_in_a_plain_checkpoint_is_no_pickle_to_us_even_if_the_manifest_is_forged(
    name, engine, saved_runs, tmp_path, canary
):
    step = Path(shutil.copytree(saved_runs["plain"] / "checkpoints/step-4", tmp_path / "step-4"))
    engine.load_state(step)  # it can be read
    for content in bombs(canary).values():
        (step / name).write_bytes(content)
        seal_again(step)
        assert manifest.verify(step) == []
        with pytest.raises(UserError, match="step-4: unreadable checkpoint file"):
            engine.load_state(step)


def test_a_bomb_in_state_json_is_named(saved_runs, tmp_path, canary):
    work = Path(shutil.copytree(saved_runs["plain"], tmp_path / "run"))
    for content in bombs(canary).values():
        (work / "checkpoints/step-4/state.json").write_bytes(content)
        seal_again(work / "checkpoints/step-4")
        done = CliRunner().invoke(app, ["checkpoints", str(work), "--verify"])
        assert done.exit_code == 2 and "state.json is no state of a run" in done.stderr, done.stderr


def test_a_bomb_in_deepspeeds_shards_does_not_go_off_even_if_the_manifest_is_forged(saved_runs, tmp_path, canary):
    work = Path(shutil.copytree(saved_runs["ZeRO-2"], tmp_path / "run"))
    step = work / "checkpoints/step-4"
    for shard in sorted((step / "deepspeed").iterdir()):
        before = shard.read_bytes()
        for kind in ("torch", "old torch", "pickle"):
            shard.write_bytes(bombs(canary)[kind])
            seal_again(step)
            with pytest.raises(UserError, match="step-4: unreadable checkpoint file"):
                export_checkpoint(str(work), "4", tmp_path / "out")
        shard.write_bytes(before)
    (step / "deepspeed/mp_rank_00_model_states.pt").write_bytes(bombs(canary)["torch"])
    seal_again(step)
    file = launch_file(tmp_path / "launch.yaml", ranks=2, zero_stage=2)
    (work / "run.json").unlink()  # it was done
    done = train(file, saved_runs.recipe, *COMMON, f"output_dir={work}", env=saved_runs.cache)
    assert done.returncode != 0 and "step-4: unreadable checkpoint file" in done.stderr, done.stderr[-3000:]


def test_a_base_model_that_is_a_pickle_is_read_as_tensors_or_not_at_all(tmp_path, canary):
    path = small_recipe(tmp_path / "job")
    base = path.parent / "base"
    loaded = load_recipe(path)
    facts = read_facts(loaded)
    tensors = {
        name: p.detach().clone()
        for name, p in load_model(loaded, one_process(), facts, torch.device("cpu")).named_parameters()
    }
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    assert load_model(loaded, one_process(), facts, torch.device("cpu")) is not None, "tensors in a pickle can be read"
    for kind in ("torch", "old torch", "pickle"):
        (base / "pytorch_model.bin").write_bytes(bombs(canary)[kind])
        with pytest.raises(UserError, match="its weights cannot be loaded"):
            load_model(loaded, one_process(), facts, torch.device("cpu"))


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "added_tokens.json",
    ],
)
def test_a_bomb_among_the_files_of_model_and_tokenizer(name, tmp_path, canary):
    base = tiny_model(tmp_path / "base")
    path = small_recipe(tmp_path / "job")
    for stray in ("vocab.pkl", "optimizer.pt", "training_args.bin", "adapter_model.bin", "pytorch_model.bin"):
        (base / stray).write_bytes(bombs(canary)["torch"])
    loaded = load_recipe(path, [f"model.name_or_path={base}"])
    load_tokenizer(loaded)
    (base / name).write_bytes(bombs(canary)["pickle"])
    may_be_without = name == "generation_config.json"  # transformers goes on without one that it cannot read
    with (
        contextlib.nullcontext()
        if may_be_without
        else pytest.raises(UserError, match=f"model.name_or_path is {base}, but its ")
    ):
        facts = read_facts(loaded)
        load_tokenizer(loaded)
        load_model(loaded, one_process(), facts, torch.device("cpu"))


def test_a_runs_folder_cannot_say_that_code_is_trusted(saved_runs, tmp_path, canary):
    work = Path(shutil.copytree(saved_runs["plain"], tmp_path / "run"))
    base = tiny_model(tmp_path / "base")
    code = (
        f"import os\nfrom transformers import LlamaConfig\nos.mkdir({str(canary)!r})\n\nclass OwnConfig(LlamaConfig):\n"
        "    model_type = 'own'\n"
    )
    (base / "own.py").write_text(code)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(config | {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}})
    )
    text = (work / "recipe.yaml").read_text().replace("trust_remote_code: false", "trust_remote_code: true")
    (work / "recipe.yaml").write_text(text.replace(str(saved_runs.recipe.parent / "base"), str(base)))
    with pytest.raises(UserError, match="model.trust_remote_code is true.*give --trust-remote-code"):
        export_checkpoint(str(work), "4", tmp_path / "out")
    assert not canary.exists()
    with contextlib.suppress(UserError):
        export_checkpoint(str(work), "4", tmp_path / "out", trust_remote_code=True)
    canary.rmdir()  # the code was live


def test_an_adapter_that_is_a_pickle(saved_runs, tmp_path, canary):
    from finetune.model import saved
    from finetune.model.trained_folder import find

    folder = Path(shutil.copytree(saved_runs["LoRA"] / "model", tmp_path / "model"))
    (folder / "adapter_model.safetensors").unlink()
    for kind in ("torch", "old torch", "pickle"):
        (folder / "adapter_model.bin").write_bytes(bombs(canary)[kind])
        with pytest.raises(UserError, match="its adapter cannot be loaded"):
            saved.load(find(str(folder)), torch.device("cpu"))


def test_a_bomb_in_the_token_cache_is_written_anew(tmp_path, canary, monkeypatch):
    from finetune.data.prepare import prepare

    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    loaded = load_recipe(small_recipe(tmp_path / "job"))
    tokenizer = load_tokenizer(loaded)
    first = prepare(loaded, tokenizer, lambda text: None)
    entry = Path(first.summary["cache_folder"])
    files = [path for path in entry.rglob("*") if path.is_file()]
    assert len(files) >= 5
    for file in files:
        for content in bombs(canary).values():
            file.write_bytes(content)
            again = prepare(loaded, tokenizer, lambda text: None)
            assert again.summary["cache"] == "new" and again.train.fingerprint == first.train.fingerprint
            assert np.array_equal(again.train.row(0).labels, first.train.row(0).labels)


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".json", ".csv", ".parquet", ".txt", ".jsonl.gz", ".pkl", ".pt", ".arrow"]
)
def test_a_bomb_as_training_data(suffix, tmp_path, canary, monkeypatch):
    from finetune.data.prepare import prepare

    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    path = small_recipe(tmp_path / "job")
    for kind, content in bombs(canary).items():
        file = tmp_path / f"{kind.replace(' ', '_')}{suffix}"
        file.write_bytes(content)
        loaded = load_recipe(path, [f"data.train=[{{path: {file}}}]"])
        with pytest.raises(UserError):
            prepare(loaded, load_tokenizer(loaded), lambda text: None)


# ---- links: nothing is written outside of the output folder


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints",
        "model",
        "model.tmp",
        "metrics.jsonl",
        "metrics.jsonl.tmp",
        "run.json",
        "run.json.tmp",
        "recipe.yaml",
        ".lock",
        "checkpoints/step-4",
        "checkpoints/latest.tmp",
        "anything",
    ],
)
@pytest.mark.parametrize("there", [True, False], ids=["existing", "dangling"])
def test_a_link_out_of_the_output_folder_is_refused_by_name(name, there, saved_runs, tmp_path):
    output, outside = tmp_path / "run", tmp_path / "outside"
    link = output / name
    link.parent.mkdir(parents=True)
    if there and "." in name:
        outside.write_text("precious\n")
    elif there:
        outside.mkdir()
    link.symlink_to(outside)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as refused:
        train_in_place(str(saved_runs.recipe), [*COMMON, f"output_dir={output}"])
    assert refused.value.exit_code == 2
    assert str(refused.value).startswith(f"output_dir: {link} is a symbolic link to {outside}, outside of {output}")
    assert sorted(tmp_path.rglob("*")) == before, "nothing was written"


def test_links_that_stay_inside_and_a_linked_output_folder_are_fine(tmp_path):
    real = tmp_path / "disk/real"
    (real / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    output = tmp_path / "link"
    output.symlink_to("runs/real")
    (real / "newest").symlink_to("checkpoints")
    (real / "checkpoints/x").symlink_to(output / "checkpoints")
    (real / "before-1").symlink_to("/")
    for folder in (output, tmp_path / "runs/real", real, tmp_path / "not there"):
        run_folder.refuse_links_out(folder)
    (real / "up").symlink_to("../real-not")  # a folder whose name begins alike is another one
    with pytest.raises(UserError, match="real-not, outside of"):
        run_folder.refuse_links_out(output)


# ---- secrets

TOKEN = "hf_" + "Zq7" * 11
SECRETS = {
    "HF_TOKEN": TOKEN,
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCY",
    "AWS_ACCESS_KEY_ID": "some-name-of-a-key",
    "DATABASE_PASSWORD": "correct horse battery",
}
PLANTED = "s3cr3t-in-the-recipe"


def test_no_secret_is_in_anything_that_a_run_writes_or_says(tmp_path):
    path = small_recipe(tmp_path / "job")
    output = tmp_path / "run"
    other = "hf_" + "Yx8" * 11  # a token that no variable holds
    overrides = [
        "training.max_steps=4",
        "checkpoint.save_steps=1",
        f"model.revision={other}",
        (
            f"data.train=[{{path: {path.parent / 'chat.jsonl'}, system: 'see"
            f" https://me:{PLANTED}@host/x?api_key={PLANTED}'}}]"
        ),
    ]
    overrides.append("data.max_length=256")  # room for the system prompt
    env = SECRETS | {
        "PLANTED": PLANTED,
        "FINETUNE_CACHE": str(tmp_path / "cache"),
        "FINETUNE_STATUS_FILE": str(tmp_path / "status"),
    }
    leaking = [sys.executable, *program("leaking_run"), path, *overrides, f"output_dir={output}"]
    done = run(leaking, env=env)
    assert (
        done.returncode == 1 and "RuntimeError: cannot reach https://***@host/file?token=*** with [" in done.stderr
    ), done.stderr[-3000:]
    assert "Traceback" in done.stderr
    document = json.loads((output / "run.json").read_text())
    assert document["status"] == "failed" and "***" in document["message"]
    assert any("model.revision=***" in argument for argument in document["argv"])
    assert (
        "revision: '***'" in (output / "recipe.yaml").read_text() and "***@host" in (output / "recipe.yaml").read_text()
    )
    facts = manifest.examine(output / "checkpoints/step-1", hashes=True).facts
    assert facts["same"]["recipe"]["model.revision"] == "***"
    said = {
        "stdout": done.stdout.encode(),
        "stderr": done.stderr.encode(),
        "status": (tmp_path / "status").read_bytes(),
    }
    said |= {str(file): file.read_bytes() for file in output.rglob("*") if file.is_file()}
    assert len(said) >= 10
    for where, content in said.items():
        for secret in (*SECRETS.values(), PLANTED, other):
            assert secret.encode() not in content and json.dumps(secret).strip('"').encode() not in content, (
                where,
                secret,
            )
    again = run([leaking[0], ROOT / "finetune/train.py", *leaking[3:]], env=env)
    assert again.returncode == 0 and "resuming after step 1" in again.stderr, again.stderr[-3000:]


def test_check_and_refusals_keep_secrets_to_themselves(tmp_path):
    path = small_recipe(tmp_path / "job")
    address = f"https://me:{PLANTED}@host/data.jsonl"
    for arguments in (
        ["check", path, f"data.train=[{{path: '{address}'}}]"],
        ["check", "--json", path, f"data.train=[{{path: '{address}'}}]"],
        ["check", path, f"training.sed={TOKEN}"],
        ["check", "--json", path, f"training.max_steps={TOKEN}"],
        ["data", path, f"model.name_or_path={address}"],
        ["train", path, f"{TOKEN}"],
        ["generate", address, "hello"],
        ["checkpoints", address],
    ):
        command = [sys.executable, "-c", "from finetune.commands.cli import main; main()", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stderr
        assert "***" in done.stderr or "training.sed" in done.stderr
        assert PLANTED not in done.stdout + done.stderr and TOKEN not in done.stdout + done.stderr, arguments


@pytest.mark.parametrize(
    "said, clean",
    [
        ("git clone https://me:pw@host/x", "git clone https://***@host/x"),
        ("https://justatoken@host/x", "https://***@host/x"),
        ("/data/https:/me:pw@host/x", "/data/https:/***@host/x"),
        ("sk-proj-Ab1Cd2Ef3Gh4Ij5Kl6Mn7Op8-Qr9_St0 and sk-Ab1Cd2Ef3Gh4Ij5Kl6Mn7Op8", "*** and ***"),
        ("/data/sk-wikipedia-articles-2024/x.jsonl trains /models/hf_Llama31Instruct8Btuned", None),
        ("s3://b/x?X-Amz-Signature=abc123&part=2", "s3://b/x?X-Amz-Signature=***&part=2"),
        ("Authorization: Bearer abcdefghijklmnop12", "Authorization: Bearer ***"),
        (f"token {TOKEN}.", "token ***."),
        ("key AKIAABCDEFGHIJKLMNOP", "key ***"),
        ("wJalrXUtnFEMI/K7MDENG+bPxRfiCY and correct horse battery", "*** and ***"),
        ("someone@example.com wrote 1e-5 to runs/hf_small at https://host/a@b?page=2", None),
        ("training.learning_rate: 0.01 -> 0.005; lora.r=8; sk-learn; step-4; TOKENIZERS_PARALLELISM=false", None),
    ],
)
def test_what_is_a_secret(said, clean):
    env = SECRETS | {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "SSL_KEY": str(ROOT),
        "EMPTY_TOKEN": "",
    }
    assert redact.text(said, env) == (said if clean is None else clean)
    assert redact.tree({"a key": [said, (said, 1.5)]}, env) == {"a key": [clean or said, (clean or said, 1.5)]}


def test_a_word_that_is_a_secret_in_one_shell_only_is_no_difference():
    plain = {"recipe": {"data.train": "chats.jsonl", "model.name_or_path": "/models/projectx/base"}}
    masked = redact.tree(plain, {"LAB_PASSWORD": "projectx"})
    assert masked["recipe"]["model.name_or_path"] == "/models/***/base"
    assert differences(plain, masked) == differences(masked, plain) == differences(masked, masked) == []
    other = {"recipe": {"data.train": "chats.jsonl", "model.name_or_path": "/models/other"}}
    assert differences(masked, other) == ["model.name_or_path: /models/***/base -> /models/other"]


def test_a_traceback_is_clean(monkeypatch, capsys):
    from finetune.process.exit_status import run_guarded

    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def fails() -> None:
        raise ValueError(os.environ["HF_TOKEN"])

    assert run_guarded(fails) == 1
    said = capsys.readouterr().err
    assert "ValueError: ***" in said and TOKEN not in said
    with pytest.raises(ValueError, match=TOKEN):
        fails()
    assert traceback.format_exc()
