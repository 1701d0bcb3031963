"""The real download code against a server on 127.0.0.1 that also breaks off, stalls, refuses and sends wrong bytes."""

import contextlib
import dataclasses
import http.server
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

import download
from runs import ROOT
from settings import UserError

BODY = "label,review\n1,早餐很好\n".encode() * 9000


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.contents[path]; server.faults is what it does to its next GETs, and then it serves well."""

    def do_GET(self):
        server = self.server
        server.seen.append((self.path, self.headers.get("Range")))
        content = server.contents.get(self.path.split("?")[0])
        fault = server.faults.pop(0) if server.faults else None
        if content is None or fault == 404 or fault == 503:
            self.send_error(fault or 404)
            return
        begin = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
        if begin >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        content = content[begin:]
        if fault == "chunks":  # a chunked answer that breaks off, as a proxy's may
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n" % len(content) + content[:len(content) // 2])
            self.close_connection = True
            return
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            if fault in ("break", "stall"):
                self.wfile.write(content[:len(content) // 2])
                self.wfile.flush()
                if fault == "stall":
                    server.released.wait(20)
                self.connection.close()
            else:
                self.wfile.write(b"?" * len(content) if fault == "wrong" else content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.contents, server.faults, server.seen, server.released = {"/reviews.csv": BODY}, [], [], threading.Event()
        server.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


def check_body(path):
    with open(path, "rb") as file:
        if file.read() != BODY:
            raise download.Wrong("has another checksum")


@pytest.fixture
def reviews(server, tmp_path):
    """The file of reviews as the program fetches it, from the server, with the checksum of what the server has."""
    file = download.files(f"{server.address}/reviews.csv")["sentiment"][0]
    return dataclasses.replace(file, path=str(tmp_path / "data" / "reviews.csv"), check=check_body)


def content_of(folder):
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def test_a_file_arrives_whole_and_alone(server, reviews, capsys):
    download.get(reviews)
    check_body(reviews.path)
    assert content_of(os.path.dirname(reviews.path)) == ["reviews.csv"]
    assert "checked" in capsys.readouterr().out and len(server.seen) == 1


def test_an_address_may_be_written_as_people_read_it(server, reviews):
    server.contents["/%E6%95%B0%E6%8D%AE%201/a%20b.csv"] = BODY
    download.get(dataclasses.replace(reviews, address=f"{server.address}/数据 1/a%20b.csv"))
    check_body(reviews.path)


def test_a_right_file_is_left_alone(server, reviews, capsys):
    download.get(reviews)
    before = os.stat(reviews.path)
    download.get(reviews)
    assert os.stat(reviews.path) == before and len(server.seen) == 1
    assert "is there already, and right" in capsys.readouterr().out


def test_another_file_of_that_name_is_never_overwritten(server, reviews):
    os.makedirs(os.path.dirname(reviews.path))
    with open(reviews.path, "w") as file:
        file.write("mine")
    with pytest.raises(UserError, match="left alone: move it away"):
        download.get(reviews)
    assert open(reviews.path).read() == "mine" and not server.seen


@pytest.mark.parametrize("fault", ["break", "stall"])
def test_a_transfer_that_breaks_off_or_stalls_is_resumed(server, reviews, fault, capsys):
    server.faults = [fault]
    download.get(reviews, tries=2, timeout=1)
    check_body(reviews.path)
    ranges = [seen[1] for seen in server.seen]
    assert ranges == [None, f"bytes={len(BODY) // 2}-"]
    assert "trying again in 1 s (2 of 2)" in capsys.readouterr().err


def test_an_interrupted_download_is_resumed_by_the_next_call(server, reviews):
    server.faults = ["break"]
    with pytest.raises(UserError, match=f"broke off at {len(BODY) // 2:,} of {len(BODY):,} bytes.*by hand and put it at"):
        download.get(reviews, tries=1)
    assert content_of(os.path.dirname(reviews.path)) == [".downloading-reviews.csv"]
    download.get(reviews, tries=1)
    check_body(reviews.path)
    assert server.seen[-1][1] == f"bytes={len(BODY) // 2}-"


def test_wrong_bytes_never_get_the_name_and_are_not_resumed(server, reviews):
    server.faults = ["wrong"]
    with pytest.raises(UserError, match="what came has another checksum"):
        download.get(reviews, tries=1)
    assert content_of(os.path.dirname(reviews.path)) == []
    server.faults = ["wrong"]
    download.get(reviews, tries=2)
    check_body(reviews.path)
    assert server.seen[-1][1] is None


def test_a_chunked_answer_that_breaks_off_is_tried_again(server, reviews):
    server.faults = ["chunks"]
    download.get(reviews, tries=2)
    check_body(reviews.path)


def test_a_whole_file_that_was_not_renamed_is_not_fetched_again(server, reviews):
    os.makedirs(os.path.dirname(reviews.path), exist_ok=True)
    with open(os.path.join(os.path.dirname(reviews.path), ".downloading-reviews.csv"), "wb") as file:
        file.write(BODY)
    download.get(reviews, tries=1)
    check_body(reviews.path)


def test_left_overs_of_another_file_do_not_block_the_download(server, reviews):
    for left in (BODY + b"more", b"x" * 100):  # longer than the file: 416; shorter: the sum comes out wrong
        os.makedirs(os.path.dirname(reviews.path), exist_ok=True)
        with open(os.path.join(os.path.dirname(reviews.path), ".downloading-reviews.csv"), "wb") as file:
            file.write(left)
        download.get(reviews, tries=2)
        check_body(reviews.path)
        os.unlink(reviews.path)


@pytest.mark.parametrize("fault", [404, 503])
def test_a_server_that_refuses_ends_in_one_line(server, reviews, fault):
    server.faults = [fault] * 2
    with pytest.raises(UserError, match=f"{server.address}/reviews.csv could not be fetched .*answers {fault}.*put it at {reviews.path}"):
        download.get(reviews, tries=2)
    assert content_of(os.path.dirname(reviews.path)) == []


def command(folder, *arguments, **environment):
    """`python data.py download …` in an empty folder."""
    return subprocess.run([sys.executable, os.path.join(ROOT, "data.py"), "download", *arguments], cwd=folder, capture_output=True,
                          text=True, env=os.environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} | environment, timeout=120)


def last_line(done):
    return done.stderr.strip().split("\n")[-1]


def test_without_a_network_one_line_names_address_and_place(tmp_path):
    done = command(tmp_path, "sentiment", "--tries", "1", "--address", "http://127.0.0.1:9/reviews.csv")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert last_line(done).startswith("error: http://127.0.0.1:9/reviews.csv could not be fetched")
    assert last_line(done).endswith("by hand and put it at data/ChnSentiCorp_htl_all.csv") and content_of(tmp_path / "data") == []


def test_the_published_reviews_are_known_by_their_checksum(server, tmp_path):
    done = command(tmp_path, "sentiment", "--tries", "1", "--address", f"{server.address}/reviews.csv")
    assert done.returncode == 2 and "what came differs in SHA-256" in last_line(done) and content_of(tmp_path / "data") == []


def test_the_dialogues_come_by_gdown(server, tmp_path):
    server.contents["/train.txt"] = "甲\n乙\n\n".encode() * 500_001
    server.faults = ["break"]
    path = tmp_path / "data" / "train.txt"
    download.get(download.File(str(path), f"{server.address}/train.txt", download.fetch_drive, download.check_dialogues), tries=3)
    assert path.read_bytes() == server.contents["/train.txt"]
    assert content_of(tmp_path / "data") == ["train.txt"]
    again = command(tmp_path, "chat", "--address", f"{server.address}/train.txt")
    assert again.returncode == 0 and "is there already, and right" in again.stdout


def test_left_overs_of_gdown_to_which_nothing_can_be_added_do_not_block_the_download(server, tmp_path):
    """It was killed between the last byte and the renaming, or the server gives no parts of files."""
    server.contents["/train.txt"] = "甲\n乙\n\n".encode() * 500_001
    (tmp_path / ".downloading-train.txtabcdefgh.part").write_bytes(server.contents["/train.txt"])
    path = tmp_path / "train.txt"
    download.get(download.File(str(path), f"{server.address}/train.txt", download.fetch_drive, download.check_dialogues), tries=2)
    assert path.read_bytes() == server.contents["/train.txt"] and content_of(tmp_path) == ["train.txt"]


def test_a_web_page_in_place_of_the_dialogues_is_refused(server, tmp_path):
    server.contents["/train.txt"] = b"<html>too many people have looked at this file</html>"
    done = command(tmp_path, "chat", "--address", f"{server.address}/train.txt", "--tries", "1")
    assert done.returncode == 2 and "holds 1 dialogues and not the 500,001" in last_line(done) and content_of(tmp_path / "data") == []


def test_a_stalling_drive_is_given_up(server, tmp_path):
    server.contents["/train.txt"] = "甲\n乙\n\n".encode() * 500_001
    server.faults = ["stall"]
    begin = time.monotonic()
    with pytest.raises(download.Failed, match="nothing came for 3 seconds"):
        download.fetch_drive(f"{server.address}/train.txt", str(tmp_path / "part"), 3)
    assert time.monotonic() - begin < 19


def published_weights(n_layer):
    """The content of a file like the published ones, but narrow."""
    return dict(global_step=1, n_layer=n_layer, n_head=1, n_embd=2, state_dict={"transformer.wte.weight": torch.zeros(3, 2)})


@pytest.fixture
def hub(server, tmp_path):
    """The server as HF_ENDPOINT, with the two files of the repository."""
    listing = dict(id=download.REPOSITORY, siblings=[dict(rfilename=name) for name in ("README.md", "cpt90M.pth", "a b/cpt300M.pth")])
    server.contents[f"/api/models/{download.REPOSITORY}"] = json.dumps(listing).encode()
    for name, layers in (("cpt90M.pth", 12), ("a%20b/cpt300M.pth", 26)):
        torch.save(published_weights(layers), tmp_path / "x")
        server.contents[f"/{download.REPOSITORY}/resolve/main/{name}"] = (tmp_path / "x").read_bytes()
    os.unlink(tmp_path / "x")
    return server


def test_the_weights_come_from_any_endpoint_and_any_folder_of_the_repository(hub, tmp_path):
    done = command(tmp_path, "pretrained", HF_ENDPOINT=hub.address + "/")
    assert done.returncode == 0, done.stderr
    assert content_of(tmp_path / "checkpoints" / "pretrained") == ["cpt300M.pth", "cpt90M.pth"]


def test_the_weights_come_from_a_mirror_that_lists_no_files(hub, tmp_path):
    del hub.contents[f"/api/models/{download.REPOSITORY}"]
    done = command(tmp_path, "pretrained", "--tries", "1", HF_ENDPOINT=hub.address)
    assert content_of(tmp_path / "checkpoints" / "pretrained") == ["cpt90M.pth"]
    assert done.returncode == 2 and "answers 404" in last_line(done) and "put it at checkpoints/pretrained/cpt300M.pth" in last_line(done)


def test_interrupted_weights_are_resumed_by_the_next_call(hub, tmp_path):
    hub.faults = [None, "break"]  # the list of files comes first
    assert command(tmp_path, "pretrained", "--tries", "1", HF_ENDPOINT=hub.address).returncode == 2
    assert ".downloading-cpt90M.pth" in content_of(tmp_path / "checkpoints" / "pretrained")
    done = command(tmp_path, "pretrained", "--tries", "1", HF_ENDPOINT=hub.address)
    assert done.returncode == 0, done.stderr
    size = len(hub.contents[f"/{download.REPOSITORY}/resolve/main/cpt90M.pth"])
    assert [seen[1] for seen in hub.seen if seen[0].endswith("cpt90M.pth")] == [None, f"bytes={size // 2}-"]


def test_weights_that_are_not_the_published_ones_are_refused(hub, tmp_path):
    address = next(path for path in hub.contents if path.endswith("cpt300M.pth"))
    hub.contents[address] = hub.contents[address.replace("a%20b/cpt300M", "cpt90M")]
    done = command(tmp_path, "pretrained", "--tries", "1", HF_ENDPOINT=hub.address)
    assert done.returncode == 2 and "what came is not the published checkpoint of 26 layers" in last_line(done)
    assert content_of(tmp_path / "checkpoints" / "pretrained") == ["cpt90M.pth"]  # the other one is kept


def test_all_tells_of_every_file_that_could_not_be_had(tmp_path):
    without = tmp_path / "without"
    without.mkdir()
    (without / "gdown.py").write_text("raise ImportError('no gdown')")
    done = command(tmp_path, "all", "--tries", "1", PYTHONPATH=str(without), https_proxy="http://127.0.0.1:9", NO_PROXY="", no_proxy="")
    errors = [line for line in done.stderr.split("\n") if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 4 and "Traceback" not in done.stderr
    assert "pip install gdown" in errors[0] and "data/train.txt" in errors[0] and download.DRIVE in errors[0]
    assert download.REVIEWS in errors[1] and "put it at data/ChnSentiCorp_htl_all.csv" in errors[1]
    assert "huggingface.co/cjl196/small-gpt/resolve/main/cpt90M.pth could not be fetched" in errors[2]
    assert "checkpoints/pretrained/cpt300M.pth" in errors[3]


def test_a_folder_where_the_file_belongs_is_left_alone(tmp_path):
    (tmp_path / "data" / "ChnSentiCorp_htl_all.csv").mkdir(parents=True)
    done = command(tmp_path, "sentiment", "--address", "http://127.0.0.1:9/reviews.csv")
    assert done.returncode == 2 and "is a folder; it is left alone" in last_line(done) and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["cats"], ["all", "--address", "http://127.0.0.1:9"], ["chat", "--tries", "0"],
                                       ["sentiment", "--tries", "1", "--address", "nonsense"]])
def test_wrong_arguments_end_with_status_2(tmp_path, arguments):
    done = command(tmp_path, *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
