"""Fine-tune a checkpoint into a classifier of reviews, measure it, use it.

python sentimentalTrain.py CONFIG… [key=value …]     several configurations end in one table
python sentimentalTrain.py CONFIG|CHECKPOINT --predict FILE.csv|FILE.txt|-
"""

import dataclasses
import glob
import json
import math
import os
import re
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import reviews
import runtime as rt
import settings as settings_module
from data import file_sha256
from model import Classifier, extended
from ngrams import Ngrams
from optim import learning_rate, make_optimizers, set_learning_rate, share_done, update
from settings import SentimentSettings, UserError
from tokenizer import SEP, UNK

NEW = 2  # tokens after the vocabulary: <start> and <extract>
RUN = re.compile(r"seed\d+(-(split|fold)\d+)?")  # folder of one run of several
PART = 4096  # reviews that are predicted and printed together


def main():
    options = command_line()
    predicting = options.predict is not None or options.predict_text is not None
    with rt.Processes() as processes:
        paths, all_settings = configurations(options.config, predicting)
        runtime = rt.start(all_settings[0], processes)
        if predicting:
            return predict(paths[0], all_settings[0].checkpoint_root, options, runtime)
        check(all_settings, processes)
        if runtime.main and not options.dry_run:
            make_folders(all_settings, options.table, processes)
        stopping = None if options.dry_run else rt.StopSignal(processes)  # up to here, and in a dry run, Ctrl-C just ends
        results = []
        for path, settings in zip(paths, all_settings):
            if len(all_settings) > 1:
                runtime.say(f"\n== {path}")
            result, failed = experiment(settings, runtime, stopping, options.dry_run)
            results += [result] if result else []
            if failed or rt.add_up(runtime, bool(stopping))[0]:
                break
        if len(all_settings) > 1 and results and runtime.main:
            table(paths, all_settings, results, options.table)
        if failed:
            raise failed


def command_line():
    parser = settings_module.parser(
        SentimentSettings, "python sentimentalTrain.py CONFIG… [key=value …] [--dry-run] [--table PATH]\n"
        "       python sentimentalTrain.py CONFIG|CHECKPOINT --predict FILE|- | --predict-text TEXT")
    parser.add_argument("config", nargs="+", help="YAML files, key=value; with --predict a .pth file too")
    parser.add_argument("--dry-run", action="store_true", help="print settings, size, memory and FLOPs, and stop")
    parser.add_argument("--table", metavar="PATH", default="checkpoints/ablation",
                        type=lambda path: re.sub(r"\.(md|png)$", "", path if os.path.basename(path) else os.path.join(path, "ablation")),
                        help="where the table of several configurations goes, as PATH.md and PATH.png (default: %(default)s)")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--predict", metavar="FILE", help="label and probability of each review: the column review of a .csv or .tsv, "
                        "else each line; - is standard input")
    given.add_argument("--predict-text", metavar="TEXT", help="label and probability of this one review")
    return parser.parse_intermixed_args()


def configurations(words, predicting):
    """(paths, their settings) of the words of a command line; of a checkpoint, to predict with, they are what key=value says."""
    names = [word for word in words if "=" not in word or os.path.isfile(word)]  # it may lie in a folder called lr=0.01
    paths = [path for name in names for path in ([] if os.path.exists(name) else sorted(glob.glob(name))) or [name]]  # Windows expands no *
    over = settings_module.overrides(word for word in words if word not in names)
    if not paths:
        raise UserError("no configuration is named; config/demoSentimental.yaml is one")
    if predicting:
        paths = [os.path.join(path, "best.pth") if os.path.isdir(path) else path for path in paths]
        if len(paths) > 1:
            raise UserError(f"--predict takes one configuration or checkpoint, not {len(paths)}")
        if key := next((key for key in ("resume_from", "base_model") if key in over), None):
            raise UserError(f"{key}={over[key]} is not used in predicting: name the classifier in place of the configuration")
    elif models := [path for path in paths if path.endswith(".pth")]:
        raise UserError(f"{models[0]} is a checkpoint; to classify with it: --predict FILE, to train on: CONFIG base_model={models[0]}")
    read = lambda path: {} if path.endswith(".pth") else settings_module.read_yaml(path)
    all_settings = [settings_module.build(SentimentSettings, read(path) | over) for path in paths]
    for key in ("device", "dtype"):
        if len(values := sorted({getattr(settings, key) for settings in all_settings})) > 1:
            raise UserError(f"{key} is {' and '.join(values)} in these configurations; run them one by one")
    return paths, all_settings


def check(all_settings, processes):
    """A UserError for what is wrong with any of the configurations: the last one's shows before the first has run for hours."""
    roots = [os.path.realpath(settings.checkpoint_root) for settings in all_settings]
    for settings, root in zip(all_settings, roots):
        if settings.base_model is None:
            raise UserError("base_model is not set; name a checkpoint, for example base_model=checkpoints/demo/best.pth")
        if roots.count(root) > 1:
            raise UserError(f"checkpoint_root={settings.checkpoint_root} is shared by several configurations: each would set aside the "
                            "previous one's results; give each its own")
        folder, name = os.path.split(settings.base_model)
        above, last = os.path.split(folder := os.path.realpath(folder))
        if (folder in roots or above in roots and RUN.fullmatch(last)) and checkpoint.OURS.fullmatch(name):
            raise UserError(f"base_model={settings.base_model} lies in checkpoint_root: a classifier would take its place, "
                            "and the next run start from that; name another checkpoint_root")
        if (settings.data_path or "").lower().endswith((".csv", ".tsv")):
            raise UserError(f"data_path={settings.data_path} is for a corpus of dialogues; name reviews with sentimental_data_path")
        texts, labels, names, _ = reviews.read_reviews(settings.sentimental_data_path)
        for _, _, training, *_ in reviews.splits(texts, labels, names, settings):
            if len(training) < settings.train_batch:
                raise UserError(f"train_batch={settings.train_batch} is more than the {len(training)} reviews of the training part; "
                                f"use {len(training)} or fewer")
    files = sorted({path for settings in all_settings for path in (settings.sentimental_data_path, settings.split_path) if path})
    processes.once(lambda: ", ".join(f"{path} ({file_sha256(path)[:8]})" for path in files))  # the same on each machine
    for base, corpus in {(settings.base_model, settings.data_path) for settings in all_settings}:
        checkpoint.load_model(base, corpus=corpus)


def make_folders(all_settings, table, processes):
    """Makes all that will be written to, and claims it; a UserError where that cannot be."""
    for settings in all_settings:
        for key in ("checkpoint_root", "tensorboard_path"):
            if folder := getattr(settings, key):
                checkpoint.make_folder(folder, f"{key}={folder}")
        processes.claim(settings.checkpoint_root)
    if len(all_settings) > 1:
        checkpoint.make_folder(os.path.dirname(table) or ".", f"--table {table}")


def experiment(settings, runtime, stopping, dry_run):
    """All runs (seeds, folds) of one configuration: (the figures of those that ended, or None; the error that ended it, or None)."""
    if settings.resume_from:
        runtime.say(f"resume_from={settings.resume_from} is not used here: base_model={settings.base_model} is what is started from")
    if settings.compile:
        runtime.say("compile=True is not used here: batches have many lengths, and each would be compiled anew")
    if settings.frozen and settings.weight_decay:
        runtime.say(f"weight_decay={settings.weight_decay} is not used where frozen=True: it would pull on the embeddings that are to stay")
    if settings.patience and not settings.val_percent:
        runtime.say(f"patience={settings.patience} is not used: with val_percent=0 nothing is held out")
    texts, labels, names, left_out = reviews.read_reviews(settings.sentimental_data_path)
    if left_out:
        runtime.say(f"{settings.sentimental_data_path}: rows without a review or label, left out: {left_out}")
    runtime.say(f"settings  {', '.join(f'{k}={v}' for k, v in dataclasses.asdict(settings).items())}\n"
                f"machine   {runtime.device}, {str(runtime.dtype).removeprefix('torch.')}, processes: {runtime.world}")
    if len({re.sub(r"\.0$", "", name.casefold()) for name in names}) < len(names):
        runtime.say(f"some of the labels {', '.join(names)} look alike, but are classes of their own: write alike those that are one")
    classes = ", ".join(f"{name}: {count}" for name, count in zip(names, np.bincount(labels)))
    runtime.say(f"reviews   {settings.sentimental_data_path}: {len(texts)} of {len(names)} classes ({classes})")
    plans = list(reviews.splits(texts, labels, names, settings))
    root, several, results, failed = settings.checkpoint_root, len(plans) > 1, [], None
    for title, seed, *parts in plans:
        folder = os.path.join(root, title.replace(", ", "-").replace(" ", "")) if several else root
        try:
            result = train(settings, runtime, stopping, texts, labels, names, seed, parts, folder, dry_run)
        except Exception as error:  # what ended before keeps its figures
            result, failed = None, error
        if result is None:
            break
        results.append(dict(title=title, seed=seed) | result)
        runtime.say(f"{title}: {tell(result['test'], names)}; {result['minutes']:.1f} minutes")
    if not results:
        return None, failed
    summary = {name: float(np.mean([r["test"][name] for r in results])) for name in ("accuracy", "f1", "auc", "majority")}
    summary |= dict(deviation=float(np.std([r["test"]["accuracy"] for r in results], ddof=1)) if len(results) > 1 else None,
                    trained=results[0]["trained"], minutes=sum(r["minutes"] for r in results), runs=results, planned=len(plans))
    if several:
        runtime.say(f"{len(results)} of {len(plans)} runs: test accuracy {percent(summary)}, macro F1 {summary['f1']:.4f}, "
                    f"ROC AUC {summary['auc']:.4f}, majority {summary['majority']:.2%}")
    if runtime.main:
        if several:
            checkpoint.set_aside(root)
            chosen = max(results, key=lambda result: result["validation"]["accuracy"] if result["validation"] else 0)
            checkpoint.name_also(os.path.join(chosen["folder"], "best.pth"), os.path.join("..", "best.pth"))
        content = summary | dict(classes=names, settings=dataclasses.asdict(settings))
        with checkpoint.whole(os.path.join(root, "metrics.json")) as temporary, open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
        best = " that is best on validation" if several and chosen["validation"] else ""
        runtime.say(f"the classifier{best}: {root}/best.pth; all figures: {root}/metrics.json")
    return summary, failed


def train(settings, runtime, stopping, texts, labels, names, seed, parts, folder, dry_run):
    """One run: fine-tunes on parts[0], chooses the epoch on parts[1], measures once on parts[2]; None if it was stopped."""
    begin, device = time.perf_counter(), runtime.device
    training, validation, test = parts
    torch.manual_seed(seed)
    classifier, tokenizer, block_size, met = make_classifier(settings, runtime, names)
    classifier.to(device).train()
    classifier.gpt.checkpointing = settings.checkpointing
    trained = classifier.freeze(NEW, settings.frozen)
    numbers = torch.from_numpy(reviews.hashes(texts))
    met = torch.cat([met, numbers[training], numbers[validation]]).unique()
    if known := torch.isin(numbers[test], met).sum():
        runtime.say(f"warning: {known} of the {len(test)} reviews in the test part were also trained on, as copies in another part "
                    f"or earlier, by base_model={settings.base_model}: the figures will be too high")
    uncut = tokenizer.encode_batch(texts)  # the n-grams see all of a review
    rows = reviews.encode(uncut, classifier.gpt.config.vocab_size - NEW, block_size)
    lengths = np.array([len(row) for row in rows])
    unit = reviews.width_unit(settings.use_mask, block_size)
    steps = -(-len(training) // settings.train_batch)
    sort_by = lengths if settings.use_mask else np.zeros_like(lengths)  # what batches are made by
    order = reviews.by_length(training, sort_by, settings.train_batch, np.random.default_rng([seed, 0]))
    filling = 1 - lengths[training].sum() / sum(reviews.pad([rows[i] for i in batch], unit)[0].size for batch in order)
    pieces = count_pieces(settings, runtime)
    describe_run(runtime, classifier, trained, parts, lengths, filling, np.mean(np.concatenate(uncut) == UNK),
                 -(-settings.train_batch // pieces) * -(-lengths.max() // unit) * unit)
    if dry_run:
        return None
    if runtime.main:
        checkpoint.make_folder(folder, f"checkpoint_root={settings.checkpoint_root}")
    linear = Ngrams.train([uncut[i] for i in training], labels[training], len(names), settings.ngrams) if settings.ngrams else None
    decay = 0.0 if settings.frozen else settings.weight_decay
    optimizers = make_optimizers(classifier, dataclasses.replace(settings, weight_decay=decay), runtime.dtype, runtime.neighbours)
    scaler = torch.amp.GradScaler(device.type, enabled=runtime.dtype == torch.float16)
    distributed = rt.distribute(runtime, classifier)
    name = os.path.relpath(folder, os.path.dirname(os.path.abspath(settings.checkpoint_root)))  # with the run's, if there are several
    writer = rt.tensorboard(runtime, settings.tensorboard_path and os.path.join(settings.tensorboard_path, name))
    bar = rt.step_bar(runtime, total=min(settings.max_steps or math.inf, settings.max_epoch * steps))
    step, epoch, best, best_state, history, worse, refused, share = 0, 0, None, None, [], 0, 0, 0.0

    def measured(members, linear):
        probabilities = classify(classifier, linear, rows, uncut, members, settings.test_batch, unit, runtime)
        return reviews.measure(probabilities, labels[members], names)

    while share < 1 and not (settings.patience and worse >= settings.patience):
        nats, right, seen = 0.0, 0.0, 0
        for batch in reviews.by_length(training, sort_by, settings.train_batch, np.random.default_rng([seed, epoch])):
            minutes, wish = rt.add_up(runtime, (time.perf_counter() - begin) / 60 * runtime.main, bool(stopping))
            if wish:
                bar.close()
                runtime.say("stopped" + (f": {folder}/best.pth is the best so far" if best else ", nothing is saved yet"))
                return None
            share = share_done(settings, step, minutes, step / steps)
            if share >= 1 and step > 0:
                break
            factor = learning_rate(step, share, settings)
            set_learning_rate(optimizers, factor)

            # The pieces of a batch, and their random numbers, are the same for one process and for two.
            mine = list(enumerate(np.array_split(batch, pieces)))[runtime.rank::runtime.world]
            for number, piece in mine:
                rt.seed_step(seed, step, number)
                weight, piece = (1.0, piece) if len(piece) else (0.0, batch[:1])  # all processes must exchange
                ids, ends, wanted = runtime.tensors(*reviews.pad([rows[i] for i in piece], unit), labels[piece])
                with rt.exchange(distributed, number == mine[-1][0]):
                    with runtime.autocast():
                        scores = (distributed or classifier)(ids, ends)
                    loss = F.cross_entropy(scores, wanted, reduction="sum") * weight
                    scaler.scale(loss * (runtime.world / len(batch))).backward()  # DDP takes the mean over processes
                nats += loss.item()
                right += (scores.argmax(dim=-1) == wanted).sum().item() * weight
            norm = update(optimizers, scaler, classifier, settings)
            classifier.zero_grad(set_to_none=distributed is None)
            refused = 0 if math.isfinite(norm) else refused + 1
            if refused == 20:
                raise UserError(f"the gradient has not been finite for {refused} steps at step {step}: lower lr={settings.lr} "
                                f"(muon_lr={settings.muon_lr})")
            seen += len(batch)
            step += 1
            bar.set_postfix_str(f"epoch {epoch + 1}, lr {settings.lr * factor:.1e}", refresh=False)
            bar.update()

        if not seen:  # the time was up between two epochs
            break
        epoch += 1
        share = share_done(settings, step, minutes, step / steps)
        nats, right = rt.add_up(runtime, nats, right)
        told = dict(epoch=epoch, loss=nats / seen, train_accuracy=right / seen)
        if len(validation):
            figures = measured(validation, linear)
            told |= dict(validation=figures["accuracy"], validation_auc=figures["auc"])
        history.append(told)
        for name, value in told.items():
            writer.add_scalar(name, value, step)
        if runtime.main:
            words = [f"{name.replace('_', ' ')} {round(value, 4)}" for name, value in told.items()]
            bar.write(f"{', '.join(words)}, {(time.perf_counter() - begin) / 60:.1f} minutes")
        worse += 1
        quality = lambda told: (told["validation"], told["validation_auc"])  # with few reviews accuracies are often equal
        if best is None or not len(validation) or quality(told) > quality(best):
            best, worse = told, 0
            best_state = {name: value.cpu().clone() for name, value in classifier.state_dict().items()}
            if runtime.main:
                save(folder, step, classifier, linear, tokenizer, names, block_size, met, dataclasses.replace(settings, seed=seed),
                     history, bar.write if epoch == 1 else None)
    bar.close()

    classifier.load_state_dict(best_state)
    metrics = dict(validation=measured(validation, linear) if len(validation) else None, test=measured(test, linear))
    if linear:
        metrics["test_without_ngrams"] = measured(test, None)
    minutes = (time.perf_counter() - begin) / 60
    for name in ("accuracy", "f1", "auc", "majority"):
        writer.add_scalar(f"test/{name}", metrics["test"][name], step)
    writer.add_scalar("minutes", minutes, step)
    writer.add_text("test/confusion", str(metrics["test"]["confusion"]), step)
    writer.close()
    return metrics | dict(epoch=best["epoch"], history=history, filling=filling, trained=trained, folder=folder, minutes=minutes)


def make_classifier(settings, runtime, names):
    """(classifier, tokenizer, block size, hashes of what it was trained on as a classifier) from the checkpoint base_model, which
    is a GPT or a classifier."""
    gpt, tokenizer, meta = checkpoint.load_model(settings.base_model, corpus=settings.data_path)
    earlier = meta.get("classifier")
    gpt = extended(gpt, 0 if earlier else NEW, settings.dropout, like=SEP)
    block_size = min(settings.block_size, gpt.config.block_size)
    if block_size < settings.block_size:
        runtime.say(f"block_size={block_size}, as in {settings.base_model}, not {settings.block_size}")
    classifier = Classifier(gpt, len(names), settings.use_mask)
    if earlier and earlier["names"] == names:
        classifier.classifier.load_state_dict(earlier["head"])
    return classifier, tokenizer, block_size, (earlier or {}).get("met", torch.zeros(0, dtype=torch.int64))


def save(folder, step, classifier, linear, tokenizer, names, block_size, met, settings, history, tell=None):
    """Writes all that prediction needs into one checkpoint, which is also a GPT's. `tell`: as checkpoint.save has it."""
    head = dict(head=classifier.classifier.state_dict(), names=names, block_size=block_size, use_mask=classifier.use_mask,
                met=met, ngrams=vars(linear) if linear else None)
    content = checkpoint.describe(classifier.gpt, tokenizer) | dict(
        classifier=head, optimizer=None, scaler=None, progress=dict(step=step, epoch=len(history)),
        random=dict(seed=settings.seed), settings=dataclasses.asdict(settings), metrics=history[-1])
    checkpoint.name_also(checkpoint.save(folder, step, content, 0, tell), "best.pth")


def load(path):
    """(classifier, its n-gram model or None, tokenizer, what else was saved of it) of a file that `save` wrote."""
    gpt, tokenizer, meta = checkpoint.load_model(path)
    if (saved := meta.get("classifier")) is None:
        raise UserError(f"{path} is no classifier; make one: python sentimentalTrain.py config/demoSentimental.yaml base_model={path}")
    if not saved.get("causal", True):
        raise UserError(f"{path} was trained with causal=False, which this version no longer has: train it anew")
    classifier = Classifier(gpt, len(saved["names"]), saved["use_mask"])
    classifier.classifier.load_state_dict(saved["head"])
    return classifier.eval(), Ngrams(**saved["ngrams"]) if saved["ngrams"] else None, tokenizer, saved


def predict(path, root, options, runtime):
    """Prints a line for each text: label, tab, probability; an empty line for an empty text. A configuration's classifier is in `root`."""
    if options.predict == "-" and runtime.world > 1:
        raise UserError("--predict - is for one process: several would each read a part of standard input; name a file")
    classifier, linear, tokenizer, saved = load(path if path.endswith(".pth") else os.path.join(root, "best.pth"))
    classifier.to(runtime.device)
    text = (options.predict_text or "").encode("utf-8", "replace").decode()  # a shell may pass what is not UTF-8
    texts = [part.strip() for part in ([text] if options.predict is None else reviews.read_unlabelled(options.predict))]
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    unit = reviews.width_unit(saved["use_mask"], saved["block_size"])
    with tqdm(total=sum(map(bool, texts)), unit="review", disable=None if runtime.main else True) as bar:
        for begin in range(0, len(texts), PART):
            part = texts[begin:begin + PART]
            uncut = tokenizer.encode_batch(list(filter(None, part)))
            rows = reviews.encode(uncut, classifier.gpt.config.vocab_size - NEW, saved["block_size"])
            probabilities = classify(classifier, linear, rows, uncut, np.arange(len(rows)), 32, unit, runtime, bar)
            lines = iter(f"{saved['names'][row.argmax()]}\t{row.max():.4f}" for row in probabilities)
            if runtime.main:
                bar.write("\n".join(next(lines) if text else "" for text in part))


@torch.no_grad()
def classify(classifier, linear, rows, uncut, members, batch_size, unit, runtime, bar=None):
    """(len(members), classes) probabilities, computed by all processes together. With a `linear` model beside the GPT they are the
    normalised geometric mean of both."""
    logs = np.zeros((len(members), classifier.classifier.out_features))
    batches = reviews.by_length(np.arange(len(members)), np.array([len(rows[i]) for i in members]), batch_size)
    classifier.eval()
    for number in range(runtime.rank, len(batches), runtime.world):
        batch = batches[number]
        ids, ends = runtime.tensors(*reviews.pad([rows[i] for i in members[batch]], unit))
        with runtime.autocast():
            scores = classifier(ids, ends)
        logs[batch] = scores.log_softmax(dim=-1).cpu()
        if linear is not None:
            logs[batch] = (logs[batch] + linear.log_probabilities([uncut[i] for i in members[batch]])) / 2
        if bar is not None:
            bar.update(sum(map(len, batches[number:number + runtime.world])))
    classifier.train()
    logs = np.array(rt.add_up(runtime, *logs.ravel())).reshape(logs.shape)
    return torch.from_numpy(logs).softmax(dim=1).numpy()


def count_pieces(settings, runtime):
    """Into how many pieces a batch is cut: at least two, so that two processes compute what one does; auto is just that.
    More processes need more pieces, whose random numbers are others."""
    rows = settings.train_batch if settings.micro_batch == "auto" else settings.micro_batch
    return -(-max(2, -(-settings.train_batch // rows)) // runtime.world) * runtime.world


def describe_run(runtime, classifier, trained, parts, lengths, filling, unknown, most):
    """Says what is about to be trained, on what. `filling`, `unknown`: shares of all tokens; `most`: positions computed at once."""
    training, validation, test = parts
    parameters = classifier.gpt.count_parameters()
    config, tokens = classifier.gpt.config, int(lengths[training].sum())
    learning = np.mean([block.attention.q.weight.requires_grad for block in classifier.gpt.blocks])
    work = (classifier.gpt.flops_per_token() - 6 * classifier.gpt.head.weight.numel()) * (2 + learning) / 3
    held = sum(p.numel() for p in classifier.parameters() if p.requires_grad)  # of all embeddings, where some are trained
    kept = classifier.gpt.kept_bytes(2 if runtime.dtype != torch.float32 else 4, classifier.gpt.checkpointing)
    runtime.say(
        f"model     {config.arch}, {config.n_layer} layers, {config.n_embd} wide, {parameters / 1e6:.2f}M parameters, "
        f"{trained / 1e6:.2f}M of them trained\n"
        f"data      {len(training)} reviews to train on ({tokens:,} tokens, {filling:.2%} filling), {len(validation)} to choose the epoch, "
        f"{len(test)} to test{f'; {unknown:.2%} of all tokens <unk>' if unknown > 1e-4 else ''}\n"
        f"memory    about {(4 * parameters + 12 * held) / 2**30:.2f} GiB of weights, gradients and optimizer, and up to "
        f"{most * kept / 2**30:.2f} GiB of activations\n"  # frozen blocks pass a gradient on to the embeddings
        f"work      {work * tokens / (1 - filling) / 1e12:.1f} TFLOP an epoch")


def tell(metrics, names):
    """Metrics in words, the confusion matrix in the order of `names`."""
    return (f"accuracy {metrics['accuracy']:.2%} (always the commonest: {metrics['majority']:.2%}), macro F1 {metrics['f1']:.4f}, "
            f"ROC AUC {metrics['auc']:.4f}, confusion (true {'/'.join(names)} by predicted) {metrics['confusion']}")


def percent(summary):
    """Accuracy with its deviation over the runs."""
    deviation = "" if summary["deviation"] is None else f" ± {100 * summary['deviation']:.2f}"
    return f"{100 * summary['accuracy']:.2f}{deviation} %"


def table(paths, all_settings, results, target):
    """The table of all configurations: printed, as Markdown, and as a picture."""
    head = ["configuration", "mask", "frozen", "accuracy", "macro F1", "trained parameters", "minutes"]
    part = lambda result: "" if len(result["runs"]) == result["planned"] else f" ({len(result['runs'])} of {result['planned']} runs)"
    lines = [[os.path.splitext(os.path.basename(path))[0] + part(result), "yes" if settings.use_mask else "no",
              "yes" if settings.frozen else "no", percent(result), f"{result['f1']:.4f}", f"{result['trained'] / 1e6:.2f}M",
              f"{result['minutes']:.1f}"] for path, settings, result in zip(paths, all_settings, results)]
    widths = [max(map(len, column)) for column in zip(head, *lines)]
    text = "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
                     for line in (head, ["-" * width for width in widths], *lines))
    print("\n" + text)
    folder, name = os.path.split(target)
    if old := checkpoint.set_aside(folder or ".", re.compile(re.escape(name) + r"\.(md|png)")):
        print(f"\nan earlier table is now in {old}")
    with open(target + ".md", "w", encoding="utf-8") as file:
        file.write(text + "\n")
    print(f"\nalso as {target}.md" + (f" and {target}.png" if picture(lines, results, target + ".png") else
                                     "; the picture needs matplotlib: pip install matplotlib"))


def picture(lines, results, path):
    """Accuracies of the configurations as bars, with their deviation and the majority baseline; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 0.9 + 0.55 * len(lines)), layout="constrained")
    axes = figure.subplots()
    titles = [f"{'mask' if line[1] == 'yes' else 'no mask'}, {'frozen' if line[2] == 'yes' else 'not frozen'}\n{line[0]}" for line in lines]
    axes.barh(range(len(lines)), [100 * r["accuracy"] for r in results], xerr=[100 * (r["deviation"] or 0) for r in results],
              color="#4878a8", capsize=3)
    for place, line in enumerate(lines):
        axes.text(1, place, line[3], va="center", ha="left", color="white")
    axes.vlines([100 * r["majority"] for r in results], [n - 0.5 for n in range(len(lines))], [n + 0.5 for n in range(len(lines))],
                color="#b04030", linestyle="--", label="always the commonest class")
    axes.set(xlim=(0, 100), yticks=range(len(lines)), yticklabels=titles, xlabel="test accuracy, %")
    axes.invert_yaxis()
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=150)
    return True


if __name__ == "__main__":
    settings_module.main(main)
