"""Fetches what the configurations name: the dialogues, the reviews, the published weights.

A file gets its name only when it is whole and right; what is there already is checked, and never overwritten.
"""

import argparse
import contextlib
import dataclasses
import glob
import hashlib
import http.client
import json
import os
import subprocess
import sys
import time
import typing
import urllib.error
import urllib.parse
import urllib.request

from tqdm import tqdm

import data
from settings import FULL, UserError

DRIVE = "https://drive.google.com/uc?id=1nEuew_KNpTMbyy7BO4c8bXMXN351RCPp"
REVIEWS = "https://raw.githubusercontent.com/SophonPlus/ChineseNlpCorpus/master/datasets/ChnSentiCorp_htl_all/ChnSentiCorp_htl_all.csv"
REVIEWS_SHA256 = "1d414b9c65caf3a836abdb4efded621968502ad3338e1a9d885ae131c86083f0"  # 2,904,858 bytes
REPOSITORY = "cjl196/small-gpt"


class Failed(Exception):
    """One try that came to nothing, and why; the next may do better."""


class Wrong(Failed):
    """What came (or lies there) is not the file that it should be."""


@dataclasses.dataclass(frozen=True)
class File:
    """One file: where it belongs, where it comes from, how it is fetched, and what tells that it is right."""

    path: str
    address: str
    fetch: typing.Callable  # (address, temporary, timeout) -> None, or Failed; goes on with what lies at `temporary`
    check: typing.Callable  # (path) -> None, or Wrong


# Ways to fetch

def fetch_http(address, temporary, timeout):
    """Over HTTP, with a bar, from where an earlier try broke off."""
    have = os.path.getsize(temporary) if os.path.exists(temporary) else 0
    try:
        address = urllib.parse.quote(address, safe="%/:=&?~#+!$,;'@()*[]")
        request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            have = have if resumed else 0
            rest = response.headers.get("Content-Length")
            total = have + int(rest) if rest else None
            with open(temporary, "ab" if resumed else "wb") as file, tqdm(
                    total=total, initial=have, unit="B", unit_scale=True, desc=os.path.basename(address)) as bar:
                while block := response.read1(1 << 16):
                    file.write(block)
                    bar.update(len(block))
            if total is not None and os.path.getsize(temporary) < total:
                raise Failed(f"the connection broke off at {os.path.getsize(temporary):,} of {total:,} bytes")
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing comes after what is there: whole, or another file's; the check tells
            return
        raise Failed(f"the server answers {error.code} {error.reason}")
    except (OSError, ValueError, http.client.HTTPException) as error:
        if getattr(error, "filename", None) or getattr(error, "errno", None) in FULL:  # of the file here, not of the network
            raise UserError(f"{temporary} cannot be written: {error.strerror}")
        raise Failed(str(getattr(error, "reason", error)) or type(error).__name__)


def fetch_drive(address, temporary, timeout):
    """By gdown, which knows Google Drive's question before large files; ended when nothing comes for `timeout` seconds."""
    try:
        import gdown  # noqa: F401
    except ImportError:
        raise UserError(f"Google Drive needs gdown: pip install gdown; or open {address} in a browser and put the file where it belongs: "
                        "data/train.txt")

    def size():
        with contextlib.suppress(FileNotFoundError):  # gdown has just renamed it
            return sum(os.path.getsize(path) for path in glob.glob(glob.escape(temporary) + "*"))
        return 0

    process = subprocess.Popen([sys.executable, "-m", "gdown", address, "-O", temporary, "--continue", "--quiet"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seen, since = size(), time.monotonic()
    with tqdm(initial=seen, unit="B", unit_scale=True, desc="gdown") as bar:
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if (now := size()) != seen:
                    bar.update(now - seen)
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since > timeout:
                    raise Failed(f"nothing came for {timeout:g} seconds")
            lines = [line.strip() for line in process.stderr if line.strip()]
        finally:
            process.kill()
            process.communicate()
    if process.returncode or not os.path.exists(temporary):
        first = next((number for number, line in enumerate(lines) if "rror" in line), -1)
        problem = " ".join(lines[first:])[:300] or "gdown failed"
        if "byte range" in problem:  # the server has no rest of it, or sends none: gdown would ask for one for ever
            for part in glob.glob(glob.escape(temporary) + "*.part"):
                os.unlink(part)
        raise Failed(problem)


def fetch_weights(address, temporary, timeout):
    """From a Hugging Face repository, in whatever folder of it the file lies. Not by huggingface_hub, which begins anew after a break."""
    start, name = address.split("/resolve/")[0], os.path.basename(address)
    listing = start.replace(REPOSITORY, f"api/models/{REPOSITORY}")
    try:
        with urllib.request.urlopen(listing, timeout=timeout) as response:
            paths = [entry["rfilename"] for entry in json.load(response)["siblings"]]
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        paths = [name]  # a mirror of the files alone; if there is no network, the file itself tells
    path = next((path for path in paths if os.path.basename(path) == name), None)
    if path is None:
        raise Failed(f"{REPOSITORY} holds no {name}")
    fetch_http(f"{start}/resolve/main/{urllib.parse.quote(path)}", temporary, timeout)


# What tells that a file is right

def check_dialogues(path):
    """The published corpus has 500,001 dialogues."""
    try:
        dialogues = sum(len(spans) for _, spans in data.read_groups(path))
    except UserError as error:
        if isinstance(error.__context__, OSError):  # the disk's fault, not the file's
            raise
        raise Wrong(str(error).removeprefix(path).partition(";")[0].strip())
    if dialogues < 500_000:
        raise Wrong(f"holds {dialogues:,} dialogues and not the 500,001 of the published corpus")


def check_reviews(path):
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != REVIEWS_SHA256:
            raise Wrong("differs in SHA-256 from the published reviews")


def check_weights(n_layer):
    def check(path):
        import checkpoint  # here: text comes without waiting for torch
        try:
            content = checkpoint.load(path)
        except checkpoint.Damaged as error:  # other errors, full memory say, are not the file's
            raise Wrong(str(error).removeprefix(path).strip())
        if not checkpoint.is_original(content) or content["n_layer"] != n_layer:
            raise Wrong(f"is not the published checkpoint of {n_layer} layers")
    return check


def files(address=None):
    """What can be fetched: {name: [File, …]}. `address` replaces the published one."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    weights = [File(f"checkpoints/pretrained/{name}.pth", f"{endpoint}/{REPOSITORY}/resolve/main/{name}.pth", fetch_weights,
                    check_weights(layers)) for name, layers in (("cpt90M", 12), ("cpt300M", 26))]
    fetch_chat = fetch_drive if "drive.google.com" in (address or DRIVE) else fetch_http
    return dict(chat=[File("data/train.txt", address or DRIVE, fetch_chat, check_dialogues)],
                sentiment=[File("data/ChnSentiCorp_htl_all.csv", address or REVIEWS, fetch_http, check_reviews)],
                pretrained=weights)


def get(file, tries=5, timeout=30.0):
    """Fetches one file into its place, unless it is there and right."""
    if os.path.exists(file.path):
        try:
            if os.path.isdir(file.path):
                raise Wrong("is a folder")
            file.check(file.path)
        except OSError as error:
            raise UserError(f"{file.path} is there already but cannot be read: {error.strerror}")
        except Wrong as error:
            raise UserError(f"{file.path} is there already but {error}; it is left alone: move it away to fetch the published one")
        print(f"{file.path} is there already, and right")
        return
    folder, name = os.path.split(file.path)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made: {error.strerror}")
    temporary, problem = os.path.join(folder, f".downloading-{name}"), None
    for number in range(tries):
        if number:
            wait = 2 ** (number - 1)
            print(f"{file.address}: {problem}; trying again in {wait} s ({number + 1} of {tries})", file=sys.stderr, flush=True)
            time.sleep(wait)
        try:
            file.fetch(file.address, temporary, timeout)
            file.check(temporary)
            os.replace(temporary, file.path)
            print(f"{file.path}: {os.path.getsize(file.path):,} bytes, checked")
            return
        except Wrong as error:
            os.unlink(temporary)
            problem = f"what came {error}"
        except Failed as error:
            problem = str(error)
    raise UserError(f"{file.address} could not be fetched ({problem}); fetch it by hand and put it at {file.path}")


def main(arguments):
    parser = argparse.ArgumentParser(prog="python data.py download", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["chat", "sentiment", "pretrained", "all"],
                        help="chat: data/train.txt; sentiment: data/ChnSentiCorp_htl_all.csv; pretrained: checkpoints/pretrained/")
    parser.add_argument("--address", help="fetch chat or sentiment from another address, a mirror's (weights: set HF_ENDPOINT)")
    parser.add_argument("--tries", type=int, default=5, help="how often a file is tried (default: 5)")
    options = parser.parse_args(arguments)
    if options.address and options.what not in ("chat", "sentiment"):
        raise UserError(f"--address={options.address} goes with chat or sentiment alone; for the weights set HF_ENDPOINT")
    if options.tries < 1:
        raise UserError(f"--tries={options.tries} fetches nothing; give 1 or more")
    known = files(options.address)
    problems = []
    for file in sum(known.values(), []) if options.what == "all" else known[options.what]:
        try:
            get(file, options.tries)
        except UserError as error:  # the other files may still be had
            problems.append(str(error))
    if problems:
        raise UserError("\nerror: ".join(problems))
