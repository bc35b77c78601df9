"""The watchdog, in processes of its own: what it ends, and what it lets live."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAD = "import time; from vit_jax.watchdog import Watchdog\n"


def run(body):
    """Return code, stderr and seconds of a program."""
    began = time.monotonic()
    argv = [sys.executable, "-c", HEAD + body]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stderr, time.monotonic() - began


def test_a_thread_that_is_stuck_ends_the_process_with_every_stack():
    code, err, _ = run(
        "import threading\n"
        "threading.Thread(target=lambda: time.sleep(50), daemon=True).start()\n"
        "def stuck(): time.sleep(50)\n"
        "with Watchdog(0.5) as dog:\n"
        "    dog.alive()\n"
        "    stuck()\n"
    )
    assert code == 1
    assert "in stuck" in err
    assert err.count("File ") >= 2
    assert "Thread" in err
    assert "<lambda>" in err


@pytest.mark.parametrize(
    "body",
    [
        # Twice as long as it waits, but never without a sign of life.
        "with Watchdog(1) as dog:\n    for _ in range(20): dog.alive(); time.sleep(0.1)\n",
        # Compilation has four times as long, each named one once.
        "with Watchdog(0.5) as dog:\n    dog.patient('save'); time.sleep(1)\n",
        # Off, and over.
        "with Watchdog(0) as dog:\n    dog.alive(); time.sleep(0.5)\n",
        "with Watchdog(0.3) as dog:\n    dog.alive()\ntime.sleep(0.6)\n",
    ],
)
def test_what_shows_signs_of_life_is_not_ended(body):
    code, err, _ = run(body)
    assert (code, err) == (0, "")


def test_patience_lasts_until_the_next_sign_of_life_and_a_name_has_it_once():
    code, _, seconds = run(
        "with Watchdog(0.4) as dog:\n"
        "    dog.patient('save'); dog.alive(); dog.patient('save'); time.sleep(50)\n"
    )
    assert code == 1
    assert seconds < 5


def test_winding_is_cheap(monkeypatch):
    from vit_jax import watchdog

    wound = []
    timer = watchdog.faulthandler
    monkeypatch.setattr(timer, "dump_traceback_later", lambda *a, **_: wound.append(a))
    monkeypatch.setattr(timer, "cancel_dump_traceback_later", lambda: None)
    with watchdog.Watchdog(100.0) as dog:
        for _ in range(1000):
            dog.alive()
    assert [seconds for (seconds,) in wound] == [400.0, 100.0]
