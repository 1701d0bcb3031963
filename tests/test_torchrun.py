"""train.py under torchrun: real processes on 127.0.0.1, talking through gloo."""

import os
import re
import signal
import time

import pytest

import runs

TWO, FOUR = ["--nproc_per_node=2"], ["--nproc_per_node=4"]


def two_machines(per_node=1):
    """The options of two torchrun agents, each a machine of so many processes."""
    port = runs.free_port()
    return [["--nnodes=2", f"--node_rank={rank}", f"--nproc_per_node={per_node}", "--master_addr=127.0.0.1", f"--master_port={port}"]
            for rank in range(2)]


def nodes(config, per_node):
    """Outputs of two torchrun agents that train together."""
    started = [runs.start(config, torchrun=torchrun, **runs.THREAD) for torchrun in two_machines(per_node)]
    ended = [runs.finish(process) for process in started]
    assert [status for status, _ in ended] == [0, 0], ended
    return [output for _, output in ended]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """A function: (folder, output) of 30 steps in one process and in two, with these settings; each pair is made once."""
    made = {}

    def reference(processes, **values):
        key = (processes, *sorted(values.items()))
        if key not in made:
            folder = str(tmp_path_factory.mktemp("reference"))
            config = runs.write_config(folder, max_steps=30, save_freq=15, ddp=True, world_size=3,
                                       tensorboard_path=f"{folder}/tensorboard", **values)
            made[key] = folder, runs.run(config, torchrun=None if processes == 1 else [f"--nproc_per_node={processes}"], **runs.THREAD)
        return made[key]
    return reference


def assert_same_training(folder, reference, metrics="metrics"):
    """Two runs agree: logged losses to 1e-5 relative, the last weights to 1e-4, the held-out loss."""
    ours, theirs = (runs.checkpoint(f"{f}/checkpoints") for f in (folder, reference))
    assert ours["progress"]["step"] == theirs["progress"]["step"] == 30
    assert [ours["progress"][k] for k in ("epoch", "row", "tokens")] == [theirs["progress"][k] for k in ("epoch", "row", "tokens")]
    assert runs.largest_difference(ours, theirs) < 1e-4
    losses, expected = (dict(runs.losses(f"{f}/tensorboard")) for f in (folder, reference))
    assert losses and all(losses[step] == pytest.approx(expected[step], rel=1e-5) for step in losses)


def held_out_loss(output):
    (figure,) = re.findall(r"step 30, .*: (validation loss .*)\n", output)
    return figure


def test_two_processes_train_as_one_does(references):
    (one, alone), (two, together) = references(1), references(2)
    assert_same_training(two, one)
    assert held_out_loss(together) == held_out_loss(alone)
    assert alone.count("\nsettings ") + alone.startswith("settings ") == together.count("finished after") == 1
    assert alone.count("torchrun did not start this: training on one device") == 1 and "world_size=3 is" not in alone
    assert together.count("world_size=3 is ignored: there are 2 processes") == 1 and "did not start" not in together


@pytest.mark.soak
@pytest.mark.parametrize("values", [dict(optimizer="adamw"), dict(arch="gpt2"), dict(train_batch=8, train_percent=0.5)], ids=str)
@pytest.mark.parametrize("processes", [2, 4])
def test_the_number_of_processes_changes_nothing_but_the_time(references, processes, values):
    (one, alone), (several, together) = references(1, **values), references(processes, **values)
    assert_same_training(several, one)
    assert held_out_loss(together) == held_out_loss(alone)


def test_two_machines_train_as_one_does(references, tmp_path):
    config = runs.write_config(str(tmp_path), max_steps=30, tensorboard_path=f"{tmp_path}/tensorboard")
    first, second = nodes(config, 1)
    assert_same_training(tmp_path, references(1)[0])
    assert first.count("validation loss") == 2 and "validation loss" not in second  # the evaluation and the last line
    assert len(os.listdir(tmp_path / "tensorboard")) == 1
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["best.pth", "cpt30.pth", "last.pth"]


@pytest.mark.soak
def test_two_machines_of_two_processes_go_on_from_one_process(references, tmp_path):
    one, _ = references(1)
    config = runs.write_config(str(tmp_path), max_steps=30, resume_from=f"{one}/checkpoints/cpt15.pth",
                               tensorboard_path=f"{tmp_path}/tensorboard")
    nodes(config, 2)
    assert_same_training(tmp_path, one)


@pytest.mark.soak
@pytest.mark.parametrize("torchrun", [None, FOUR], ids=["one", "four"])
def test_another_number_of_processes_goes_on_from_two(references, tmp_path, torchrun):
    two, _ = references(2)
    config = runs.write_config(str(tmp_path), max_steps=30, resume_from=f"{two}/checkpoints/cpt15.pth",
                               tensorboard_path=f"{tmp_path}/tensorboard")
    runs.run(config, torchrun=torchrun, **runs.THREAD)
    assert_same_training(tmp_path, references(1)[0])


def test_an_error_in_preparing_the_data_ends_all_processes_with_one_message(tmp_path):
    config = runs.write_config(str(tmp_path))
    (tmp_path / "corpus.txt").write_text("a dialogue\nand no other\n")
    status, output = runs.finish(runs.start(config, torchrun=TWO))
    assert status != 0
    assert output.count("holds one dialogue") == 1 and output.count("Traceback") == 1, output  # torchrun's own
    assert not (tmp_path / ".cache").exists()


def test_a_batch_that_cannot_be_split_is_one_error_that_names_the_next_that_can(tmp_path):
    config = runs.write_config(str(tmp_path), train_batch=15)
    status, output = runs.finish(runs.start(config, torchrun=TWO))
    assert status != 0
    assert output.count("train_batch=15 cannot be split over 2 processes; use 14 or 16") == 1


WAITING = """
import datetime, os, sys, time
import runtime
with runtime.Processes() as processes:
    processes.store.set_timeout(datetime.timedelta(seconds=1))
    def make():
        time.sleep(4)
        open(f"{sys.argv[1]}/made by {processes.rank}", "x")
        return "ready"
    print("has", processes.once(make), os.listdir(sys.argv[1]), flush=True)
"""


@pytest.mark.soak
def test_the_data_is_made_once_and_waited_for_beyond_the_time_out_of_the_store(tmp_path):
    script, folder = tmp_path / "wait.py", tmp_path / "made"
    script.write_text(WAITING)
    folder.mkdir()
    status, output = runs.finish(runs.start(str(folder), script=str(script), torchrun=TWO))
    assert status == 0 and output.count("has ready ['made by 0']") == 2, output


@pytest.mark.soak
def test_a_killed_worker_is_restarted_and_the_result_is_that_of_an_undisturbed_run(references, tmp_path):
    undisturbed, _ = references(2)
    config = runs.write_config(str(tmp_path), max_steps=30, save_freq=3, resume_from="auto")
    process = runs.start(config, torchrun=[*TWO, "--max-restarts=3"], **runs.THREAD)
    runs.wait_for(lambda: os.path.exists(tmp_path / "checkpoints/cpt6.pth"))
    os.kill(runs.workers(process)[1], signal.SIGKILL)
    status, output = runs.finish(process)
    assert status == 0 and output.count("settings ") == 2, output
    assert runs.largest_difference(runs.checkpoint(tmp_path / "checkpoints"), runs.checkpoint(f"{undisturbed}/checkpoints")) == 0


def long_run(tmp_path):
    """Popen of two processes that train until they are stopped, and have begun to."""
    config = runs.write_config(str(tmp_path), save_freq=5)
    process = runs.start(config, torchrun=TWO, **runs.THREAD)
    runs.wait_for(lambda: os.path.exists(tmp_path / "checkpoints/cpt5.pth"))
    return process, runs.workers(process)


def assert_gone(pids):
    for pid in pids:
        runs.wait_for(lambda pid=pid: not os.path.exists(f"/proc/{pid}"))


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
def test_without_restarts_a_killed_worker_ends_all_and_torchrun_names_it(tmp_path, rank):
    process, workers = long_run(tmp_path)
    os.kill(workers[rank], signal.SIGKILL)
    begin = time.monotonic()
    status, output = runs.finish(process, 60)
    assert status != 0 and time.monotonic() - begin < 60
    assert f"(local_rank: {rank})" in output.split("Root Cause")[1] and "Signal 9 (SIGKILL)" in output, output
    assert output.count("Traceback") == 1, output  # torchrun's own
    assert_gone(workers)


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_to_torchrun_writes_a_checkpoint_and_ends_all(tmp_path, number):
    process, workers = long_run(tmp_path)
    time.sleep(1)
    os.kill(process.pid, number)
    _, output = runs.finish(process, 40)
    step = int(re.search(r"stopped at step (\d+): .*go on with resume_from=auto", output)[1])
    assert runs.checkpoint(tmp_path / "checkpoints")["progress"]["step"] == step
    assert_gone(workers)


@pytest.mark.soak
def test_no_process_leaves_at_a_signal_before_the_checkpoint_is_written(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(f"""
import os, sys, time
sys.path.insert(0, {runs.ROOT!r})
import checkpoint, settings, train
def save(*arguments, plain=checkpoint.save):
    time.sleep(2)
    return plain(*arguments)
checkpoint.save = save
def leave(status, plain=os._exit):
    print("rank", os.environ["RANK"], "leaves", sorted(os.listdir({str(tmp_path / "checkpoints")!r})), flush=True)
    plain(status)
os._exit = leave
settings.main(train.main)
""")
    process = runs.start(runs.write_config(str(tmp_path), save_freq=5), script=str(script), torchrun=TWO, **runs.THREAD)
    runs.wait_for(lambda: os.path.exists(tmp_path / "checkpoints/cpt5.pth"))
    os.kill(process.pid, signal.SIGTERM)
    _, output = runs.finish(process, 60)
    written = sorted(os.listdir(tmp_path / "checkpoints"))
    assert f"rank 0 leaves {written}" in output and f"rank 1 leaves {written}" in output, output


@pytest.mark.soak
def test_workers_save_and_end_when_torchrun_itself_is_killed(tmp_path):
    process, workers = long_run(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    _, output = runs.finish(process, 40)
    assert output.count("stopped at step") == 1
    assert_gone(workers)


FAULTY = """
import os, sys
sys.path.insert(0, {root!r})
import runtime, settings, train
step = None
def seed_step(seed, now, rank, plain=runtime.seed_step):
    global step
    step = now
    plain(seed, now, rank)
runtime.seed_step = seed_step
def loss(self, *arguments, plain=train.GPT.forward):
    if step == 5 and os.environ.get("RANK", "1") == "1":
        {fault}
    return plain(self, *arguments)
train.GPT.forward = loss
settings.main(train.main)
"""


def faulty(tmp_path, fault):
    """The path of a script that trains as train.py does, but for a fault in step 5 on rank 1, or in the only process."""
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(root=runs.ROOT, fault=fault))
    return str(script)


@pytest.mark.soak
def test_an_exception_on_one_rank_ends_all_with_its_traceback(tmp_path):
    config = runs.write_config(str(tmp_path), max_steps=30)
    process = runs.start(config, script=faulty(tmp_path, "raise ZeroDivisionError('a bug on rank 1')"), torchrun=TWO, **runs.THREAD)
    status, output = runs.finish(process, 60)
    assert status != 0 and output.count("ZeroDivisionError: a bug on rank 1") == 1
    assert output.count("Traceback") == 2, output  # the bug's and torchrun's own
    assert "(local_rank: 1)" in output.split("Root Cause")[1], output


@pytest.mark.soak
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(tmp_path):
    weights = []
    for torchrun in (None, TWO):
        folder = tmp_path / f"{torchrun}"
        folder.mkdir()
        config = runs.write_config(str(folder), max_steps=10)
        runs.run(config, script=faulty(tmp_path, "return plain(self, *arguments) * float('nan')"), torchrun=torchrun, **runs.THREAD)
        weights.append(runs.checkpoint(folder / "checkpoints"))
    assert all(tensor.isfinite().all() for tensor in weights[1]["model"].values())
    assert runs.largest_difference(*weights) < 1e-4


@pytest.mark.soak
def test_compiled_processes_write_the_file_that_plain_ones_write(references, tmp_path):
    two, _ = references(2)
    config = runs.write_config(str(tmp_path), max_steps=30, compile=True, micro_batch=4, tensorboard_path=f"{tmp_path}/tensorboard")
    output = runs.run(config, torchrun=TWO, **runs.THREAD)
    assert "does not work here" not in output
    assert_same_training(tmp_path, two)


PROFILED = """
import sys
sys.path.insert(0, {root!r})
import torch, settings, train
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
    train.main()
names = [event.name for event in profile.events()]
print("weighs", sum("all_reduce" in name and "gloo" in name for name in names), flush=True)
"""


@pytest.mark.soak
def test_gradients_are_summed_over_processes_once_a_step_however_many_micro_batches(tmp_path):
    script = tmp_path / "profiled.py"
    script.write_text(PROFILED.format(root=runs.ROOT))
    config = runs.write_config(str(tmp_path), max_steps=8)
    counts = []
    for micro_batch in (8, 2):
        output = runs.run(config, f"micro_batch={micro_batch}", script=str(script), torchrun=TWO, **runs.THREAD)
        counts.append(set(re.findall(r"weighs (\d+)", output)))
    assert counts[0] == counts[1] and counts[0] != {"0"}


SHARED = """
import torch
import optim, runtime
from settings import TrainSettings, build
counted = 0
def orthogonalise(matrices, *arguments, plain=optim.orthogonalise):
    global counted
    counted += len(matrices)
    return plain(matrices, *arguments)
optim.orthogonalise = orthogonalise
with runtime.Processes() as processes:
    group = runtime.start(build(TrainSettings, dict(device="cpu")), processes).neighbours
    trained = []
    for process_group in (None, group):
        counted = 0
        torch.manual_seed(0)
        matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in [(64, 64)] * 5 + [(64, 128)]]
        blocks = [(32, number % 2) for number in range(5)] + [(64, 0)]
        muon = optim.BlockMuon([dict(params=matrices, blocks=blocks)], torch.float32, process_group, lr=0.1)
        for _ in range(3):
            for matrix in matrices:
                matrix.grad = torch.randn_like(matrix)
            muon.step()
        trained.append(torch.cat([matrix.flatten() for matrix in matrices]))
    print(f"machine of {torch.distributed.get_world_size(group)}, {counted} blocks, "
          f"agrees {torch.allclose(*trained, rtol=0, atol=1e-5)}", flush=True)
"""


@pytest.mark.soak
def test_the_processes_of_a_machine_share_the_orthogonalisation(tmp_path):
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    started = [runs.start(str(tmp_path), script=str(script), torchrun=torchrun, **runs.THREAD) for torchrun in two_machines(2)]
    outputs = [runs.finish(process)[1] for process in started]
    # In each step 2 of 3 matrices, 1 of 2 others, each of two blocks, and the last, which is one: 7 of 11.
    assert [output.count("machine of 2, 21 blocks, agrees True") for output in outputs] == [2, 2], outputs


@pytest.mark.soak
def test_processes_share_the_cores_unless_the_user_says_otherwise(tmp_path):
    config, cores = runs.write_config(str(tmp_path)), len(os.sched_getaffinity(0))
    for torchrun, environment, threads in (
            (TWO, {}, max(1, cores // 2)), (TWO, dict(OMP_NUM_THREADS=str(cores)), cores), (["--nproc_per_node=1"], {}, cores),
            (["--nproc_per_node=1"], dict(OMP_NUM_THREADS="1"), 1), (None, {}, cores)):
        assert f"threads: {threads}\n" in runs.run(config, "--dry-run", torchrun=torchrun, **environment)


@pytest.mark.soak
def test_a_machine_without_the_checkpoint_ends_all_with_a_line(references, tmp_path):
    two, _ = references(2)
    started = []
    for rank, torchrun in enumerate(two_machines()):
        place = tmp_path / f"machine{rank}"  # each has its own disk: its own current folder
        place.mkdir()
        if rank == 0:
            os.symlink(os.path.join(two, "checkpoints"), place / "checkpoints")
        config = runs.write_config(str(place), checkpoint_root="checkpoints", resume_from="auto", max_steps=30)
        started.append(runs.start(config, cwd=str(place), torchrun=torchrun))
    ended = [runs.finish(process, 60) for process in started]
    assert all(status != 0 for status, _ in ended)
    assert ended[1][1].count("cpt30.pth, which rank 0 goes on from, is not on") == 1, ended


@pytest.mark.soak
def test_a_machine_with_other_reviews_ends_all_with_a_line(references, tmp_path):
    base, started = os.path.join(references(2)[0], "checkpoints/last.pth"), []
    for rank, torchrun in enumerate(two_machines()):
        place = tmp_path / f"machine{rank}"
        place.mkdir()
        lines = [f"{i % 2},{'good' if i % 2 else 'bad'} {i}" for i in range(40)][::1 - 2 * rank]
        (place / "reviews.csv").write_text("\n".join(["label,review", *lines]))
        (place / "s.yaml").write_text(f"sentimental_data_path: reviews.csv\nbase_model: {base}\ndevice: cpu\ntrain_percent: 0.5\n")
        started.append(runs.start("s.yaml", cwd=str(place), script=os.path.join(runs.ROOT, "sentimentalTrain.py"), torchrun=torchrun))
    ended = [runs.finish(process, 60) for process in started]
    assert all(status != 0 for status, _ in ended)
    assert re.search(r"has reviews.csv \(\w+\) where rank 0 has reviews.csv \(\w+\): give every machine the same files", ended[1][1]), ended
