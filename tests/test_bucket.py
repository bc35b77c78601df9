"""Run folders in a bucket: the local files' way there and back, and whole runs on an object store.

The store is a fake of this process (`tests/store.py`), or fsspec's memory where gcsfs is missing.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import fsspec
import pytest

import vit_jax
from tests import chaos, store
from tests.test_checkpoint import state_of, target_of
from vit_jax import bucket, checkpoint, faults, main
from vit_jax.errors import CheckpointError, ConfigError, DataError
from vit_jax.report import read_metrics

ROOT = Path(__file__).parent.parent
ADDRESS = "memory://bucket/runs/one"
RUN = ["--config=configs/vit.py:tiny", "--config.steps=6", "--config.ema=0.9"]
RUN += ["--config.checkpoint_every=2", "--config.eval_every=4", "--config.log_every=1"]
RUN += ["--config.batch_size=64"]
with_gcsfs = pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is None, reason="needs gcsfs: pip install -e '.[gcs]'"
)


class KilledError(BaseException):
    """In place of SIGKILL, in a process that goes on."""


@pytest.fixture
def memory(monkeypatch, tmp_path):
    """A bucket in memory: its file system. Checkpoints lie in a folder instead."""
    monkeypatch.setattr(bucket, "SCHEME", "memory://")
    monkeypatch.setattr(bucket, "READER", "fsspec")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where failed runs leave their files
    monkeypatch.setattr(bucket, "_root", lambda address: tmp_path / "in_bucket" / address[-3:])
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.mkdirs("/bucket")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """What the same run leaves in a folder, undisturbed."""
    folder = tmp_path_factory.mktemp("local") / "run"
    assert main.main([*RUN, f"--workdir={folder}"]) == 0
    return parts(folder)


def parts(folder):
    return chaos.hashes(folder), read_metrics(folder), chaos.curves(folder)


def put(files, **texts):
    for name, text in texts.items():
        files.pipe_file(f"/bucket/runs/one/{name.replace('_', '.')}", text.encode())


def test_files_come_from_the_bucket_and_only_what_changed_goes_back(memory, monkeypatch):
    put(memory, config_json="{}", log_txt="a line\n", labels_json="[]")
    memory.pipe_file("/bucket/runs/one/checkpoints/4/seal", b"x")
    sent, pipe = [], memory.pipe_file
    monkeypatch.setattr(memory, "pipe_file", lambda *a, **k: (sent.append(a[0]), pipe(*a, **k)))
    with bucket.run_folder(f"{ADDRESS}/") as folder:
        assert folder.files.name == "one"  # which a picture's title tells
        assert (folder.files / "checkpoints").is_dir()
        assert not list((folder.files / "checkpoints").iterdir())
        folder.push()
        assert not sent
        with open(folder.files / "log.txt", "a") as log:
            log.write("another\n")
        (folder.files / "tensorboard").mkdir()
        (folder.files / "tensorboard" / "events").write_bytes(b"e")
        folder.push()
        assert sent == [f"{ADDRESS}/log.txt", f"{ADDRESS}/tensorboard/events"]
        (folder.files / "curves.png").write_bytes(b"p")
    assert sent[2:] == [f"{ADDRESS}/curves.png"]
    assert memory.cat_file("/bucket/runs/one/log.txt") == b"a line\nanother\n"
    assert not folder.files.exists()


def test_of_what_is_no_run_folder_only_the_names_come(memory):
    put(memory, weights_bin="gigabytes")
    with bucket.run_folder(ADDRESS) as folder:
        assert [(p.name, p.stat().st_size) for p in folder.files.iterdir()] == [("weights.bin", 0)]
    assert memory.cat_file("/bucket/runs/one/weights.bin") == b"gigabytes"


def test_of_two_that_claim_a_folder_at_once_the_second_is_refused(memory):
    def claim(folder, seed):
        (folder.files / "labels.json").write_text("[]")
        (folder.files / "config.json").write_text(f'{{"seed": {seed}}}')
        folder.claim()

    def claim_later():
        with bucket.run_folder(ADDRESS) as second, bucket.run_folder(ADDRESS) as first:
            claim(first, 1)
            claim(second, 2)

    with pytest.raises(CheckpointError, match=f"{ADDRESS} was claimed by another run"):
        claim_later()
    assert json.loads(memory.cat_file("/bucket/runs/one/config.json")) == {"seed": 1}


def test_a_claim_ends_with_the_config_and_one_cut_short_is_made_again(memory, monkeypatch):
    pipe = memory.pipe_file

    def cut(path, data, **options):
        if path.endswith("config.json"):
            raise ConnectionError("cut")
        pipe(path, data, **options)

    def claim():
        with bucket.run_folder(ADDRESS) as folder:
            (folder.files / "labels.json").write_text("[]")
            (folder.files / "config.json").write_text("{}")
            folder.claim()

    with monkeypatch.context() as patch:
        patch.setattr(memory, "pipe_file", cut)
        with pytest.raises(ConfigError, match="cannot be written: cut"):
            claim()
    assert memory.ls("/bucket/runs/one", detail=False) == ["/bucket/runs/one/labels.json"]
    claim()
    assert memory.cat_file("/bucket/runs/one/config.json") == b"{}"


def test_a_process_that_did_not_claim_the_folder_brings_its_own_files_when_it_fails(memory):
    def fail():
        with bucket.run_folder(ADDRESS) as folder:
            (folder.files / "1-broken.jsonl").write_text("{}\n")
            raise DataError("too many")

    with pytest.raises(DataError):
        fail()
    assert memory.cat_file("/bucket/runs/one/1-broken.jsonl") == b"{}\n"


def test_errors_name_the_bucket_and_not_the_local_files(memory):
    put(memory, config_json="{}")
    with pytest.raises(CheckpointError) as caught, bucket.run_folder(ADDRESS) as folder:
        raise CheckpointError(f"{folder.files} belongs to another config")
    assert str(caught.value) == f"{ADDRESS} belongs to another config"


@pytest.mark.parametrize("also", [False, True])
def test_files_that_could_not_be_copied_stay_where_they_are(memory, monkeypatch, capsys, also):
    put(memory, config_json="{}")

    def refuse(*_, **__):
        raise OSError("Forbidden: you may not\nat all")

    monkeypatch.setattr(memory, "pipe_file", refuse)
    kept = []

    def write():
        with bucket.run_folder(ADDRESS) as folder:
            kept.append(folder.files / "metrics.jsonl")
            kept[0].write_text("{}\n")
            if also:
                raise CheckpointError("first")

    with pytest.raises(CheckpointError) as caught:
        write()
    said = str(caught.value) + capsys.readouterr().err
    assert f"could not be copied to {ADDRESS}: Forbidden: you may not at all. They are in" in said
    assert str(caught.value).startswith("first") == also
    assert kept[0].read_text() == "{}\n"


def test_a_folder_of_the_file_system_is_itself(tmp_path):
    before = tmp_path / "run"
    with bucket.run_folder(before) as folder:
        assert folder.root == folder.files == before
        folder.claim()
        folder.push()
    assert not before.exists()


@pytest.mark.parametrize("address", ["gs://", "gs://bucket", "gs://bucket/", "gs:///run"])
def test_an_address_without_a_folder_is_refused(address, monkeypatch):
    monkeypatch.setattr(bucket, "READER", "fsspec")
    with pytest.raises(ConfigError, match="gs://BUCKET/RUN was wanted"):
        bucket.checked(address)


def test_what_reads_buckets_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(bucket, "READER", "no_such_package")
    with pytest.raises(ConfigError, match=r"needs no_such_package.*pip install -e '.\[gcs\]'"):
        main.parse(["--config=configs/vit.py:tiny", "--workdir=gs://bucket/run"])


def test_a_store_that_is_silent_is_no_damage():
    asked = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})("Invalid, 401")
    for error in (
        asked,
        ConnectionResetError(),
        ValueError("UNAVAILABLE: 503"),
        OSError("Forbidden"),
    ):
        assert bucket.unreached(error)
    for error in (ValueError("DATA_LOSS: crc"), FileNotFoundError("d/1"), KeyError("digest")):
        assert not bucket.unreached(error)


@pytest.mark.slow
def test_rows_are_in_the_bucket_before_the_checkpoint_and_come_back(
    memory, local, tmp_path, monkeypatch, capsys
):
    argv = [*RUN, f"--workdir={ADDRESS}"]

    def kill(*_):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", kill)
        patch.setattr(bucket.Mirror, "finish", lambda *_: "")  # the dead push nothing
        patch.setenv(faults.VARIABLE, "kill@save1")
        with pytest.raises(KilledError):
            main.main(argv)
    saved = chaos.finished(tmp_path / "in_bucket" / "one")
    text = memory.cat_file("/bucket/runs/one/metrics.jsonl").decode()
    assert {json.loads(line)["step"] for line in text.splitlines()} >= set(range(1, saved[-1] + 1))

    pipe, refusals = memory.pipe_file, iter([True])

    def refuse_once(path, data, **options):
        if path.endswith("metrics.jsonl") and next(refusals, False):
            raise OSError("503")
        pipe(path, data, **options)

    monkeypatch.setattr(memory, "pipe_file", refuse_once)
    capsys.readouterr()
    assert main.main(argv) == 0
    assert (
        f"files could not be copied to {tmp_path}/in_bucket/one yet: 503" in capsys.readouterr()[0]
    )
    here = tmp_path / "in_bucket" / "one"
    memory.get("/bucket/runs/one/", str(here), recursive=True)
    assert parts(here) == local
    assert (here / "curves.png").exists()
    assert "process" not in (here / "lock").read_text()


@pytest.fixture(scope="module")
def served():
    """An object store that gcsfs and TensorStore find in this process."""
    with pytest.MonkeyPatch.context() as patch, store.serving(store.Store()) as there:
        for name, value in there.environment.items():
            patch.setenv(name, value)

        yield there


@pytest.fixture
def objects(served):
    """The same, empty and willing."""
    served.objects.clear()
    served.writes.clear()
    yield served
    served.refused, served.denied, served.down = (), "", False
    served.before = lambda name: None


def opened(warnings):
    """Checkpoints in the bucket."""
    bucket._store("gs://bucket/run")
    return checkpoint.Checkpoints(bucket._root("gs://bucket/run"), warn=warnings.append)


def target():
    return target_of(state_of(0))


@with_gcsfs
def test_a_damaged_checkpoint_of_a_bucket_is_set_aside_and_saved_again(objects):
    warnings = []
    checkpoints = opened(warnings)
    for step in (1, 2):
        assert checkpoints.save(step, state_of(step))
    assert checkpoints.close()
    name = next(n for n in objects.objects if n.startswith("run/checkpoints/2/state/d/"))
    whole, generation = objects.objects[name]
    objects.objects[name] = whole[: len(whole) // 2], generation
    checkpoints = opened(warnings)
    state, step = checkpoints.restore(target())
    assert step == state.step == 1
    assert "checkpoint 2 is damaged" in warnings[0]
    assert (
        len([n for n in objects.objects if "/damaged-2-" in n and n.endswith("/seal/metadata")])
        == 1
    )
    assert checkpoints.save(2, state_of(2), rank=0.5)
    checkpoints.rank(1, 0.7)
    assert checkpoints.close()
    checkpoints = opened(warnings)
    assert (checkpoints.steps(), checkpoints.best()) == ([1, 2], 1)
    assert checkpoints.restore(target())[1] == 2
    checkpoints.close()
    assert len(warnings) == 1


@with_gcsfs
def test_a_bucket_that_does_not_answer_is_no_damaged_checkpoint(objects):
    warnings = []
    checkpoints = opened(warnings)
    assert checkpoints.save(1, state_of(1))
    assert checkpoints.wait()
    before = dict(objects.objects)
    for objects.denied, objects.down in (("", True), ("/state/d/", False)):
        with pytest.raises(CheckpointError, match="cannot be reached"):
            checkpoints.restore(target())
    objects.denied = ""
    assert checkpoints.restore(target())[1] == 1
    assert checkpoints.close()
    assert (objects.objects, warnings) == (before, [])


@with_gcsfs
def test_a_save_that_a_bucket_refuses_is_said_and_the_next_one_works(objects):
    warnings = []
    checkpoints = opened(warnings)
    assert checkpoints.save(1, state_of(1))
    assert checkpoints.wait()
    objects.refused = ("POST",)
    checkpoints.save(2, state_of(2))
    assert not checkpoints.wait()
    assert "checkpoint 2 could not be written" in warnings[0]
    objects.refused = ()
    assert checkpoints.save(3, state_of(3))
    assert checkpoints.close()
    checkpoints = opened(warnings)
    assert checkpoints.steps() == [1, 3]
    checkpoints.close()


def brought(objects, folder):
    """What is in the bucket's run folder, as files."""
    for name, (data, _) in objects.objects.items():
        file = folder / Path(name).relative_to("run")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return parts(folder)


@with_gcsfs
@pytest.mark.slow
def test_a_run_killed_as_it_finishes_a_checkpoint_goes_on_bit_for_bit(
    objects, local, tmp_path, capsys
):
    argv, last = [*RUN, "--workdir=gs://bucket/run"], "run/checkpoints/4/commit_success.txt"
    command = [sys.executable, "-m", "vit_jax.main", *argv]
    own = objects.environment | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | own)

    def kill(name):
        if name == last:
            process.kill()
            raise ConnectionError("killed before it was written")

    objects.before = kill
    assert process.wait(120) == -9
    objects.before = lambda name: None
    assert last not in objects.objects
    assert "run/checkpoints/4/seal/metadata" in objects.objects
    capsys.readouterr()
    assert main.main(argv) == 0
    assert "going on from step 2 of 6" in capsys.readouterr().out
    assert brought(objects, tmp_path / "run") == local

    rows = []
    for name, data in objects.writes:  # each checkpoint's rows were there before it was one
        if name == "run/metrics.jsonl":
            rows = [json.loads(line)["step"] for line in data.splitlines()]
        if name.count("/") == 3 and name.endswith("/commit_success.txt"):
            assert max(rows) >= int(name.split("/")[2])

    assert main.main([*argv, "--mode=eval"]) == 0
    assert "step 6 (best) validation_ema" in capsys.readouterr().out
    assert "run/predictions.png" in objects.objects
    assert vit_jax.load("gs://bucket/run").source.startswith(
        "gs://bucket/run, a run folder, step 6"
    )
    assert main.main([*argv, "--config.seed=7"]) == 4
    assert "error: gs://bucket/run belongs to another config" in capsys.readouterr().err


@with_gcsfs
@pytest.mark.parametrize(
    ("address", "refused", "status", "said"),
    [
        ("gs://nobody/run", (), 2, "gs://nobody/run: there is no bucket 'nobody'"),
        ("gs://bucket/run", ("GET",), 2, "gs://bucket/run cannot be read: Forbidden"),
        ("gs://bucket/run", ("POST",), 2, "gs://bucket/run cannot be written: Forbidden"),
    ],
)
def test_what_a_bucket_refuses_is_one_sentence_before_anything_is_compiled(
    objects, capsys, address, refused, status, said
):
    objects.refused = refused
    assert main.main([*RUN, f"--workdir={address}"]) == status
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


@with_gcsfs
def test_what_is_no_run_in_a_bucket_is_no_checkpoint(objects):
    objects.put("weights.npz", b"x", {})
    for ref in ("gs://bucket/weights.npz", "gs://nobody/run", "gs://bucket"):
        with pytest.raises(CheckpointError, match=ref):
            vit_jax.load(ref)
