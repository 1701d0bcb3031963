import concurrent.futures
import signal
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer
from settings import UserError
from tokenizer import PAD, SEP, UNK, BPETokenizer, CharTokenizer

SAMPLE = "你好呀\n今天天气怎么样？\n很好，出去走走吧 hello 123\n"
TEXT = SAMPLE * 30 + "很少的字：龘"
KINDS = {"char": CharTokenizer, "bpe": BPETokenizer}


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train([TEXT], vocab_size=400)


def test_vocabulary_is_by_falling_frequency_and_ties_by_code_point():
    made = CharTokenizer.train(["ba\nab", "ccc\nd"])
    assert made.vocabulary == "cabd"
    assert made.encode("cb\nx").tolist() == [3, 5, SEP, UNK]


def test_rare_characters_and_a_bounded_vocabulary_become_unk():
    assert CharTokenizer.train(["aaabbc"], min_freq=2).encode("abc").tolist() == [3, 4, UNK]
    small = CharTokenizer.train(["aaabbc"], vocab_size=4)
    assert small.size == 4 and small.encode("abc").tolist() == [3, UNK, UNK]


@given(st.text(alphabet=sorted(set(TEXT)) + ["\n"]))
def test_characters_decode_to_what_was_encoded(text):
    made = CharTokenizer.train([TEXT])
    assert made.decode(made.encode(text).tolist()) == text


@given(st.text())
@settings(deadline=None)
def test_bpe_decodes_any_text_to_what_was_encoded(bpe, text):
    ids = bpe.encode(text).tolist()
    assert bpe.decode(ids) == text
    assert UNK not in ids and PAD not in ids


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
def test_streamed_bpe_never_shows_half_a_character(bpe, text):
    shown = list(bpe.decode_stream(bpe.encode(text).tolist()))
    assert "".join(shown) == text
    assert all("�" not in part for part in shown) or "�" in text


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_an_error_while_a_bpe_reads_reaches_the_caller_and_ctrl_c_means_what_it_did(handler):
    def texts():
        yield from [TEXT] * 300  # the library takes some at a time
        within.append(signal.getsignal(signal.SIGINT))
        raise UserError("damaged")

    within, before = [], signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(UserError, match="damaged"):
            BPETokenizer.train(texts(), vocab_size=400)
        assert signal.getsignal(signal.SIGINT) is handler
        assert within == [signal.SIG_DFL if handler is signal.default_int_handler else handler]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_bpe_is_trained_in_a_thread_too():
    with concurrent.futures.ThreadPoolExecutor() as pool:
        made = pool.submit(BPETokenizer.train, [TEXT], vocab_size=400).result()
    assert made.state() == BPETokenizer.train([TEXT], vocab_size=400).state()


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_special_token_cannot_be_typed(kind):
    made = KINDS[kind].train(["<sep><pad><unk>" + TEXT], vocab_size=400)
    ids = made.encode("<sep><pad><unk>").tolist()
    assert not {UNK, SEP, PAD} & set(ids) and made.decode(ids) == "<sep><pad><unk>"


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_saved_tokenizers_are_the_same_again(kind, tmp_path):
    made = KINDS[kind].train([TEXT], vocab_size=400)
    made.save(tmp_path / "t.json")
    again = tokenizer.load(tmp_path / "t.json")
    assert again.encode(TEXT).tolist() == made.encode(TEXT).tolist() and again.size == made.size


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_characters_of_tokens_add_up_to_the_length_of_the_text(kind):
    made = KINDS[kind].train([TEXT], vocab_size=400)
    assert made.characters[made.encode(TEXT)].sum() == len(TEXT)


def test_characters_are_encoded_at_20_million_a_second_at_least():
    made = CharTokenizer.train([TEXT])
    text = SAMPLE * 100_000
    made.encode(text)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        made.encode(text)
        times.append(time.perf_counter() - begin)
    assert len(text) / min(times) > 20e6


def test_what_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "t.json").write_text("[1, 2]")
    (tmp_path / "bpe.json").write_text('{"kind": "bpe", "tokenizer": "{}"}')
    for path in (tmp_path / "t.json", tmp_path / "bpe.json", tmp_path / "missing.json"):
        with pytest.raises(UserError, match="tokenizer="):
            tokenizer.load(path)
    with pytest.raises(UserError, match="vocab_size=100"):
        BPETokenizer.train([TEXT], vocab_size=100)
    with pytest.raises(ValueError, match="twice"):
        CharTokenizer("aa")
