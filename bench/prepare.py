"""Characters/s and peak memory of preparing a corpus, ours against the original's way: python bench/prepare.py [CONFIG]

Each preparation runs in a process of its own, in turns, from a cold start of the program but with the file in the page
cache. The original's way is written anew from what the original was seen to do; it takes as long as the original.
"""

import collections
import importlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def peak_memory():
    """(bytes that this process held at most, bytes it holds now); Linux."""
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    return tuple(int(status[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))


def originals_way(path, block_size):
    """Inputs and targets (dialogues, block_size) int64 of a corpus, and its vocabulary.

    As the original does it: a list of characters for each dialogue, all of them once more in one list to be counted, and a
    step of Python for each of block_size positions, which where there is a character calls for its id and stores that.
    """
    with open(path, encoding="utf-8") as file:
        dialogues = [["<sep>" if character == "\n" else character for character in dialogue] for dialogue in file.read().split("\n\n")]
    counts = collections.Counter([character for dialogue in dialogues for character in dialogue])
    ids = {"<unk>": 0, "<sep>": 1, "<pad>": 2}
    for character, _ in sorted(counts.items(), key=lambda pair: pair[1], reverse=True):
        ids.setdefault(character, len(ids))

    def look_up(character):
        return ids.get(character, 0) if not isinstance(character, (list, tuple)) else [look_up(one) for one in character]

    rows = np.zeros((len(dialogues), block_size), dtype=np.int16)
    for i, dialogue in enumerate(dialogues):
        for j in range(block_size):
            if j < len(dialogue):
                rows[i][j] = look_up(dialogue[j])
        rows[i][len(dialogue):] = ids["<pad>"]
    inputs = rows.astype(np.int64)
    targets = np.concatenate([inputs[:, 1:], np.full((len(inputs), 1), ids["<pad>"])], axis=1)
    return inputs, targets, ids


def child(way, path, block_size):
    """In a fresh process: prepares once and prints seconds, peak bytes, bytes before."""
    if way == "ours":
        sys.path.insert(0, ROOT)
        for name in ("numpy.random", "multiprocessing.synchronize"):  # torch has long imported them in train.py
            importlib.import_module(name)
        import data
        from settings import TrainSettings, tune_allocator
        tune_allocator()  # as every script does
        prepare = lambda: data.prepare(TrainSettings(data_path=path, block_size=block_size))
    else:
        prepare = lambda: originals_way(path, block_size)
    _, before = peak_memory()
    begin = time.perf_counter()
    kept = prepare()
    seconds = time.perf_counter() - begin
    print(seconds, peak_memory()[0], before, flush=True)
    del kept


def trial(way, corpus, block_size):
    """(seconds, peak bytes above the program's own, peak bytes) of one preparation."""
    with tempfile.TemporaryDirectory() as folder:  # the store goes beside the corpus
        path = os.path.join(folder, "corpus.txt")
        os.symlink(os.path.abspath(corpus), path)
        command = [sys.executable, os.path.abspath(__file__), "--child", way, path, str(block_size)]
        seconds, peak, before = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    return seconds, peak - before, peak


def main(arguments=None):
    import common
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=1, help="the corpus so many times over, to see what grows")
    options = parser.parse_intermixed_args(arguments)
    settings = common.read_settings(options)
    options.rounds = 1 if options.smoke else options.rounds
    with tempfile.TemporaryDirectory() as folder:
        corpus = os.path.join(folder, "corpus.txt")
        with open(corpus, "wb") as file:
            for _ in range(options.copies):
                with open(settings.data_path, "rb") as source:
                    shutil.copyfileobj(source, file)
                file.write(b"\n\n")
        with open(corpus, encoding="utf-8") as file:
            characters = sum(map(len, file))
        found = common.alternate({way: lambda way=way: trial(way, corpus, settings.block_size) for way in ("ours", "original")},
                                 options.rounds)
    rows = []
    for way, trials in found.items():
        seconds, above, peak = map(statistics.median, zip(*trials))
        rows.append([way, round(characters / seconds), seconds, above / 2**20, peak / 2**20])
        common.record(options.results, "prepare", way=way, characters=characters, copies=options.copies, seconds=[t[0] for t in trials],
                      characters_per_second=characters / seconds, peak_above_start=above, peak=peak, smoke=options.smoke)
    common.table(["way", "characters/s", "seconds", "MiB above start", "MiB in all"], rows)
    print(f"{characters:,} characters; ours is {rows[0][1] / rows[1][1]:.1f} times faster with "
          f"{rows[0][3] / rows[1][3]:.3f} of the memory ({rows[0][4] / rows[1][4]:.3f} with the program itself)")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:  # nothing heavy is imported here: the peak is to be the preparation's
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        sys.path.insert(0, ROOT)
        import settings as settings_module
        settings_module.main(main)
