# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""A model that is missing, damaged, unsafe or unable to roll back is refused by name; a sound one loads in silence."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import VOCABULARY, tiny_model

from ralmspec.retrievers.errors import MissingExtra
from ralmspec.stages.errors import BadModel
from ralmspec.stages.transformers_model import TransformersModel


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def copied(models, tmp_path, family="llama"):
    return Path(shutil.copytree(tiny_model(family, models), tmp_path / "copy"))


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def garble_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def pickle_weights(folder):
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickle_weights_beside_others(folder):
    shutil.copy(folder / "model.safetensors", folder / "adapter.safetensors")
    pickle_weights(folder)


def lose_a_tensor(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def lose_the_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    "listed config": (lambda folder: (folder / "config.json").write_text("[1]"), "config.json cannot be read"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "pickled": (pickle_weights, r"only pickled weights \(pytorch_model.bin\)"),
    "pickled beside": (pickle_weights_beside_others, "the weights cannot be read .*model.safetensors"),
    "cut": (cut_weights, "the weights cannot be read"),
    "garbled": (garble_weights, "the weights cannot be read"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "the weights cannot be read"),
    "tensor lost": (lose_a_tensor, "lack 1 of the model's tensors, 'model.layers.1.mlp.up_proj.weight'"),
    "other width": (lambda folder: edit(folder / "config.json", intermediate_size=96), "the weights"),
    "other depth": (lambda folder: edit(folder / "config.json", num_hidden_layers=5), "lack .* of the model's tensors"),
    "no tokenizer": (lose_the_tokenizer, "tokenizer"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "the tokenizer cannot be read"),
    "other family": (
        lambda folder: edit(folder / "config.json", model_type="gpt_neox"),
        "'gpt_neox' model; served are",
    ),
    "no family": (lambda folder: edit(folder / "config.json", model_type="nonsense"), "config.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.filterwarnings("default")
def test_a_damaged_folder_is_refused_by_name(models, tmp_path, damage):
    folder = copied(models, tmp_path)
    harm, complaint = DAMAGE[damage]
    harm(folder)
    with pytest.raises(BadModel, match=complaint) as refusal:
        TransformersModel.load(folder)
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize(
    "name", [Path("nowhere"), "./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere", "", __file__], ids=str
)
def test_a_folder_that_is_not_there_is_a_bad_model(name):
    with pytest.raises(BadModel, match="is no model folder: check the path"):
        TransformersModel.load(name)


def test_sliding_windows_are_refused_because_they_cannot_go_back(models, tmp_path):
    folder = tiny_model("mistral", tmp_path, sliding_window=16)
    with pytest.raises(BadModel, match="keeps only part of its past .*DynamicSlidingWindowLayer"):
        TransformersModel.load(folder)


def test_cross_attention_is_refused(tmp_path):
    with pytest.raises(BadModel, match="'gpt2' model; served are decoders"):
        TransformersModel.load(tiny_model("gpt2", tmp_path, add_cross_attention=True))


def test_the_folders_own_code_is_not_run(models, tmp_path):
    folder = copied(models, tmp_path)
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    edit(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(BadModel):
        TransformersModel.load(folder)
    edit(folder / "config.json", model_type="llama", auto_map={"AutoModelForCausalLM": "evil.Model"})
    assert TransformersModel.load(folder).vocabulary == VOCABULARY
    assert not marker.exists()


def test_a_tokenizer_larger_than_the_model_is_refused(models, tmp_path):
    folder = tiny_model("gpt2", tmp_path, vocab_size=300)
    with pytest.raises(BadModel, match="largest token id is 383, the model knows 300 tokens"):
        TransformersModel.load(folder)


def test_settings_that_are_not_there_are_refused(models):
    folder = tiny_model("gpt2", models)
    with pytest.raises(ValueError, match="dtype 'int8' is not one of float32"):
        TransformersModel.load(folder, dtype="int8")
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(ValueError, match=f"device '{device}' is not there"):
            TransformersModel.load(folder, device=device)


def test_without_transformers_the_error_names_the_extra(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'ralmspec\[local\]'"):
        TransformersModel.load(models)


def test_loading_prints_nothing_and_leaves_the_progress_bars_as_they_were(models, capfd):
    folder = tiny_model("llama", models)
    capfd.readouterr()
    shown = transformers.utils.logging.is_progress_bar_enabled()
    TransformersModel.load(folder)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled() == shown


def test_start_and_end_tokens_are_the_checkpoints(models, tmp_path):
    found: dict[str, object] = {}
    for family in ("gpt2", "opt", "llama"):
        model = TransformersModel.load(tiny_model(family, models))
        found[family] = (model.start_tokens, model.end_tokens)
    assert found == {"gpt2": ((), {0}), "opt": ((0,), {0}), "llama": ((0,), {1})}
    folder = copied(models, tmp_path, "llama")
    edit(folder / "generation_config.json", eos_token_id=[1, 7])
    model = TransformersModel.load(folder)
    assert model.end_tokens == {1, 7}
    assert model.encode(model.decode([8, 7, 9])) == [8, 7, 9]  # an ordinary token may end a sequence and stays text
    (folder / "generation_config.json").unlink()
    assert TransformersModel.load(folder).end_tokens == {1}
