"""Several devices and processes of this machine: they train what one would, and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from vit_jax import checkpoint, processes
from vit_jax.report import read_metrics

ROOT = Path(__file__).parent.parent
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
RUN = (
    "--config.batch_size=32",
    "--config.learning_rate=1e-3",
    "--config.schedule.warmup_steps=0",
    "--config.log_every=1",
    "--config.eval_every=20",
    "--config.checkpoint_every=5",
    "--config.ema=0.9",
)
STEPS = "--config.steps=20"
FOREVER = "--config.steps=100000"
GONE = 60  # seconds after which no process is left: a heartbeat, a shutdown, and some breath


class Fellows:
    """The processes of one run, with four devices between them unless said otherwise.

    A fault strikes the last of them; none is left running.
    """

    def __init__(self, workdir, *arguments, config="vit", count=2, devices=4, fault=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        own = f"{QUICK} --xla_force_host_platform_device_count={devices // count}"
        own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": own}
        self.workdir, self.logs, self.all = workdir, [], []
        for number in range(count):
            command = [sys.executable, "-m", "vit_jax.main", f"--config=configs/{config}.py:tiny"]
            command += [*RUN, f"--workdir={workdir}", *arguments]
            if count > 1:
                command += [f"--coordinator={address}", f"--processes={count}"]
                command += [f"--process={number}"]
            faulty = {"VIT_JAX_FAULT": fault} if fault and number == count - 1 else {}
            self.logs.append(workdir.with_suffix(f".{number}.log"))
            with open(self.logs[-1], "w") as log:
                environment = os.environ | own | faulty
                self.all.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for one in self.all:
            if one.poll() is None:
                one.send_signal(signal.SIGCONT)
                one.kill()
                one.wait()

    def said(self):
        """All that they have said, where one of them was not to stop."""
        return "\n".join(log.read_text() for log in self.logs)

    def wait(self, seconds=120):
        """Exit statuses, once all are gone."""
        end = time.monotonic() + seconds
        return [one.wait(max(end - time.monotonic(), 0.1)) for one in self.all]

    def reach(self, step, seconds=120):
        """Waits until a row of that step is there."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            rows = read_metrics(self.workdir) if self.workdir.exists() else []
            if any(row["step"] >= step for row in rows):
                return
            if any(one.poll() is not None for one in self.all):
                break
            time.sleep(0.05)
        raise AssertionError(self.said())


def rows(workdir):
    """Each row's place and loss."""
    return {(row["step"], row["split"]): row["loss"] for row in read_metrics(workdir)}


def assert_same_run(workdir, other):
    """Losses to 1e-5, and parameters as far as Adam leaves them alone where a gradient is 0."""
    ours, theirs = rows(workdir), rows(other)
    assert ours.keys() == theirs.keys()
    for place in ours:
        assert ours[place] == pytest.approx(theirs[place], rel=1e-5), place
    ours, theirs = checkpoint.read(workdir), checkpoint.read(other)
    assert ours.step == theirs.step
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), ours.params, theirs.params
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process with four devices makes in 20 steps, of each architecture asked for."""
    folder, made = tmp_path_factory.mktemp("alone"), {}

    def run(config):
        if config not in made:
            made[config] = folder / config
            with Fellows(made[config], STEPS, config=config, count=1) as one:
                assert one.wait() == [0], one.said()
        return made[config]

    return run


@pytest.mark.long
def test_two_processes_train_what_one_does(tmp_path, alone):
    with Fellows(tmp_path / "two", STEPS) as two:
        assert two.wait() == [0, 0], two.said()
    assert_same_run(tmp_path / "two", alone("vit"))
    assert "step 20 validation" not in two.logs[1].read_text()  # one of them speaks


@pytest.mark.long
@pytest.mark.parametrize("config", ["swin", "cvt"])
def test_two_processes_train_what_one_does_of_other_architectures(tmp_path, alone, config):
    with Fellows(tmp_path / "two", STEPS, config=config) as two:
        assert two.wait() == [0, 0], two.said()
    assert_same_run(tmp_path / "two", alone(config))


@pytest.mark.long
def test_a_run_goes_on_with_fewer_devices_and_other_axes(tmp_path, alone):
    workdir = tmp_path / "run"
    parts = (
        (8, "term@7", ("--config.mesh.fsdp=2",)),
        (4, "term@14", ("--config.mesh.data=1", "--config.mesh.tensor=4")),
        (1, None, ()),
    )
    for devices, fault, axes in parts:
        with Fellows(workdir, STEPS, *axes, count=1, devices=devices, fault=fault) as one:
            assert one.wait() == [143 if fault else 0], one.said()
    assert_same_run(workdir, alone("vit"))


# Widths at which the arrays are large enough to be split.
WIDE = {
    "vit": "--config.model.backbone.width=64 --config.model.backbone.depth=2",
    "swin": "--config.model.backbone.width=32",
    "cvt": "",
}
MESHES = (
    "data=1",
    "data=8",
    "data=1,fsdp=8",
    "data=2,fsdp=4",
    "data=2,fsdp=2,tensor=2",
)


@pytest.mark.long
@pytest.mark.parametrize("config", WIDE)
def test_a_device_and_eight_on_any_axes_agree_for_20_steps(config):
    arguments = f"--config=configs/{config}.py:tiny --config.learning_rate=1e-3 {WIDE[config]}"
    arguments += " --config.schedule.warmup_steps=0"
    command = [sys.executable, "-m", "tests.devices", arguments, "20", *MESHES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr
    first, *others = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(others) == len(MESHES) - 1
    for other in others:
        assert other["seen"] == first["seen"]
        np.testing.assert_allclose(other["losses"], first["losses"], rtol=1e-5)
        assert other["gap"] < 2e-3  # Adam moves a parameter of gradient 0 by the noise in it
        if "fsdp" in other["mesh"] and WIDE[config]:
            assert other["share"] < 0.6


@pytest.mark.slow
def test_a_signal_to_one_stops_both_at_one_step_and_any_number_goes_on(tmp_path, alone):
    workdir = tmp_path / "run"
    fsdp = (STEPS, "--config.mesh.data=1", "--config.mesh.fsdp=4")
    with Fellows(workdir, *fsdp) as two:
        two.reach(7)
        two.all[1].send_signal(signal.SIGTERM)
        assert two.wait() == [143, 143], two.said()
    saved = checkpoint.read(workdir).step
    assert 7 <= saved < 20
    assert f"stopped at step {saved}" in two.logs[0].read_text()
    with Fellows(workdir, STEPS, count=1) as one:
        assert one.wait() == [0], one.said()
    assert f"going on from step {saved} of 20" in one.logs[0].read_text()
    assert_same_run(workdir, alone("vit"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_signal_to_one_while_it_compiles_ends_both_at_once(tmp_path, number):
    with Fellows(tmp_path / "run", STEPS, "--config.data.workers=1", config="swin") as two:
        log, end = two.logs[0], time.monotonic() + 120
        while "compiling the training step" not in log.read_text():
            assert time.monotonic() < end, two.said()
            time.sleep(0.02)
        two.all[number].send_signal(signal.SIGTERM)
        assert two.wait() == [143, 143], two.said()
    assert "compiled in" not in log.read_text()
    assert "stopped at step 0, of which there is nothing to save" in log.read_text()


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "what"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)]
)
def test_one_that_dies_or_stands_still_takes_the_others_with_it(tmp_path, number, what):
    workdir = tmp_path / "run"
    with Fellows(workdir, FOREVER) as two:
        two.reach(7)
        two.all[number].send_signal(what)
        began = time.monotonic()
        other = two.all[1 - number]
        assert other.wait(GONE) not in (0, 143)
        print(f"process {number}, {what.name}: gone in {time.monotonic() - began:.1f} s")
    assert checkpoint.read(workdir).step >= 5


@pytest.mark.long
def test_one_that_hangs_ends_all_with_the_stacks_of_its_threads(tmp_path):
    workdir = tmp_path / "run"
    with Fellows(workdir, FOREVER, "--config.hang_seconds=10", fault="hang@8") as two:
        two.reach(7)
        assert all(status not in (0, 143) for status in two.wait(GONE))
    assert any("most recent call first" in log.read_text() for log in two.logs)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # a shell inside of an allocation
        ({"SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # a pod that is no indexed job
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_launchers_are_recognised(environment, expected):
    assert processes.launched(environment) == expected


def test_alone_everything_is_the_process_itself():
    assert processes.alone()
    assert processes.first()
    assert processes.number() == 0
    assert processes.agree(True)
    assert not processes.agree(False)
    assert processes.from_first({"a": [1, None]}) == {"a": [1, None]}
    assert processes.first_does(json.dumps, [1]) == "[1]"
