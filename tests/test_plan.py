"""The plan of a run: HLO texts with numbers worked out by hand, a tiny ViT on two devices."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax import hlo, main, plan, standin
from vit_jax.chips import CHIPS
from vit_jax.errors import ConfigError
from vit_jax.mesh import make_mesh

LIBTPU = importlib.util.find_spec("libtpu") is not None
TINY = ["--config=configs/vit.py:tiny", "--config.optimizer.name=adamw"]


def program(body, *, chips=8, before=""):
    """A module whose entry has these lines."""
    entry = f"ENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}\n"
    return f"HloModule m, num_partitions={chips}\n\n{before}\n{entry}"


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("all-reduce", 2 * 3 / 4),
        ("all-gather", 3),
        ("reduce-scatter", 3 / 4),
        ("all-to-all", 3 / 4),
    ],
)
@pytest.mark.parametrize("suffix", ["", "-start"])
def test_a_collective_costs_what_a_ring_of_four_needs(kind, share, suffix):
    text = program(
        "  %p = bf16[10,7]{1,0} parameter(0)\n"
        f"  ROOT %c = bf16[40,7]{{1,0}} {kind}{suffix}(%p), channel_id=1, "
        "replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}"
    )
    message = hlo.read(text).messages[kind]
    assert (message.count, message.bytes) == (1, pytest.approx(140 * share))


def test_a_permutation_sends_what_it_is_given():
    text = program(
        "  %p = f32[5]{0} parameter(0)\n"
        "  %s = (f32[5]{0}, f32[5]{0}) collective-permute-start(%p), channel_id=1, "
        "source_target_pairs={{0,1},{1,0}}\n"
        "  ROOT %d = f32[5]{0} collective-permute-done(%s)"
    )
    message = hlo.read(text).messages["collective-permute"]
    assert (message.count, message.bytes) == (1, 20)


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups={}", 8),
        ("replica_groups=[2,4]<=[8], dimensions={0}", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['a'=8] {'a'}, use_global_device_ids=true", 8),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", 2),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", 4),
        ("channel_id=1", 8),
    ],
)
def test_how_many_take_part_is_read_in_every_way_it_is_written(attributes, size):
    assert hlo.group_size(attributes, 8) == size


LOOP = """
%body (t: (s32[], f32[6])) -> (s32[], f32[6]) {
  %t = (s32[], f32[6]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[6]{0} get-tuple-element(%t), index=1
  %g = f32[6]{0} all-reduce(%x), channel_id=3, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %r = (s32[], f32[6]{0}) tuple(%i, %g)
}

%condition (t.1: (s32[], f32[6])) -> pred[] {
  %limit = s32[]{:T(128)} constant(24)
  %t.1 = (s32[], f32[6]{0}) parameter(0)
  %j = s32[] get-tuple-element(%t.1), index=0
  ROOT %lt = pred[] compare(%j, %limit), direction=DIRECTION
}
"""
WHILE = (
    "  %p = (s32[], f32[6]{0}) parameter(0)\n"
    "  ROOT %w = (s32[], f32[6]{0}) while(%p), condition=%condition, body=%body"
)


def test_a_loop_counts_all_its_turns():
    known = ', backend_config={"known_trip_count":{"n":"5"}}'
    up_to = LOOP.replace("DIRECTION", "LT")
    for suffix, turns in ((known, 5), ("", 24)):
        work = hlo.read(program(WHILE + suffix, before=up_to))
        message = work.messages["all-reduce"]
        assert (message.count, work.unknown_loops) == (turns, 0)
        assert message.bytes == pytest.approx(turns * 24 * 2 * 7 / 8)


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    work = hlo.read(program(WHILE, before=LOOP.replace("DIRECTION", "NE")))
    assert (work.messages["all-reduce"].count, work.unknown_loops) == (1, 1)


def test_a_collective_that_is_spread_over_fusions_counts_once():
    part = (
        "%part.N (a: f32[3]) -> f32[24] {\n  %a = f32[3]{0} parameter(0)\n"
        "  ROOT %g = f32[24]{0} all-gather(%a), channel_id=9, replica_groups=[1,8]<=[8]\n}\n"
    )
    body = (
        "  %p = f32[3]{0} parameter(0)\n"
        "  %f = f32[24]{0} fusion(%p), kind=kCustom, calls=%part.1\n"
        "  ROOT %h = f32[24]{0} fusion(%p), kind=kCustom, calls=%part.2"
    )
    work = hlo.read(program(body, before=part.replace("N", "1") + part.replace("N", "2")))
    message = work.messages["all-gather"]
    assert (message.count, message.bytes) == (1, 12 * 7)


def test_a_sum_of_which_each_chip_keeps_a_part_is_a_reduce_scatter():
    fused = (
        "%all-reduce-scatter.5 (a: f32[80]) -> f32[10] {\n  %a = f32[80]{0} parameter(0)\n"
        "  %g = f32[80]{0} all-reduce(%a), channel_id=9, replica_groups=[1,8]<=[8]\n"
        "  ROOT %s = f32[10]{0} dynamic-slice(%g)\n}\n"
    )
    body = (
        "  %p = f32[80]{0} parameter(0)\n"
        "  ROOT %f = f32[10]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.5"
    )
    messages = hlo.read(program(body, before=fused)).messages
    assert {kind: m.bytes for kind, m in messages.items()} == {"reduce-scatter": 320 * 7 / 8}


def test_products_count_2_for_each_multiply_add():
    text = program(
        "  %a = f32[3,5,7]{2,1,0} parameter(0)\n  %b = bf16[3,7,11]{2,1,0} parameter(1)\n"
        "  ROOT %d = f32[3,5,11]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, "
        "lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}"
    )
    assert hlo.read(text).flops == 2 * 3 * 5 * 7 * 11


@pytest.mark.parametrize(
    ("window", "size", "taps", "result", "pairs"),
    [
        ("size=16 stride=16", 32, 16, 2, 32),  # patches
        ("size=3 pad=1_1", 5, 3, 5, 13),  # the padding's two products are left out
        ("size=2 stride=2 rhs_dilate=3", 8, 2, 3, 6),
        ("size=4 stride=3 lhs_dilate=4", 4, 4, 4, 4),  # how a TPU writes a batch of products
    ],
)
def test_a_convolution_counts_products_with_inputs_only(window, size, taps, result, pairs):
    text = program(
        f"  %a = f32[2,{size},3]{{2,1,0}} parameter(0)\n"
        f"  %b = f32[{taps},3,5]{{2,1,0}} parameter(1)\n"
        f"  ROOT %c = f32[2,{result},5]{{2,1,0}} convolution(%a, %b), window={{{window}}}, "
        "dim_labels=b0f_0io->b0f"
    )
    assert hlo.read(text).flops == 2 * 2 * 5 * 3 * pairs


def test_memory_traffic_counts_slices_as_slices_and_leaves_out_what_stays_on_the_chip():
    fused = (
        "%slice_of (a: f32[24,10], i: s32[]) -> f32[1,10] {\n"
        "  %a = f32[24,10]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
        "  ROOT %s = f32[1,10]{1,0} dynamic-slice(%a, %i)\n}\n"
    )
    body = (
        "  %p = f32[24,10]{1,0} parameter(0)\n  %i = s32[]{:S(2)} parameter(1)\n"
        "  %f = f32[1,10]{1,0} fusion(%p, %i), kind=kLoop, calls=%slice_of\n"
        "  ROOT %n = f32[1,10]{1,0:T(8,128)S(1)} negate(%f)"
    )
    # Reads one row of 24 and writes it; `negate` reads it, and its result stays on the chip.
    assert hlo.read(program(body, before=fused)).memory_bytes == 3 * 40


def test_what_a_real_program_sends_and_computes_is_what_its_shapes_say():
    B, D, turns = 6, 8, 3
    mesh = make_mesh(devices=jax.devices()[:2])

    def loss(w, x):
        y, _ = jax.lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, None, length=turns)
        return y.sum()

    rows, whole = (NamedSharding(mesh, PartitionSpec(*s)) for s in (("data",), ()))
    w = jax.ShapeDtypeStruct((D, D), jnp.float32, sharding=whole)
    x = jax.ShapeDtypeStruct((B, D), jnp.float32, sharding=rows)
    work = hlo.read(jax.jit(jax.grad(loss), out_shardings=whole).lower(w, x).compile().as_text())
    # The gradient alone is summed over two chips, each of which then sends as much as it has;
    # whether in every turn or once at the end is the compiler's affair.
    assert work.messages["all-reduce"].bytes in (D * D * 4, turns * D * D * 4)
    # A forward and two backward products in each turn; the one for the first input is not needed.
    assert work.flops in (2 * 3 * turns * B / 2 * D * D, 2 * (3 * turns - 1) * B / 2 * D * D)
    assert work.unknown_loops == 0


def config_of(*arguments):
    return main.parse([*TINY, *arguments])[0]


@pytest.fixture(scope="module")
def studied():
    """Plans of one ViT on two devices: whole on each, and split by fsdp."""
    machine = plan.parse_topology("local:2")
    wide = ["--config.model.backbone.width=64", "--config.ema=0.9"]
    return {n: plan.plan(config_of(*wide, f"--config.mesh.fsdp={n}"), machine) for n in (1, 2)}


def test_memory_is_that_of_one_chip(studied):
    whole, split = (studied[n]["memory"] for n in (1, 2))
    assert whole["parameters"] == 4 * studied[1]["parameters"]
    assert whole["running_mean"] == whole["parameters"]
    for name in ("parameters", "optimizer", "running_mean"):
        assert split[name] < 0.6 * whole[name]
    assert split["batch"] == whole["batch"] > 4 * 16 * 16 * 3 * 4  # 4 of 8 pictures, and labels
    assert whole["peak"] >= sum(whole[k] for k in ("parameters", "optimizer", "temporaries"))


def test_gradients_travel_once_a_step(studied):
    sent = studied[1]["messages"]["all-reduce"]["bytes"]
    assert studied[1]["memory"]["parameters"] <= sent < 1.1 * studied[1]["memory"]["parameters"]
    assert studied[2]["messages"]["all-gather"]["bytes"] > 0


def test_compiled_flops_are_three_forward_passes(studied):
    compute = studied[1]["compute"]
    assert compute["model_flops"] == 3 * compute["forward_per_image"] * 4
    # The gradient for the picture itself is not needed.
    assert 0.9 < compute["compiled_flops"] / compute["model_flops"] <= 1
    assert compute["xla_flops"] > 0


def test_the_numbers_are_sentences_and_json(studied):
    found = json.loads(json.dumps(studied[2]))
    rows = dict(plan.lines(found))
    assert rows["machine"] == "local:2: 2 chips, mesh fsdp=2"
    assert "4 for each chip" in rows["batch"]
    assert "no chip to judge it by" in rows["verdict"]
    assert "time" not in rows


def test_the_bound_is_the_longest_of_three():
    chip = CHIPS["v5e"]
    found = {
        "compute": {"compiled_flops": 197e12, "memory_bytes": 3 * 819e9, "model_flops": 98.5e12},
        "messages": {"all-reduce": {"count": 2, "bytes": 2 * 200e9}},
        "batch_size": 600,
        "steps": 3600,
    }
    time = plan._bound(found, chip)
    assert time["roofs"] == pytest.approx({"compute": 1, "memory": 3, "messages": 2})
    assert (time["bound_by"], time["images_per_second"]) == ("memory", pytest.approx(200))
    assert time["hours"] == pytest.approx(3)
    assert time["mfu"] == pytest.approx(0.5 / 3)


def too_large(**memory):
    """A study of 64 pictures on 8 chips that does not fit in 100 bytes."""
    sizes = {"parameters": 20, "optimizer": 40, "running_mean": 0, "batch": 0, "program": 0}
    memory = sizes | {"temporaries": 60} | memory
    return {
        **{"batch_size": 64, "limit": 100, "compile_seconds": 1.0, "memory": memory},
        "mesh": {"data": 8, "fsdp": 1, "tensor": 1},
    }


@pytest.mark.parametrize(
    ("change", "size"),
    [
        ({"mesh.fsdp": 8}, (20 + 40 + 20) / 8 + 40),
        ({"accumulate": 2}, 20 + 40 + 20 + 20 + 40 / 2),
        ({"batch_size": 16}, 20 + 40 + 20 + 40 / 4),
        ({"model.backbone.remat": True}, None),
    ],
)
def test_a_change_is_estimated_by_arithmetic(change, size):
    assert plan.estimate(too_large(), change) == size


def test_the_first_change_that_fits_is_compiled_and_told():
    config = {"accumulate": 1, "mesh": {}, "model": {"backbone": {"remat": False}}}
    asked = []

    def compile_with(other):
        asked.append(other)
        return {"memory": {"peak": 120 if other["model"]["backbone"]["remat"] else 90}}

    better = plan.first_that_fits(config, too_large(), compile_with, seconds=60)
    # accumulate=2 cannot fit by arithmetic; remat is tried in vain; two chips are enough.
    assert better["change"] == {"mesh.data": -1, "mesh.fsdp": 2}
    assert (better["compiled"], better["peak"]) == (True, 90)
    assert [c["mesh"].get("fsdp") for c in asked] == [None, 2]
    by_arithmetic = plan.first_that_fits(config, too_large(), compile_with, seconds=0)
    assert (by_arithmetic["change"], by_arithmetic["compiled"]) == (better["change"], False)
    assert plan.first_that_fits(config, too_large(batch=10**6), compile_with, 0)["change"] == {}


def test_a_verdict_names_the_change_in_flags():
    found = {"fits": False, "limit": 95e9, "memory": {"peak": 200e9}}
    better = {"change": {"mesh.data": -1, "mesh.fsdp": 16}, "peak": 50e9, "compiled": False}
    text = plan.verdict(found | {"fitting": better})
    assert text.startswith("does NOT fit: 200 GB of 95 GB")
    assert "--config.mesh.data=-1 --config.mesh.fsdp=16: 50 GB (by arithmetic" in text


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (1.50G) exceeds available HBM (15.75G).",
            1.5 * 2**30 + 7,
        ),
        ("RESOURCE_EXHAUSTED: ... Used 17.00M of 15.75G hbm. Exceeded ...", 17 * 2**20),
        ("RESOURCE_EXHAUSTED: no space left on device", None),
        ("INTERNAL: Used 17.00G of 15.75G hbm", None),
    ],
)
def test_a_compiler_that_refuses_says_how_much_was_wanted(message, size):
    assert plan._refused(message, 7) == size


def test_no_dataset_is_opened_for_a_known_one():
    config = main.parse(["--config=configs/vit.py:imagenet"])[0]
    (train, held_out), remark = standin.splits_of(config)
    assert (len(train), len(held_out), len(train.class_names)) == (1_281_167, 50_000, 1000)
    assert "blank pictures stand in for imagenet2012" in remark
    (train, held_out), _ = standin.splits_of(config, examples=500, classes=7)
    assert (len(train), len(train.class_names)) == (500, 7)
    assert standin.splits_of(config_of()) == (None, "")


@pytest.mark.parametrize("recipe", ["setr.py:ade20k", "detr.py:bccd"])
def test_a_stand_in_has_what_the_task_learns_from(recipe):
    config = main.parse([f"--config=configs/{recipe}"])[0]
    (train, _), _ = standin.splits_of(config)
    wanted = "segmentation" if "setr" in recipe else "boxes"
    assert wanted in train[0]


@pytest.mark.parametrize(("name", "chips"), [("v5e:16x16", 256), ("v5p:8x8x8", 512), ("h100:8", 8)])
def test_a_topology_is_a_chip_and_a_number(name, chips):
    topology = plan.parse_topology(name)
    assert (topology.count, topology.chip) == (chips, CHIPS[name.split(":")[0]])
    assert topology.simulated == (name == "h100:8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*TINY], "no --topology given; write one such as v5e:16x16"),
        ([*TINY, "--topology=v5x:4x4"], "there is no chip 'v5x'. Did you mean 'v5"),
        ([*TINY, "--topology=v5e:big"], "sides of the slice, such as 16x16"),
        ([*TINY, "--topology=v5e:16"], "sides of the slice"),
        ([*TINY, "--topology=local:0"], "number of devices, such as 8"),
        ([*TINY, "--topology=local:4x4"], "number of devices"),
        ([*TINY, "--topology=local:64"], "with 2 simulated devices; set XLA_FLAGS"),
        ([*TINY, "--topology=local:2", "--examples=many"], "invalid int value: 'many'"),
        ([*TINY, "--topology=local:2", "--classes=0"], "--classes=0 must be at least 1"),
        ([*TINY, "--topology=local:2", "--config.batchsize=3"], "Did you mean 'batch_size'"),
        ([*TINY, "--topology=local:2", "--config.mesh.fsdp=3"], "does not fit 2 devices"),
        (["--config=configs/vit.py:folder", "--topology=local:2"], "--examples=N and --classes=K"),
        (["--topology=local:2"], "no --config=FILE given"),
    ],
)
def test_a_wrong_line_is_one_sentence(arguments, words, capsys):
    assert plan.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err


def test_a_tpu_without_libtpu_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install -e "\.\[tpu\]".*--topology=local:8'):
        plan.devices_of(plan.parse_topology("v5e:16x16"))


def test_help_teaches(capsys):
    assert plan.main(["--help"]) == 0
    assert plan.main([]) == 2
    text = capsys.readouterr().out
    assert "--topology=v5e:16x16" in text
    assert "BOUND" in text


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_a_chip_has_published_figures_of_its_kind(chip):
    assert chip.source
    assert CHIPS[chip.name] is chip
    # Bytes and seconds, not gigabytes: a chip of these years needs 100 to 700 products a byte.
    assert 100 < chip.flops / chip.memory_bandwidth < 700
    assert 2 < chip.memory_bandwidth / chip.link_bandwidth < 11
    assert 15e9 < chip.memory < 150e9


def test_a_gpu_is_judged_by_its_own_figures(capsys):
    assert plan.main([*TINY, "--topology=h200:2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chip"]["memory"] == 141e9
    assert found["fits"] is True
    assert found["time"]["step"] == max(found["time"]["roofs"].values())
    assert any("simulated" in text for text in found["remarks"])


@pytest.mark.slow
@pytest.mark.skipif(not LIBTPU, reason="libtpu is not installed: pip install -e '.[tpu]'")
def test_a_tpu_slice_is_compiled_for_without_a_tpu(monkeypatch):
    for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.setenv(name, "cpu" if name == "JAX_PLATFORMS" else "1")
    machine = plan.parse_topology("v5e:2x2")
    found = plan.plan(config_of("--config.model.backbone.scan=True"), machine)
    assert (found["chips"], found["fits"]) == (4, True)
    # Each chip sends 2 (n-1)/n of the gradients.
    wanted = found["memory"]["parameters"] * 2 * 3 / 4
    assert found["messages"]["all-reduce"]["bytes"] == pytest.approx(wanted, rel=0.1)
    with pytest.raises(ConfigError, match="there is no such slice"):
        plan.devices_of(plan.parse_topology("v5e:3x3"))


def test_one_picture_costs_what_the_rule_says(studied):
    forward = studied[1]["compute"]["forward_per_image"]
    D, N = 64, 16
    block = 2 * (4 * N * D * D + 2 * N * N * D + 2 * N * D * 2 * D)
    assert forward == 2 * N * 48 * D + block + 2 * D * 10
