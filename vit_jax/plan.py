"""What a pod would do, seen from a laptop: python -m vit_jax.plan --topology=v5e:16x16 ..."""

import argparse
import copy
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vit_jax import command
from vit_jax import main as program
from vit_jax.chips import CHIPS, Chip
from vit_jax.errors import ConfigError, DataError, OutOfMemoryError, nearest
from vit_jax.standin import splits_of

USAGE = """Compiles the real training step of a config for a machine that is not there, and says
what each chip will hold, compute and send, how fast a step can be at best, and whether it fits.

  python -m vit_jax.plan --config=configs/vit.py:imagenet --topology=v5e:16x16
  python -m vit_jax.plan --config=configs/vit.py:imagenet --topology=v5e:16x16 --config.mesh.fsdp=16
  python -m vit_jax.plan --config=configs/vit.py --topology=local:8
  python -m vit_jax.plan --config=configs/vit.py:imagenet --topology=h100:8 --json

A topology is a TPU slice (v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:8x8: the vendor's own names), for
which libtpu compiles without any TPU (pip install -e ".[tpu]"); local:N, N simulated devices of
this machine's processor; or a100:N, h100:N, h200:N, one host of GPUs: N simulated devices as well,
judged by the figures of that chip.

memory    What one chip holds, and the most of it at a time. "temporaries" are activations,
          gradients and what the compiler needs besides, by its own account.
compute   FLOPs by the rule of `vit_jax.cost`, 3 x forward a step, and those of the compiled
          program, loops counted as often as they turn. Much more than the former means that
          something is computed twice (remat), on several chips at once, or by the optimizer (muon).
messages  What each chip sends in a step, by kind of collective, in the fewest bytes possible.
time      The longest of FLOPs / peak, memory traffic / bandwidth and messages / links, with the
          vendor's figures (vit_jax/chips.py). It is a BOUND: no measurement, and no step is faster;
          data, evaluations and checkpoints come on top.
verdict   fits, or the first change (accumulate, remat, fsdp, batch_size) with which it does, tried
          for --seconds=300 and then told by arithmetic. Exit status 6 if it does not fit.

The data is not read: blank pictures stand in for it, as many as the known datasets have, else
--examples and --classes say how many.
"""
EXAMPLES = "v5e:16x16, v5p:8x8x8, v6e:8x8, v4:4x4x4, h100:8 or local:8"
SHARE = 0.95  # of a chip's memory that a step may fill: the runtime and its buffers want some


@dataclass(frozen=True)
class Topology:
    """A machine to plan for.

    Attributes:
      name: as it was asked for.
      chip: whose figures judge it; None for simulated devices.
      count: how many chips.
    """

    name: str
    chip: Chip | None
    count: int

    @property
    def simulated(self) -> bool:
        """Whether processor threads stand in for the chips."""
        return self.chip is None or not self.chip.tpu


def parse_topology(text: str) -> Topology:
    """`v5e:16x16` -> chip and count; ConfigError, in one sentence with examples, if it is none."""
    name, _, shape = text.lower().partition(":")
    if name not in CHIPS and name != "local":
        hint = nearest(name, [*CHIPS, "local"])
        raise ConfigError(
            f"topology {text!r}: there is no chip {name!r}.{hint} Write one such as {EXAMPLES}"
        )
    tpu = name in CHIPS and CHIPS[name].tpu
    wanted = r"\d+(x\d+){1,2}" if tpu else r"\d+"
    if not re.fullmatch(wanted, shape) or 0 in (sizes := [int(n) for n in shape.split("x")]):
        kind = "sides of the slice, such as 16x16," if tpu else "number of devices, such as 8,"
        raise ConfigError(
            f"topology {text!r}: after {name}: the {kind} was wanted; write one such as {EXAMPLES}"
        )
    return Topology(f"{name}:{shape}", CHIPS.get(name), math.prod(sizes))


def devices_of(topology: Topology) -> list[Any]:
    """Devices to compile for, which need not exist.

    Raises:
      ConfigError: if the vendor has no such slice, libtpu is missing, or JAX has started already
        with fewer simulated devices.
    """
    if topology.simulated:
        flags = os.environ.get("XLA_FLAGS", "").split()
        flag = "--xla_force_host_platform_device_count"
        if "jax" not in sys.modules:  # it reads them when it starts
            flags = [f for f in flags if not f.startswith(flag)] + [f"{flag}={topology.count}"]
            os.environ["XLA_FLAGS"] = " ".join(flags)
            os.environ["JAX_PLATFORMS"] = "cpu"
        import jax

        devices = jax.devices("cpu")
        if len(devices) < topology.count:
            raise ConfigError(
                f"--topology={topology.name}: JAX runs already, with {len(devices)} simulated "
                f"devices; set XLA_FLAGS={flag}={topology.count} before it starts"
            )
        return devices[: topology.count]
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f'--topology={topology.name} needs the package libtpu: pip install -e ".[tpu]"; '
            f"without it --topology=local:{min(topology.count, 8)} simulates devices"
        )
    # What libtpu would otherwise ask the machine that it believes to run on, and its chatter.
    silence = {"TPU_SKIP_MDS_QUERY": "1", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}
    host = {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}
    kind = {"TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1"}
    several = {"TPU_HOST_BOUNDS": "1,1,1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, value in {**silence, **host, **kind, **several, "JAX_PLATFORMS": "cpu"}.items():
        os.environ.setdefault(name, value)
    import jax
    from jax.experimental import topologies

    how: dict[str, Any] = {}
    if topology.chip.name == "v4":
        how["chip_config_name"] = "megacore"  # both cores of a chip as one device, as on a TPU VM
    if topology.count == 1:
        how["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **how)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].partition(": ")[2]
        raise ConfigError(
            f"--topology={topology.name}: there is no such slice ({reason}); write one such as "
            f"{EXAMPLES}"
        ) from error
    return list(described.devices)


def study(
    config: Mapping[str, Any],
    devices: Sequence[Any],
    splits: Sequence[Any] | None,
    chip: Chip | None,
) -> dict[str, Any]:
    """Compiles the training step of a config for these devices; all numbers are of one chip.

    Returns:
      Plain data, documented by what `lines` says of it; `time` is {} without a chip, and `compute`
      and `messages` are {} where the compiler refused a step too large for the memory.

    Raises:
      ConfigError, DataError: as of `run.set_up`.
    """
    import jax

    from vit_jax import cost, hlo
    from vit_jax.run import set_up

    config = copy.deepcopy(dict(config))
    run = set_up(config, devices=devices, splits=splits)
    state = run.abstract_state
    memory = {
        "parameters": _held(state.params) + _held(state.model_state),
        "optimizer": _held(state.opt_state),
        "running_mean": _held(state.ema),
        "batch": _held(run.abstract_batch),
    }
    began = time.monotonic()
    found: dict[str, Any] = {
        "chips": run.mesh.size,
        "mesh": dict(run.mesh.shape),
        "batch_size": config["batch_size"],
        "examples_per_chip": config["batch_size"] / run.mesh.size,
        "parameters": cost.parameters(state.params),
        "steps": run.total_steps,
        "steps_per_epoch": run.steps_per_epoch,
        "remarks": list(run.remarks),
    }
    share = 3 * run.flops * config["batch_size"] / run.mesh.size
    compute = {"forward_per_image": run.flops, "model_flops": share, "rule": cost.RULE}
    try:
        compiled = run.compile_train_step()
    except (OutOfMemoryError, jax.errors.JaxRuntimeError) as error:
        needed = _refused(str(error), sum(memory.values()))
        if needed is None:
            raise
        memory |= {"temporaries": needed - sum(memory.values()), "program": 0, "peak": needed}
        found |= {"compile_seconds": time.monotonic() - began, "memory": memory}
        found |= {"compute": compute, "messages": {}, "time": {}}
        return found | _judged(memory, chip)
    found["compile_seconds"] = time.monotonic() - began
    account = compiled.memory_analysis()
    memory["temporaries"] = account.temp_size_in_bytes
    memory["program"] = account.generated_code_size_in_bytes
    memory["peak"] = cost.taken(compiled) + memory["program"]
    work = hlo.read(compiled.as_text())
    analysis = compiled.cost_analysis() or {}
    compute |= {"compiled_flops": work.flops, "xla_flops": analysis.get("flops", 0.0)}
    compute |= {"memory_bytes": work.memory_bytes, "unknown_loops": work.unknown_loops}
    found |= {"memory": memory, "compute": compute}
    found["messages"] = {
        kind: {"count": m.count, "bytes": m.bytes} for kind, m in sorted(work.messages.items())
    }
    found["time"] = _bound(found, chip) if chip else {}
    return found | _judged(memory, chip)


def _held(tree: Any) -> int:
    """Bytes of a tree's arrays on one chip."""
    import jax

    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _refused(message: str, held: float) -> float | None:
    """Bytes that a step would take which a TPU's compiler refuses; None if it says otherwise."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    number = r"([\d.]+)([KMGT]?)"
    extra = re.search(rf"required for HLO temporaries \({number}\)", message)
    found = extra or re.search(rf"Used {number} of {number} hbm", message)
    if found is None:
        return None
    size = float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")
    return size + held if extra else size


def _judged(memory: Mapping[str, float], chip: Chip | None) -> dict[str, Any]:
    if chip is None:
        return {"limit": None, "fits": None}
    return {"limit": chip.memory * SHARE, "fits": memory["peak"] <= chip.memory * SHARE}


def _bound(found: Mapping[str, Any], chip: Chip) -> dict[str, Any]:
    """The least time of a step, by each of the three roofs: Williams et al. 2009, "Roofline"."""
    sent = sum(m["bytes"] for m in found["messages"].values())
    roofs = {
        "compute": found["compute"]["compiled_flops"] / chip.flops,
        "memory": found["compute"]["memory_bytes"] / chip.memory_bandwidth,
        "messages": sent / chip.link_bandwidth,
    }
    bound = max(roofs, key=roofs.get)
    step = roofs[bound]
    return {
        "roofs": roofs,
        "bound_by": bound,
        "step": step,
        "images_per_second": found["batch_size"] / step,
        "mfu": found["compute"]["model_flops"] / step / chip.flops,
        "hours": step * found["steps"] / 3600,
    }


def changes(config: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What could make a step smaller, the mildest first, as {key: value} of the config.

    Half the examples of a chip at a time (`accumulate`: the same update), activations made again
    (`remat`), parameters and optimizer over more chips (`fsdp`), both, and last a smaller batch.
    """
    per_chip = found["batch_size"] // (found["mesh"]["data"] * found["mesh"]["fsdp"])
    done = config["accumulate"]
    parts = [k for k in (2, 4, 8, 16) if (per_chip // done) % k == 0]
    backbone = config["model"].get("backbone", {})
    remat = {"model.backbone.remat": True} if backbone.get("remat") is False else {}
    spread = found["mesh"]["data"] * found["mesh"]["fsdp"]
    wider = [
        {"mesh.data": -1, "mesh.fsdp": n}
        for n in (2, 4, 8, 16, 32, 64, 128, 256, 512)
        if n > found["mesh"]["fsdp"] and spread % n == 0
    ]
    for k in parts[:1]:
        yield {"accumulate": done * k}
    if remat:
        yield remat
    yield from wider
    for k in parts[1:]:
        yield {"accumulate": done * k}
    for sharding in wider[-1:]:
        yield {**remat, **sharding}
        for k in parts:
            yield {**remat, **sharding, "accumulate": done * k}
    for part in (2, 4, 8, 16):
        if per_chip % part == 0 and per_chip // part % done == 0:
            yield {"batch_size": found["batch_size"] // part}


def estimate(found: Mapping[str, Any], change: Mapping[str, Any], done: int = 1) -> float | None:
    """Bytes of a chip after a change, by arithmetic; None for `remat`, which has to be compiled.

    What is kept for each example falls with the examples at a time, parameters, optimizer and
    gradients with fsdp; accumulated gradients are one more copy.
    """
    if "model.backbone.remat" in change:
        return None
    memory = found["memory"]
    state = memory["parameters"] + memory["optimizer"] + memory["running_mean"]
    gradients = min(memory["parameters"], memory["temporaries"])
    kept = memory["temporaries"] - gradients + memory["batch"]
    fewer = found["mesh"]["fsdp"] / change.get("mesh.fsdp", found["mesh"]["fsdp"])
    parts = change.get("accumulate", done) / done
    parts *= found["batch_size"] / change.get("batch_size", found["batch_size"])
    extra = gradients if "accumulate" in change and done == 1 else 0
    return (state + gradients + extra) * fewer + kept / parts + memory["program"]


def first_that_fits(
    config: Mapping[str, Any],
    found: Mapping[str, Any],
    compile_with: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """The first of `changes` with which a step fits, compiled for as long as `seconds` last.

    Args:
      config: the one that does not fit.
      found: its `study`.
      compile_with: the study of another config.
      seconds: for compiling; after that, arithmetic decides.

    Returns:
      `change`, its `peak`, whether it was `compiled`, and all that was `tried`; change {} if
      nothing fits.
    """
    tried, left = [], seconds
    for change in changes(config, found):
        guess = estimate(found, change, config["accumulate"])
        if guess is not None and guess > found["limit"]:
            tried.append({"change": change, "peak": guess, "compiled": False})
            continue
        compiles = found["compile_seconds"] <= left
        if compiles:
            began = time.monotonic()
            try:
                peak = compile_with(changed(config, change))["memory"]["peak"]
            except (ConfigError, DataError):
                continue  # a batch or an axis that does not divide
            left -= time.monotonic() - began
        elif guess is None:
            continue
        else:
            peak = guess
        tried.append({"change": change, "peak": peak, "compiled": compiles})
        if peak <= found["limit"]:
            return {**tried[-1], "tried": tried}
    return {"change": {}, "peak": None, "compiled": False, "tried": tried}


def changed(config: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """The config with {"mesh.fsdp": 16, ...} set."""
    config = copy.deepcopy(dict(config))
    for key, value in change.items():
        *parts, last = key.split(".")
        place = config
        for part in parts:
            place = place[part]
        place[last] = value
    return config


def lines(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of each line that a person reads."""
    from vit_jax.cost import human

    memory, compute, chip = found["memory"], found["compute"], found["chip"]
    shown = ", ".join(f"{k}={v}" for k, v in found["mesh"].items() if v > 1) or "one device"
    rows = [
        ("model", f"{found['model']}, {found['parameters']:,} parameters, {found['dtype']}"),
        ("machine", f"{found['topology']}: {found['chips']} chips, mesh {shown}"),
        (
            "batch",
            f"{found['batch_size']:,} pictures, {found['examples_per_chip']:g} for each chip; "
            f"{found['steps']:,} steps, {found['steps_per_epoch']:.1f} an epoch",
        ),
    ]
    parts = [
        f"{name.replace('_', ' ')} {human(memory[name])}B"
        for name in ("parameters", "optimizer", "running_mean", "batch", "temporaries", "program")
        if memory[name]
    ]
    peak = f"peak {human(memory['peak'])}B a chip"
    if chip:
        peak += f", {memory['peak'] / chip['memory']:.0%} of {chip['name']}'s "
        peak += f"{human(chip['memory'])}B"
    rows.append(("memory", f"{peak}: {', '.join(parts)}"))
    text = (
        f"{human(compute['forward_per_image'])}FLOPs forward an image, "
        f"{human(compute['model_flops'])}FLOPs a chip and step = 3 x forward ({compute['rule']})"
    )
    if "compiled_flops" in compute:
        ratio = compute["compiled_flops"] / max(compute["model_flops"], 1)
        text += (
            f"; as compiled {human(compute['compiled_flops'])}FLOPs, {ratio:.2f} x that; by XLA's "
            f"own count, each loop once, {human(compute['xla_flops'])}FLOPs"
        )
        if compute["unknown_loops"]:
            text += f"; {compute['unknown_loops']} loops of unknown length, counted once"
    rows.append(("compute", text))
    if "memory_bytes" in compute:
        rows.append(("traffic", f"{human(compute['memory_bytes'])}B of memory a chip and step"))
        sent = [
            f"{kind} {human(m['bytes'])}B in {m['count']}" for kind, m in found["messages"].items()
        ]
        rows.append(("messages", f"each chip sends {', '.join(sent)}" if sent else "none"))
    rows += _speed(found)
    rows += [("remark", text) for text in found["remarks"]]
    return [*rows, ("verdict", verdict(found))]


def _speed(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    estimated = found["time"]
    if not estimated:
        return []
    roofs = ", ".join(f"{k} {_seconds(v)}" for k, v in estimated["roofs"].items())
    return [
        (
            "time",
            f"a step takes at least {_seconds(estimated['step'])} ({roofs}): a bound by published "
            "figures, not a measurement",
        ),
        (
            "speed",
            f"at most {estimated['images_per_second']:,.0f} images/s, MFU {estimated['mfu']:.0%}; "
            f"the schedule of {found['steps']:,} steps takes at least "
            f"{_hours(estimated['hours'])}",
        ),
    ]


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.3g} ms"


def _hours(value: float) -> str:
    return f"{value:.1f} hours" if value >= 1 else f"{value * 60:.1f} minutes"


def verdict(found: Mapping[str, Any]) -> str:
    """Fits, or what to change, in one sentence."""
    from vit_jax.cost import human

    if found["fits"] is None:
        return "no chip to judge it by: --topology=h100:8 takes that chip's figures"
    room = f"{human(found['limit'])}B ({SHARE:.0%} of the chip's memory)"
    if found["fits"]:
        slowest = {
            "compute": "its products set the pace",
            "memory": "memory traffic sets the pace: more pictures a chip would use it better",
            "messages": "messages set the pace: more pictures a chip, or less fsdp",
        }
        return f"fits in {room}; {slowest[found['time']['bound_by']]}"
    text = f"does NOT fit: {human(found['memory']['peak'])}B of {room}"
    better = found["fitting"]
    if not better["change"]:
        return f"{text}, and no accumulate, remat, fsdp or batch_size that was tried does"
    flags = " ".join(f"--config.{k}={v}" for k, v in better["change"].items())
    how = "compiled" if better["compiled"] else "by arithmetic, not compiled"
    return f"{text}; it does with {flags}: {human(better['peak'])}B ({how})"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ConfigError(f"{message}; see --help")


def parse(argv: list[str]) -> tuple[dict[str, Any], Topology, argparse.Namespace]:
    """Command line -> config, machine, and the other options; ConfigError for a wrong one."""
    parser = _Parser(prog="python -m vit_jax.plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--topology")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--examples", type=int)
    parser.add_argument("--classes", type=int)
    parser.add_argument("--seconds", type=float, default=300.0)
    options, rest = parser.parse_known_args(argv)
    if options.topology is None:
        raise ConfigError(f"no --topology given; write one such as {EXAMPLES}, or --help")
    for name in ("examples", "classes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}={value} must be at least 1")
    config, _, _, _ = program.parse(rest)
    return config, parse_topology(options.topology), options


def plan(
    config: Mapping[str, Any],
    topology: Topology,
    *,
    examples: int | None = None,
    classes: int | None = None,
    seconds: float = 300.0,
) -> dict[str, Any]:
    """All that is known of a config on a machine, before it is paid for; see `USAGE`.

    Args:
      config: as `main.parse` gives it.
      topology: of `parse_topology`.
      examples: in the training split, instead of the known number.
      classes: likewise.
      seconds: for compiling what might fit, where the config does not.

    Raises:
      ConfigError, DataError: if machine, config or data is wrong.
    """
    splits, remark = splits_of(config, examples, classes)
    devices, chip = devices_of(topology), topology.chip
    began = time.monotonic()
    found = study(config, devices, splits, chip)
    found["topology"] = topology.name
    found["chip"] = {**vars(chip)} if chip else None
    backbone = config["model"].get("backbone", {}).get("target", "")
    found["model"] = config["model"]["target"] + (f" on {backbone}" if backbone else "")
    found["dtype"] = config["dtype"]
    if remark:
        found["remarks"].append(remark)
    if topology.simulated:
        found["remarks"].append(
            "compiled for simulated devices of a processor: temporaries and memory traffic are "
            "that compiler's, another one's will differ"
        )
    if found["fits"] is False:

        def again(other: Mapping[str, Any]) -> dict[str, Any]:
            return study(other, devices, splits, chip)

        found["fitting"] = first_that_fits(config, found, again, seconds)
    found["seconds"] = time.monotonic() - began
    return found


def main(argv: list[str] | None = None) -> int:
    """Runs one command line; returns the exit status: 0 fits, 2 wrong, 3 data, 6 does not fit."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"--help", "-h"} & set(argv):
        print(USAGE)
        return 0 if argv else 2

    def body() -> int:
        config, topology, options = parse(argv)
        command.quiet()
        limits = {"examples": options.examples, "classes": options.classes}
        found = plan(config, topology, **limits, seconds=options.seconds)
        if options.json:
            print(json.dumps(found, indent=2))
        else:
            for name, text in lines(found):
                print(f"{name:9} {text}")
            print(
                f"{'took':9} {found['seconds']:.0f} s here, of which compiling "
                f"{found['compile_seconds']:.0f} s"
            )
        return OutOfMemoryError.exit_status if found["fits"] is False else 0

    return command.guard(body)


if __name__ == "__main__":
    sys.exit(main())
