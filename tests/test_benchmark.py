import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import jax
import numpy as np
import pytest
from PIL import Image

import vit_jax
from vit_jax import benchmark, step, workload
from vit_jax.errors import ConfigError, DataError, OutOfMemoryError
from vit_jax.worker import Worker, WorkerError, timed

FAKE = """
import os, signal, sys
sys.path.insert(0, {folder!r})
from worker import serve

class Fake:
    def __init__(self):
        self.slow = 0
    def prepare(self, order):
        print("chatter of a library")
        if order["batch_size"] > 4:
            os.kill(os.getpid(), signal.SIGKILL)
        if order["batch_size"] == 3:
            raise KeyError("no such thing")
        return {{"memory": 10 * order["batch_size"]}}
    def run(self, steps):
        pass
    def rate(self, dtype):
        return 1e9
    def wrong(self, error):
        return "wrong" if isinstance(error, KeyError) else "bug"

serve(Fake)
"""


@pytest.fixture
def fake():
    folder = os.path.dirname(benchmark.__file__)
    worker = Worker([sys.executable, "-c", FAKE.format(folder=folder)])
    yield worker
    worker.close()


def test_a_worker_answers_and_says_what_is_wrong_and_is_started_again_if_it_dies(fake):
    assert fake.ask(do="prepare", batch_size=2) == {"memory": 20}
    assert fake.ask(do="rate", dtype="float32") == {"flops": 1e9}
    assert len(fake.ask(do="run", seconds=0.001)["times"]) >= 1
    with pytest.raises(WorkerError, match="no such thing") as caught:
        fake.ask(do="prepare", batch_size=3)
    assert caught.value.kind == "wrong"
    with pytest.raises(WorkerError, match="status -9") as caught:  # as the system ends it
        fake.ask(do="prepare", batch_size=8)
    assert caught.value.kind == "memory"
    assert fake.ask(do="prepare", batch_size=1) == {"memory": 10}


def test_a_worker_that_cannot_start_says_so():
    worker = Worker([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(WorkerError, match="status 3") as caught:
        worker.ask(do="rate", dtype="float32")
    assert caught.value.kind == "bug"
    worker.close()


def test_short_steps_are_timed_several_at_once_and_long_ones_alone(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run(steps, each):
        calls.append(steps)
        now[0] += steps * each

    assert timed(lambda steps: run(steps, 0.001), 0.12) == pytest.approx([0.001] * 3)
    assert calls == [1, 50, 50, 50]
    calls.clear()
    assert timed(lambda steps: run(steps, 0.0625), 0.125) == [0.0625, 0.0625]
    assert calls == [1, 1, 1]


class Answers:
    """A worker whose steps take given times; `most` pictures fit its memory."""

    def __init__(self, *times, most=99, error=None, flops=None):
        self._times, self._most, self._error = list(times), most, error
        self._said = {"flops": flops, "published": {"model_type": "vit"}} if flops else {}
        self.orders = []

    def ask(self, do, **order):
        self.orders.append((do, order))
        if do == "run":
            if not self._times:
                raise WorkerError("broke down", "bug")
            return {"times": self._times.pop(0)}
        if order["batch_size"] > self._most:
            raise WorkerError("too much", "memory")
        if self._error:
            raise WorkerError(*self._error)
        return {"memory": 100, "compile_seconds": 1.0} | self._said


ORDER = {"work": "training", "batch_size": 8, "model": "vit_s16", "dtype": "float32"}
TURNS = {"rounds": 2, "seconds": 1.0, "say": lambda text: None}


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
    monkeypatch.setattr(benchmark, "REST", 0.0)


def test_medians_quartiles_and_ratios_are_those_of_the_rounds():
    workers = {
        "ours": Answers([1.0, 2.0, 3.0], [4.0], flops=1e9),
        "timm eager": Answers([4.0, 4.0, 5.0], [6.0]),
    }
    row = benchmark.measure(ORDER, workers, **TURNS)
    ours = row["sides"]["ours"]
    assert ours["median"] == 2.5
    assert ours["quartiles"] == [2.0, 4.0]
    assert ours["images_per_second"] == 8 / 2.5
    assert ours["rounds"] == [2.0, 4.0]
    assert row["ratios"] == {"timm eager": [1.5, 1.75, 2.0]}
    assert [do for do, _ in workers["ours"].orders] == ["prepare", "run", "run"]
    assert workers["timm eager"].orders[0][1]["published"] == {"model_type": "vit"}
    assert "published" not in ours


def test_the_share_of_the_machine_counts_a_training_step_as_three_forward_passes():
    row = benchmark.measure(ORDER, {"ours": Answers([2.0], [2.0], flops=1e9)}, **TURNS)
    benchmark._add_share(row, {"ours": 6e10, "timm eager": 4.8e10})
    assert row["sides"]["ours"]["of_machine"] == pytest.approx(3 * 1e9 * 4 / 6e10)


def test_a_batch_too_large_for_one_side_is_halved_for_all():
    workers = {"ours": Answers([1.0], [1.0], flops=1e9), "peer": Answers([1.0], [1.0], most=3)}
    said = []
    row = benchmark.measure(ORDER, workers, **TURNS | {"say": said.append})
    assert row["batch_size"] == 2
    assert "going on with batch_size=2" in " ".join(said)
    with pytest.raises(OutOfMemoryError, match="not even one picture"):
        benchmark.measure(ORDER, {"ours": Answers(most=0)}, **TURNS)


def test_a_peer_that_has_no_such_model_is_a_line_of_the_table_and_ours_is_an_error():
    workers = {"ours": Answers([1.0], [1.0], flops=1e9), "peer": Answers(error=("none", "wrong"))}
    row = benchmark.measure(ORDER, workers, **TURNS)
    assert row["sides"]["peer"] == {"error": "none"}
    row["sides"]["ours"]["parameters"] = 5
    assert any("none" in line for line in benchmark.table(row))
    with pytest.raises(ConfigError, match="no such model"):
        benchmark.measure(ORDER, {"ours": Answers(error=("no such model", "wrong"))}, **TURNS)


def test_a_peer_that_fails_in_its_turn_is_dropped_and_ours_is_an_error():
    workers = {"ours": Answers([1.0], [3.0], flops=1e9), "peer": Answers([1.0])}
    row = benchmark.measure(ORDER, workers, **TURNS)
    assert row["sides"]["peer"] == {"error": "broke down"}
    assert row["sides"]["ours"]["rounds"] == [1.0, 3.0]
    assert row["ratios"] == {}
    with pytest.raises(WorkerError, match="broke down"):
        benchmark.measure(ORDER, {"ours": Answers([1.0])}, **TURNS)


def test_benchmarks_that_share_turns_let_peers_compile_together_and_time_alone(
    monkeypatch, tmp_path
):
    both, device, heard = threading.Barrier(2), threading.Lock(), []

    class Peer(Answers):
        def ask(self, do, **order):
            if do == "prepare":
                heard.append(order["published"]["model_type"])
                both.wait(timeout=20)  # each is prepared while the other is
            return {"flops": 1.0} if do == "rate" else super().ask(do, **order)

    class Alone(Peer):
        def ask(self, do, **order):
            assert device.acquire(blocking=False)
            time.sleep(0.01)
            device.release()
            return {"flops": 1.0} if do == "rate" else Answers.ask(self, do, **order)

    @contextmanager
    def workers(options):
        yield {"ours": Alone([1.0], [1.0], flops=1e9), "peer": Peer([2.0], [2.0])}

    monkeypatch.setattr(benchmark, "_workers", workers)
    line = ["vit_ti16", "--work=inference", "--rounds=2", "--peer=transformers"]
    options, _ = benchmark.parse([*line, f"--turns={tmp_path / 'turns'}"])
    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(benchmark.benchmark, options, None, lambda text: None) for _ in "ab"]
    for wait in waits:
        (row,) = wait.result()["rows"]
        assert row["ratios"] == {"peer": [2.0, 2.0, 2.0]}
    assert heard == ["vit", "vit"]


def test_what_a_peer_could_not_prepare_ahead_is_tried_again_with_half_the_batch():
    workers = {"ours": Answers([1.0], [1.0], flops=1e9), "peer": Answers([1.0], [1.0])}
    ready = {"peer": WorkerError("too much", "memory")}
    row = benchmark.measure(ORDER, workers, **TURNS, ready=ready)
    assert row["batch_size"] == 4
    assert [order["batch_size"] for do, order in workers["peer"].orders if do == "prepare"] == [4]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ([], "names of models or --config"),
        (["vit_s16", "--config=configs/vit.py"], "either names"),
        (["vit_s16", "--work=traning"], "traning"),
        (["vit_s16", "--work=input"], "needs a --config"),
        (["vit_s16", "--batch_size=8,zero"], "whole numbers"),
        (["vit_s16", "--batch_size=0"], "at least 1"),
        (["vit_s16", "--image_size=1,2,3"], "224x288"),
        (["vit_s16", "--dtype=float8"], "float8"),
        (["vit_s16", "--peer=keras"], "keras"),
        (["vit_s16", "--rounds=0"], "at least 1"),
        (["vit_s16", "--set", "scan"], "NAME=VALUE"),
        (["vit_s16", "--turns=file"], "beside a --peer"),
        (["--config=configs/vit.py:tiny", "--work=input", "--peer=timm"], "--pictures=FOLDER"),
        (["--config=configs/vit.py:tiny", "--work=input", "--peer=transformers"], "--peer=timm"),
    ],
)
def test_a_wrong_line_is_one_sentence(line, said):
    with pytest.raises(ConfigError, match=said):
        benchmark.parse(line)


def test_a_folder_that_is_not_there_is_told():
    with pytest.raises(DataError, match="nowhere"):
        benchmark.parse(["--config=configs/vit.py:tiny", "--pictures=nowhere"])


def test_every_combination_is_one_order():
    options, config = benchmark.parse(
        ["vit_s16", "swin_t", "--batch_size=1,8", "--image_size=224x288", "--set", "scan=True"]
    )
    found = list(benchmark.orders(options, config))
    assert len(found) == 8
    assert found[0]["image_size"] == [224, 288]
    assert found[0]["fields"] == {"scan": True}
    assert {o["work"] for o in found} == {"training", "inference"}


def test_a_configs_pipeline_is_one_thread_without_mixing():
    options, config = benchmark.parse(["--config=configs/vit.py:imagenet", "--work=input"])
    (order,) = benchmark.orders(options, config)
    assert order["config"]["data"]["threads"] == 0
    assert order["config"]["train"]["mix"] == {}
    assert order["transforms"][0]["target"] == "data.transforms.RandomResizedCrop"
    assert config["data"]["threads"] == 16


@pytest.mark.parametrize("name", ["vit_ti16", "detr_r50", "setr_mla_l16", "clip_b32"])
def test_a_stand_in_batch_can_be_learned_from(name):
    module = workload.model_of(name, "float32", (224, 224), {})
    task, batch = workload.stand_in(module, (224, 224), 2)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    function = partial(step.init_and_score, model=module, task=task)
    assert jax.eval_shape(function, jax.random.key(0), shapes)["params"]


def test_a_backbone_alone_learns_nothing():
    with pytest.raises(ConfigError, match="--config"):
        workload.stand_in(vit_jax.create("vit_ti16", 0), (224, 224), 2)


def test_our_side_compiles_times_and_describes_a_model():
    ours = workload.Ours()
    order = {"model": "vit_ti16", "fields": {"depth": 1}, "image_size": [16, 32], "batch_size": 2}
    for work in ("inference", "training"):
        said = ours.prepare(order | {"work": work, "dtype": "bfloat16"})
        assert said["published"]["model_type"] == "vit"
        # Patches, then 4 products of a block's tokens with its widths and 2 of tokens with tokens.
        tokens, width = 1 * 2 + 1, 192
        products = 2 * 768 * width + tokens * 12 * width**2 + 2 * tokens**2 * width + width * 1000
        assert said["flops"] == 2 * products
        assert said["memory"] > 4 * said["parameters"]
        ours.run(2)
    assert ours.wrong(MemoryError()) == "memory"
    assert ours.wrong(ValueError("RESOURCE_EXHAUSTED: Out of memory")) == "memory"
    assert ours.wrong(ConfigError("x")) == "wrong"
    assert ours.wrong(KeyError("x")) == "bug"


@pytest.mark.slow
def test_a_configs_steps_and_pipeline_are_measured_by_one_command(capsys):
    line = ["--config=configs/vit.py:tiny", "--work=training,inference,input"]
    assert benchmark.main([*line, "--rounds=1", "--seconds=0.01", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["work"] for row in found["rows"]] == ["training", "inference", "input"]
    for row in found["rows"]:
        assert row["sides"]["ours"]["images_per_second"] > 0
    assert 0 < found["rows"][0]["sides"]["ours"]["of_machine"] < 1
    assert found["rows"][2]["sides"]["ours"]["shape"] == [8, 16, 16, 3]
    assert found["machine"]["cores"] == os.cpu_count()
    assert found["machine"]["processor"] == benchmark.processor() != ""


@pytest.mark.slow
def test_one_command_measures_pictures_of_a_folder(capsys, tmp_path):
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "a.png")
    line = ["--config=configs/vit.py:imagenet", "--work=input", f"--pictures={tmp_path}"]
    assert benchmark.main([*line, "--batch_size=2", "--rounds=1", "--seconds=0.01"]) == 0
    assert "config, input, batch 2" in capsys.readouterr().out
