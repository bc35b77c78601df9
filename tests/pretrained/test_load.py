"""A reference that leads nowhere says so in one sentence."""

import json
from types import SimpleNamespace

import pytest

import vit_jax
from vit_jax import describe
from vit_jax.errors import CheckpointError, ConfigError
from vit_jax.pretrained import hf, load


def refused(ref, said):
    with pytest.raises(CheckpointError, match=said) as caught:
        load.open_checkpoint(ref)
    assert "\n" not in str(caught.value)


def test_a_place_that_does_not_exist_is_named_with_what_is_near(tmp_path):
    (tmp_path / "my_model").mkdir()
    refused(tmp_path / "my_modle", r"no such file or folder\. Did you mean '.*my_model'")
    refused("google/vit-base-patch16-224", "On the Hub it would be hf:google/vit-base-patch16-224")


def test_files_and_folders_of_another_kind_are_refused(tmp_path):
    (tmp_path / "model.h5").write_bytes(b"")
    refused(tmp_path / "model.h5", r"files of the kind '\.h5'")
    refused(tmp_path, "holds no config.json")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("", "config.json cannot be read"),
        ("[]", "no JSON object"),
        ('{"model_type": "vit"}', "no weights"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(tmp_path, config, said):
    (tmp_path / "config.json").write_text(config)
    refused(tmp_path, said)


def test_an_architecture_that_is_not_here_is_named_with_the_nearest(tmp_path):
    from safetensors.numpy import save_file

    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "swin3"}))
    refused(tmp_path, r"model_type='swin3' is not known here\. Did you mean")


def test_a_state_dict_of_nothing_known_is_refused(tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"lstm.weight": np.zeros(3)}, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", r"its 1 arrays \(lstm.weight, \.\.\.\)")


def hub_error(name):
    """What huggingface_hub raises, without a network."""
    from huggingface_hub import errors

    kind = getattr(errors, name)
    if issubclass(kind, errors.HfHubHTTPError):
        return kind("no", response=SimpleNamespace(headers={}, request=None, status_code=404))
    return kind("no")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("RepositoryNotFoundError", "there is no such repository"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("GatedRepoError", "ask for access"),
        ("HFValidationError", "wanted hf:OWNER/NAME"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("OfflineModeIsEnabled", "cannot be reached"),
        ("HfHubHTTPError", "could not be downloaded: no"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(name, said, monkeypatch):
    def fail(*_, **__):
        raise hub_error(name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    refused("hf:google/vit@v9", f"hf:google/vit@v9: .*{said}")


def test_a_repository_is_asked_for_its_small_files_and_one_kind_of_weights(tmp_path, monkeypatch):
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "model.safetensors").touch()
    assert hf.download("google/vit@v1") == tmp_path
    assert asked == [("google/vit", "v1", hf.WANTED)]
    (tmp_path / "model.safetensors").unlink()  # an old repository: PyTorch's pickle only
    hf.download("google/vit")
    assert asked[-1] == ("google/vit", None, (*hf.WANTED, "pytorch_model.bin"))


def test_without_a_network_the_command_ends_with_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert describe.main(["hf:nobody/nothing-at-all"]) == 4
    error = capsys.readouterr().err
    assert error.startswith("error: hf:nobody/nothing-at-all: ")
    assert error.count("\n") == 1


def test_a_dtype_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="dtype='float8'"):
        vit_jax.load(tmp_path, dtype="float8")
