"""A tiny corpus, and real training processes on it, for the tests of train.py alone and under torchrun."""

import contextlib
import glob
import os
import random
import signal
import socket
import subprocess
import sys
import time

import torch
import yaml

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = dict(train_percent=0.8, block_size=32, arch="modern", n_layer=2, n_head=2, n_embd=64, train_batch=16, test_batch=4,
            optimizer="muon", lr=0.003, muon_lr=0.01, dtype="float32", device="cpu", eval_freq=1000, save_freq=1000, compile=False,
            max_epoch=20_000)  # a test that fails leaves no run for ever
THREAD = dict(OMP_NUM_THREADS="1")  # the same sums in each process, however many there are


def write_config(folder, name="config.yaml", **values):
    """The path of a YAML file of a tiny run whose files all lie in `folder`; the corpus is made if it is not there."""
    corpus = os.path.join(folder, "corpus.txt")
    if not os.path.exists(corpus):
        write_corpus(corpus)
    values = TINY | dict(data_path=corpus, checkpoint_root=os.path.join(folder, "checkpoints"), tensorboard_path=None) | values
    path = os.path.join(folder, name)
    with open(path, "w") as file:
        yaml.safe_dump(values, file)
    return path


def write_corpus(path, dialogues=150):
    """Dialogues of invented words: enough rows for a few passes in a test, and long ones among them."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 6))) for _ in range(60)]
    with open(path, "w") as file:
        for _ in range(dialogues):
            for _ in range(draw.randint(1, 4)):
                file.write(" ".join(draw.choices(words, k=draw.randint(1, 4))) + "\n")
            file.write("\n")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(*arguments, torchrun=None, script=os.path.join(ROOT, "train.py"), cwd=None, **environment):
    """Popen of train.py, or another script, with `arguments`, under torchrun with the options `torchrun` (a list) if given."""
    command = [sys.executable]
    if torchrun is not None:
        command += ["-m", "torch.distributed.run", *torchrun]
        if not any(option.startswith("--master_port") for option in torchrun):
            command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "TORCHELASTIC", "RANK", "WORLD_SIZE"))}
    return subprocess.Popen([*command, script, *arguments], text=True, env=clean | dict(PYTHONPATH=ROOT) | environment, cwd=cwd,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=hear_ctrl_c)


def hear_ctrl_c():
    """What a shell starts in the background, the tests say, ignores it, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process, seconds=500):
    """(exit status, output) of a process that `start` gave; nothing of it is left running."""
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        for pid in [process.pid, *workers(process)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {seconds} s:\n{output}")


def run(*arguments, seconds=500, **options):
    """The output of train.py with `arguments`, which must succeed."""
    status, output = finish(start(*arguments, **options), seconds)
    assert status == 0, output
    return output


def workers(process):
    """Process ids of the workers of torchrun, by rank of the machine."""
    found = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            with open(path) as file:
                pid, parent = int(path.split("/")[2]), int(file.read().rsplit(")", 1)[1].split()[1])
            with open(f"/proc/{pid}/environ") as file:
                variables = dict(line.split("=", 1) for line in file.read().split("\0") if "=" in line)
        except (OSError, IndexError):
            continue  # it has just ended
        if parent == process.pid and "LOCAL_RANK" in variables:
            found[int(variables["LOCAL_RANK"])] = pid
    return [found[rank] for rank in sorted(found)]


def wait_for(condition, seconds=300):
    """What `condition()` returns once it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


def checkpoint(folder, name="last.pth"):
    return torch.load(os.path.join(folder, name), weights_only=True)


def losses(folder):
    """[(step, training loss)] from TensorBoard's files, as its page shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(folder)
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss/train")]


def largest_difference(a, b):
    """Between two checkpoints' weights."""
    assert a["model"].keys() == b["model"].keys()
    return max((a["model"][name] - b["model"][name]).abs().max().item() for name in a["model"])
