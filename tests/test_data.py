import collections
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import data
import runs
import tokenizer
from settings import TrainSettings, UserError, build
from tokenizer import PAD, SEP, UNK


def make_settings(path, **more):
    return build(TrainSettings, dict(data_path=str(path)) | more)


def in_memory(dialogues):
    """A Documents of given dialogues (lists of ids without the end)."""
    documents = data.Documents.__new__(data.Documents)
    ended = [[*ids, PAD] for ids in dialogues]
    documents.ids = np.array([i for ids in ended for i in ids], dtype=np.uint16)
    ends = np.cumsum([len(ids) for ids in ended], dtype=np.int64)
    documents.spans = np.stack([ends - [len(ids) for ids in ended], ends], axis=1)
    return documents


DIALOGUES = [["你好", "你好呀"], ["吃了吗", "吃了", "吃的什么"], ["晚安"]]


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_is_read_with_and_without_bom_and_with_either_line_end(tmp_path, bom, end):
    text = end.join([*DIALOGUES[0], "", "", *DIALOGUES[1], "  ", *DIALOGUES[2]])
    path = tmp_path / "c.txt"
    path.write_bytes((bom + text).encode())
    assert list(data.read_dialogues(str(path))) == ["\n".join(d) for d in DIALOGUES]


@given(st.text(alphabet="a你 \t\u3000\x85\n\r", max_size=80), st.integers(1, 40), st.booleans())
@hypothesis_settings(deadline=None)
def test_dialogues_are_what_stands_between_blank_lines_wherever_a_block_ends(text, block, bom):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "BLOCK", block)
        path = os.path.join(folder, "c.txt")
        with open(path, "wb") as file:
            file.write(("\ufeff" * bom + text).encode())
        with open(path, encoding="utf-8-sig") as file:
            expected = ["".join(lines).removesuffix("\n") for blank, lines in itertools.groupby(file, str.isspace) if not blank]
        assert list(data.read_dialogues(path)) == expected


def test_both_forms_of_jsonl_are_read(tmp_path):
    path = tmp_path / "c.jsonl"
    turns = [{"role": "system", "content": "x"}, {"role": "user", "content": "你\r\n好"}, {"role": "assistant", "content": "嗯"}]
    lines = [{"messages": turns},
             {"conversations": [{"from": "human", "value": "吃了吗"}, {"from": "gpt", "value": "吃了"}]}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert list(data.read_dialogues(str(path))) == ["你 好\n嗯", "吃了吗\n吃了"]


def test_jsonl_whose_rows_have_the_keys_of_both_forms_is_read(tmp_path):
    """As tables of both kinds in one have them: what a row has not is null or empty."""
    path = tmp_path / "c.jsonl"
    said = [{"from": "system", "value": "x"}, {"from": "human", "value": "吃了吗"}, {"from": "gpt", "value": "吃了"}]
    rows = [{"messages": none, "conversations": [turn | {"role": None, "content": None} for turn in said]} for none in (None, [])]
    rows += [{"messages": [{"role": "user", "content": "好", "from": None, "value": None}], "conversations": None}, {"messages": []}]
    rows += [{"messages": None, "conversations": []}, {"messages": None}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert list(data.read_dialogues(str(path))) == ["吃了吗\n吃了"] * 2 + ["好"]


def test_speakers_in_jsonl_take_turns_where_turns_are_empty_nobody_s_or_of_the_same_one(tmp_path):
    path = tmp_path / "c.jsonl"
    turns = [("System", "快"), ("user", "在吗"), ("User", "几点了"), ("assistant", None), ("tool", '{"time": 9}'), ("assistant", "九点"),
             ("user", " "), ("assistant", "还有事吗"), ("user", "没了")]
    without_roles = [{"value": "好"}, {"value": "好"}, {"value": ""}, {"role": None, "value": "好"}]
    calls = [dict(role="system"), dict(role="user", content="几点"), dict(role="assistant", tool_calls=[])]
    entries = [{"messages": [dict(role=role, content=text) for role, text in turns]}, {"conversations": without_roles}, {"messages": calls}]
    path.write_text("\n".join(map(json.dumps, entries)))
    assert list(data.read_dialogues(str(path))) == ["在吗 几点了\n九点 还有事吗\n没了", "好\n好\n好", "几点"]


@pytest.mark.parametrize("block", [1, 1000, data.BLOCK])
def test_a_store_of_jsonl_is_that_of_the_same_text(tmp_path, monkeypatch, block):
    monkeypatch.setattr(data, "BLOCK", block)
    dialogues = [[f"第{i}句", f"好{i % 7}"] for i in range(2500)]
    (tmp_path / "c.txt").write_text("\n\n".join(map("\n".join, dialogues)))
    turns = [[dict(role=role, content=text) for role, text in zip(("user", "assistant"), dialogue)] for dialogue in dialogues]
    (tmp_path / "c.jsonl").write_text("\ufeff" + "\r\n".join(json.dumps({"messages": messages}) for messages in turns))
    stores = [data.prepare(make_settings(tmp_path / name)) for name in ("c.txt", "c.jsonl")]
    for name in ("text.bin", "spans.npy", "training.npy", "tokenizer.json"):
        first, second = (open(os.path.join(store, name), "rb").read() for store in stores)
        assert first == second


def test_jsonl_that_was_read_as_text_is_read_anew_under_its_right_name(tmp_path):
    lines = [json.dumps({"messages": [{"role": "user", "content": text}]}, ensure_ascii=False) for text in ("你好", "你", "好你你")]
    (tmp_path / "c.txt").write_text("\n\n".join(lines))
    stores = [data.prepare(make_settings(tmp_path / "c.txt"))]
    os.rename(tmp_path / "c.txt", tmp_path / "c.jsonl")
    stores.append(data.prepare(make_settings(tmp_path / "c.jsonl")))
    assert data.manifest(stores[0])["identity"] != data.manifest(stores[1])["identity"]
    assert set(tokenizer.load(f"{stores[1]}/tokenizer.json").vocabulary) == set("你好")


def test_the_text_in_parts_of_jsonl_is_read_and_pictures_are_left_out(tmp_path):
    path = tmp_path / "c.jsonl"
    parts = [{"type": "text", "text": "你"}, {"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "好"}]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "嗯"}]}))
    assert list(data.read_dialogues(str(path))) == ["你好\n嗯"]


def test_half_an_emoji_in_jsonl_becomes_a_question_mark(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "好\\ud83d"}, {"role": "assistant", "content": "嗯"}]}\n')
    assert list(data.read_dialogues(str(path))) == ["好?\n嗯"]


def test_a_min_freq_above_all_counts_is_an_error_and_leaves_no_store(tmp_path):
    (tmp_path / "c.txt").write_text("你好\n你好\n\n再见\n再见\n")
    with pytest.raises(UserError, match="min_freq=9 leaves no character"):
        data.prepare(make_settings(tmp_path / "c.txt", min_freq=9))
    assert os.listdir(tmp_path) == ["c.txt"]


def test_what_a_killed_preparation_left_goes_after_a_week(tmp_path):
    (tmp_path / "c.txt").write_text("你好\n你好\n\n再见\n再见\n")
    for name, age in (("old", 8 * 86400), ("new", 6 * 86400)):
        file = tmp_path / ".cache" / f".making-{name}" / "text.bin"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x")
        for path in (file, file.parent):
            os.utime(path, (time.time() - age,) * 2)
    data.prepare(make_settings(tmp_path / "c.txt", train_percent=0.5))
    assert [path.name for path in (tmp_path / ".cache").glob(".making-*")] == [".making-new"]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.txt", "你好\n吃了吗".encode("gb18030"), "not UTF-8.*-f GB18030"),
    ("p.txt", "PK赛开始了".encode("gb18030"), "not UTF-8.*-f GB18030"),
    ("z.txt", b"PK\3\4\x14\0\xff", "is a zip or gzip archive, or an Excel"),
    ("z.txt", b"\x1f\x8b\x08\x00\xff", "is a zip or gzip archive"),
    ("u.txt", "你好\n吃了吗\n".encode() + b"\xe4\xbd", "is damaged .*iconv -c -f UTF-8"),
    ("u.txt", "привет, как дела? хорошо, спасибо\n".encode() + b"\xd0", "is damaged .*iconv -c -f UTF-8"),
    ("h.txt", "你好\n吃了吗".encode("utf-16"), "not UTF-8.*-f UTF-16"),
    ("f.txt", "你好\r\n\r\n".encode() * 100_000 + b"\xff", "at byte 1000000"),
    ("g.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is no text in UTF-8"),
    ("r.csv", b"label,review\n1,a\n", "is no corpus: .txt"),
    ("g.jsonl", b'{"messages": []}\n{"\xff', "at byte 19"),
    ("b.jsonl", b'{"text": 1}', "line 1"),
    ("b.jsonl", b'{"messages": [{"role": "user", "text": "a"}]}', "line 1"),
    ("b.jsonl", b'{"messages": [{"role": "user", "content": ["a"]}]}', "line 1"),
    ("c.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n{', "line 2"),
    ("b.json", b'[{"messages": []}]', r"line 1: expected .* one array of them all becomes that by jq"),
    ("b.json", b'[\n{"messages": []}]', r"line 1 is not JSON.* one array of them all becomes that by jq"),
    ("c.jsonl", b'{"messages": [{"role": "user", "content": "a\n', "not JSON: Invalid control character at column"),
    ("d.txt", b"\n\n", "no dialogue"),
    ("m.jsonl", b"\xef\xbb\xbf", "no dialogue"),
    ("e.txt", "一句\n两句".encode(), "one dialogue;"),
    ("c.txt", "一句\n两句\n\n一句\n两句\n".encode(), "one dialogue over and over"),
])
def test_a_corpus_that_cannot_be_used_is_one_line_and_leaves_nothing(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        data.prepare(make_settings(tmp_path / name))
    assert os.listdir(tmp_path) == [name]


SLOW_BPE = """
import sys, data, tokenizer
from settings import TrainSettings
def train(texts, *more, plain=tokenizer.BPETokenizer.train):
    print("training", flush=True)
    return plain(texts, *more)
tokenizer.BPETokenizer.train = train
data.prepare(TrainSettings(data_path=sys.argv[1], tokenizer="bpe", vocab_size=int(sys.argv[2])))
"""


def test_ctrl_c_leaves_the_training_of_a_bpe_at_once_and_nothing_behind(tmp_path):
    """Inside its library, where large corpora spend minutes, Python hears no signal."""
    points = np.random.default_rng(0).integers(ord("一"), ord("龥"), (60_000, 60), dtype=np.uint32)
    (tmp_path / "c.txt").write_text("\n\n".join(map(tokenizer.text_of, points)), encoding="utf-8")
    start = lambda size: subprocess.Popen([sys.executable, "-c", SLOW_BPE, tmp_path / "c.txt", str(size)], cwd=runs.ROOT, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=runs.hear_ctrl_c)
    for seconds in (0.1, 0.3, 1.0):  # while it reads, and later
        process = start(30_000)
        assert process.stdout.readline() == "training\n"
        time.sleep(seconds)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        assert process.communicate() == ("", "") and process.returncode == -signal.SIGINT
        assert time.monotonic() - begin < 2 and os.listdir(tmp_path / ".cache") == []
    assert start(300).communicate() == ("training\n", "") and len(os.listdir(tmp_path / ".cache")) == 1


def test_the_command_that_converts_a_corpus_can_be_pasted(tmp_path):
    path = tmp_path / "my text's.txt"
    path.write_bytes("你好\n吃了吗\n\n吃了\n".encode("gb18030"))
    with pytest.raises(UserError) as refused:
        data.prepare(make_settings(path))
    command = shlex.split(str(refused.value).partition("convert it: ")[2])  # into words as a shell does
    assert command == ["iconv", "-f", "GB18030", "-t", "UTF-8", str(path), ">", "utf8.txt"]


def test_the_script_for_chat_exports_drops_empty_messages_and_joins_those_of_one_person(tmp_path):
    with open(os.path.join(runs.ROOT, "data", "README.md"), encoding="utf-8") as file:
        script = file.read().partition("<<'END'\n")[2].partition("END\n")[0]
    export = ["20:31:07 甲: 你好", "20:31:09 乙: 在", "20:32:09 乙: ", "20:33:00 甲:  ", "20:34:00 甲: 好", "20:34:10 甲: 的",
              "22:00:00 甲: 嗯", "22:00:20 乙: 晚安"]
    (tmp_path / "export.txt").write_text("\n".join(f"2024-05-01 {line}" for line in export) + "\n第二行\n\n")
    done = subprocess.run([sys.executable, "-", tmp_path / "export.txt"], input=script, capture_output=True, text=True, check=True)
    assert done.stdout == "你好\n在\n好 的\n\n嗯\n晚安 第二行\n"


def test_a_pipe_is_no_corpus(tmp_path):
    os.mkfifo(tmp_path / "c.txt")
    with pytest.raises(UserError, match="is a pipe or device, and a corpus is read twice"):
        data.prepare(make_settings(tmp_path / "c.txt"))


def test_a_corpus_that_is_still_being_written_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "c.txt"
    path.write_text("你好\n\n再见\n")

    def write_text(*arguments, plain=data._write_text):
        with open(path, "a") as file:
            file.write("\n在吗\n")
        return plain(*arguments)
    monkeypatch.setattr(data, "_write_text", write_text)
    with pytest.raises(UserError, match="c.txt was changed while it was read"):
        data.prepare(make_settings(path))
    assert os.listdir(tmp_path) == ["c.txt"]
    monkeypatch.undo()
    assert data.manifest(data.prepare(make_settings(path)))["dialogues"] == 3


def test_a_corpus_that_is_removed_while_it_is_read_is_named_and_not_the_store(tmp_path, monkeypatch):
    (tmp_path / "c.txt").write_text("你好\n\n再见\n")

    def write_text(*arguments, plain=data._write_text):
        made = plain(*arguments)
        os.remove(tmp_path / "c.txt")
        return made
    monkeypatch.setattr(data, "_write_text", write_text)
    with pytest.raises(UserError, match="c.txt was changed while it was read"):
        data.prepare(make_settings(tmp_path / "c.txt"))
    assert os.listdir(tmp_path) == []


def test_a_missing_corpus_says_where_to_get_one(tmp_path):
    with pytest.raises(UserError, match="does not exist.*download"):
        data.prepare(make_settings(tmp_path / "none.txt"))


def write_corpus(path, count=200):
    path.write_text("\n\n".join("\n".join(f"第{i}句{'话' * (i % 7)}{j}" for j in range(1 + i % 4)) for i in range(count)))


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_the_store_holds_the_corpus_split_by_dialogue_and_its_vocabulary_is_of_the_training_part(tmp_path, kind):
    path = tmp_path / "c.txt"
    write_corpus(path)
    with open(path, "a") as file:
        file.write("\n \u2003\n\n" + "龘")
    settings = make_settings(path, train_percent=0.9, tokenizer=kind)
    store = data.prepare(settings)
    made = tokenizer.load(os.path.join(store, "tokenizer.json"))
    texts = {part: [] for part in ("train", "val")}
    for part, found in texts.items():
        documents = data.Documents(store, part)
        for begin, end in documents.spans:
            assert documents.ids[end - 1] == PAD
            found.append(made.decode(documents.ids[begin:end - 1].tolist()))
    corpus = list(data.read_dialogues(str(path)))
    assert sorted(texts["train"] + texts["val"]) == sorted(corpus) and len(texts["val"]) == 20
    assert texts["train"] == [d for d in corpus if d not in texts["val"]]
    said, trained = data.manifest(store), "".join(texts["train"]).replace("\n", "")
    assert said["utterances"] == sum(len(text.split("\n")) for text in corpus)
    if kind == "char":
        assert list(made.vocabulary) == sorted(set(trained), key=lambda character: (-trained.count(character), character))
        assert said["tokens"] == {part: sum(len(text) + 1 for text in found) for part, found in texts.items()}


def test_a_store_is_found_again_by_what_it_was_made_with_alone(tmp_path):
    path = tmp_path / "c.txt"
    write_corpus(path)
    kinds = [{}, dict(vocab_size=10), dict(min_freq=200), dict(train_percent=0.5), dict(seed=2), dict(tokenizer="bpe", vocab_size=300)]
    stores = [data.prepare(make_settings(path, **kind)) for kind in kinds]
    assert len(set(stores)) == len(kinds) and [data.prepare(make_settings(path, **kind)) for kind in kinds] == stores
    tokenizers = [tokenizer.load(os.path.join(store, "tokenizer.json")) for store in stores]
    assert tokenizers[1].size == 10 and tokenizers[2].size < tokenizers[0].size and tokenizers[5].size == 300
    for kind, made, store in zip(kinds, tokenizers, stores):  # a model's tokenizer goes with the store that it was trained on
        assert data.prepare(make_settings(path, **kind), made) == store
    (tmp_path / "other.txt").write_text("你好\n\n再见\n")
    with_new_characters = data.prepare(make_settings(tmp_path / "other.txt"), tokenizers[0], data.manifest(stores[0])["identity"])
    assert tokenizer.load(os.path.join(with_new_characters, "tokenizer.json")).vocabulary.startswith(tokenizers[0].vocabulary)
    assert data.manifest(data.prepare(make_settings(tmp_path / "other.txt"), tokenizers[0]))["unknown"] > 0


def test_characters_of_held_out_dialogues_alone_are_unknown_and_counted(tmp_path):
    (tmp_path / "c.txt").write_text("\n\n".join(chr(0x4E00 + i) for i in range(200)))
    store = data.prepare(make_settings(tmp_path / "c.txt", train_percent=0.9))
    documents = data.Documents(store, "val")
    assert [documents.ids[begin:end].tolist() for begin, end in documents.spans] == [[UNK, PAD]] * 20
    assert data.manifest(store)["unknown"] == 20 and tokenizer.load(os.path.join(store, "tokenizer.json")).size == 3 + 180


def held_out(path, dialogues, **more):
    """The dialogues that are held out of a corpus of these."""
    path.write_text("\n\n".join(dialogues))
    store = data.prepare(make_settings(path, **more))
    made, documents = tokenizer.load(os.path.join(store, "tokenizer.json")), data.Documents(store, "val")
    return [made.decode(documents.ids[begin:end - 1].tolist()) for begin, end in documents.spans]


def test_copies_of_a_dialogue_are_on_one_side_and_a_corpus_that_grows_keeps_what_it_held_out(tmp_path):
    dialogues = [f"{i}号\n好{i * i}" for i in range(1000)]
    first = held_out(tmp_path / "a.txt", dialogues, train_percent=0.9)
    assert len(first) == len(set(first)) == 100
    assert set(held_out(tmp_path / "b.txt", dialogues, train_percent=0.9, seed=1)) != set(first)
    copied = held_out(tmp_path / "c.txt", dialogues + dialogues[:500], train_percent=0.9)
    assert all(copied.count(text) == (dialogues + dialogues[:500]).count(text) for text in copied)
    moved = dialogues[::-1] + [f"新{i}\n来{i}" for i in range(500)]
    grown = held_out(tmp_path / "d.txt", moved, train_percent=0.9)
    assert len(grown) == 150 and len(set(first) - set(grown)) + len(set(grown) & set(dialogues) - set(first)) <= 15


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50), st.floats(0.001, 1), st.integers(0, 2**32 - 1))
@hypothesis_settings(deadline=None)
def test_both_parts_of_a_corpus_get_at_least_one_dialogue_and_the_training_part_its_share(numbers, share, seed):
    mask = data.split_mask(np.array(numbers, dtype=np.uint32), share, seed)
    if share == 1 or len(set(numbers)) == 1:
        assert mask.all() == (share == 1) and mask.any() == (share == 1)
    else:
        assert mask.any() and not mask.all() and mask.sum() >= min(round(len(numbers) * share), len(numbers) / 2)
        assert len(set(numbers)) < len(numbers) or mask.sum() == min(max(1, round(len(numbers) * share)), len(numbers) - 1)


def test_the_store_is_made_once_and_again_when_the_corpus_changes(tmp_path):
    path = tmp_path / "c.txt"
    write_corpus(path)
    first = data.prepare(make_settings(path))
    stamp = os.stat(os.path.join(first, "text.bin")).st_mtime_ns
    assert data.prepare(make_settings(path)) == first and os.stat(os.path.join(first, "text.bin")).st_mtime_ns == stamp
    write_corpus(path, 201)
    assert data.prepare(make_settings(path)) != first


dialogue = st.lists(st.integers(3, 9) | st.just(SEP), min_size=1, max_size=60)


@given(st.lists(dialogue, min_size=1, max_size=40), st.integers(2, 40), st.integers(0, 5), st.integers(0, 3))
@hypothesis_settings(deadline=None)
def test_an_epoch_holds_every_token_exactly_once(dialogues, block_size, seed, number):
    documents = in_memory(dialogues)
    epoch = data.Epoch(documents, block_size, seed, number)
    inputs, targets, numbers = epoch.batch(0, len(epoch) + 2)
    real = targets != data.IGNORE
    assert real.sum() == epoch.real_targets(0, len(epoch) + 2) == len(documents.ids) - len(dialogues)
    assert ((numbers >= 0) == real).all()
    # Each piece continues somewhere in some dialogue; together they score each token but the first exactly once.
    scored = []
    for row in range(len(inputs)):
        for piece in np.unique(numbers[row][real[row]]):
            at = numbers[row] == piece
            assert (inputs[row][at][1:] == targets[row][at][:-1]).all()
            scored.append((inputs[row][at][0], *targets[row][at]))
    whole = sorted((*ids, PAD) for ids in dialogues if len(ids) <= block_size)
    counted = sorted(scored)
    for piece in whole:
        counted.remove(piece)  # a dialogue that fits stands in one row, whole
    for piece in counted:
        assert len(piece) <= block_size + 1
    starts = np.zeros(len(documents.ids), dtype=int)
    for start, length in zip(epoch.starts, epoch.lengths):
        starts[start + 1:start + length + 1] += 1
        ids = documents.ids[start:start + length + 1]
        ends_dialogue = start + length + 1 in documents.spans[:, 1]
        if not ends_dialogue and SEP in ids[1:]:
            assert ids[-1] == SEP  # cut between utterances where there is a place for it
        assert ends_dialogue or ids[-1] != PAD  # never a false ending
    expected = np.ones(len(documents.ids), dtype=int)
    expected[documents.spans[:, 0]] = 0
    assert (starts == expected).all()


@given(st.lists(dialogue, min_size=1, max_size=40), st.integers(2, 60), st.integers(0, 5), st.floats(0.1, 1))
@hypothesis_settings(deadline=None)
def test_dialogues_of_a_chain_follow_each_other_in_a_document_as_in_a_conversation(dialogues, block_size, seed, share):
    documents = in_memory(dialogues)
    epoch = data.Epoch(documents, block_size, seed, 0, share)
    inputs, targets, numbers = epoch.batch(0, len(epoch) + 2)
    real = targets != data.IGNORE
    assert real.sum() == epoch.real_targets(0, len(epoch) + 2) == len(documents.ids) - len(dialogues) + epoch.joined.sum()
    assert ((numbers >= 0) == real).all()
    found = []
    for row in range(len(inputs)):
        for number in np.unique(numbers[row][real[row]]):
            ids, after = (array[row][numbers[row] == number].tolist() for array in (inputs, targets))
            begin = 0
            for n in range(len(ids) - 1):
                if after[n] == PAD:  # the end of a dialogue, which is not said: the next begins as if the person went on
                    assert ids[n + 1] == SEP
                    found.append((*ids[begin:n + 1], PAD))
                    begin = n + 2
                else:
                    assert ids[n + 1] == after[n]
            found.append((*ids[begin:], after[-1]))
    assert len(found) == len(epoch.lengths)
    for ids in dialogues:
        if len(ids) <= block_size:
            found.remove((*ids, PAD))


def test_as_many_dialogues_are_linked_as_is_wished_where_rows_have_room():
    documents = in_memory([[3 + i % 50] * (1 + i % 9) for i in range(2000)])
    for share in (0, 0.5, 1):
        joined = data.Epoch(documents, 1000, 0, 0, share).joined.mean()
        assert joined == pytest.approx(share, abs=0.04)


@given(st.lists(dialogue, min_size=1, max_size=20), st.integers(4, 30), st.integers(1, 7))
@hypothesis_settings(deadline=None)
def test_batches_are_slices_of_the_epoch_whatever_their_size(dialogues, block_size, size):
    epoch = data.Epoch(in_memory(dialogues), block_size, 0, 0)
    whole = epoch.batch(0, len(epoch))
    for begin in range(0, len(epoch), size):
        part = epoch.batch(begin, min(begin + size, len(epoch)))
        for a, b in zip(part[:2], whole[:2]):
            assert (a == b[begin:begin + size]).all()


@given(st.lists(dialogue, min_size=1, max_size=20), st.integers(4, 30))
@hypothesis_settings(deadline=None)
def test_bigrams_are_counted_inside_dialogues_alone(dialogues, block_size):
    first, second, count = data.Epoch(in_memory(dialogues), block_size, 0, 0).bigrams()
    expected = collections.Counter(pair for ids in dialogues for pair in itertools.pairwise([*ids, PAD]))
    assert dict(zip(zip(first.tolist(), second.tolist()), count.tolist())) == expected
    first, _, count = data.Epoch(in_memory(dialogues), block_size, 0, 0).bigrams(most=1)
    assert 0 < count.sum() <= block_size  # of one row


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    documents = in_memory([[3 + i % 50] * (1 + i % 9) for i in range(300)])
    same, again, other, later = (data.Epoch(documents, 32, *where).batch(0, 10)[0] for where in ((1, 0), (1, 0), (2, 0), (1, 1)))
    assert (same == again).all() and not (same == other).all() and not (same == later).all()


def test_dialogues_like_real_ones_are_packed_with_at_most_two_percent_filling():
    rng = np.random.default_rng(0)
    lengths = np.minimum(1 + rng.lognormal(3.5, 1.0, 20_000).astype(int), 1000)
    epoch = data.Epoch(in_memory([[3] * n for n in lengths]), 256, 0, 0)
    assert epoch.filling <= 0.02


MEMORY = """
import sys
def memory():  # most that this process has held, in KiB; getrusage would count what its parent held
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1])
"""
LARGE = MEMORY + """
import time
import data
from settings import TrainSettings, build
begin = time.perf_counter()
store = data.prepare(build(TrainSettings, dict(data_path=sys.argv[1])))
print(time.perf_counter() - begin, memory())
"""


@pytest.mark.soak
def test_the_published_corpus_size_is_prepared_in_30_seconds_and_1_gb(tmp_path):
    rng = np.random.default_rng(0)
    letters = np.array([chr(0x4E00 + i) for i in range(7000)])
    with open(tmp_path / "large.txt", "w", encoding="utf-8") as file:
        for _ in range(500):
            lines = ["".join(line) for line in letters[(rng.zipf(1.3, (3000, 20)) - 1) % 7000]]
            file.write("\n\n".join("\n".join(lines[i:i + 3]) for i in range(0, 3000, 3)) + "\n\n")
        file.write("最后一句\n好")
    done = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path / "large.txt")], capture_output=True, text=True, check=True)
    seconds, kilobytes = map(float, done.stdout.split())
    assert seconds < 30 and kilobytes < 1 << 20, (seconds, kilobytes)


@pytest.mark.parametrize("end", ["\n", "\r"])
def test_reading_a_corpus_takes_no_memory_of_its_size(tmp_path, end):
    with open(tmp_path / "c.txt", "w", newline=end) as file:
        for _ in range(200_000):
            file.write("这是一句不长也不短的话，用来占地方。\n嗯，知道了。\n\n")
    program = (MEMORY + "import data\n"
               "before = memory()\n"
               "print(sum(1 for _ in data.read_dialogues(sys.argv[1])), memory() - before)")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "c.txt")], capture_output=True, text=True, check=True)
    dialogues, kilobytes = map(int, done.stdout.split())
    assert dialogues == 200_000 and kilobytes < 8192  # the file has 17,000, its code points 22,000


@pytest.mark.soak
@pytest.mark.parametrize(("name", "kind", "megabytes"), [("c.txt", "char", 30), ("c.jsonl", "char", 30), ("c.txt", "bpe", 12)])
def test_preparing_long_dialogues_takes_no_memory_of_their_size(tmp_path, name, kind, megabytes):
    dialogues = [[f"第{number}段"] + ["　　这是一句不长也不短的话，用来占地方。"] * 18_000 for number in range(megabytes)]
    with open(tmp_path / name, "w", encoding="utf-8") as file:
        for dialogue in dialogues:
            messages = dict(messages=[dict(role=("user", "assistant")[n % 2], content=line) for n, line in enumerate(dialogue)])
            file.write(json.dumps(messages, ensure_ascii=False) + "\n" if name == "c.jsonl" else "\n".join(dialogue) + "\n\n")
    if kind == "bpe":
        kind = str(tmp_path / "tokenizer.json")
        tokenizer.BPETokenizer.train(["这是一句话"]).save(kind)
    program = (MEMORY + "import data, settings\n"
               "given = settings.build(settings.TrainSettings, dict(data_path=sys.argv[1], tokenizer=sys.argv[2], train_percent=0.5))\n"
               "before = memory()\n"
               "data.prepare(given)\n"
               "print(memory() - before)")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / name), kind], capture_output=True, text=True, check=True)
    assert float(done.stdout) < (120_000 if name == "c.txt" and megabytes == 12 else 80_000)  # KiB; half as much again without care


@pytest.mark.parametrize("damage", ["manifest.json", "text.bin", "training.npy", "tokenizer.json"])
@pytest.mark.parametrize("way", ["removed", "emptied"])
def test_a_store_that_is_not_whole_is_made_again(tmp_path, damage, way):
    (tmp_path / "c.txt").write_text("你好\n你好\n\n再见\n再见\n")
    settings = make_settings(tmp_path / "c.txt", train_percent=0.5)
    folder = data.prepare(settings)
    whole = open(os.path.join(folder, damage), "rb").read()
    (os.remove if way == "removed" else lambda path: open(path, "w").close())(os.path.join(folder, damage))
    assert data.prepare(settings) == folder and open(os.path.join(folder, damage), "rb").read() == whole


@pytest.mark.parametrize("content", ["{", "[]", "null", "{}", '{"sizes": []}', '{"sizes": {"text.bin": 1}}'])
def test_a_manifest_of_another_form_is_none(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    assert data.manifest(tmp_path) is None


def test_stores_made_at_the_same_time_do_not_hinder_one_another(tmp_path):
    (tmp_path / "c.txt").write_text("你好\n你好\n\n再见\n再见\n")
    program = ("import sys, data\n"
               "from settings import TrainSettings\n"
               "for seed in range(60):\n"
               "    data.prepare(TrainSettings(data_path=sys.argv[1], seed=seed // 2, train_percent=0.5))")
    started = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "c.txt")], stderr=subprocess.PIPE) for _ in range(4)]
    for process in started:
        assert process.communicate()[1] == b"" and process.returncode == 0
    assert len([*(tmp_path / ".cache").iterdir()]) == 30
