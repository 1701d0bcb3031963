"""Pretrain a GPT on dialogues: python train.py config/demo.yaml [key=value …], or the same under torchrun."""

import dataclasses
import itertools
import json
import math
import os
import platform
import time

import torch

import checkpoint
import data
import runtime as rt
import settings as settings_module
import tokenizer as tokenizer_module
from model import GPT, GPTConfig, Recorded, Sampling, extended, generate
from optim import learning_rate, make_optimizers, set_learning_rate, share_done, update
from settings import TrainSettings, UserError, quoted

BY_HEART = 1.0  # nats a token: with a training loss below this, a model mostly says what its text has (bench/LOG.md)


def main():
    begin = time.perf_counter()
    parser = settings_module.parser(TrainSettings, "python train.py CONFIG [key=value …] [--dry-run]")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("override", nargs="*", default=[], help="key=value")
    parser.add_argument("--dry-run", action="store_true", help="print settings, size, memory and FLOPs, and stop")
    options = parser.parse_intermixed_args()
    with rt.Processes() as processes:
        values = settings_module.read_yaml(options.config) | settings_module.overrides(options.override)
        settings = settings_module.build(TrainSettings, values)
        runtime = rt.start(settings, processes)
        rt.explain_processes(runtime, values)
        train(settings, runtime, options.dry_run, begin)


def train(settings, runtime, dry_run, begin):
    device = runtime.device
    if settings.train_batch % runtime.world:
        more = -(-settings.train_batch // runtime.world) * runtime.world
        less = f"{more - runtime.world} or " if more > runtime.world else ""
        raise UserError(f"train_batch={settings.train_batch} cannot be split over {runtime.world} processes; use {less}{more}")
    rows = settings.train_batch // runtime.world  # of this process in a step

    # Where to go on from, the data, the model: every process does the same.
    if runtime.main and not dry_run:
        runtime.processes.claim(settings.checkpoint_root)
    path, saved = find_checkpoint(settings, runtime, rename=not dry_run)
    model, tokenizer = checkpoint.unpack(saved, path, dropout=settings.dropout) if saved else (None, None)
    if saved and (size := model.config.block_size) != settings.block_size:
        raise UserError(f"{path} has block_size={size}, not {settings.block_size}: give block_size={size}")
    settings = keep_split(settings, runtime, path, saved, tokenizer)
    trained_on = saved and saved["progress"].get("store")  # a classifier's has none, nor has the original's
    store = runtime.processes.once(lambda: data.prepare(settings, tokenizer, trained_on))  # the others wait
    known, tokenizer = tokenizer, tokenizer_module.load(os.path.join(store, "tokenizer.json"))
    if settings.vocab_size and tokenizer.size > settings.vocab_size:
        runtime.say(f"vocab_size={tokenizer.size}, as in {path or settings.tokenizer}, not {settings.vocab_size}")
    documents, held_out, made = data.Documents(store, "train"), data.Documents(store, "val"), data.manifest(store)
    torch.manual_seed(settings.seed)
    model = fitted(model, known, tokenizer, settings, path, runtime) if saved else GPT(GPTConfig.of(settings, tokenizer.size))
    progress, same_run = starting_point(settings, runtime, path, saved, made)
    if begun := progress["step"]:
        runtime.say(f"going on from {path} at step {begun}")
    if not same_run and (there := checkpoint.numbered(settings.checkpoint_root)):
        runtime.say(f"{settings.checkpoint_root} holds a run up to step {there[0][0]}, which the first save sets aside"
                    + ("" if saved else "; to go on with it: resume_from=auto"))
    epoch = data.Epoch(documents, settings.block_size, settings.seed, progress["epoch"], settings.chain)
    progress["row"] = min(progress["row"], len(epoch) - 1)  # another `chain` may need fewer rows
    describe(settings, runtime, model, epoch, held_out, made)
    if settings.patience and not len(held_out.spans):
        runtime.say(f"patience={settings.patience} is not used: nothing is held out")
    if dry_run:
        return
    passes = lambda: progress["epoch"] + progress["row"] / len(epoch)  # over the data so far
    if begun and not same_run and share_done(settings, begun, progress["minutes"], passes()) >= 1:
        raise UserError(f"{path} is at step {begun}, after which nothing is left to do: raise max_steps, max_minutes or max_epoch")
    if runtime.main and settings.bigram_start and not saved and model.config.modern and not model.config.tied:
        first, second, count = map(torch.from_numpy, epoch.bigrams())
        if count.sum() >= tokenizer.size:  # less says nothing of most tokens
            runtime.say("the model starts from the bigram counts of the corpus (bigram_start)")
            model.start_from_bigrams(first, second, count)  # DDP gives it to the other processes
    model.to(device).train()
    model.checkpointing = settings.checkpointing
    micro_batch = choose_micro_batch(settings, runtime, model, rows)
    optimizers = make_optimizers(model, settings, runtime.dtype, runtime.neighbours)
    scaler = torch.amp.GradScaler(device.type, enabled=runtime.dtype == torch.float16)
    if saved:
        load_optimizers(optimizers, scaler, saved)
    if runtime.main:
        checkpoint.make_folder(settings.checkpoint_root, f"checkpoint_root={settings.checkpoint_root}")
        runtime.processes.claim(settings.checkpoint_root)
    saved_step, saved_path = begun if same_run else -1, path
    metrics = saved["metrics"] if same_run else {}
    if runtime.main and same_run:  # it may have been ended just before
        file = os.path.realpath(path)
        if os.path.basename(file) != "best.pth":  # that may be older
            checkpoint.name_also(file, "last.pth")
        if metrics.get("step") == begun and metrics["loss"] == progress["best"]:
            checkpoint.name_also(file, "best.pth")
    saved = None  # gives its memory back
    peak = rt.peak_flops(runtime)  # here: the compiler's processes, once started, take the cores for a while
    if settings.compile and device.type == "mps":
        runtime.say("compile=True is not used on mps, for which PyTorch's compiler is not ready")
    elif settings.compile:
        compile_or_say(model, runtime)
    distributed = rt.distribute(runtime, model)
    record = rt.can_record(runtime, settings, rows // micro_batch)

    def learn(inputs, targets, numbers, factor):
        """Makes the gradient of `factor` times the summed loss of a step's rows; that loss."""
        total = torch.zeros((), device=device)
        for row in range(0, rows, micro_batch):
            piece = slice(row, row + micro_batch)
            with rt.exchange(distributed, last=row + micro_batch >= rows):
                with runtime.autocast():
                    loss = (distributed or model)(inputs[piece], targets[piece], numbers[piece])
                scaler.scale(loss * factor).backward()
            total += loss.detach()
        return total

    def save():
        """Rank 0 writes a checkpoint."""
        nonlocal saved_step, saved_path
        if runtime.main:
            content = checkpoint.describe(model, tokenizer) | dict(
                optimizer=[optimizer.state_dict() for optimizer in optimizers], scaler=scaler.state_dict(), progress=progress,
                random=dict(seed=settings.seed), settings=dataclasses.asdict(settings), metrics=metrics)
            new = bar.write if saved_step < 0 else None
            saved_path = checkpoint.save(settings.checkpoint_root, progress["step"], content, settings.keep, new)
        saved_step = progress["step"]

    learn = Recorded(learn) if record else learn
    stopping = rt.StopSignal(runtime.processes)
    writer = rt.tensorboard(runtime, settings.tensorboard_path, begun)
    samples = sample_prompts(held_out, tokenizer, settings.block_size)
    bar = rt.step_bar(runtime, initial=begun)
    earlier, refused, mean_loss, compiling = progress["minutes"], 0, None, 0.0
    tick, tick_tokens = time.perf_counter(), 0

    while True:
        minutes, wish = rt.add_up(runtime, (earlier + (time.perf_counter() - begin) / 60) * runtime.main, bool(stopping))
        progress["minutes"], step = minutes, progress["step"]
        share = share_done(settings, step, minutes, passes())
        finished = share >= 1 and step > 0
        due = not wish and step not in (0, progress["scored"]) and (finished or step % settings.eval_freq == 0)
        better = False
        if due:
            if saved_step < 0:  # a run's first evaluation may run out of memory
                save()
            before = metrics.get("tokens")
            metrics = evaluate(model, held_out, tokenizer, settings, runtime) | dict(step=step)
            if before not in (None, metrics["tokens"]):  # eval_steps or test_batch is another: losses do not compare
                progress |= dict(best=math.inf, worse=0)
            better = metrics["loss"] < progress["best"] or not metrics["tokens"]  # with nothing held out, the newest is the best
            progress |= dict(scored=step, best=min(progress["best"], metrics["loss"]), worse=0 if better else progress["worse"] + 1)
            if runtime.main:
                tell_evaluation(bar, writer, metrics, mean_loss, minutes, sample_replies(model, samples, tokenizer, runtime))

        finished |= settings.patience is not None and progress["worse"] >= settings.patience
        if due or step not in (0, saved_step) and (finished or wish or step % settings.save_freq == 0):
            save()
            if runtime.main and better:
                checkpoint.name_also(saved_path, "best.pth")
            tick, tick_tokens = time.perf_counter(), 0
        if wish:
            rt.add_up(runtime, 0)  # waits until rank 0 has saved: a launcher may end all processes when the first has ended
            bar.close()
            runtime.say(f"stopped at step {step}: " + (f"{saved_path}; go on with resume_from=auto" if saved_step >= 0 else
                                                       "nothing to save yet; begin again with the same command"))
            break
        if finished:
            bar.close()
            runtime.say(ending(settings, progress, metrics, mean_loss, share, progress["step"] == begun, compiling, tokenizer.size))
            break

        # One step: the rows [row, row + train_batch) of the epoch, the same whatever the number of processes.
        factor = learning_rate(step, share, settings)
        set_learning_rate(optimizers, factor)
        rt.seed_step(settings.seed, step, runtime.rank)
        first = progress["row"] + runtime.rank * rows
        count = epoch.real_targets(progress["row"], progress["row"] + settings.train_batch)
        tensors = runtime.tensors(*epoch.batch(first, first + rows))
        with rt.undisturbed(settings.compile):
            total = learn(*tensors, torch.full((), runtime.world / count, device=device))  # DDP takes the mean over processes
        norm = update(optimizers, scaler, model, settings)
        if not (record and learn.graph):  # a recorded step overwrites its gradients
            model.zero_grad(set_to_none=distributed is None)  # not before the next step: that makes a CPU's a twentieth slower
        refused = 0 if math.isfinite(norm) else refused + 1
        if refused == 20:
            raise UserError(f"the gradient has not been finite for {refused} steps at step {step}: lower lr={settings.lr} "
                            f"(muon_lr={settings.muon_lr}) and resume from an earlier checkpoint, resume_from=PATH, or start over")
        progress["step"] += 1
        progress["tokens"] += count
        progress["row"] += settings.train_batch
        if progress["row"] >= len(epoch):
            progress |= dict(epoch=progress["epoch"] + 1, row=0)
            epoch = data.Epoch(documents, settings.block_size, settings.seed, progress["epoch"], settings.chain)

        # Tell.
        tick_tokens += count
        if progress["step"] % 10 == 0 or step < 10:
            (loss,) = rt.add_up(runtime, total.item())
            loss /= count
            if math.isfinite(loss):
                mean_loss = loss if mean_loss is None else 0.9 * mean_loss + 0.1 * loss
            now = time.perf_counter()
            compiling = (now - tick) / 60 if step == 0 else compiling
            speed, tick, tick_tokens = tick_tokens / (now - tick), now, 0
            mfu = speed * model.flops_per_token() / (peak * runtime.world)
            for name, value in (("loss/train", loss), ("learning_rate", settings.lr * factor), ("gradient_norm", norm),
                                ("tokens_per_second", speed), ("MFU", mfu), ("filling", epoch.filling), ("epoch", progress["epoch"])):
                writer.add_scalar(name, value, progress["step"])
            bar.set_postfix_str(f"loss {mean_loss or loss:.3f}, {speed:,.0f} tokens/s, MFU {mfu:.0%}, "
                                f"epoch {passes():.2f}", refresh=False)
        bar.total = max(progress["step"], round(step / share)) if share > 1e-4 else None
        bar.update()
    writer.close()


def find_checkpoint(settings, runtime, rename):
    """(path, content) that `resume_from` means, or (None, None): rank 0 decides, and every process reads that file."""
    path, content, corpus = settings.resume_from, None, settings.data_path
    if runtime.main and path == "auto":
        path, content = checkpoint.newest(settings.checkpoint_root, corpus, rename)
    elif runtime.main and path is not None:
        content = checkpoint.read(path, corpus)
    path, mark = json.loads(runtime.processes.tell(json.dumps([path, content and content.get("progress")])))
    if path is not None and not runtime.main:
        content = checkpoint.read(path, corpus) if os.path.exists(path) else {}
        if content.get("progress") != mark:
            raise UserError(f"{path}, which rank 0 goes on from, is not on {platform.node()}: "
                            "put it on a disk that all machines share, or copy it to each")
    return path, content


def keep_split(settings, runtime, path, saved, tokenizer):
    """The settings, but with the checkpoint's train_percent and seed where it goes on with its corpus: another split would train
    on what was held out before, and measure on what was trained on. Where it goes on with another one, a line warns of that."""
    if not saved or saved["progress"].get("store") is None:
        return settings
    split = {name: saved["settings"][name] for name in ("train_percent", "seed")}
    kept = dataclasses.replace(settings, **split)
    if kept == settings:
        return settings
    if runtime.processes.once(lambda: data.identity(data.corpus_of(kept), tokenizer)) != saved["progress"]["store"]:
        if kept.seed != settings.seed or kept.train_percent > settings.train_percent:
            runtime.say(f"if {settings.data_path} holds what {path} was trained on, part of that is held out now, and the validation loss "
                        f"too low: give seed={kept.seed} train_percent={kept.train_percent}, as there")
        return settings
    for name, value in split.items():
        if value != getattr(settings, name):
            runtime.say(f"{name}={value}, as in {path}, not {getattr(settings, name)}: the same dialogues stay held out")
    return kept


def fitted(model, known, tokenizer, settings, path, runtime):
    """A checkpoint's model, with rows for what `tokenizer` has more than its own, `known`. Lines say what the settings want otherwise."""
    if added := tokenizer.size - known.size:
        runtime.say(f"{added} characters of {settings.data_path} join the vocabulary of {path}")
        model = extended(model, added, settings.dropout, tokenizer_module.UNK, known.size)
    config = GPTConfig.of(settings, tokenizer.size)
    if settings.tokenizer != (kind := tokenizer.state()["kind"]):
        runtime.say(f"tokenizer={kind}, as in {path}, not {settings.tokenizer}")
    for field in dataclasses.fields(GPTConfig):
        wanted, has = getattr(config, field.name), getattr(model.config, field.name)
        if wanted != has and (settings.n_kv_head or field.name != "n_kv_head"):
            runtime.say(f"{field.name}={has}, as in {path}, not {wanted}")
    return model


def starting_point(settings, runtime, path, saved, made):
    """(progress, same_run): where the run begins, and whether it goes on in the folder of its checkpoint. `made`: the store's manifest.

    A new run, and one on another corpus than its checkpoint's (or from a file that keeps no place in one), begins at step 0; else it
    begins at its checkpoint's step. If the folder is another run's or has later files, it does not go on there: it counts its best anew,
    and its first save sets aside what lies in checkpoint_root, for pruning would take the later files for the newest. It counts its
    best anew also where the folder has lost best.pth.
    """
    anew = dict(step=0, epoch=0, row=0, tokens=0, minutes=0.0, best=math.inf, worse=0, scored=0, store=made["identity"])
    if not saved:
        return anew, False
    progress = anew | saved["progress"]
    if (original := progress.pop("original", None)) == made["corpus"]:  # it kept no place in the data
        return progress | dict(store=made["identity"]), False
    if (store := saved["progress"].get("store")) != made["identity"]:
        reason = f"{settings.data_path}, or what is held out of it, is not what {path} was trained on" if store or original else (
            f"{path} keeps no place in a corpus")  # a classifier, or a folder that came back
        runtime.say(f"{reason}: a new run with its weights, from step 0")
        saved["optimizer"] = None
        return anew, False
    root = os.path.realpath(settings.checkpoint_root)
    same_run = os.path.dirname(os.path.realpath(path)) == root and all(step <= progress["step"] for step, _ in checkpoint.numbered(root))
    has_best = os.path.exists(os.path.join(root, "best.pth"))
    same_run, has_best = rt.add_up(runtime, same_run * runtime.main, has_best * runtime.main)  # rank 0's disk decides
    return progress if same_run and has_best else progress | dict(best=math.inf, worse=0, scored=0), bool(same_run)


def load_optimizers(optimizers, scaler, saved):
    """Takes over the optimizers' states, but keeps the learning rates and weight decays that the settings ask for."""
    for optimizer, state in zip(optimizers, saved.get("optimizer") or []):
        groups = optimizer.param_groups
        try:
            optimizer.load_state_dict(state)
        except ValueError as error:
            raise UserError(f"the checkpoint's optimizer is another one ({error}); use the same `optimizer` (an original's file: adamw), "
                            "or start anew")
        optimizer.param_groups = groups  # load_state_dict made new ones
    if saved.get("optimizer") and saved.get("scaler"):  # empty where that run needed none
        scaler.load_state_dict(saved["scaler"])


def compile_or_say(model, runtime):
    """Compiles the model's parts after a trial of the compiler; where it does not work, says why and goes on without."""
    try:
        with rt.undisturbed():
            torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=runtime.device))
        model.compile_parts()
        runtime.say("compile=True: the first step may take a minute, and Ctrl-C waits for its end")
    except Exception as error:
        runtime.say(f"compile=True does not work here, going on without: {(str(error) or repr(error)).splitlines()[0]}")


def choose_micro_batch(settings, runtime, model, rows):
    """Rows that this process computes at once: as set, or the most that memory holds (CPU: about 8,192 tokens)."""
    divisors = [n for n in range(rows, 0, -1) if rows % n == 0]
    if settings.micro_batch != "auto":
        return next(n for n in divisors if n <= settings.micro_batch)
    if runtime.device.type != "cuda":
        return next(n for n in divisors if n == 1 or n * settings.block_size <= 8192)
    # Room for the optimizers' state and, as a recorded pass keeps its memory, for what Muon computes with: half of all matrices at once.
    state = torch.empty(12 * model.count_parameters(), dtype=torch.uint8, device=runtime.device)
    for n in divisors:
        try:
            ids = torch.zeros(n, settings.block_size, dtype=torch.long, device=runtime.device)
            with runtime.autocast():
                loss = model(ids, ids, torch.zeros_like(ids))
            loss.backward()
            free, total = torch.cuda.mem_get_info(runtime.device)
            fits = free > 0.05 * total
        except torch.OutOfMemoryError:
            fits = False
        finally:
            loss = None
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        if rt.add_up(runtime, fits)[0] == runtime.world:  # in every process
            break
    del state
    return n


@torch.no_grad()
def evaluate(model, held_out, tokenizer, settings, runtime):
    """Loss (nats per real token) and bits per character of held-out dialogues, each scored by itself, over all processes."""
    rows = data.Epoch(held_out, settings.block_size, 0, 0)
    batches = range(0, len(rows), settings.test_batch)[:settings.eval_steps]
    characters, nats, count, length = tokenizer.characters, 0.0, 0, 0
    model.eval()
    with torch.compiler.set_stance("force_eager"), runtime.autocast():
        for row in batches[runtime.rank::runtime.world]:
            arrays = rows.batch(row, min(row + settings.test_batch, len(rows)))
            nats += model.loss(*runtime.tensors(*arrays)).item()
            real = arrays[1][arrays[1] != data.IGNORE]
            count, length = count + len(real), length + characters[real].sum()
    model.train()
    nats, count, length = rt.add_up(runtime, nats, count, float(length))
    if not count:
        return dict(loss=math.inf, bits=math.inf, tokens=0)
    return dict(loss=nats / count, bits=nats / math.log(2) / length, tokens=int(count))


def sample_prompts(held_out, tokenizer, block_size):
    """The first utterances of a few held-out dialogues, as text."""
    texts = (tokenizer.decode(held_out.ids[begin:end].tolist()).split("\n") for begin, end in held_out.spans)
    prompts = (text[0] for text in texts if len(text) > 1 and 3 <= len(text[0]) <= 60 and "\ufffd" not in text[0]
               and len(tokenizer.encode(text[0])) < block_size)
    return list(dict.fromkeys(itertools.islice(prompts, 3)))


def sample_replies(model, prompts, tokenizer, runtime):
    """Yields (prompt, reply) at temperature 0.8, from a generator of its own."""
    if not prompts:
        return
    generator = torch.Generator(runtime.device).manual_seed(0)
    sampling = Sampling(temperature=0.8, top_p=0.9, max_new_tokens=30, banned=tokenizer.banned(model.config.vocab_size))
    ids = [tokenizer.encode(prompt).tolist() + [tokenizer_module.SEP] for prompt in prompts]
    model.eval()
    with torch.compiler.set_stance("force_eager"), runtime.autocast():
        steps = list(generate(model, ids, sampling, (tokenizer_module.SEP, tokenizer_module.PAD), generator=generator))
    model.train()
    replies = torch.stack(steps, dim=1).tolist()
    yield from ((prompt, tokenizer.decode(i for i in reply if i > tokenizer_module.PAD)) for prompt, reply in zip(prompts, replies))


def tell_evaluation(bar, writer, metrics, mean_loss, minutes, replies):
    """Prints and logs what an evaluation found. `mean_loss`: of the last training steps, or None."""
    step, loss = metrics["step"], metrics["loss"]
    writer.add_scalar("minutes", minutes, step)
    if metrics["tokens"]:
        bar.write(f"step {step}, {minutes:.1f} min: validation loss {loss:.4f} ({metrics['bits']:.3f} bits a character, "
                  f"perplexity {math.exp(min(loss, 50)):.1f})")
        for name, value in (("loss/validation", loss), ("bits_per_character", metrics["bits"]), ("gap", loss - (mean_loss or math.nan))):
            writer.add_scalar(name, value, step)
    else:
        bar.write(f"step {step}, {minutes:.1f} min: nothing is held out (train_percent=1), so nothing measured")
    told = []
    for prompt, reply in replies:
        bar.write(f"    {prompt}  →  {reply}")
        told.append(f"{prompt} → {reply}")
    writer.add_text("replies", "  \n".join(told), step)
    writer.flush()


def ending(settings, progress, metrics, mean_loss, share, idle, compiling, vocab_size):
    """What a finished run says: why it ended, which of its checkpoints to talk to, and what was wrong with it. `idle`: nothing was left
    to do; `compiling`: minutes of its first step."""
    folder, best, guessing = settings.checkpoint_root, progress["best"], math.log(vocab_size)
    why, files, name, by_heart = "", f"{folder}/last.pth", "last.pth", ""
    if share < 1:
        why = f" (evaluations without improvement: {settings.patience})"
    if idle:
        why = f" (nothing was left to do: raise {'patience' if share < 1 else 'max_steps, max_minutes or max_epoch'})"
    elif settings.compile and compiling > 0.5 * (settings.max_minutes or math.inf):
        why += " (more than half of it compiling the first step: raise max_minutes, or give compile=False)"
    if math.isfinite(best):
        files += f", and best.pth with the best validation loss, {best:.4f}"
        poor = best > guessing + 0.1  # where an untrained model may be
        if poor:
            files += f", which is worse than guessing ({guessing:.4f}): lower lr={settings.lr}, or take more text"
        if best == metrics.get("loss") or settings.patience or mean_loss is not None and mean_loss >= best:
            name = "best.pth"
        elif not poor:
            by_heart = " (it knows its training text better than best.pth)"
    return (f"finished after {progress['step']} steps and {progress['minutes']:.1f} minutes{why}: {files}\n"
            f"talk to it: python chat.py {quoted(f'{folder}/{name}')}{' best_of=4' * ((mean_loss or 0) > BY_HEART)}{by_heart}")


def describe(settings, runtime, model, epoch, held_out, made):
    """Says what is about to be trained, on what. `made`: the token store's manifest."""
    positions = epoch.positions[-1]
    steps = -(-len(epoch) // settings.train_batch)
    parameters = model.count_parameters()
    state = 4 if settings.optimizer == "muon" else 8
    width = 2 if runtime.dtype != torch.float32 else 4
    rows = settings.train_batch // runtime.world
    if settings.micro_batch != "auto" or runtime.device.type != "cuda":  # a GPU's memory decides
        rows = choose_micro_batch(settings, runtime, model, rows)
    config, unknown = model.config, made["unknown"] / sum(made["tokens"].values())
    activations = rows * settings.block_size * model.kept_bytes(width, settings.checkpointing)
    for name, text in (
            ("settings", ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(settings).items())),
            ("machine", f"{runtime.device}, {str(runtime.dtype).removeprefix('torch.')}, processes: {runtime.world}, "
                        f"threads: {torch.get_num_threads()}"),
            ("model", f"{config.arch}, {parameters / 1e6:.2f}M parameters, vocabulary {config.vocab_size}"),
            ("data", f"{len(epoch.documents.spans)} dialogues, {positions:,} tokens an epoch in {len(epoch)} rows "
                     f"({epoch.filling:.2%} filling), {steps} steps; {len(held_out.spans)} dialogues held out"
                     + (f"; {unknown:.2%} of all tokens <unk>" if unknown > 1e-4 else "")),
            ("memory", f"about {parameters * (8 + state + 2 * (width == 2)) / 2**30:.2f} GiB of weights, gradients and optimizer, and "
                       f"{activations / 2**30:.2f} GiB of activations"),
            ("work", f"{model.flops_per_token() / 1e6:.1f} MFLOP a token, "
                     f"{model.flops_per_token() * len(epoch) * settings.block_size / 1e12:.1f} TFLOP an epoch")):
        runtime.say(f"{name:<9} {text}")
    if settings.max_steps and settings.warmup_steps >= settings.max_steps:
        runtime.say(f"warmup_steps={settings.warmup_steps} lasts as long as the run, which never reaches lr={settings.lr}")
    if made["utterances"] < 1.5 * made["dialogues"]:
        runtime.say(f"most dialogues of {settings.data_path} have only one utterance, which teaches no reply: put an empty line "
                    "between dialogues, not between their utterances")


if __name__ == "__main__":
    settings_module.main(main)
