"""How fast models run here, alone and beside their peers: python -m vit_jax.benchmark MODEL..."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from vit_jax import command, programs
from vit_jax import main as program
from vit_jax.errors import ConfigError, DataError, OutOfMemoryError
from vit_jax.worker import Worker, WorkerError

USAGE = """Measures models and configs on this machine: images/s, milliseconds a step, time to
compile, memory, and the share of what the machine can do.

  python -m vit_jax.benchmark vit_s16 swin_t cvt_13
  python -m vit_jax.benchmark vit_s16 --work=inference --batch_size=1,8,32
  python -m vit_jax.benchmark vit_s16 swin_t cvt_13 resnet_50 --peer=transformers
  python -m vit_jax.benchmark vit_b16 --dtype=bfloat16 --batch_size=128 --peer=timm
  python -m vit_jax.benchmark --config=configs/cvt.py --work=training,input
  python -m vit_jax.benchmark --config=configs/vit.py:imagenet --work=input --pictures=FOLDER \\
      --peer=timm

MODEL...       names of vit_jax.list_models(), at --image_size=224; or --config with its own sizes,
               data and training step
--work         training, inference, input (a config's pipeline); training,inference if not given
--batch_size   of all of them, or several with commas; halved where memory does not suffice
--dtype        of the computation: float32 or bfloat16
--set          fields of the backbone: --set scan=True --set remat=dots_saveable
--peer         transformers or timm: the same work in PyTorch as well, eager and by torch.compile,
               each in a process of its own, in turns with ours, so that what disturbs one disturbs
               all; --peer_python=PATH is a Python that has it, if this one has not
--modes        of the peer: eager, compiled, or both with a comma
--seconds      each turn lasts, at least one step; --rounds of turns
--turns        a file, the same for several of these commands started at once: their peers compile
               together, and all else is done by one after the other
--pictures     a folder whose pictures stand in for a config's data in "input"
--json         all numbers, for programs

ms a step      the median over all steps, and the quartiles
of machine     FLOPs by the rule of vit_jax.cost (training is 3 x forward), each second, over those
               of a product of two large matrices of the same dtype, measured first
ratio          ours / theirs in images/s: the median over the rounds; above 1 we are faster
memory         what the compiler says it needs, or the device's peak; of a peer on a CPU the whole
               process's peak
input          one batch after the other in a single thread, a core's worth; a config's mixing of
               pictures is left out
"""
Answer = dict[str, Any] | WorkerError
WORKS = ("training", "inference", "input")
PEERS, MODES = ("transformers", "timm"), ("eager", "compiled")
DTYPES = ("float32", "bfloat16")
REST = 0.3  # seconds before a turn, in which the other's threads stop waiting busily


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ConfigError(f"{message}; see --help")


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """Command line -> options and a config, if it names one; ConfigError for a wrong one."""
    parser = _Parser(prog="python -m vit_jax.benchmark", add_help=False, allow_abbrev=False)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--work", default="")
    parser.add_argument("--batch_size", default="")
    parser.add_argument("--image_size", default="224")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--peer", choices=PEERS)
    parser.add_argument("--peer_python", default=sys.executable)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", default="")
    parser.add_argument("--pictures", default="")
    parser.add_argument("--json", action="store_true")
    mine = [a for a in argv if not a.lstrip("-").startswith("config")]
    options = parser.parse_args(mine)
    of_config = [a for a in argv if a not in mine]
    config = program.parse(of_config)[0] if of_config else None
    if bool(config) == bool(options.models):
        raise ConfigError("wanted either names of models or --config; see --help")
    default = ("training", "inference")
    options.work = _words("work", options.work, WORKS) or default
    options.modes = _words("modes", options.modes, MODES)
    if "input" in options.work and not config:
        raise ConfigError("--work=input needs a --config, which says what is read and how")
    if "input" in options.work and options.peer == "transformers":
        raise ConfigError("--work=input is compared with --peer=timm")
    if options.turns and (config or not options.peer):
        raise ConfigError("--turns is for models by their names, beside a --peer")
    if options.pictures and not Path(options.pictures).is_dir():
        raise DataError(f"--pictures={options.pictures}: there is no such folder")
    if "input" in options.work and options.peer and not options.pictures:
        raise ConfigError("--work=input with a peer needs --pictures=FOLDER, which both can read")
    options.batch_size = _numbers("batch_size", options.batch_size)
    size = _numbers("image_size", options.image_size.replace("x", ","))
    options.image_size = size * 2 if len(size) == 1 else size
    if len(options.image_size) != 2:
        raise ConfigError(f"--image_size={options.image_size}: wanted 224 or 224x288")
    if options.rounds < 1 or options.seconds <= 0:
        raise ConfigError("--rounds must be at least 1, and --seconds above 0")
    options.set = dict(_field(text) for text in options.set)
    return options, config


def _words(name: str, text: str, valid: Sequence[str]) -> tuple[str, ...]:
    words = tuple(word for word in text.split(",") if word)
    for word in words:
        if word not in valid:
            raise ConfigError(f"--{name}={word}: wanted some of {', '.join(valid)}")
    return words


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(",") if part)
    except ValueError as error:
        raise ConfigError(f"--{name}={text}: whole numbers were wanted") from error
    if any(number < 1 for number in numbers):
        raise ConfigError(f"--{name}={text}: must be at least 1")
    return numbers


def _field(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: wanted NAME=VALUE")
    try:
        return name, {"True": True, "False": False}.get(value, json.loads(value.lower()))
    except ValueError:
        return name, value


def orders(
    options: argparse.Namespace, config: Mapping[str, Any] | None
) -> Iterator[dict[str, Any]]:
    """Every piece of work that was asked for."""
    common = {"dtype": options.dtype if config is None else config["dtype"]}
    for model in options.models or [""]:
        for work in options.work:
            default = 8 if config is None else config["batch_size"]
            for batch_size in options.batch_size or (default,):
                order = common | {"work": work, "batch_size": batch_size}
                if config is None:
                    size = list(options.image_size)
                    yield order | {"model": model, "fields": options.set, "image_size": size}
                elif work != "input":
                    yield order | {"config": config, "image_size": _side(config)}
                else:
                    alone = {**config["data"], "threads": 0, "workers": 0}
                    train = {**config["train"], "mix": {}}
                    steps = train["transforms"]
                    given = {"config": {**config, "data": alone, "train": train}}
                    yield order | given | {"pictures": options.pictures, "transforms": steps}


def _side(config: Mapping[str, Any]) -> list[int]:
    size = config["image_size"]
    return [size, size] if isinstance(size, int) else list(size)


def measure(
    order: Mapping[str, Any],
    workers: Mapping[str, Worker],
    *,
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
    ready: Mapping[str, Answer] | None = None,
) -> dict[str, Any]:
    """One piece of work by all workers in turns.

    Args:
      order: of `orders`.
      workers: "ours" and peers by their names.
      rounds: how often each has its turn.
      seconds: that a turn lasts.
      say: is told what is going on.
      ready: what workers that are prepared for it have said.

    Returns:
      {"work", "batch_size", ..., "sides": {name: {"times", "images_per_second", "median",
      "quartiles", "compile_seconds", "memory", ...} or {"error"}}, "ratios": {peer: [low, median,
      high] over the rounds}}.

    Raises:
      OutOfMemoryError: if one picture is too many.
      ConfigError, DataError: if our side refuses the order.
    """
    order, sides = dict(order), {}
    while True:
        try:
            sides = _prepare(order, workers, say, ready or {})
            break
        except MemoryError:
            ready = None
            if order["batch_size"] == 1:
                raise OutOfMemoryError(f"{_title(order)}: not even one picture fits") from None
            order["batch_size"] //= 2
            say(f"memory does not suffice; going on with batch_size={order['batch_size']}")
    running = [name for name, side in sides.items() if "error" not in side]
    times: dict[str, list[list[float]]] = {name: [] for name in running}
    for number in range(rounds):
        turn = number % len(running)
        for name in running[turn:] + running[:turn]:
            say(f"round {number + 1} of {rounds}: {name}")
            if len(running) > 1:
                time.sleep(REST)
            try:
                times[name].append(workers[name].ask(do="run", seconds=seconds)["times"])
            except WorkerError as error:
                if name == "ours":
                    raise
                sides[name] = {"error": str(error)}  # as one that could not be prepared
                running.remove(name)
    for name in running:
        sides[name] |= _statistics(times[name], order["batch_size"])
    ratios = {}
    for name in running:
        if name != "ours":
            pairs = zip(times["ours"], times[name], strict=True)
            each = sorted(statistics.median(b) / statistics.median(a) for a, b in pairs)
            ratios[name] = [each[0], statistics.median(each), each[-1]]
    hidden = ("config", "transforms")
    kept = {k: v for k, v in order.items() if k not in hidden}
    return kept | {"sides": sides, "ratios": ratios}


def _prepare(
    order: Mapping[str, Any],
    workers: Mapping[str, Worker],
    say: Callable[[str], None],
    ready: Mapping[str, Answer],
) -> dict[str, dict[str, Any]]:
    """What each side says of the order; MemoryError if it is too much for one of them."""
    sides: dict[str, dict[str, Any]] = {}
    published = None
    for name, worker in workers.items():
        answer = ready.get(name)
        if answer is None:
            say(f"compiling: {name}")
            peers = {k: v for k, v in order.items() if k != "config"} | {"published": published}
            answer = _answer(worker, order if name == "ours" else peers)
        if isinstance(answer, WorkerError):
            if answer.kind == "memory":
                raise MemoryError(str(answer)) from answer
            if name == "ours":
                kind = ConfigError if answer.kind == "wrong" else RuntimeError
                raise kind(str(answer)) from answer
            answer = {"error": str(answer)}
        sides[name] = answer
        published = sides[name].pop("published", published)
    return sides


def _answer(worker: Worker, order: Mapping[str, Any]) -> Answer:
    try:
        return worker.ask(do="prepare", **order)
    except WorkerError as error:
        return error


def _peers_ahead(order: Mapping[str, Any], workers: Mapping[str, Worker]) -> dict[str, Answer]:
    """What the peers say of the order of a model by its name, before our side has been asked."""
    from vit_jax import workload  # and JAX, which this process needs for nothing else

    size, fields = tuple(order["image_size"]), order["fields"]
    module = workload.model_of(order["model"], order["dtype"], size, fields)
    given = {**order, "published": workload.published(module)}
    return {name: _answer(worker, given) for name, worker in workers.items() if name != "ours"}


class _Turns:
    """One file that several benchmarks lock: some work is done together, the rest alone."""

    def __init__(self, path: str):
        self._path = path

    def together(self) -> AbstractContextManager[None]:
        """Beside others that do the same."""
        return self._locked(alone=False)

    def alone(self) -> AbstractContextManager[None]:
        """While none of the others does either."""
        return self._locked(alone=True) if self._path else nullcontext()

    @contextmanager
    def _locked(self, alone: bool) -> Iterator[None]:
        import fcntl  # not on Windows

        with open(self._path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield


def _statistics(times: list[list[float]], batch_size: int) -> dict[str, Any]:
    every = sorted(t for turn in times for t in turn)
    middle = statistics.median(every)
    low, high = every[len(every) // 4], every[min(3 * len(every) // 4, len(every) - 1)]
    return {
        "median": middle,
        "quartiles": [low, high],
        "steps": len(every),
        "images_per_second": batch_size / middle,
        "rounds": [statistics.median(turn) for turn in times],
    }


def _title(order: Mapping[str, Any]) -> str:
    return f"{order.get('model') or 'config'}, {order['work']}, batch {order['batch_size']}"


@contextmanager
def _workers(options: argparse.Namespace) -> Iterator[dict[str, Worker]]:
    here = Path(__file__).parent
    # A GPU's memory is shared by those who take turns.
    ours = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if options.peer else {}
    workers = {"ours": Worker([sys.executable, "-m", "vit_jax.workload"], ours)}
    try:
        if options.peer:
            modes = ("eager",) if options.work == ("input",) else options.modes
            for mode in modes:
                line = [options.peer_python, str(here / "peer.py"), options.peer, mode]
                workers[f"{options.peer} {mode}"] = Worker(line)
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def benchmark(
    options: argparse.Namespace,
    config: Mapping[str, Any] | None,
    say: Callable[[str], None],
    show: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """All that was asked for; each row is shown as soon as it is there."""
    rows: list[dict[str, Any]] = []
    turns, rates, ready = _Turns(options.turns), {}, {}
    with _workers(options) as workers:
        for order in orders(options, config):
            told = f"{_title(order)}: "
            if options.turns:
                with turns.together():
                    say(f"{told}compiling, beside others: {', '.join([*workers][1:])}")
                    ready = _peers_ahead(order, workers)
            with turns.alone():
                if not rates and options.work != ("input",):
                    say(f"measuring the machine: products of large matrices in {order['dtype']}")
                    of = {"do": "rate", "dtype": order["dtype"]}
                    rates = {name: worker.ask(**of)["flops"] for name, worker in workers.items()}
                row = measure(
                    order,
                    workers,
                    rounds=options.rounds,
                    seconds=options.seconds,
                    say=lambda text, told=told: say(told + text),
                    ready=ready,
                )
            _add_share(row, rates)
            rows.append(row)
            show(row)
    machine = {"python": platform.python_version(), "cores": os.cpu_count()}
    machine |= {"processor": processor(), "system": platform.machine()}
    machine |= {"commit": _commit(), "flops": rates}
    return {"machine": machine, "rows": rows}


def _add_share(row: dict[str, Any], rates: Mapping[str, float]) -> None:
    """The share of the machine's rate, for each side, by our count of FLOPs."""
    flops = row["sides"]["ours"].get("flops")
    if not flops or not rates:
        return
    flops *= 3 if row["work"] == "training" else 1
    best = max(rates.values())
    for side in row["sides"].values():
        if "images_per_second" in side:
            side["of_machine"] = flops * side["images_per_second"] / best


def processor() -> str:
    """The processor's name as the system tells it: a library may suit one and not another."""
    name = programs.of_processor("model name").partition(":")[2].strip()
    return name or platform.processor() or platform.machine()


def _commit() -> str:
    """Of the source, if it lies in a repository."""
    line = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(line, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


COLUMNS = {  # and their widths
    "": 34,
    "side": 23,
    "images/s": 10,
    "ms a step": 11,
    "quartiles": 18,
    "compile": 9,
    "memory": 10,
    "of machine": 12,
    "ratio": 18,
}


def table(row: Mapping[str, Any]) -> list[str]:
    """Lines of one row, for people."""
    from vit_jax.cost import human

    lines = []
    for number, (name, side) in enumerate(row["sides"].items()):
        title = _title(row) if number == 0 else ""
        if "error" in side:
            lines.append(_line((title, name, side["error"])))
            continue
        low, high = (1000 * t for t in side["quartiles"])
        ratio = row["ratios"].get(name)
        cells = (
            title,
            name,
            f"{side['images_per_second']:.4g}",
            f"{1000 * side['median']:.4g}",
            f"{low:.4g} - {high:.4g}",
            f"{side['compile_seconds']:.1f} s" if "compile_seconds" in side else "",
            f"{human(side['memory'])}B" if "memory" in side else "",
            f"{side['of_machine']:.0%}" if "of_machine" in side else "",
            f"{ratio[1]:.2f} ({ratio[0]:.2f}-{ratio[2]:.2f})" if ratio else "",
        )
        lines.append(_line(cells))
    flops = row["sides"]["ours"].get("flops")
    if flops:
        params = row["sides"]["ours"]["parameters"]
        lines.append(f"  {params:,} parameters, {flops / 1e9:.3g} GFLOPs forward an image")
    return lines


def _line(cells: Sequence[str]) -> str:
    pairs = zip(cells, COLUMNS.values(), strict=False)  # an error's line has few cells
    return "".join(f"{cell:{width}}" for cell, width in pairs).rstrip()


def main(argv: list[str] | None = None) -> int:
    """Runs one command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"--help", "-h"} & set(argv):
        print(USAGE)
        return 0 if argv else 2

    def body() -> int:
        options, config = parse(argv)
        began = time.monotonic()

        def say(text: str) -> None:
            print(f"[{time.monotonic() - began:5.0f} s] {text}", file=sys.stderr, flush=True)

        def show(row: dict[str, Any]) -> None:
            if not options.json:
                print("\n".join(table(row)), flush=True)

        if not options.json:
            print(_line(tuple(COLUMNS)))
        found = benchmark(options, config, say, show)
        if options.json:
            print(json.dumps(found, indent=2))
            return 0
        machine = found["machine"]
        for name, rate in machine["flops"].items():
            print(f"large matrices are multiplied at {rate / 1e9:,.0f} GFLOP/s ({name})")
        print(f"on {machine['cores']} cores, {machine['processor']}")
        return 0

    return command.guard(body)


if __name__ == "__main__":
    sys.exit(main())
