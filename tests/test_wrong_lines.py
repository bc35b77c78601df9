"""Wrong command lines and config files, as one table: a sentence, the nearest name, status 2.

All of them are found from the text of the config and of the package, before JAX is imported.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from vit_jax import build, keys, main, targets
from vit_jax.build import flatten
from vit_jax.errors import ConfigError

ROOT = Path(__file__).parent.parent
CVT, VIT = "--config=configs/cvt.py", "--config=configs/vit.py"
SETR = "--config=configs/setr.py"

LINES = {
    "": "try --config=configs/cvt.py",
    "--confg=configs/cvt.py": "--confg is no flag",
    "--config configs/cvt.py": "with the equals sign",
    "--config=configs/cvtt.py": "no config file 'configs/cvtt.py'. Did you mean 'configs/cvt.py'",
    f"{CVT}:imagnet": "no recipe 'imagnet'. Did you mean 'imagenet'?",
    f"{CVT} batch_size=3": "write --config.batch_size=3",
    f"{CVT} train": "'train' is no flag",
    f"{CVT} --workdr=x": "workdir",
    f"{CVT} --mode=evaluate": "<train|eval>",
    f"{CVT} --config.batchsize=3": "'batchsize'. Did you mean 'batch_size'",
    f"{CVT} --config.optimizer.weight_deca=0": "'optimizer.weight_decay'",
    f"{CVT} --config.model.backbone.width=3": "model.backbone.widths",
    f"{CVT} --config.train.transforms[9].size=3": "train.transforms[9].size",
    f"{CVT} --config.batch_size=abc": "batch_size=abc: a whole number",
    f"{CVT} --config.batch_size=1.5": "batch_size=1.5: a whole number",
    f"{CVT} --config.batch_size=True": "batch_size=True: a whole number",
    f"{CVT} --config.batch_size=None": "batch_size=None: a whole number",
    f"{CVT} --config.learning_rate=fast": "learning_rate=fast: a number",
    f"{CVT} --config.epochs": "epochs",
    f"{VIT} --config.batch_size=0": "config.batch_size=0 must be at least 1",
    f"{VIT} --config.steps=-5": "config.steps=-5 must be at least 0",
    f"{VIT} --config.learning_rate=0": "config.learning_rate=0.0 must be above 0",
    f"{VIT} --config.learning_rate=nan": "config.learning_rate=nan must be above 0",
    f"{VIT} --config.ema=1.5": "config.ema=1.5 must be at least 0 and at most 1",
    f"{VIT} --config.max_skipped=0": "config.max_skipped=0 must be at least 1",
    f"{VIT} --config.mesh.fdsp=2": "'mesh.fdsp'. Did you mean 'mesh.fsdp'",
    f"{VIT} --config.mesh.fsdp=-2": "config.mesh.fsdp=-2 must be at least -1",
    f"{VIT} --config.dtype=bfloat": "dtype='bfloat' does not exist. Did you mean 'bfloat16'",
    f"{VIT} --config.optimizer.name=adam": "optimizer.name='adam' does not exist. Did you mean 'ad",
    f"{VIT} --config.schedule.name=cosin": "schedule.name='cosin' does not exist. Did you mean 'co",
    f"{VIT} --config.schedule.drops=(0.5,'a')": "config.schedule.drops[1]: a number was wanted",
    f"{VIT} --config.data.on_broken=halt": "data.on_broken='halt' does not exist.",
    f"{VIT} --config.data.name=digit": "'digit' is no dataset of vit_jax.data",
    f"{VIT} --config.data.max_broken=5": "config.data.max_broken=5.0 must be at least 0 and at",
    f"{VIT} --config.task.target=tasks.classification.Clasification": "'Classification'",
    f"{VIT} --config.model.target=models.clasifier.Classifier": "module 'vit_jax.models.clasifier'",
    f"{VIT} --config.model.backbone.target=models.vit.vit_s61": "has no 'vit_s61'. Did you mean 'v",
    f"{VIT} --config.train.transforms[0].target=data.transforms.Resise": "Did you mean 'Resize'",
    f"{SETR} --config.eval.inference.target=tasks.inference.Avraged": "Did you mean 'Averaged'",
    f"{SETR} --config.data.options.sizes=3": "options",
    f"{VIT} --config.data.tokeniser=x": "'data.tokeniser'",
    f"{VIT} --config.data.tokenizer=gs://bucket/x": "data.tokenizer=gs://bucket/x is an address",
    f"{VIT} --config.data.vocabulary=0": "config.data.vocabulary=0 must be at least 1",
    f"{VIT} --config.data.length=long": "data.length=long: a whole number was wanted",
    f"{VIT} --workdir=s3://bucket/run": "--workdir=s3://bucket/run is an address, and a folder was",
    f"{VIT} --workdir=gs://bucket": "gs://bucket: gs://BUCKET/RUN was wanted, a folder in a bucket",
    f"{VIT} --config.data.data_dir=gs://b/d": "data.data_dir=gs://b/d is an address, and a folder",
    f"{VIT} --config.data.data_dir=s3://data": "data.data_dir=s3://data is an address, and a folde",
    f"{VIT} --processes=2": "need --coordinator=HOST:PORT of process 0",
    f"{VIT} --processes=two": "processes",
    f"{VIT} --coordinator=here": "--coordinator=here: HOST:PORT was wanted",
    f"{VIT} --coordinator=a:1 --processes=2": "which one this is, 0 to 1 (got -1)",
    f"{VIT} --coordinator=a:1 --processes=2 --process=2": "which one this is, 0 to 1 (got 2)",
    f"{VIT} --coordinator=a:1 --process=0": "how many there are (got 0)",
}

WITHIN = "    config = vit.get_config('tiny')\n    with config.unlocked():\n        {}\n"
FILES = {  # a config file after its imports and `def get_config(recipe="")`: what it says
    "    config = vit.get_config('tiny')\n    config.learnig_rate = 1e-3\n": "'learning_rate'",
    WITHIN.format("config.learnig_rate = 1e-3"): "no config key 'learnig_rate'. Did you mean 'lea",
    WITHIN.format("config.optimizer.betas = (0.9, 0.99)"): "no config key 'optimizer.betas'",
    WITHIN.format("config.batch_size = True"): "config.batch_size: a whole number was wanted, got",
    WITHIN.format("config.batch_size = None"): "config.batch_size: a whole number was wanted, got",
    WITHIN.format("config.accumulate = -2"): "config.accumulate=-2 must be at least 1",
    WITHIN.format("del config.schedule.power"): "config.schedule.power is missing; a config starts",
    WITHIN.format("del config.optimizer"): "config.optimizer is missing",
    WITHIN.format("config.train.transforms = 3"): "field 'transforms'",
    WITHIN.format("config.train.transforms = ({'size': 3},)"): "config.train.transforms[0] names",
    WITHIN.format("config.sharding = (('head', 'fsdp'),)"): "config.sharding[0][1]: a tuple was",
    WITHIN.format("config.sharding = ('head',)"): "config.sharding[0]: 2 entries were wanted, as",
    WITHIN.format("config.optimizer.lr_scale = ((3, 'head'),)"): "lr_scale[0][0]: a string was",
    WITHIN.format("config.model.backbone.heds = 3"): "has no argument 'heds'. Did you mean 'heads'",
    WITHIN.format("config.model.backbone.depth = True"): "backbone.depth: a whole number was",
    WITHIN.format("config.model.backbone.update({'depth': 2.0})"): "depth",
    WITHIN.format("config.model = {'num_classes': 3}"): "config.model names no target",
    WITHIN.format("config.task.smoothing = 0.1"): "no argument 'smoothing'. Did you mean 'label",
    WITHIN.format("config.data.options = {'seed': 3}"): "data.options: digits has no option 'seed'",
    WITHIN.format("config.schedule = 'cosine'"): "field 'schedule'",
    "    return ConfigDict({'batch_size': 3})\n": "config.seed is missing; a config starts from",
    "    return 3\n": "get_config() must return a config",
    "    pass\n": "get_config",
    "    raise KeyError('recipe')\n": "recipe",
    "    return None +\n": "invalid syntax",
}


def file_of(body, folder):
    file = folder / "mine.py"
    head = "from ml_collections import ConfigDict\nfrom configs import vit\n"
    head += "def get_config(recipe=''):\n"
    end = "" if "return" in body or "raise" in body or "pass" in body else "    return config\n"
    file.write_text(head + body + end)
    return file


def check(argv, said, capsys):
    """One sentence on stderr, status 2, within 3 seconds; nothing of a device."""
    import jax._src.xla_bridge as bridge

    before = dict(bridge._backends)
    bridge._backends.clear()  # as in a process that has touched none
    began = time.monotonic()
    try:
        assert main.main(argv) == 2
        assert not bridge._backends
    finally:
        bridge._backends.clear()
        bridge._backends.update(before)
    assert time.monotonic() - began < 3
    out, err = capsys.readouterr()
    assert said in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not out


@pytest.mark.parametrize("line", LINES)
def test_a_wrong_command_line_is_one_sentence_with_the_nearest_right_name(
    line, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    check(line.split() or ["--mode=train"], LINES[line], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("body", FILES)
def test_a_wrong_config_file_is_one_sentence_with_the_nearest_right_name(body, capsys, tmp_path):
    check([f"--config={file_of(body, tmp_path)}"], FILES[body], capsys)


CODE = (
    "import sys; from vit_jax import main; status = main.main(sys.argv[1:]);"
    "sys.exit(status if 'jax' not in sys.modules else 99)"
)
STARTED = [
    [CVT, "--config.batchsize=3"],
    [VIT, "batch_size=3"],
    [VIT, "--config.optimizer.name=adam"],
    [VIT, "--config.model.backbone.target=models.vit.vit_s61"],
    [VIT, "--config.data.name=digit"],
]


def test_a_wrong_line_ends_a_process_within_three_seconds_and_without_jax():
    for arguments in STARTED:
        began = time.monotonic()
        argv = [sys.executable, "-c", CODE, *arguments]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1
        assert time.monotonic() - began < 3, arguments


def test_the_table_of_keys_is_that_of_the_base_config():
    from configs import common

    base = flatten(common.base())
    free = {name for name in keys.names() if name.startswith(("task", "model", "train", "eval"))}
    assert set(keys.names()) - free == {k for k in base if not k.startswith(tuple(free))}
    assert set(common.base()) == set(keys.KEYS)
    assert set(common.base().train) == set(keys.KEYS["train"])
    assert set(common.base().eval) | {"inference"} == set(keys.KEYS["eval"])


def test_the_names_in_the_table_are_those_that_the_optimizer_knows():
    import jax.numpy as jnp

    from vit_jax import optim

    rate = {"learning_rate": 1.0, "total_steps": 9, "warmup_steps": 0, "drops": (0.5,)}
    for name in keys.KEYS["schedule"]["name"].choices:
        optim.schedule(name=name, **rate)
    for name in keys.KEYS["optimizer"]["name"].choices:
        params = {"block_0": {"kernel": jnp.ones((3, 5))}}
        optim.make({"name": name}, params=params, schedule=lambda step: 1.0)
    for function, valid in (
        (lambda: optim.schedule(name="?", **rate), keys.KEYS["schedule"]["name"].choices),
        (
            lambda: optim.make({"name": "?"}, params=params, schedule=lambda step: 1.0),
            keys.KEYS["optimizer"]["name"].choices,
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            function()
        assert f"Valid: {', '.join(sorted(valid))}." in str(caught.value)


@pytest.mark.parametrize("package", ["models", "tasks"])
def test_what_a_targets_source_says_is_what_it_takes(package):
    """The check that reads, and the one that imports, agree on everything that can be named."""
    seen = 0
    for module in build.submodules(f"vit_jax.{package}"):
        path = f"{package}.{module}"
        there = targets._module(ROOT / "vit_jax" / package / module)
        for name in there:
            if not callable(target := build.find(f"{path}.{name}")) or name.startswith("_"):
                continue
            read = targets.arguments(f"{path}.{name}")
            if read is not None and target.__module__.startswith("vit_jax"):
                assert set(read) == build._accepted(target), f"{path}.{name}"
                seen += 1
    assert seen > 10


def test_every_shipped_recipe_passes():
    recipes = {"cvt": "digits imagenet tiny", "vit": "folder finetune probe cifar10"}
    recipes |= dict.fromkeys(("detr", "setr", "upernet"), "scenes folder tiny")
    for name, chosen in recipes.items():
        for recipe in chosen.split():
            main.parse([f"--config=configs/{name}.py:{recipe}"])
