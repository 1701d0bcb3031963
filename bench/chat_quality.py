"""Quality of replies on held-out dialogues: python bench/chat_quality.py CHECKPOINT data_path=data/train.txt [key=value …].

For each held-out dialogue the model gets all utterances but the last and answers; compared with the true last one by chrF
(Popović 2015, characters 1–6). The same checkpoint answers with this project's sampling (ChatSettings and the key=value
given), and as the original samples: temperature 0.5 and nothing else. A JSON line for each goes to bench/results.jsonl.
"""

import argparse
import collections
import dataclasses

import common  # first: it makes the folder above importable
import torch

import chat
import checkpoint
import data
import settings as settings_module
from model import Sampling, generate, most_informative
from settings import ChatSettings, TrainSettings
from tokenizer import PAD, SEP

ORIGINAL = dict(temperature=0.5, top_p=1.0, no_repeat_ngram=0, best_of=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("override", nargs="*", default=[], help="key=value: data_path, and sampling to try beside the shipped one")
    parser.add_argument("--dialogues", type=int, default=300)
    parser.add_argument("--rows", type=int, default=64, help="replies made at once")
    parser.add_argument("--seeds", default="1", help="figures are means over these, as 1,2,3")
    options = parser.parse_intermixed_args()
    values = settings_module.overrides(options.override)
    saved = checkpoint.read(options.checkpoint)["settings"]
    trained = settings_module.build(TrainSettings, saved | {k: v for k, v in values.items() if k == "data_path"})
    ours = settings_module.build(ChatSettings, values)
    model, tokenizer = chat.load(options.checkpoint, ours)
    prompts, truths = held_out(trained, tokenizer, model.config.block_size - ours.max_new_tokens, options.dialogues)
    runs = {"the original's sampling": settings_module.build(ChatSettings, ORIGINAL), "this project's": ours}
    print(f"{options.checkpoint}, {len(prompts)} held-out dialogues")
    print(f"{'':<26}{'distinct-1':>11}{'distinct-2':>11}{'repeated 4-grams':>18}{'ten commonest':>15}{'length':>8}{'chrF':>7}")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for name, settings in {"(the true replies)": None, **runs}.items():
        rows = [figures(truths, truths)] if settings is None else [
            figures(reply(model, tokenizer, prompts, dataclasses.replace(settings, seed=seed), options.rows), truths) for seed in seeds]
        row = {key: sum(one[key] for one in rows) / len(rows) for key in rows[0]}
        print(f"{name:<26}{row['distinct1']:>11.3f}{row['distinct2']:>11.3f}{row['repeated4']:>18.1%}{row['ten_commonest']:>15.1%}"
              f"{row['length']:>8.1f}{row['chrF']:>7.2f}", flush=True)
        if settings is not None:
            keys = {key: getattr(settings, key) for key in chat.ADJUSTABLE}
            common.record(common.RESULTS, "chat_quality", way=name, dialogues=len(prompts), seeds=seeds, **row, settings=keys)


def held_out(trained, tokenizer, room, count):
    """(ids of the utterances but the last, the last one's text) of held-out dialogues that fit."""
    documents = data.Documents(data.prepare(trained, tokenizer), "val")
    prompts, truths = [], []
    for begin, end in documents.spans:
        ids = documents.ids[begin:end - 1].tolist()  # without <pad>
        if SEP not in ids:
            continue
        last = len(ids) - ids[::-1].index(SEP)
        if last <= room and ids[last:] and len(prompts) < count:
            prompts.append(ids[:last])
            truths.append(tokenizer.decode(ids[last:]))
    return prompts, truths


def reply(model, tokenizer, prompts, settings, rows):
    """The reply to each prompt, as chat.py would choose it."""
    sampling = Sampling(min_new_tokens=1, banned=tokenizer.banned(model.config.vocab_size), exempt=tokenizer.parts(),
                        **{name: getattr(settings, name) for name in chat.SAMPLING})
    generator = torch.Generator(model.embedding.weight.device).manual_seed(settings.seed)
    replies, at_once = [], max(1, rows // settings.best_of)
    for first in range(0, len(prompts), at_once):
        batch = [prompt for prompt in prompts[first:first + at_once] for _ in range(settings.best_of)]
        scores = torch.zeros(len(batch), device=model.embedding.weight.device)
        steps = list(generate(model, batch, sampling, (SEP, PAD), generator=generator, scores=scores))
        ids = [[i for i in row if i >= 0] for row in torch.stack(steps, dim=1).tolist()]
        for n in range(0, len(batch), settings.best_of):
            candidates = ids[n:n + settings.best_of]
            best = 0 if settings.best_of == 1 else most_informative(
                model, candidates, scores[n:n + settings.best_of], settings.mmi_weight, SEP)
            replies.append(tokenizer.decode([i for i in candidates[best] if i > PAD]))
    return replies


def figures(replies, truths):
    """The table's numbers for replies (strings)."""
    commonest = collections.Counter(replies).most_common(10)
    grams = lambda text, n: [text[i:i + n] for i in range(len(text) - n + 1)]
    distinct = lambda n: len({g for text in replies for g in grams(text, n)}) / max(1, sum(len(grams(text, n)) for text in replies))
    repeated = sum(len(set(grams(text, 4))) < len(grams(text, 4)) for text in replies) / len(replies)
    return dict(distinct1=distinct(1), distinct2=distinct(2), repeated4=repeated, length=sum(map(len, replies)) / len(replies),
                ten_commonest=sum(count for _, count in commonest) / len(replies), chrF=chrf(replies, truths))


def chrf(replies, truths, longest=6, beta=2.0):
    """Character n-gram F-score of the whole set, 0 to 100."""
    scores = []
    for n in range(1, longest + 1):
        hits = made = wanted = 0
        for reply, truth in zip(replies, truths):
            a, b = (collections.Counter(text[i:i + n] for i in range(len(text) - n + 1)) for text in (reply, truth))
            hits, made, wanted = hits + (a & b).total(), made + a.total(), wanted + b.total()
        precision, recall = hits / max(1, made), hits / max(1, wanted)
        scores.append((1 + beta ** 2) * precision * recall / max(1e-12, beta ** 2 * precision + recall))
    return 100 * sum(scores) / longest


if __name__ == "__main__":
    settings_module.main(main)
