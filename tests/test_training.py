"""The training loop of train.py in one process. Signals go to real processes; the rest runs in this one."""

import contextlib
import glob
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pexpect
import pytest
import torch

import runs
import runtime as rt
import settings as settings_module
import train


@pytest.fixture
def trained(tmp_path, monkeypatch, capsys):
    """A function that runs train.py on a tiny corpus in this process: (exit status, output, folder of checkpoints)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(*arguments, **values):
        config = runs.write_config(str(tmp_path), **values)
        monkeypatch.setattr(sys, "argv", ["train.py", config, *arguments])
        try:
            status = settings_module.main(train.main) or 0
        except SystemExit as exit:
            status = exit.code
        output = capsys.readouterr()
        return status, output.out + output.err, tmp_path / "checkpoints"
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def steps_of(folder):
    return sorted(int(name[3:-4]) for name in os.listdir(folder) if name.startswith("cpt"))


@pytest.mark.soak
def test_a_run_killed_again_and_again_ends_with_the_weights_of_an_undisturbed_one(tmp_path):
    ends = []
    for name, kills in (("undisturbed", 0), ("disturbed", 4)):
        folder = tmp_path / name
        folder.mkdir()
        config = runs.write_config(str(folder), max_steps=60, save_freq=7, eval_freq=20, dropout=0.2, resume_from="auto")
        draw, here = random.Random(3), folder / "checkpoints"
        for _ in range(kills):
            before = steps_of(here)[-1] if here.exists() and steps_of(here) else 0
            process = runs.start(config, **runs.THREAD)
            runs.wait_for(lambda before=before, process=process: process.poll() is not None or here.exists() and
                          any(step > before for step in steps_of(here)))
            time.sleep(draw.uniform(0, 0.3))
            process.kill()
            runs.finish(process)
        output = runs.run(config, **runs.THREAD)
        assert "finished after 60 steps" in output
        ends.append(runs.checkpoint(here))
    assert runs.largest_difference(*ends) == 0
    assert ends[0]["metrics"] == ends[1]["metrics"] and ends[0]["progress"]["tokens"] == ends[1]["progress"]["tokens"]


def test_the_measures_of_the_last_evaluation_outlive_a_stop(trained):
    _, _, folder = trained(max_steps=12, save_freq=5, eval_freq=4)
    whole = runs.checkpoint(folder)["metrics"]
    for name in ("cpt12.pth", "last.pth", "best.pth"):
        os.unlink(folder / name)
    assert steps_of(folder)[-1] == 10  # after the evaluation at 8; what step 12 holds is from before its own
    trained(max_steps=12, save_freq=5, eval_freq=4, resume_from="auto")
    assert whole and runs.checkpoint(folder)["metrics"] == whole


def test_resume_is_bit_identical(trained):
    """In the middle of an epoch, with the tokenizer from the checkpoint and the token store made anew."""
    values = dict(max_steps=12, save_freq=5, dropout=0.2, chain=0.5)
    _, _, folder = trained(**values)
    whole = runs.checkpoint(folder)
    for name in ("cpt12.pth", "last.pth", "best.pth"):
        os.unlink(folder / name)
    shutil.rmtree(folder.parent / ".cache")
    status, output, _ = trained(resume_from="auto", **values)
    assert status == 0 and "12/12" in output and "earlier run" not in output and "not what" not in output
    assert runs.largest_difference(whole, runs.checkpoint(folder)) == 0


def test_going_on_says_from_where_and_why_it_ends(trained):
    _, output, folder = trained(max_steps=4)
    assert "going on" not in output
    _, output, _ = trained(max_steps=4, resume_from="auto")
    assert f"going on from {folder}/cpt4.pth at step 4" in output and re.search("finished after 4 steps.*nothing was left to do", output)
    _, output, _ = trained(max_steps=50, resume_from="auto", eval_freq=1, patience=2, lr=0.0, muon_lr=0.0)
    assert "minutes (evaluations without improvement: 2): " in output
    _, output, _ = trained(max_steps=90, resume_from="auto", eval_freq=1, patience=2, lr=0.0, muon_lr=0.0)
    assert "minutes (nothing was left to do: raise patience): " in output
    _, output, _ = trained(max_steps=2, lr=1000.0, muon_lr=1000.0)
    assert re.search("which is worse than guessing \\(.*\\): lower lr=1000.0, or take more text\n", output)
    assert "it knows its training text" not in output
    _, output, folder = trained(max_steps=30, eval_freq=10)
    _, output, _ = trained(max_steps=60, eval_freq=10, resume_from="auto", lr=1.0, muon_lr=3.0)
    assert runs.checkpoint(folder, "best.pth")["progress"]["step"] == 30 and f"chat.py {folder / 'best.pth'} best_of=4" in output
    trained(max_steps=200, eval_freq=20)
    _, output, _ = trained(max_steps=205, eval_freq=200, resume_from="auto")
    assert "last.pth (it knows its training text better than best.pth)" in output
    _, output, _ = trained(max_steps=2, lr=0.0, muon_lr=0.0)
    assert "finished after 2 steps" in output and "guessing" not in output


def test_a_checkpoint_of_another_run_with_nothing_left_to_do_changes_nothing(trained, tmp_path):
    log = str(tmp_path / "log")
    _, _, folder = trained(max_steps=9, save_freq=3, keep=5, tensorboard_path=log)
    before = runs.losses(log)
    status, output, _ = trained(max_steps=2, resume_from=str(folder / "cpt3.pth"), tensorboard_path=log)
    assert status == 2 and "cpt3.pth is at step 3, after which nothing is left to do: raise max_steps" in output
    assert steps_of(folder) == [3, 6, 9] and not list(folder.glob("before-*")) and runs.losses(log) == before


def test_a_run_whose_best_pth_was_lost_counts_its_best_anew(trained):
    """It ended with "talk to best.pth", which was not there; and what was better than all that is there was not kept."""
    _, _, folder = trained(max_steps=30, eval_freq=30)
    os.unlink(folder / "best.pth")
    _, output, _ = trained(max_steps=30, eval_freq=30, resume_from="auto")  # it is the best itself
    assert "nothing was left to do" in output and runs.checkpoint(folder, "best.pth")["progress"]["step"] == 30
    trained(max_steps=33, eval_freq=33, lr=100.0, muon_lr=100.0, resume_from="auto")  # worse
    os.unlink(folder / "best.pth")
    _, output, _ = trained(max_steps=36, eval_freq=36, lr=100.0, muon_lr=100.0, resume_from="auto")
    best = runs.checkpoint(folder, "best.pth")
    assert best["progress"]["step"] == 36 and f"validation loss, {best['metrics']['loss']:.4f}" in output


def test_a_run_killed_before_its_last_file_got_its_second_name_names_it_when_it_goes_on(trained):
    _, _, folder = trained(max_steps=9, eval_freq=3, keep=5)
    os.unlink(folder / "last.pth")
    os.link(folder / "cpt6.pth", folder / "last.pth")
    _, output, _ = trained(max_steps=9, resume_from="auto")
    assert "nothing was left to do" in output and runs.checkpoint(folder)["progress"]["step"] == 9
    os.replace(folder / "cpt6.pth", folder / "best.pth")
    for step in steps_of(folder):
        os.unlink(folder / f"cpt{step}.pth")
    _, output, _ = trained(max_steps=6, eval_freq=3, resume_from=str(folder / "best.pth"))
    assert "nothing was left to do" in output
    assert runs.checkpoint(folder)["progress"]["step"] == 9  # best.pth is older


def test_a_run_goes_on_with_a_chain_that_needs_fewer_rows(trained):
    row = runs.checkpoint(trained(max_steps=56, chain=1.0, train_batch=2)[2])["progress"]["row"]
    status, output, folder = trained(max_steps=58, chain=0.0, train_batch=2, resume_from="auto")
    progress = runs.checkpoint(folder)["progress"]
    assert status == 0 and (row, progress["step"], progress["epoch"], progress["row"]) == (112, 58, 1, 2)  # of 115 and 108 rows


def test_losses_of_other_held_out_dialogues_are_not_compared(trained):
    """Going on with another eval_steps: the few of before may have been easier."""
    trained(max_steps=10, eval_freq=10)
    first = runs.checkpoint(trained(max_steps=20, eval_freq=10, eval_steps=1, test_batch=1)[2])["metrics"]
    _, output, folder = trained(max_steps=22, eval_freq=1, patience=1, lr=0.0, muon_lr=0.0, resume_from="auto")
    content = runs.checkpoint(folder, "best.pth")
    assert content["progress"]["step"] == 21 and content["metrics"]["tokens"] > first["tokens"]
    assert "finished after 22 steps" in output


def test_the_best_weights_get_their_name_when_a_run_was_killed_before(trained, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(path, name, old=train.checkpoint.name_also):
        if name == "best.pth" and path.endswith("cpt20.pth"):
            raise Killed
        old(path, name)
    monkeypatch.setattr(train.checkpoint, "name_also", killed)
    with pytest.raises(Killed):
        trained(max_steps=40, eval_freq=10)
    monkeypatch.undo()
    _, output, folder = trained(max_steps=40, eval_freq=1, patience=1, lr=1.0, muon_lr=3.0, resume_from="auto")
    best = runs.checkpoint(folder, "best.pth")
    assert best["progress"]["step"] == 20 and f"validation loss, {best['metrics']['loss']:.4f}" in output


@pytest.mark.soak
def test_ctrl_c_while_the_step_is_compiled_leaves_no_half_compiled_step(tmp_path):
    """Ctrl-C goes to the compiler's programs as well: what they leave behind, later runs load."""
    cache = dict(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    config = runs.write_config(str(tmp_path), compile=True, max_steps=3)
    process = runs.start(config, **cache)

    said = next((line for line in process.stdout if "the first step may take" in line), None)  # what is compiled from here on is the step
    assert said

    def compiling():
        of_group = []
        for path in glob.glob("/proc/[0-9]*/stat"):
            with contextlib.suppress(OSError), open(path) as file:
                name, _, rest = file.read().partition("(")[2].rpartition(")")
                of_group += [name] * (int(rest.split()[2]) == process.pid)
        return {"cc1plus", "ld", "as", "collect2"} & set(of_group)
    runs.wait_for(lambda: process.poll() is not None or compiling())
    os.killpg(process.pid, signal.SIGINT)
    status, output = runs.finish(process)
    assert status == 0 and "stopped at step" in output and "does not work here" not in output, output
    output = runs.run(config, "resume_from=auto", **cache)
    assert "finished after 3 steps" in output and "does not work here" not in output
    assert "give compile=False" not in runs.run(config, "max_minutes=9", **cache)
    assert "give compile=False" in runs.run(config, "max_minutes=0.01", **cache)


def test_a_second_run_in_a_folder_is_refused_as_long_as_the_first_lives(tmp_path):
    """Each would prune and put aside what the other saves."""
    config = runs.write_config(str(tmp_path), save_freq=5)
    process = runs.start(config, **runs.THREAD)
    runs.wait_for(lambda: os.path.exists(tmp_path / "checkpoints/last.pth"))
    try:
        status, output = runs.finish(runs.start(runs.write_config(str(tmp_path), "again.yaml", resume_from="auto"), **runs.THREAD), 60)
        assert status == 2 and "error: another run is writing to checkpoint_root=" in output and "going on" not in output
        assert process.poll() is None
    finally:
        process.kill()
        runs.finish(process)
    assert not [name for name in os.listdir(tmp_path / "checkpoints") if name.startswith("before")]
    assert "going on from" in runs.run(runs.write_config(str(tmp_path), max_minutes=0, resume_from="auto"), **runs.THREAD)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(tmp_path, number):
    process = runs.start(runs.write_config(str(tmp_path), save_freq=5), **runs.THREAD)
    runs.wait_for(lambda: os.path.exists(tmp_path / "checkpoints/cpt5.pth"))
    process.send_signal(number)
    status, output = runs.finish(process)
    step = int(re.search(r"stopped at step (\d+): .*cpt\1\.pth; go on with resume_from=auto", output)[1])
    assert status == 0 and runs.checkpoint(tmp_path / "checkpoints")["progress"]["step"] == step


@pytest.mark.parametrize("ignored", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["closed", "closed-nohup"])
def test_a_terminal_that_is_closed_costs_no_step_and_under_nohup_nothing_at_all(tmp_path, ignored):
    config = runs.write_config(str(tmp_path), save_freq=5, **(dict(max_steps=200) if ignored else {}))
    program, *arguments = [*(["nohup"] if ignored else []), sys.executable, os.path.join(runs.ROOT, "train.py"), config]
    terminal = pexpect.spawn(program, arguments, env=os.environ | runs.THREAD, cwd=str(tmp_path),
                             preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # the tests may run under nohup
    runs.wait_for(lambda: os.path.exists(tmp_path / "checkpoints/last.pth"))
    before = runs.checkpoint(tmp_path / "checkpoints")["progress"]["step"]
    os.close(terminal.child_fd)  # the kernel sends SIGHUP, and what is written from now on is an error
    terminal.child_fd, terminal.closed = -1, True
    assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == 0
    step = runs.checkpoint(tmp_path / "checkpoints")["progress"]["step"]
    assert step == 200 if ignored else step >= before


def test_a_reader_of_the_output_that_ends_first_costs_no_step(tmp_path):
    """`… | tee log`, which Ctrl-C ends as well; evaluations write before they save."""
    process = runs.start(runs.write_config(str(tmp_path), eval_freq=5, keep=9), **runs.THREAD)
    runs.wait_for(lambda: os.path.exists(tmp_path / "checkpoints/cpt5.pth"))
    process.stdout.close()
    runs.wait_for(lambda: os.path.exists(tmp_path / "checkpoints/cpt20.pth"))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0 and runs.checkpoint(tmp_path / "checkpoints")["progress"]["step"] >= 20


def test_a_full_disk_under_the_log_costs_no_step():
    code = "import runtime as rt; rt.StopSignal(rt.Processes()); print('x' * 10**6); print('y'); rt.os.write(2, b'went on')"
    done = subprocess.run([sys.executable, "-c", code], stdout=open("/dev/full", "w"), stderr=subprocess.PIPE, text=True, cwd=runs.ROOT)
    assert done.returncode == 0 and done.stderr == "went on"


def test_closed_standard_streams_are_no_error(tmp_path):
    config = runs.write_config(str(tmp_path), max_steps=1)
    done = subprocess.run(["bash", "-c", f"{sys.executable} train.py {config} <&- >&- && {sys.executable} train.py {config} 2>&-"],
                          env=os.environ | runs.THREAD, cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "finished after 1 steps" in done.stdout


@pytest.mark.parametrize("reader", ["lives", "ends"])
def test_a_second_ctrl_c_leaves_at_once(tmp_path, reader):
    """Also where the first has ended the reader of its output: `… 2>&1 | tee log`."""
    script = tmp_path / "slow.py"  # a step that takes a minute
    script.write_text("import time, settings, train\n"
                      "train.set_learning_rate = lambda *_: print('in a step', flush=True) or time.sleep(60)\n"
                      "settings.main(train.main)\n")
    process = runs.start(runs.write_config(str(tmp_path)), script=str(script), **runs.THREAD)
    while "in a step" not in process.stdout.readline():
        assert process.poll() is None
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    if reader == "ends":
        process.stdout.close()
    process.send_signal(signal.SIGINT)
    status, output = runs.finish(process)
    assert status == 130 and time.monotonic() - begin < 20 and ("leaving at once" in output or reader == "ends")


def test_a_curve_holds_each_step_once_and_a_run_that_begins_anew_keeps_the_one_before(trained, tmp_path):
    log = str(tmp_path / "log")
    trained(max_steps=12, save_freq=3, keep=9, tensorboard_path=log)
    trained(max_steps=11, tensorboard_path=log, resume_from=str(tmp_path / "checkpoints/cpt6.pth"))
    assert [step for step, _ in runs.losses(log)] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    trained(max_steps=5, tensorboard_path=log)
    assert [step for step, _ in runs.losses(log)] == [1, 2, 3, 4, 5]
    (before,) = (tmp_path / "log").glob("before-*")
    assert [step for step, _ in runs.losses(str(before))] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_curves_move_only_when_nobody_writes_them_any_more(tmp_path):
    def begin():
        processes = rt.Processes()
        rt.tensorboard(rt.Runtime(torch.device("cpu"), torch.float32, processes), str(tmp_path)).close()
        return processes

    with begin():
        begin().__exit__(None, None, None)
        assert len(os.listdir(tmp_path)) == 2 and not [*tmp_path.glob("before-*")]
    begin().__exit__(None, None, None)
    assert len([*tmp_path.glob("before-*/*")]) == 2


def test_patience_stops_and_names_the_best(trained):
    status, output, folder = trained(lr=0.0, min_lr=0.0, muon_lr=0.0, eval_freq=2, patience=3)
    assert status == 0
    assert re.search(r"finished after 8 steps .*best.pth with the best validation loss, \d", output), output
    assert runs.checkpoint(folder, "best.pth")["progress"]["step"] == 2


def test_max_steps_stops_with_a_last_and_a_best_checkpoint(trained):
    status, output, folder = trained(max_steps=7)
    assert status == 0 and "finished after 7 steps" in output
    assert sorted(os.listdir(folder)) == ["best.pth", "cpt7.pth", "last.pth"]
    assert runs.checkpoint(folder)["progress"]["step"] == 7


@pytest.mark.parametrize("minutes", [0.03, 0])
def test_max_minutes_stops_with_a_checkpoint(trained, minutes):
    """Also where the time is up before the first step: that one is still made."""
    status, output, folder = trained(max_minutes=minutes)
    assert status == 0
    step = int(re.search(r"finished after (\d+) steps", output)[1])
    assert step == runs.checkpoint(folder)["progress"]["step"] == steps_of(folder)[-1] > 0


def test_a_gradient_that_is_not_finite_is_skipped(trained, monkeypatch):
    """A poisoned step leaves weights and optimizer as they were, and the run goes on."""
    seen = []

    def poisoned(model, *arguments, forward=train.GPT.forward):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return forward(model, *arguments) * (float("nan") if len(seen) == 3 else 1)
    monkeypatch.setattr(train.GPT, "forward", poisoned)
    status, _, folder = trained(max_steps=5)
    assert status == 0 and len(seen) == 5
    moved = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in zip(seen, seen[1:])]
    assert moved == [True, True, False, True]
    assert all(tensor.isfinite().all() for tensor in runs.checkpoint(folder)["model"].values())


def test_gradients_that_are_never_finite_end_with_the_way_out(trained, monkeypatch):
    monkeypatch.setattr(train.GPT, "forward", lambda model, *arguments: train.GPT.loss(model, *arguments) * float("nan"))
    status, output, _ = trained(save_freq=5)
    assert status == 2 and "has not been finite for 20 steps at step 19: lower lr=0.003" in output and "Traceback" not in output


def test_a_dry_run_tells_and_writes_nothing_but_the_token_store(trained, tmp_path):
    status, output, folder = trained("--dry-run", tensorboard_path=str(tmp_path / "runs"))
    assert status == 0
    for name in ("settings", "machine", "model", "data", "memory", "work"):
        assert re.search(rf"^{name} ", output, re.MULTILINE), output
    assert sorted(os.listdir(tmp_path)) == [".cache", "config.yaml", "corpus.txt"]


def test_a_new_model_starts_from_the_bigrams_of_its_corpus_unless_told_otherwise(trained):
    losses = []
    for start in (True, False):
        _, _, folder = trained(bigram_start=start, lr=0, muon_lr=0, max_steps=1)
        losses.append(runs.checkpoint(folder)["metrics"]["loss"])
    assert losses[0] < losses[1] - 0.2


def test_accumulation_equals_one_batch(trained):
    _, _, folder = trained(max_steps=20)
    whole = runs.checkpoint(folder)
    _, _, folder = trained(max_steps=20, micro_batch=4)
    assert runs.largest_difference(whole, runs.checkpoint(folder)) < 1e-4
    assert whole["progress"]["tokens"] == runs.checkpoint(folder)["progress"]["tokens"]


def test_checkpoints_of_an_earlier_run_are_set_aside(trained):
    _, _, folder = trained(max_steps=9, save_freq=4)
    _, output, _ = trained(max_steps=3)
    (aside,) = (name for name in os.listdir(folder) if name.startswith("before-"))
    assert sorted(os.listdir(folder)) == [aside, "best.pth", "cpt3.pth", "last.pth"]
    assert runs.checkpoint(folder / aside)["progress"]["step"] == 9
    assert f"an earlier run's checkpoints are now in {folder / aside}" in output


def test_the_best_checkpoint_stays_the_best_when_a_run_goes_on_and_gets_worse(trained):
    trained(max_steps=9, eval_freq=6)
    status, output, folder = trained(max_steps=14, eval_freq=2, lr=3.0, muon_lr=3.0, resume_from="auto")
    assert status == 0 and "step 9, " not in output and "step 14, " in output
    best, last = runs.checkpoint(folder, "best.pth"), runs.checkpoint(folder)
    assert best["progress"]["step"] == best["metrics"]["step"] == 9 and last["metrics"]["step"] == 14
    assert best["metrics"]["loss"] == best["progress"]["best"] == last["progress"]["best"] < last["metrics"]["loss"]  # each its own


@pytest.mark.parametrize("keep", [0, 2])
def test_going_on_from_a_checkpoint_before_the_newest_is_a_run_of_its_own(trained, tmp_path, keep):
    _, _, folder = trained(max_steps=12, save_freq=3, keep=20)
    status, output, _ = trained(max_steps=8, save_freq=3, keep=keep, resume_from=str(folder / "cpt3.pth"))
    assert status == 0 and "an earlier run's checkpoints are now in" in output
    assert runs.checkpoint(folder)["progress"]["step"] == runs.checkpoint(folder, "best.pth")["progress"]["step"] == 8
    (aside,) = folder.glob("before-*")
    assert steps_of(aside) == [3, 6, 9, 12]


def test_a_damaged_newest_checkpoint_costs_a_run_neither_its_best_nor_its_folder(trained):
    _, _, folder = trained(max_steps=9, save_freq=3, keep=5)
    _, output, _ = trained(max_steps=12, eval_freq=2, lr=3.0, muon_lr=3.0, resume_from="auto")  # worse: 9 stays the best
    assert (folder / "cpt12.pth").exists() and runs.checkpoint(folder, "best.pth")["progress"]["step"] == 9
    (folder / "cpt12.pth").write_bytes(b"half")
    status, output, _ = trained(max_steps=13, eval_freq=2, lr=3.0, muon_lr=3.0, resume_from="auto")
    assert status == 0 and "cpt12.pth.unreadable" in output and "an earlier run" not in output
    assert runs.checkpoint(folder)["progress"]["step"] == 13 and runs.checkpoint(folder, "best.pth")["progress"]["step"] == 9


def test_going_on_with_another_corpus_is_a_new_run_with_the_old_weights(trained, tmp_path):
    _, _, folder = trained(max_steps=9, save_freq=3)
    before = runs.checkpoint(folder)
    runs.write_corpus(tmp_path / "other.txt", 100)
    status, output, _ = trained(data_path=str(tmp_path / "other.txt"), max_steps=2, lr=1e-9, muon_lr=1e-9, resume_from="auto")
    assert status == 0 and "is not what" in output and "finished after 2 steps" in output
    assert "an earlier run's checkpoints are now in" in output and steps_of(folder) == [2]
    assert 0 < runs.largest_difference(before, runs.checkpoint(folder)) < 1e-5
    status, output, _ = trained(max_steps=3, optimizer="adamw", resume_from=str(folder / "cpt2.pth"))  # and with a new optimizer
    state = runs.checkpoint(folder)["optimizer"][0]["state"]
    assert status == 0 and "is not what" in output and {int(one["step"]) for one in state.values()} == {3}


def test_a_run_that_goes_on_with_more_text_takes_in_its_new_characters(trained, tmp_path):
    _, _, folder = trained(max_steps=3)
    before = runs.checkpoint(folder)
    more = (tmp_path / "corpus.txt").read_text() + "龘靐\n龘\n\n靐\n龘龘\n\n" * 20 + "\n\n".join(f"龘{i}\n靐{i}" for i in range(20))
    (tmp_path / "more.txt").write_text(more)
    status, output, _ = trained(data_path=str(tmp_path / "more.txt"), max_steps=1, min_freq=10**6, resume_from=str(folder / "last.pth"),
                                checkpoint_root=str(tmp_path / "rare"))
    assert status == 0 and "join" not in output
    status, output, _ = trained(data_path=str(tmp_path / "more.txt"), max_steps=1, lr=0.0, muon_lr=0.0, resume_from="auto")
    after, known = runs.checkpoint(folder), before["tokenizer"]["characters"]
    assert status == 0 and re.search(r"\d+ characters of .*more.txt join the vocabulary of", output) and "<unk>" not in output
    assert after["tokenizer"]["characters"].startswith(known) and {*"龘靐123"} <= {*after["tokenizer"]["characters"]}
    for name, tensor in before["model"].items():
        assert after["model"][name][:3 + len(known)].equal(tensor[:3 + len(known)])
    status, output, _ = trained(data_path=str(tmp_path / "more.txt"), max_steps=4, resume_from="auto")
    assert status == 0 and "going on from" in output and "join" not in output
    assert runs.checkpoint(folder)["progress"]["step"] == 4 and len([*tmp_path.glob(".cache/more-*")]) == 2  # one without


def test_going_on_keeps_the_dialogues_that_are_held_out(trained):
    _, _, folder = trained(max_steps=4)
    first = runs.checkpoint(folder)
    status, output, _ = trained(max_steps=6, seed=7, train_percent=0.5, resume_from="auto")
    assert status == 0 and "seed=1337, as in" in output and "train_percent=0.8, as in" in output and "is not what" not in output
    assert runs.checkpoint(folder)["progress"]["store"] == first["progress"]["store"]
    assert runs.checkpoint(folder)["progress"]["step"] == 6


@pytest.mark.parametrize(("seed", "share", "warned"), [(3, 0.8, False), (3, 0.9, False), (3, 0.5, True), (4, 0.8, True)])
def test_going_on_with_more_text_and_another_split_is_warned_of(trained, tmp_path, seed, share, warned):
    """Dialogues that were trained on are held out then, with a loss that looks excellent."""
    _, _, folder = trained(max_steps=1, seed=3, train_percent=0.8)
    (tmp_path / "more.txt").write_text((tmp_path / "corpus.txt").read_text() + "\n\n新\n好")
    status, output, _ = trained(data_path=str(tmp_path / "more.txt"), max_steps=1, seed=seed, train_percent=share, resume_from="auto")
    assert status == 0 and ("give seed=3 train_percent=0.8, as there" in output) == warned
    used = runs.checkpoint(folder)["settings"]
    assert (used["seed"], used["train_percent"]) == (seed, share)


def test_a_block_size_that_is_not_the_checkpoints_is_refused_before_the_data_is_prepared(trained, tmp_path):
    trained(max_steps=1)
    runs.write_corpus(tmp_path / "other.txt", 100)
    status, output, _ = trained(data_path=str(tmp_path / "other.txt"), block_size=8, resume_from="auto")
    assert status == 2 and "give block_size=" in output and not list(tmp_path.glob(".cache/other-*"))


def test_a_folder_that_holds_a_run_is_told_of_before_the_first_step(trained):
    trained(max_steps=2)
    status, output, _ = trained("--dry-run", max_steps=2)
    assert status == 0 and "holds a run up to step 2, which the first save sets aside; to go on with it: resume_from=auto" in output
    assert "holds a run" not in trained(max_steps=4, resume_from="auto")[1]


def test_going_on_from_a_file_of_other_content_is_one_line(trained, tmp_path):
    torch.save({"format": 1, "progress": {}}, tmp_path / "other.pth")
    status, output, _ = trained(resume_from=str(tmp_path / "other.pth"))
    assert status == 2 and "is damaged or was changed" in output


def test_going_on_with_a_single_dialogue_makes_one_store_and_says_whose_tokenizer_it_has(trained, tmp_path):
    _, _, folder = trained(max_steps=2)
    (tmp_path / "one.txt").write_text("abc\ndef\n")
    status, output, _ = trained(data_path=str(tmp_path / "one.txt"), train_percent=1, tokenizer="x.json", max_steps=3, resume_from="auto")
    assert status == 0 and "tokenizer=char, as in" in output and "not x.json" in output and "is not what" in output
    assert len(list((tmp_path / ".cache").glob("one-*"))) == 1


def test_a_text_shorter_than_its_vocabulary_is_not_what_a_model_starts_from(trained, tmp_path):
    _, _, folder = trained(max_steps=1)
    (tmp_path / "two.txt").write_text("ab\n\nba\n")
    _, output, _ = trained(data_path=str(tmp_path / "two.txt"), tokenizer=str(folder / "last.pth"), max_steps=1)
    assert "the model starts from" not in output and "finished after 1 step" in output


@pytest.mark.soak
def test_a_full_disk_ends_in_one_line_and_leaves_what_was_saved(tmp_path):
    config = runs.write_config(str(tmp_path), max_steps=4)
    runs.run(config)
    limited = "import resource, settings, train; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); settings.main(train.main)"
    (tmp_path / "limited.py").write_text(limited)
    for more, name in (("max_steps=6", "cpt6.pth"), ("data_path=" + str(tmp_path / "large.txt"), "token store")):
        if "large" in more:
            runs.write_corpus(tmp_path / "large.txt", 5000)
        status, output = runs.finish(runs.start(config, more, "resume_from=auto", script=str(tmp_path / "limited.py")))
        assert status == 2 and name in output and "cannot be written" in output and "Traceback" not in output, output
        assert output.splitlines()[-1].startswith("error: "), output  # not behind a progress bar
        assert runs.checkpoint(tmp_path / "checkpoints")["progress"]["step"] == 4
    assert not [*tmp_path.glob("checkpoints/.saving-*"), *tmp_path.glob(".cache/.making-*")]


def test_a_log_folder_that_takes_no_file_is_one_line(tmp_path):
    status, output = runs.finish(runs.start(runs.write_config(str(tmp_path), tensorboard_path="/proc/self")))
    assert status == 2 and "error: tensorboard_path=/proc/self cannot be written: " in output and "Thread" not in output


def test_a_full_disk_of_tensorboard_costs_its_log_and_not_the_run(tmp_path):
    script = tmp_path / "limited.py"
    script.write_text("import resource, time, torch, runtime as rt\n"
                      "runtime = rt.Runtime(torch.device('cpu'), torch.float32, rt.Processes())\n"
                      f"log = rt.tensorboard(runtime, {str(tmp_path / 'log')!r})\n"
                      "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
                      "for step in range(300):\n"
                      "    log.add_scalar('loss', 1.0, step)\n"
                      "    log.flush()\n"
                      "log.close()\n"
                      "print('went on')\n")
    status, output = runs.finish(runs.start(script=str(script)))
    assert status == 0 and output.count("log ends here: File too large") == 1 and "went on" in output, output


def test_a_first_evaluation_that_memory_does_not_hold_costs_no_step(trained, monkeypatch):
    def evaluate(*_):
        raise MemoryError
    monkeypatch.setattr(train, "evaluate", evaluate)
    status, output, folder = trained(eval_freq=5)
    assert status == 2 and "the memory is full" in output and runs.checkpoint(folder)["progress"]["step"] == 5
    monkeypatch.undo()
    status, output, _ = trained(eval_freq=5, max_steps=7, resume_from="auto")
    assert status == 0 and "step 5, " in output and "step 7, " in output


def test_a_model_that_no_memory_holds_is_one_line(trained):
    status, output, _ = trained("--dry-run", n_embd=2**20, n_head=2**10, n_layer=1)
    assert status == 2 and output.startswith("error: rank 0: the memory is full") and output.count("\n") == 1


@pytest.mark.parametrize("error", ["torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')",
                                   "RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.')"])
def test_full_memory_says_what_takes_less(tmp_path, error):
    script = tmp_path / "full.py"
    script.write_text("import torch, runtime, settings\n"
                      "def work():\n"
                      "    with runtime.Processes():\n"
                      f"        raise {error}\n"
                      "settings.main(work)\n")
    status, output = runs.finish(runs.start(script=str(script)))
    assert status == 2 and output.startswith("error: rank 0: the memory is full; micro_batch=1") and output.count("\n") == 1


def test_a_folder_for_checkpoints_that_cannot_be_written_ends_before_the_first_step(trained, tmp_path):
    (tmp_path / "file").write_text("")
    status, output, _ = trained(checkpoint_root=str(tmp_path / "file" / "folder"))
    assert status == 2 and "cannot be written" in output and "validation loss" not in output


def test_another_optimizer_than_the_checkpoint_s_is_refused_and_leaves_nothing(trained, tmp_path):
    _, _, folder = trained(max_steps=1)
    status, output, _ = trained(max_steps=2, optimizer="adamw", resume_from=str(folder / "last.pth"), checkpoint_root=str(tmp_path / "new"))
    assert status == 2 and "the checkpoint's optimizer is another one" in output and not (tmp_path / "new").exists()


def test_rows_shorter_than_the_sample_prompts_are_trained_on(trained):
    status, _, folder = trained(block_size=8, max_steps=2)
    assert status == 0 and steps_of(folder) == [2]


def test_a_configuration_for_several_processes_says_that_it_trains_on_one(trained):
    _, output, _ = trained("--dry-run", ddp=True, local_rank=0, world_size=2)
    assert output.count("torchrun did not start this: training on one device") == 1 and "world_size=2 is" not in output


def test_what_another_launcher_left_in_the_environment_is_no_process_of_ours(tmp_path):
    config = runs.write_config(str(tmp_path), max_steps=2)
    output = runs.run(config, "--dry-run", RANK="1", LOCAL_RANK="1", LOCAL_WORLD_SIZE="8")
    assert f"processes: 1, threads: {len(os.sched_getaffinity(0))}\n" in output  # not an eighth of the cores
    status, output = runs.finish(runs.start(config, WORLD_SIZE="2", RANK="0"))
    assert status == 2 and "error: WORLD_SIZE=2 is set, but torchrun did not start this" in output and "Traceback" not in output


@pytest.mark.parametrize("name", ["cuda:", "cuda:x", "cuda:-1", "cpu:0", "auto:0", "gpu", "CPU"])
def test_a_device_that_is_none_is_refused(name):
    with pytest.raises(settings_module.UserError, match=f"device={name} is not one of"):
        rt.pick_device(name, rt.Processes())


def test_with_nothing_held_out_the_newest_checkpoint_is_the_best(trained):
    status, output, folder = trained(train_percent=1, max_steps=4, eval_freq=2, patience=1)
    assert status == 0 and "0 dialogues held out" in output and "patience=1 is not used: nothing is held out" in output
    assert "inf" not in output.split("work ")[1]
    assert runs.checkpoint(folder, "best.pth")["progress"]["step"] == 4


def test_a_compiler_that_does_not_work_is_named_and_training_goes_on_without(tmp_path):
    config = runs.write_config(str(tmp_path), compile=True, max_steps=2)
    output = runs.run(config, CXX="/no/compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert "compile=True does not work here, going on without: " in output and "finished after 2 steps" in output


def test_a_compiler_that_fails_without_a_word_is_no_error_either(trained, monkeypatch):
    def failing(*_, **__):
        raise AssertionError
    monkeypatch.setattr(torch, "compile", failing)
    status, output, _ = trained(compile=True, max_steps=1)
    assert status == 0 and "compile=True does not work here, going on without: AssertionError()\n" in output


@pytest.mark.soak
def test_the_memory_of_training_does_not_grow_with_the_corpus(tmp_path):
    script = tmp_path / "memory.py"
    script.write_text("import re, sys, data, settings, train\n"
                      "settings.main(train.main)\n"
                      "print('anonymous', re.search('RssAnon:\\\\s+(\\\\d+)', open('/proc/self/status').read())[1])")
    used = []
    for dialogues in (2_000, 200_000):
        folder = tmp_path / str(dialogues)
        folder.mkdir()
        line = "这是一句不长也不短的话，用来占地方。" * 2
        (folder / "corpus.txt").write_text("\n\n".join(f"{line}{i % 97}\n好" for i in range(dialogues)))
        config = runs.write_config(str(folder), max_steps=3, eval_steps=2, block_size=128)
        runs.run("prepare", config, script=os.path.join(runs.ROOT, "data.py"))
        output = runs.run(config, script=str(script), **runs.THREAD)
        used.append(int(re.search(r"anonymous (\d+)", output)[1]) / 1024)
    assert used[1] - used[0] < 40, used  # MiB; the larger corpus's 8 M ids would take 60 as int64, and its text 24
