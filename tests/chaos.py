"""Kills runs at random, starts them again, and looks whether anything was lost.

    python tests/chaos.py --kills=200 --seeds=5 --configs=vit,cvt,swin --out=chaos
    python tests/chaos.py --kills=0 --terms=50 --out=chaos
    python tests/chaos.py --kills=0 --terms=50 --processes=2 --out=chaos_of_two

Each run is `python -m vit_jax.main` on a shrunk config, killed (SIGKILL) at moments drawn from the
seed and started again until it is done; then its state, rows and curves are compared with those of
a run that nobody disturbed. With `--terms` the same with SIGTERM and Ctrl-C, which must lose
nothing; with `--processes=2` a run is two processes, of which one or both get the signal. Results
go to `results.json` in the folder `--out` as they come: the same command goes on where it was
stopped. The exit status is 1 if a promise was broken.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import platform
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVED_EVERY, EVALUATED_EVERY = 40, 4, 6
SHRUNK = {
    "steps": STEPS,
    "batch_size": 64,  # 23 steps an epoch: every run crosses an epoch's border
    "checkpoint_every": SAVED_EVERY,
    "eval_every": EVALUATED_EVERY,
    "ema": 0.9,
    "model.backbone.dropout": 0.1,
}
# The suite's own, for programs are compiled again in every life of a run.
XLA_FLAGS = (
    "--xla_force_host_platform_device_count=2 "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
AIMS = {"save": 0.55, "step": 0.2, "evaluation": 0.15, "anywhere": 0.1}
PATIENCE = 300  # seconds after which a process counts as hung
ON_TIME = 5.0  # seconds from SIGTERM to the end
AT_ONCE = 1.0  # seconds from a second signal to the end


@dataclass
class Life:
    """One process of a run, from its start to its end; or several that make up one."""

    name: str  # of the config
    seed: int
    workdir: Path
    environment: dict[str, str]
    workers: int = 0
    processes: int = 1
    seen: set[str] = field(default_factory=set)  # unfinished checkpoints of earlier lives

    def __post_init__(self):
        values = SHRUNK | {"seed": self.seed, "data.workers": self.workers}
        # Three steps to a row and four to a checkpoint: a run goes on in the middle of a row.
        values["log_every"] = 3 if self.seed % 2 else 1
        argv = [sys.executable, "-m", "vit_jax.main", f"--config=configs/{self.name}.py:tiny"]
        argv += [f"--config.{key}={value}" for key, value in values.items()]
        self.workdir.parent.mkdir(parents=True, exist_ok=True)
        self.seen = self.unfinished()
        self.log = self.workdir.parent / f"{self.workdir.name}.log"
        self.began = time.monotonic()
        argv += [f"--workdir={self.workdir}"]
        if self.processes > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                argv.append(f"--coordinator=127.0.0.1:{probe.getsockname()[1]}")
            argv.append(f"--processes={self.processes}")
        self.all = [self._start(argv, number) for number in range(self.processes)]
        self.process = self.all[0]

    def _start(self, argv: list[str], number: int) -> subprocess.Popen:
        several = [f"--process={number}"] if self.processes > 1 else []
        with open(f"{self.log}.{number}" if number else self.log, "wb") as log:
            return subprocess.Popen(
                [*argv, *several],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def unfinished(self) -> set[str]:
        """Checkpoints that are being written, or whose writing was cut short."""
        found = set()
        for path in (self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
            with contextlib.suppress(FileNotFoundError):  # finished meanwhile
                found.add(f"{path.name} {path.stat().st_ino}")
        return found

    def reached(self) -> int:
        """The last step that has a row."""
        return max((row["step"] for row in rows(self.workdir)), default=0)

    def start(self) -> int:
        """The step that this process went on from, once it is running; 0 before that."""
        found = re.search(r"going on from step (\d+)", self.text())
        return int(found[1]) if found else 0

    def until(self, condition: Callable[[], Any], pause: float = 0.002) -> bool:
        """Waits; False if the process ended before."""
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() - self.began > PATIENCE:
                self.end()
                raise TimeoutError(f"nothing in {PATIENCE} s; see {self.log}")
            time.sleep(pause)
        return True

    def until_saves(self, number: int) -> bool:
        """Waits until that many checkpoints were seen being written."""
        seen = set(self.seen)

        def another() -> bool:
            nonlocal number
            new = self.unfinished() - seen
            seen.update(new)
            number -= len(new)
            return number <= 0

        return self.until(another)

    def until_evaluation(self) -> bool:
        """Waits for the last row before the next evaluation."""
        before = self.reached() if self.until(self.running) else 0
        border = (before // EVALUATED_EVERY + 1) * EVALUATED_EVERY
        return self.until(lambda: self.reached() >= min(border, STEPS), 0.01)

    def running(self) -> bool:
        return "compiled in" in self.text()

    def wait(self) -> int:
        """The exit status; of a hung process, after it was ended, that of SIGKILL."""
        try:
            for process in self.all:
                process.wait(PATIENCE)
            return self.process.returncode
        except subprocess.TimeoutExpired:
            self.end()
            return -signal.SIGKILL

    def end(self) -> None:
        """Ends it at once, with all its descendants."""
        for number in [*(process.pid for process in self.all), *self.family()]:
            if alive(number):
                os.kill(number, signal.SIGKILL)
        for process in self.all:
            process.wait()

    def family(self) -> list[int]:
        """Process ids of all that it has started."""
        return [number for process in self.all for number in descendants(process.pid)]


def descendants(number: int) -> list[int]:
    """Process ids of children and theirs, of Linux's table of processes."""
    try:
        tasks = Path(f"/proc/{number}/task").iterdir()
        own = [int(n) for task in tasks for n in (task / "children").read_text().split()]
    except OSError:
        return []
    return own + [n for child in own for n in descendants(child)]


def alive(number: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def rows(workdir: Path) -> list[dict[str, Any]]:
    """The whole rows of metrics.jsonl, in order."""
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # the last line of a killed run
            continue
    return found


def curves(workdir: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) as TensorBoard shows them: all files in order, purged at each restart.

    A `SessionLog.START` at step s makes it forget what it has from s on, of all files.
    """
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown: list[tuple[int, str, float]] = []
    for path in sorted((workdir / "tensorboard").glob("events.out.tfevents.*")):
        for record in records(path.read_bytes()):
            event = Event.FromString(record)
            if event.session_log.status == SessionLog.START:
                shown = [row for row in shown if row[0] < event.step]
            shown += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return shown


def records(data: bytes) -> Iterator[bytes]:
    """Records of a TFRecord file: length, its checksum, bytes, their checksum; no last half."""
    place = 0
    while place + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        if place + 16 + length > len(data):
            return
        yield data[place + 12 : place + 12 + length]
        place += 16 + length


def hashes(workdir: Path) -> dict[str, str]:
    """sha256 of each part of the newest checkpoint: step, params, model state, optimizer, EMA."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    newest = max(finished(workdir))
    path = workdir.absolute() / "checkpoints" / str(newest) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        saved = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        state = reader.restore(path, restore_args=as_numpy)
    found = {"newest": str(newest)}
    for part, tree in state.items():
        sha = hashlib.sha256()
        for name, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            sha.update(f"{jax.tree_util.keystr(name)} {leaf.dtype} {leaf.shape}".encode())
            sha.update(np.ascontiguousarray(leaf).tobytes())
        found[part] = sha.hexdigest()
    return found


def finished(workdir: Path) -> list[int]:
    """Steps with a checkpoint."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def best(workdir: Path) -> list[int]:
    """The checkpoint with the highest rank."""
    seals = [workdir / "checkpoints" / str(s) / "seal" / "metadata" for s in finished(workdir)]
    ranks = [(json.loads(file.read_text()).get("rank"), int(file.parts[-3])) for file in seals]
    return [max(pair for pair in ranks if pair[0] is not None)[1]]


def outcome(workdir: Path) -> dict[str, Any]:
    """All that must be the same, however often a run was stopped."""
    return {
        "state": hashes(workdir),
        "rows": (workdir / "metrics.jsonl").read_bytes().decode(),
        "curves": curves(workdir),
        "checkpoints": finished(workdir),
        "best": best(workdir),
        "pictures": sorted(p.name for p in workdir.glob("*.png")),
    }


class Chaos:
    """All runs of one command line, and their results on the disk."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.folder = options, Path(options.out).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "results.json"
        empty = {"machine": machine(), "commit": commit(), "kills": [], "signals": [], "runs": []}
        self.results = json.loads(self.file.read_text()) if self.file.exists() else empty
        self.began, self.before = time.monotonic(), self.done()
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": XLA_FLAGS.replace("count=2", f"count={2 // options.processes}"),
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "PYTHONPATH": str(ROOT),
            # The very program that the undisturbed run compiled.
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def done(self) -> int:
        return len(self.results["kills"]) + len(self.results["signals"])

    def go(self) -> int:
        """Every kill and signal that is asked for and not done yet; the exit status."""
        configs, seeds = self.options.configs.split(","), range(self.options.seeds)
        cells = [(name, seed) for seed in seeds for name in configs]
        for kind, wanted in (("kills", self.options.kills), ("signals", self.options.terms)):
            for i, (name, seed) in enumerate(cells):
                share = wanted // len(cells) + (i < wanted % len(cells))
                self.cell(kind, name, seed, share)
        print(summary(self.results), flush=True)
        return int(any(run["problems"] for run in self.results["runs"]))

    def cell(self, kind: str, name: str, seed: int, wanted: int) -> None:
        """Disturbs runs of one config and seed until there are that many disturbances."""
        here = {"kind": kind, "config": name, "seed": seed}
        runs = [r for r in self.results["runs"] if here.items() <= r.items()]
        for number in count(len(runs)):

            def own() -> list[dict[str, Any]]:
                return [r for r in self.results[kind] if (name, seed) == (r["config"], r["seed"])]

            # A run that was being disturbed when this program was stopped is finished first.
            started = any(r["run"] == number for r in own())
            if len(own()) >= wanted and not started:
                return
            self.run(kind, name, seed, number, wanted, own)

    def run(self, kind, name: str, seed: int, number: int, wanted: int, own: Callable) -> None:
        """One run to its end, and what is wrong with it."""
        want = self.undisturbed(name, seed)
        workdir = self.folder / kind / f"{name}-{seed}-{number}"
        problems: list[str] = []
        disturb = kill if kind == "kills" else interrupt
        for life in count():
            chance = random.Random(f"{self.options.random} {kind} {name} {seed} {len(own())}")
            workers = 2 * (kind == "signals" and len(own()) % 2)
            process = Life(name, seed, workdir, self.environment, workers, self.options.processes)
            earlier = [r for r in own() if r["run"] == number][-1:]
            found = disturb(process, chance) if len(own()) < wanted else {}
            status = process.wait()
            problems += found.pop("problems", [])
            if earlier and earlier[0]["resumed"] is None and "compiled in" in process.text():
                earlier[0]["resumed"] = process.start()
                earlier[0]["lost"] = max(earlier[0]["reached"] - process.start(), 0)
                allowed = 2 * SAVED_EVERY if kind == "kills" else 0
                if earlier[0]["lost"] > allowed:
                    problems.append(f"{earlier[0]}: {allowed} steps may be lost")
            elif earlier and earlier[0]["resumed"] is None and status == 0:
                earlier[0]["resumed"], earlier[0]["lost"] = STEPS, 0  # it was done
            if found:
                row = {"config": name, "seed": seed, "run": number, **found, "resumed": None}
                if earlier and earlier[0]["resumed"] is None:  # this one never got going
                    row["reached"] = max(row["reached"], earlier[0]["reached"])
                    earlier[0]["resumed"], earlier[0]["lost"] = "killed before it went on", 0
                self.results[kind].append(row)
                self.write()
                self.tell(kind, row)
            if status == 0:
                break
            if not found:
                tail = process.text()[-2000:]
                problems.append(f"life {life} ended with {status}: {tail}")
                break
        if not problems:
            got = outcome(workdir)
            if kind == "signals":  # each leaves a checkpoint where it came
                got["checkpoints"] = want["checkpoints"]
            problems += differences(want, got)
            left = [p.name for p in (workdir / "checkpoints").iterdir() if not p.name.isdigit()]
            if left:
                problems.append(f"left behind: {left}")
        kept = workdir.exists() and bool(problems)
        self.results["runs"].append(
            {"kind": kind, "config": name, "seed": seed, "run": number, "problems": problems}
        )
        self.write()
        for problem in problems:
            print(f"BROKEN {kind} {name} seed {seed} run {number}: {problem}", flush=True)
        if not kept:
            shutil.rmtree(workdir)

    @cache  # noqa: B019
    def undisturbed(self, name: str, seed: int) -> dict[str, Any]:
        """The outcome of the run that nobody disturbs."""
        workdir = self.folder / "undisturbed" / f"{name}-{seed}"
        done = self.folder / "undisturbed" / f"{name}-{seed}.json"
        if not done.exists():
            shutil.rmtree(workdir, ignore_errors=True)
            several = {"processes": self.options.processes}
            process = Life(name, seed, workdir, self.environment, **several)
            if process.wait():
                raise SystemExit(f"the undisturbed run failed:\n{process.text()}")
            done.write_text(json.dumps(outcome(workdir)))
        return json.loads(done.read_text())

    def write(self) -> None:
        unfinished = self.file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(unfinished, self.file)

    def tell(self, kind: str, row: dict[str, Any]) -> None:
        done, wanted = self.done(), self.options.kills + self.options.terms
        each = (time.monotonic() - self.began) / max(done - self.before, 1)
        left = max(wanted - done, 0) * each
        print(
            f"{done}/{wanted} | {each:.1f} s each | ETA {left / 60:.0f} min | {kind[:-1]} of "
            f"{row['config']} seed {row['seed']} run {row['run']}, {row['aim']}, at step "
            f"{row['reached']}{', in a save' * row.get('in_save', False)}",
            flush=True,
        )


def kill(life: Life, chance: random.Random) -> dict[str, Any]:
    """SIGKILL at a moment by chance; {} if the run was done before."""
    aim = chance.choices(list(AIMS), list(AIMS.values()))[0]
    if aim == "anywhere":
        delay = chance.uniform(0, 12)
    elif aim == "save":
        life.until_saves(chance.randint(1, 3))
        delay = chance.uniform(0, 0.06)
    elif aim == "evaluation":
        life.until_evaluation()
        delay = chance.uniform(0, 0.2)
    else:
        life.until(life.running)
        delay = chance.uniform(0, 3)
    try:
        life.process.wait(delay)
    except subprocess.TimeoutExpired:
        family = descendants(life.process.pid)
        life.process.kill()
        life.process.wait()
        cut = bool(life.unfinished() - life.seen)
        problems = orphans(family)
        return {"aim": aim, "reached": life.reached(), "in_save": cut, "problems": problems}
    return {}


def interrupt(life: Life, chance: random.Random) -> dict[str, Any]:
    """SIGTERM or SIGINT, to the process or its whole group, once or twice; {} if it was done."""
    number = chance.choice((signal.SIGTERM, signal.SIGINT))
    aim = chance.choice(("step", "evaluation", "save", "compilation"))
    group, twice = chance.random() < 0.5, chance.random() < 0.2
    twice &= life.processes == 1  # else the others are ended by the runtime, which takes longer
    chosen = life.all if group else [chance.choice(life.all)]
    if aim == "compilation":
        life.until(lambda: "compiling" in life.text())
        time.sleep(chance.uniform(0, 0.5))
    elif aim == "save":
        life.until_saves(chance.randint(1, 3))
        time.sleep(chance.uniform(0, 0.03))
    elif aim == "evaluation":
        life.until_evaluation()
        time.sleep(chance.uniform(0, 0.1))
    else:
        life.until(life.running)
        time.sleep(chance.uniform(0, 2))
    if life.process.poll() is not None:
        return {}
    family = life.family()

    def send() -> None:
        for process in chosen:
            if process.poll() is None:
                (os.killpg if group else os.kill)(process.pid, number)

    send()
    began = time.monotonic()
    if twice:
        try:
            life.process.wait(chance.uniform(0, 0.05))
        except subprocess.TimeoutExpired:
            send()
            began = time.monotonic()
    status = life.wait()
    seconds = time.monotonic() - began
    found = {"aim": aim, "signal": number.name, "group": group, "twice": twice}
    found |= {"workers": life.workers, "status": status, "seconds": round(seconds, 2)}
    found |= {"reached": life.start() if twice else life.reached()}
    problems = orphans(family)
    if seconds > (AT_ONCE if twice else ON_TIME):
        problems.append(f"{found}: left after {seconds:.1f} s")
    # A second signal is the system's own: the process is ended by it, which a shell shows as 143.
    allowed = {0, 128 + number} | ({-number} if twice else set())
    allowed |= {128 + signal.SIGTERM} if life.processes > 1 else set()
    if status not in allowed:
        problems.append(f"{found}: exit status {status}")
    # One that was told by the others stops as if by SIGTERM.
    for process in life.all[1:]:
        if process.returncode not in (0, 128 + number, 128 + signal.SIGTERM):
            problems.append(f"{found}: exit status {process.returncode} of another process")
    if status == 0:  # it came after the last step
        return {"problems": problems} if problems else {}
    return found | {"problems": problems}


def orphans(family: list[int], patience: float = 5.0) -> list[str]:
    """What is wrong with the processes of a run that ended: none may outlive it for long."""
    end = time.monotonic() + patience
    while any(map(alive, family)) and time.monotonic() < end:
        time.sleep(0.01)
    left = [number for number in family if alive(number)]
    return [f"processes {left} stayed behind"] * bool(left)


def differences(want: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """What is not the same, one sentence each."""
    found = []
    for part in want["state"]:
        if want["state"][part] != got["state"].get(part):
            found.append(f"{part} differs: {got['state'].get(part)}, not {want['state'][part]}")
    for what in ("rows", "curves", "checkpoints", "best", "pictures"):
        one, other = want[what], got[what]
        if what == "rows":
            one, other = one.splitlines(), other.splitlines()
        elif what == "curves":
            one, other = ([tuple(x) for x in side] for side in (one, other))
        if one != other:
            missing = [x for x in one if x not in other][:2]
            added = [x for x in other if x not in one][:2]
            found.append(
                f"{what}: {len(other)}, not {len(one)}; missing {missing}, instead {added}"
            )
    return found


def summary(results: dict[str, Any]) -> str:
    """The figures, as docs/reliability.md has them."""
    lines = []
    broken = [run for run in results["runs"] if run["problems"]]
    if kills := results["kills"]:
        cut = sum(row["in_save"] for row in kills)
        lost = [row["lost"] for row in kills if isinstance(row.get("lost"), int)]
        seeds = {row["seed"] for row in kills}
        configs = sorted({row["config"] for row in kills})
        lines.append(
            f"{len(kills)} kills, {cut} ({100 * cut / len(kills):.0f} %) of them cut a save, over "
            f"{len(seeds)} seeds of {', '.join(configs)}: at most {max(lost, default=0)} steps "
            f"repeated, {sum(lost) / max(len(lost), 1):.1f} on average, with a checkpoint every "
            f"{SAVED_EVERY}"
        )
    if signals := results["signals"]:
        once = [row for row in signals if not row["twice"]]
        lost = [row["lost"] for row in once if isinstance(row.get("lost"), int)]
        lines.append(
            f"{len(signals)} signals ({len(signals) - len(once)} of them twice): at most "
            f"{max(lost, default=0)} steps lost, gone after at most "
            f"{max((row['seconds'] for row in once), default=0):.1f} s, with a second one "
            f"{max((row['seconds'] for row in signals if row['twice']), default=0):.2f} s"
        )
    lines.append(
        f"{len(results['runs'])} runs ended, {len(results['runs']) - len(broken)} of them exactly "
        f"as undisturbed ones; {results['machine']}, commit {results['commit']}"
    )
    return "\n".join(lines)


def machine() -> str:
    return f"{os.cpu_count()} {platform.machine()} cores, Python {platform.python_version()}"


def commit() -> str:
    argv = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="over all configs and seeds")
    parser.add_argument("--terms", type=int, default=0, help="SIGTERM and SIGINT, the same")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--configs", default="vit,cvt,swin", help="files of configs, with a tiny")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1, help="of a run")
    parser.add_argument("--random", type=int, default=0, help="seed of the moments")
    parser.add_argument("--out", default="chaos", help="folder of runs and results")
    options = parser.parse_args(argv)
    if options.kills and options.processes > 1:
        parser.error("--kills of one process of several: see tests/test_processes.py; --kills=0")
    return options


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    return Chaos(parse(sys.argv[1:] if argv is None else argv)).go()


if __name__ == "__main__":
    sys.exit(main())
