"""Seconds to given validation losses, train.py against a baseline: python bench/time_to_loss.py [CONFIG] [key=value …]

The baseline (the original's recipe, or transformers' GPT-2) trains in slices until --seconds; between two slices train.py
runs once, in a process of its own, with one of --steps as its max_steps, where its learning rate reaches zero. Its seconds
are counted from the start of the process ("all in"): imports, data, model and compilation are in, and shown apart as what
the steps do not explain. The baseline's seconds are its steps alone. Every score is `common.score` on the same dialogues.

An interrupted or longer run goes on from --state, which has the baseline and train.py's runs so far; what is there is not
run again. The file of another machine, recipe or corpus is refused. --report only prints the table and draws the curves.
"""

import dataclasses
import glob
import os
import subprocess
import sys
import tempfile
import time

import common  # first: it makes the folder above importable
import original
import peers
import torch

import checkpoint
import data
import runtime as rt
import settings as settings_module
from settings import UserError


def run_ours(options, settings, mode, steps, held_out, runtime):
    """One run of train.py: {loss, all_in, start, training} in nats and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        values = dict(max_steps=steps, max_minutes="none", compile=mode != "eager", eval_freq=10**9, eval_steps=1, save_freq=10**9, keep=0,
                      checkpoint_root=f"{folder}/checkpoints", tensorboard_path=f"{folder}/runs", data_path=settings.data_path)
        smoke = common.SMOKE | values if options.smoke else values
        override = [*options.override, *(f"{name}={'none' if value is None else value}" for name, value in smoke.items())]
        environment = os.environ | (dict(TORCHINDUCTOR_CACHE_DIR=f"{folder}/inductor") if mode == "cold" else {})
        begin = time.time()
        done = subprocess.run([sys.executable, os.path.join(common.ROOT, "train.py"), options.config, *override], env=environment,
                              capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        at = step_times(f"{folder}/runs", begin)
        model, _, _ = checkpoint.load_model(f"{folder}/checkpoints/last.pth", runtime.device)
    last = max(at)
    half = min((step for step in at if step >= last / 2 and step < last), default=min(at))
    each = (at[last] - at[half]) / (last - half)  # seconds of a step once all is compiled
    all_in = at[last] + (steps - last) * each  # train.py notes the first steps and every tenth

    @torch.no_grad()
    def nats(inputs, targets):
        with runtime.autocast():
            return model.loss(inputs, targets)

    loss = common.score(nats, held_out, settings.block_size, runtime.device)
    return dict(loss=loss, all_in=all_in, training=steps * each, start=all_in - steps * each)


def step_times(folder, begin):
    """{steps done: seconds since `begin`} from the times in TensorBoard's log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    (path,) = glob.glob(os.path.join(folder, "events*"))
    events = EventAccumulator(path, size_guidance=dict(scalars=0))
    events.Reload()
    return {event.step: event.wall_time - begin for event in events.Scalars("loss/train")}


def baseline(options, settings, training, vocab_size, runtime):
    if options.against == "original":
        return original.contender(settings, training, vocab_size, runtime, options.lr, options.batch, options.dropout)
    return peers.transformers(settings, training, vocab_size, runtime, lr=options.lr, compile=settings.compile,
                              horizon=options.seconds)


def go_on(path, identity, other):
    """The runs in the file `path`, whose baseline `other` becomes; none where there is no file."""
    if not path or not os.path.exists(path):
        return []
    saved = torch.load(path, map_location=other.runtime.device, weights_only=True)
    theirs = saved.get("identity", {})
    differ = [f"{name}={theirs.get(name)}" for name in identity if theirs.get(name) != identity[name]]
    if differ:
        raise UserError(f"{path} is another run's ({', '.join(differ)}); name another --state, or remove it")
    other.load(saved["baseline"])
    return saved["runs"]


def keep(path, identity, other, runs):
    if path:
        checkpoint.write(path, dict(identity=identity, baseline=other.state(), runs=runs))


def report(options, curve, runs):
    """The table of our runs against the baseline's curve, and the curves as a picture."""
    when, lowest = min(curve, key=lambda point: point[1])  # later it may rise again
    rows = []
    for run in sorted(runs, key=lambda run: (run["mode"], run["steps"])):
        there = next((seconds for seconds, loss in curve if loss <= run["loss"]), None)  # when the baseline was as good
        times = [f"{there / run[name]:.1f}x" if there else f"more than {curve[-1][0] / run[name]:.1f}x" for name in ("all_in", "training")]
        rows.append([run["mode"], run["steps"], f"{run['loss']:.4f}", run["all_in"], run["start"], run["training"],
                     "not yet" if there is None else round(there), *times])
    common.table(["train.py", "steps", "loss", "all in s", "start and compile s", "steps alone s", f"{options.against}'s s",
                  "times less, all in", "steps alone"], rows)
    print(f"{options.against}: validation loss {lowest:.4f} in {when:.0f} s")
    for mode in sorted({run["mode"] for run in runs}):
        reached = [run for run in runs if run["mode"] == mode and run["loss"] <= lowest]
        for name in ("all_in", "training"):
            if reached:
                best = min(run[name] for run in reached)
                print(f"that loss by train.py ({mode}), {name}: {best:.1f} s, {when / best:.1f} times less")
    for target in options.targets:
        there = next((f"{seconds:.0f} s" for seconds, loss in curve if loss <= target), "not reached")
        mine = min((run["all_in"] for run in runs if run["loss"] <= target), default=None)
        print(f"validation loss {target}: {options.against} {there}, train.py {'not reached' if mine is None else f'{mine:.1f} s all in'}")
    draw(options, curve, runs)


def draw(options, curve, runs):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker
    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.plot(*zip(*curve), marker=".", label=options.against)
    for mode in sorted({run["mode"] for run in runs}):
        points = sorted((run["all_in"], run["loss"]) for run in runs if run["mode"] == mode)
        axes.plot(*zip(*points), marker="o", linestyle="", label=f"train.py, {mode}, a run a point, all in")
    axes.set(xscale="log", xlabel="seconds", ylabel="validation loss, nats per token")
    axes.xaxis.set(major_locator=ticker.LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(options.png, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    print(f"curves: {options.png}")


def main(arguments=None):
    parser = common.parser(__doc__)
    parser.add_argument("--against", default="original", choices=["original", "transformers"])
    parser.add_argument("--seconds", type=float, default=500, help="of the baseline's training, earlier calls' too")
    parser.add_argument("--slice", type=float, default=50, help="seconds of the baseline between two runs of train.py")
    parser.add_argument("--steps", default="20,30,40,60", help="max_steps of train.py's runs, multiples of 10")
    parser.add_argument("--modes", default="eager,compiled", help="of train.py: eager, compiled, cold (compiled with an empty cache)")
    parser.add_argument("--targets", type=lambda text: [float(part) for part in text.split(",")], default=[], help="losses to time")
    parser.add_argument("--lr", type=float, help="of the baseline (original: 3e-4, transformers: 1e-3)")
    parser.add_argument("--batch", type=int, default=16, help="of the original's recipe")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the original's recipe")
    parser.add_argument("--state", help="the file to go on from and to write (runs/bench/AGAINST.pth; --smoke: none)")
    parser.add_argument("--png", help="the curves (bench/time_to_loss_AGAINST.png)")
    parser.add_argument("--report", action="store_true", help="run nothing; table and curves of what is there")
    options = parser.parse_intermixed_args(arguments)
    settings = common.read_settings(options)
    if options.smoke:
        options.seconds, options.slice, options.steps, options.modes = 1.0, 0.5, "10", "eager"
        options.png = options.png or os.path.join(tempfile.gettempdir(), "time_to_loss_smoke.png")
    else:
        options.state = options.state or os.path.join(common.ROOT, f"runs/bench/{options.against}.pth")
    options.lr = options.lr or dict(original=3e-4, transformers=1e-3)[options.against]
    options.png = options.png or os.path.join(common.ROOT, f"bench/time_to_loss_{options.against}.png")
    runtime = rt.start(settings)
    training, held_out, tokenizer = common.open_store(settings)
    other = baseline(options, settings, training, tokenizer.size, runtime)
    recipe = dataclasses.asdict(settings)  # whatever file it comes from: files change
    theirs = dict(lr=options.lr, batch=options.batch, dropout=options.dropout)
    identity = dict(recipe, store=data.manifest(data.prepare(settings))["identity"], baseline=theirs, **common.machine())
    if options.against == "transformers":
        identity["horizon"] = options.seconds  # its rate falls until then
    runs = go_on(options.state, identity, other)
    if options.report and not other.curve:
        raise UserError(f"--report: {options.state} does not exist, so nothing has run; leave --report out")
    known = {(run["mode"], run["steps"]) for run in runs}
    wanted = [(mode, int(steps)) for steps in options.steps.split(",") for mode in options.modes.split(",")]
    wanted = [pair for pair in wanted if pair not in known]

    while not options.report and (other.seconds < options.seconds or wanted):
        if other.seconds < options.seconds:
            speed = other.train(min(options.slice, options.seconds - other.seconds))
            loss = other.score(held_out, settings.block_size)
            keep(options.state, identity, other, runs)
            print(f"{options.against}: {other.seconds:.0f} s, validation loss {loss:.4f}, {speed:,.0f} real tokens/s", flush=True)
        if wanted:
            mode, steps = wanted.pop(0)
            run = dict(mode=mode, steps=steps) | run_ours(options, settings, mode, steps, held_out, runtime)
            runs.append(run)
            keep(options.state, identity, other, runs)
            common.record(options.results, "time_to_loss", recipe=recipe, smoke=options.smoke, **run)
            print(f"train.py, {mode}, {steps} steps: validation loss {run['loss']:.4f} in {run['all_in']:.1f} s, "
                  f"steps alone {run['training']:.1f} s", flush=True)
    if not options.report:
        common.record(options.results, "time_to_loss_baseline", against=options.against, recipe=recipe, smoke=options.smoke,
                      seconds=other.seconds, steps=other.steps, first_step=other.first_step, curve=other.curve, **theirs,
                      tokens_per_second=other.tokens / max(other.seconds, 1e-9))
    report(options, other.curve, runs)


if __name__ == "__main__":
    settings_module.main(main)
