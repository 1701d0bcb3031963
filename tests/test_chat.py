"""The conversation (one cache, dropped turns, choosing replies), pipes, and errors. The terminal is in test_chat_terminal.py."""

import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import chat
import checkpoint
import settings as settings_module
from chat import Conversation
from model import GPT, GPTConfig, Sampling, adjust, generate, log_probability
from quantize import quantize
from settings import ChatSettings, UserError
from tokenizer import PAD, SEP, UNK, BPETokenizer, CharTokenizer

torch.set_num_threads(1)  # tiny models: a second thread only waits
LETTERS = "你好我是的不在吗今天气很吃饭喜欢abcdefghijklmnopqrstuvwxyz ,.!?"


def tiny_model(arch="modern", block_size=64, size=3 + len(LETTERS), silent=False):
    """Random weights wide enough for long, varied replies; `silent`: it would rather not stop at all."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=size, arch=arch, block_size=block_size, n_layer=2, n_head=2, n_embd=32, tied=False))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    if silent:  # gpt2's last norm has a bias: a direction that the rows of the two ends point away from
        torch.nn.init.constant_(model.norm.bias, 1.0)
        model.head.weight.data[[SEP, PAD]] = -10.0
    return model.eval()


def make(arch="modern", silent=False, block_size=64, notice=lambda line: None, **keys):
    keys = dict(seed=1, max_new_tokens=12) | keys
    model = tiny_model(arch, block_size, silent=silent)
    return Conversation(model, CharTokenizer(LETTERS), settings_module.build(ChatSettings, keys), notice)


def talk(conversation, text):
    conversation.hear(text)
    return "".join(conversation.reply())


def test_a_conversation_that_cannot_be_saved_leaves_the_earlier_file_whole(tmp_path):
    conversation, path = make(), str(tmp_path / "said.txt")
    talk(conversation, "你好")
    chat.save(conversation, path)
    before = open(path).read()
    os.chmod(path, 0o600)
    chat.save(conversation, path)
    assert os.stat(path).st_mode & 0o777 == 0o600
    talk(conversation, "今天")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5, limits[1]))  # as on a full disk
        for name in (path, str(tmp_path / "new.txt")):
            with pytest.raises(UserError, match="cannot be written: File too large"):
                chat.save(conversation, name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["said.txt"] and open(path).read() == before
    with pytest.raises(UserError, match="is no name for a file: embedded null byte"):
        chat.save(conversation, path + "\0")


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_cached_conversation_equals_uncached(arch):
    cached, other = make(arch, temperature=0, block_size=256), make(arch, temperature=0, block_size=256)
    for text in ("你好", "今天吃饭吗?", "a b c", "很喜欢"):
        expected = talk(cached, text)
        other.cache.length, other.cached = 0, []  # computes the whole conversation anew
        assert talk(other, text) == expected
    assert cached.cache.length > 50


def test_a_turn_computes_only_its_new_tokens():
    conversation = make(max_new_tokens=5, block_size=256)
    seen = []
    conversation.model.embedding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    before = 0
    for text in ("你好", "今天吃饭吗?", "a b c", "很"):
        seen.clear()
        talk(conversation, text)
        conversation_ids = conversation.used() - 1  # the <sep> that closes the reply comes with the next turn
        # The reply's last token never goes through the model, unless it met its end, which then is not part of it.
        assert conversation_ids - before - 1 <= sum(seen) <= conversation_ids - before
        before += sum(seen)
    assert before == conversation.computed


def test_full_context_drops_the_oldest_whole_turns_and_stays_fast():
    conversation = make(max_new_tokens=6, block_size=64)
    for turn in range(60):
        talk(conversation, "你好吗")
        kept = [ids for _, ids in conversation.utterances[conversation.first:]]
        assert conversation.first % 2 == 0 and sum(map(len, kept)) + len(kept) - 1 <= 64  # the last <sep> comes with the next turn
        assert conversation.used() <= 64
    assert conversation.first > 90
    spoken = sum(len(ids) + 1 for _, ids in conversation.utterances)
    assert conversation.computed < 2.5 * spoken  # half is dropped at once, so what is kept is seldom computed again


def test_dropping_leaves_what_a_new_conversation_of_the_kept_turns_would_say():
    conversation = make(max_new_tokens=6, block_size=64, temperature=0)
    for turn in range(9):
        talk(conversation, "今天很好 " + "abcdefghi"[turn])
    kept = [text for text, _ in conversation.utterances[conversation.first:]]
    assert 0 < len(kept) < 18
    fresh = make(max_new_tokens=6, block_size=64, temperature=0)
    for text in kept[:-1]:
        fresh.hear(text)
    assert "".join(fresh.reply()) == kept[-1]


def test_another_reply_in_a_full_context_sees_the_same_turns():
    conversation = make(max_new_tokens=8)
    for number in range(9):
        talk(conversation, f"你好{number}")
    first = conversation.first
    assert first > 0
    conversation.forget(1)
    assert conversation.first == first and "".join(conversation.reply())
    conversation.forget(len(conversation.utterances))
    assert conversation.first == 0


def test_an_utterance_longer_than_the_context_keeps_its_end_and_says_so():
    lines = []
    conversation = make(notice=lines.append, max_new_tokens=10, block_size=64)
    reply = talk(conversation, "a" * 200 + "今天很好")
    context = conversation.cached[:54]
    assert reply and context[-5:] == [*conversation.tokenizer.encode("今天很好").tolist(), SEP]
    assert "53 of 204" in lines[0]
    assert talk(conversation, "你好") and conversation.used() <= 64  # and goes on


def test_a_reply_cut_at_the_maximum_is_closed_before_the_next_turn():
    conversation = make("gpt2", silent=True, max_new_tokens=7, block_size=256)
    talk(conversation, "你好")
    assert len(conversation.utterances[1][1]) == 7
    talk(conversation, "吗")
    you, me, again, _ = ([*ids, SEP] for _, ids in conversation.utterances)
    assert conversation.cached[:len(you + me + again)] == you + me + again


def test_the_same_seed_gives_the_same_replies_and_another_gives_others():
    replies = lambda seed: [talk(conversation, text) for conversation in [make(seed=seed)] for text in ("你好", "今天", "吗")]
    assert replies(3) == replies(3) != replies(4)
    assert len({talk(make(seed=None), "你好") for _ in range(5)}) > 1


def test_a_seed_that_is_set_begins_its_random_numbers_anew(capsys):
    conversation, fresh = make(seed=1), make(seed=5)
    talk(conversation, "今天")
    conversation.flush()
    chat.command(conversation, "/set temperature 0.8")
    assert conversation.attempts == 1  # other keys leave them where they are
    chat.command(conversation, "/set seed=5")
    chat.command(fresh, "/set temperature 0.8")
    assert talk(conversation, "你好") == talk(fresh, "你好")


def test_undo_and_retry_go_on_as_if_it_had_not_been_said():
    conversation = make(temperature=0, block_size=256)
    talk(conversation, "你好")
    expected = talk(conversation, "今天")
    conversation.forget(2)
    talk(conversation, "abc")
    conversation.forget(2)
    computed = conversation.computed
    assert talk(conversation, "今天") == expected
    assert conversation.computed - computed < 20  # the first turn was still in the cache
    conversation.forget(1)
    assert "".join(conversation.reply()) == expected


def test_a_reply_that_is_stopped_before_a_word_takes_its_question_back_and_nothing_else(monkeypatch):
    conversation = make()
    talk(conversation, "你好")
    said = list(conversation.utterances)
    monkeypatch.setattr(conversation, "_next", lambda *_: iter([PAD]))
    assert talk(conversation, "今天") == "" and conversation.utterances == said


@pytest.mark.parametrize("best_of", [1, 3])
def test_an_interrupted_reply_keeps_what_was_said(best_of):
    conversation = make("gpt2", silent=True, best_of=best_of)
    calls = []

    def press(*_):
        calls.append(1)
        conversation.interrupted = len(calls) >= 5

    handle = conversation.model.blocks[0].register_forward_hook(press)
    said = talk(conversation, "你好")
    handle.remove()
    assert conversation.utterances[1][0] == said and 3 <= len(said) <= 5
    assert len(talk(conversation, "今天")) == 12


def test_a_reader_who_leaves_keeps_what_was_said():
    conversation = make("gpt2", silent=True)
    conversation.hear("你好")
    pieces = conversation.reply()
    said = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.utterances[1][0] == said


def test_best_of_takes_the_reply_that_the_conversation_makes_likeliest_against_none():
    conversation = make(best_of=6, mmi_weight=0.7, block_size=256)
    talk(conversation, "今天吃饭吗")
    conversation.hear("你好")
    context = conversation.context()
    generator = torch.Generator().manual_seed(1_000_003 + 1)
    sampling = Sampling(min_new_tokens=1, banned=conversation.banned,
                        **{name: getattr(conversation.settings, name) for name in chat.SAMPLING})
    scores = torch.zeros(6)
    steps = list(generate(conversation.model, [context] * 6, sampling, (SEP, PAD), generator=generator, scores=scores))
    replies = [[i for i in row if i >= 0] for row in torch.stack(steps, dim=1).tolist()]
    assert len({tuple(reply) for reply in replies}) == 6
    likely = log_probability(conversation.model, [context] * 6, replies)
    torch.testing.assert_close(scores, likely, atol=1e-4, rtol=1e-4)
    alone = log_probability(conversation.model, [[SEP]] * 6, replies)
    lengths = torch.tensor([len(reply) for reply in replies])
    best = [i for i in replies[int(((likely - 0.7 * alone) / lengths).argmax())] if i > PAD]
    assert "".join(conversation.reply()) == conversation.tokenizer.decode(best)
    conversation.settings = dataclasses.replace(conversation.settings, best_of=1, temperature=0)  # its cache is the winner's
    other = make(temperature=0, block_size=256)
    other.utterances = list(conversation.utterances)
    assert talk(conversation, "abc") == talk(other, "abc")


def test_log_probability_of_a_batch_is_that_of_each_alone():
    model = tiny_model()
    contexts, replies = [[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15, 16], [17]]
    together = log_probability(model, contexts, replies)
    for row in range(3):
        ids = torch.tensor([contexts[row] + replies[row]])
        chances = model.logits(model.hidden(ids))[0].log_softmax(dim=-1)
        expected = sum(chances[len(contexts[row]) + n - 1, i] for n, i in enumerate(replies[row]))
        torch.testing.assert_close(together[row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("keys, allowed", [
    (dict(top_k=2), {1, 2}), (dict(top_p=0.5), {2}), (dict(top_p=0.7), {1, 2}), (dict(min_p=0.3), {1, 2}), (dict(top_p=0), {2}),
    (dict(temperature=1e-30), {2}), (dict(temperature=0), {2}), (dict(min_p=1), {2}), (dict(top_k=50), {1, 2, 3})])
def test_each_sampling_key_keeps_the_tokens_that_it_says(keys, allowed):
    logits = torch.tensor([[9.0, 0.3, 0.6, 0.1]]).log()  # <unk> is the likeliest, and banned
    logits = adjust(logits, torch.empty(1, 0, dtype=torch.long), Sampling(**dict(temperature=1.0) | keys))
    kept = {int(logits.argmax())} if keys.get("temperature") == 0 else set(torch.nonzero(logits.softmax(-1)[0]).flatten().tolist())
    assert kept == allowed


def test_repetition_penalty_and_no_repeat_ngram_look_at_the_reply():
    logits = torch.tensor([[0.0, 2.0, -2.0, 1.0]])
    history = torch.tensor([[1, 2, 1]])
    penalised = adjust(logits, history, Sampling(temperature=0, repetition_penalty=2.0))
    assert penalised[0, 1:].tolist() == [1.0, -4.0, 1.0]
    barred = adjust(logits, history, Sampling(temperature=0, no_repeat_ngram=2))
    assert barred[0, 1:].isfinite().tolist() == [True, False, True]
    conversation = make("gpt2", silent=True, temperature=0, no_repeat_ngram=3, max_new_tokens=100, block_size=256)
    talk(conversation, "你好")
    ids = conversation.utterances[1][1]
    twice = [ids[n:n + 3] for n in range(98) if ids[n:n + 3] in (ids[m:m + 3] for m in range(n))]
    letters = conversation.tokenizer.encode("abcdefghijklmnopqrstuvwxyz ").tolist()
    assert len(ids) == 100 and all(last in letters for _, _, last in twice)


@pytest.mark.parametrize("tokenizer, text", [
    (CharTokenizer(LETTERS + "0"), "the theme is 2000 的"), (BPETokenizer.train(["的"], vocab_size=259), "the 的的地, 2000"),
    (CharTokenizer("хорü안녕สวัดีครบはいé!. "), "хорохоро안녕안녕 üüü สวัสดี สวัสดี はいはい"),
    (BPETokenizer.train(["okay okay hippopotamus"] * 9, vocab_size=300), "hippopotamus hippopo")],
    ids=["char", "bytes", "other scripts", "bpe"])
def test_words_numbers_and_halves_of_characters_may_repeat_what_sentences_may_not(tokenizer, text):
    """no_repeat_ngram counts tokens, and some are letters, digits or bytes."""
    ids = tokenizer.encode(text).tolist()
    sampling = Sampling(temperature=0, no_repeat_ngram=2, banned=(), exempt=tokenizer.parts())
    for n in range(1, len(ids)):
        logits = adjust(torch.zeros(1, tokenizer.size), torch.tensor([ids[:n]]), sampling)
        assert logits[0, ids[n]] == 0
    assert CharTokenizer("的a").parts() == (4,)
    said = tokenizer.encode("!.!").tolist()
    assert adjust(torch.zeros(1, tokenizer.size), torch.tensor([said]), sampling)[0, said[1]] == -torch.inf


def test_dropping_turns_of_a_long_conversation_takes_no_time_of_its_square():
    conversation = make()
    for _ in range(20_001):
        conversation.hear("好")
    begin = time.process_time()
    assert len(conversation.context()) <= 64 and conversation.first == 20_001 - conversation.used() // 2
    assert time.process_time() - begin < 2  # it was 10 s


def test_no_reply_has_unk_control_characters_or_ids_outside_the_vocabulary():
    model = tiny_model(size=70)  # 128 rows in the embedding, 70 ids
    with torch.no_grad():
        model.head.weight[70:] = 5.0 * torch.sign(model.head.weight[70:])
    tokenizer = CharTokenizer(LETTERS + "\x1b\r" + "".join(map(chr, range(200, 200 + 65 - len(LETTERS)))))
    assert tokenizer.size == 70
    conversation = Conversation(model, tokenizer, settings_module.build(ChatSettings, dict(seed=1, temperature=3, top_p=1)))
    for turn in range(15):
        assert talk(conversation, "你好")
    ids = {i for _, utterance in conversation.utterances[1::2] for i in utterance}
    assert len(ids) > 40 and max(ids) < 70
    assert not ids & {UNK, SEP, PAD, *tokenizer.encode("\x1b\r").tolist()}


def test_streamed_characters_of_bpe_are_whole():
    tokenizer = BPETokenizer.train(["你好 abc\n再见"] * 3, vocab_size=259)  # bytes only: a Chinese character is three ids
    torch.manual_seed(0)
    model = tiny_model(size=tokenizer.size, block_size=256)
    conversation = Conversation(model, tokenizer, settings_module.build(ChatSettings, dict(seed=1, temperature=0)))
    conversation.hear("你好")
    script = iter([*tokenizer.encode("我很好🙂").tolist(), SEP])
    conversation._next = lambda *_: script
    pieces = [piece for piece in conversation.reply() if piece]
    assert pieces == ["我", "很", "好", "🙂"]
    conversation._next = lambda *_: iter(tokenizer.encode("好🙂").tolist()[:-1])  # max_new_tokens ended it
    conversation.hear("你好")
    assert "".join(conversation.reply()) == "好" == conversation.utterances[-1][0]


def test_unknown_characters_are_shown_as_typed():
    conversation = make()
    talk(conversation, "你好🦙")
    assert conversation.utterances[0][0] == "你好🦙" and conversation.utterances[0][1][-1] == UNK


@pytest.mark.parametrize("kind, error", [("int8", 0.02), ("int4", 0.2)])
def test_quantized_weights_say_nearly_the_same(kind, error):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=120, n_layer=2, n_head=2, n_embd=64, tied=True)).eval().requires_grad_(False)
    ids = torch.randint(3, 120, (2, 20))
    exact = model.logits(model.hidden(ids))
    embedding = model.embedding.weight.clone()
    got = quantize(model, kind).logits(model.hidden(ids))
    assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert torch.equal(model.embedding.weight, embedding)
    assert 0 < (got - exact).norm() / exact.norm() < error
    again = model.logits(model.hidden(ids[:, :1]))  # one position takes another path through the kernel
    torch.testing.assert_close(again, got[:, :1], atol=1e-3, rtol=1e-2)


# The program

@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return checkpoint.save(folder, 1, checkpoint.describe(tiny_model(block_size=128), CharTokenizer(LETTERS)))


def run(*arguments, text=None):
    return subprocess.run([sys.executable, "chat.py", *map(str, arguments)], input=text, capture_output=True, encoding="utf-8",
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_a_pipe_gets_one_line_for_each_line_and_nothing_else(path, tmp_path):
    done = run(path, "seed=5", "max_new_tokens=20", text="\ufeff你好\n今天\r\n\n你好\nflush\nabc\nexit\nnever\n")
    lines = done.stdout.split("\n")
    assert (done.returncode, done.stderr, len(lines), lines[-1]) == (0, "", 6, "")
    assert lines[2] == "" and all(lines[n] for n in (0, 1, 3, 4))
    config = tmp_path / "chat.yaml"
    config.write_text(f"resume_from: {path}\nn_layer: 26\nn_embd: 960\nn_head: 15\nvocab_size: 7587\ndata_path: none.txt\nlr : 2e-4\n")
    assert run(path, "quantize=int4", "--prompt", "你好").stdout.strip()
    again = run(config, "seed=5", "max_new_tokens=20", "--prompt", " 你好\n")  # whatever the YAML says of the shape
    assert (again.returncode, again.stdout) == (0, lines[0] + "\n")


def test_a_pipe_of_a_chinese_windows_is_understood(path):
    said = {}
    for encoding in ("utf-8", "gb18030"):
        command, text = [sys.executable, "chat.py", path, "temperature=0"], "你好\n今天\n".encode(encoding)
        done = subprocess.run(command, input=text, capture_output=True)
        said[encoding] = done.stdout
        assert done.returncode == 0 and not done.stderr
    assert said["utf-8"] == said["gb18030"]


def test_a_damaged_line_of_a_pipe_keeps_what_can_be_read_and_is_told(path):
    replies = []
    for line in ("你好\ufffd".encode(), "你好".encode() + b"\xe4\xbd"):
        done = subprocess.run([sys.executable, "chat.py", path, "temperature=0"], input=line, capture_output=True, text=False)
        replies.append(done.stdout)
        assert done.returncode == 0 and (b"this line is not UTF-8" in done.stderr) == (len(replies) == 2)
    assert replies[0] == replies[1]


def test_a_pipe_answers_each_line_before_the_next_one_comes(path):
    with subprocess.Popen([sys.executable, "chat.py", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as process:
        for _ in range(3):
            process.stdin.write("你好\n")
            process.stdin.flush()
            assert process.stdout.readline().strip()
        process.stdin.close()
        assert process.stdout.read() == "" and process.wait(timeout=60) == 0


def test_of_a_folder_whose_best_and_last_model_differ_it_says_which_it_takes(path, tmp_path):
    for name in ("best.pth", "last.pth"):
        shutil.copyfile(path, tmp_path / name)
    assert f"{tmp_path}/best.pth has the lowest validation loss; {tmp_path}/last.pth" in run(str(tmp_path), "--prompt", "你好").stderr
    os.unlink(tmp_path / "last.pth")
    os.link(tmp_path / "best.pth", tmp_path / "last.pth")
    assert run(str(tmp_path), "--prompt", "你好").stderr == ""


def test_a_reply_waits_for_no_compiler(path):
    """Making the model's shape drew random numbers on the meta device, which imported torch._dynamo: half of chat's start."""
    done = subprocess.run([sys.executable, "-X", "importtime", "chat.py", path, "--prompt", "你好"], capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and done.stdout.strip()
    assert "torch._C" in done.stderr and "torch._dynamo" not in done.stderr


@pytest.mark.parametrize("arguments, words", [
    (["config/demoChat.yaml", "resume_from=nowhere/none.pth"], ["nowhere/none.pth does not exist; train one first"]),
    (["config/chat300M.yaml", "resume_from=nowhere/pretrained/x.pth"], ["nowhere/pretrained/x.pth", "python data.py download pretrained"]),
    (["config/demo.yaml", "checkpoint_root=nowhere"], ["nowhere/best.pth does not exist"]),
    (["chat.py"], ["chat.py is refused"]),
    (["config/nothing.yaml"], ["config/nothing.yaml does not exist"])])
def test_without_a_checkpoint_it_says_what_makes_one(arguments, words):
    done = run(*arguments, text="你好\n")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words)
