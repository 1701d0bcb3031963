"""The machine: device, precision, processes under torchrun, random numbers, signals, logs.

A script's work stands in `with Processes() as processes:`, and begins with `runtime = start(settings, processes)`.
"""

import contextlib
import dataclasses
import errno
import glob
import io
import os
import platform
import re
import signal
import sys
import tempfile
import time
import uuid
import warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from settings import FULL, FULL_MEMORY, UserError

# Dense bfloat16 peaks in FLOP/s, from the makers' data sheets (Volta and Turing: float16).
PEAKS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "H20": 148e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12,
         "L40S": 362e12, "L4": 121e12, "A10": 125e12, "V100": 125e12, "T4": 65e12, "4090": 165e12, "3090": 71e12}
CONNECTION_LOST = re.compile("gloo|remote process|Connection (closed|reset)|Broken pipe|failed to recv|TCPStore")  # another process is gone


class Processes:
    """This process among those that torchrun started, and how they wait for one another and end together.

    All of it goes through torchrun's key-value store, not through collectives: a wait may take hours.
    """

    def __init__(self):
        self.rank, self.local_rank, self.world, self.local_world = (int(os.environ.get(name) or default) for name, default in (
            ("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
        self.torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self.parent = os.getppid() if self.torchrun else None
        self.store, self.waits, self.claimed = None, 0, {}
        if self.world == 1:  # the others alone are another program's
            self.rank, self.local_rank, self.local_world = 0, 0, 1
        elif "MASTER_ADDR" not in os.environ:
            raise UserError(f"WORLD_SIZE={self.world} is set, but torchrun did not start this: unset it, or start with torchrun")

    def __enter__(self):
        if self.torchrun or self.world > 1:
            self._join(next(dist.rendezvous("env://"))[0])
        return self

    def _join(self, store):
        """Agrees with the others on a prefix of keys: the store may outlive restarts, and hold what dead processes said.

        TORCHELASTIC_RESTART_COUNT would not do: it differs between machines once one has joined, and counts no process that dies here.
        """
        if self.rank == 0:
            session = uuid.uuid4().hex
            store.set("session", session)
            others = [f"{session} {rank}" for rank in range(1, self.world)]
            while others and not store.check(others):
                time.sleep(0.05)
            store.set(f"{session} all {self.world}", "")  # their number may have changed with a restart
        else:
            tried = {}
            while True:
                session = store.get("session").decode() if store.check(["session"]) else None
                if session and session not in tried:
                    tried[session] = store.add(f"{session} {self.rank}", 1) == 1  # else: that was an earlier process of this rank
                if tried.get(session) and store.check([f"{session} all {self.world}"]):
                    break
                time.sleep(0.05)
        self.store = dist.PrefixStore(session, store)

    def wait(self, come):
        """Returns once `come()` is true; ends this process if another one fails meanwhile."""
        while not come():
            if self.store.check(["failed"]):
                self._end(2)
            time.sleep(0.1)

    def meet(self):
        """Returns in all processes when all have called it."""
        if self.store is not None:
            self.waits += 1
            key = f"wait {self.waits}"
            self.store.add(key, 1)
            self.wait(lambda: self.store.add(key, 0) == self.world)

    def tell(self, text):
        """Rank 0's text, in all processes, whenever it comes."""
        if self.store is None:
            return text
        self.waits += 1
        key = f"wait {self.waits}"
        if self.rank == 0:
            self.store.set(key, text)
        self.wait(lambda: self.store.check([key]))
        return self.store.get(key).decode()

    def once(self, make):
        """The text that `make()` returns, called by rank 0, then by the first process of each other machine, where it
        finds the work done if the disk is shared; all others wait."""
        text = self.tell(make() if self.rank == 0 else "")
        if self.rank > 0 and self.local_rank == 0 and (mine := make()) != text:
            raise UserError(f"{platform.node()} has {mine} where rank 0 has {text}: give every machine the same files")
        self.meet()
        return text

    def claim(self, folder):
        """Keeps other programs from training into a folder as long as this one does: each would put aside and prune what the other saves.
        The lock ends with the process, however that ends, and leaves no file. It holds on one machine, where the file system can lock."""
        real = os.path.realpath(folder)  # it may have several names
        if real in self.claimed:
            return
        try:
            self.claimed[real] = os.open(real, os.O_RDONLY)  # an OSError on Windows, and where there is no such folder yet
            import fcntl  # Windows has none
            fcntl.flock(self.claimed[real], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.claimed.pop(real))
            raise UserError(f"another run is writing to checkpoint_root={folder}: name another folder, or wait for it or stop it")
        except OSError:
            pass

    def __exit__(self, kind, error, trace):
        for place in self.claimed.values():
            os.close(place)
        if full := isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
                FULL_MEMORY.search(str(error)) and not isinstance(error, UserError)):
            error = UserError(f"rank {self.rank}: the memory is full; micro_batch=1, a smaller block_size or model, or "
                              "checkpointing=True (a third slower) takes less; saved checkpoints are intact")
        if error is None:
            if dist.is_initialized():
                dist.destroy_process_group()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)  # not by the interpreter's end: gloo's threads may still free tensors, and then abort (pytorch/pytorch#179291)
        elif self.store is not None and isinstance(error, Exception):
            if not isinstance(error, UserError) and CONNECTION_LOST.search(str(error)):
                print(f"rank {self.rank}: lost another process ({str(error).splitlines()[0][-150:]}); torchrun says which one",
                      file=sys.stderr, flush=True)
                self._end(1)
            try:
                said = self.store.add(f"said {error}", 1) > 1  # the same error, met by several
                self.store.set("failed", "")
            except dist.DistError:  # the store has gone with rank 0's machine
                said = False
            if said and isinstance(error, UserError):
                self._end(2)
        if full:
            raise error from None

    def _end(self, status):
        """Ends quietly, a little late: torchrun ends the others when one does, and should name the one that failed first."""
        time.sleep(5)
        sys.stdout.flush()
        os._exit(status)


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where this process runs and what it may use."""

    device: torch.device
    dtype: torch.dtype  # of matrix products
    processes: Processes
    neighbours: "dist.ProcessGroup | None" = None  # the processes of this machine, if there are several, who exchange fast

    @property
    def rank(self):
        return self.processes.rank

    @property
    def world(self):
        """How many processes there are."""
        return self.processes.world

    @property
    def main(self):
        """True in the one process that writes files and talks."""
        return self.rank == 0

    def autocast(self):
        """The context that computes matrix products in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def tensors(self, *arrays):
        """Arrays as tensors on the device."""
        pin = self.device.type == "cuda"
        return [(tensor.pin_memory() if pin else tensor).to(self.device, non_blocking=pin) for tensor in map(torch.from_numpy, arrays)]

    def say(self, *words):
        if self.main:
            print(*words, flush=True)


def start(settings, processes=None):
    """The Runtime of this process; joins the group of `processes` when torchrun started it."""
    processes = processes or Processes()
    torch.set_flush_denormal(True)  # denormal AdamW means of tokens not seen for long slow a CPU; later threads inherit it
    device = pick_device(settings.device, processes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    elif not threads_are_set(processes):
        affinity = hasattr(os, "sched_getaffinity")  # of Linux; elsewhere PyTorch's own choice is better for one process
        cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count()
        if affinity or processes.local_world > 1:
            torch.set_num_threads(max(1, cores // processes.local_world))
    group = None
    if processes.store is not None:
        processes.meet()  # a process without its device must not leave the others waiting in the next line
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=processes.rank,
                                world_size=processes.world, store=dist.PrefixStore("group", processes.store))
        group = neighbours(processes)
    return Runtime(device, pick_dtype(settings.dtype, device, processes), processes, group)


def neighbours(processes):
    """The group of the processes of this machine; None where there is one, or machines have different numbers of them."""
    numbers = torch.zeros(processes.world)
    numbers[processes.rank] = processes.local_world
    dist.all_reduce(numbers)
    if processes.local_world == 1 or (numbers != processes.local_world).any():
        return None
    return dist.group.WORLD if processes.local_world == processes.world else dist.new_subgroups(processes.local_world)[0]


def threads_are_set(processes):
    """Whether the user set OMP_NUM_THREADS; torchrun sets it to 1 for several processes where the user did not."""
    if not processes.torchrun or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return "OMP_NUM_THREADS" in os.environ
    try:
        with open(f"/proc/{os.getppid()}/environ", "rb") as file:  # what torchrun was started with
            return any(line.startswith(b"OMP_NUM_THREADS=") for line in file.read().split(b"\0"))
    except OSError:
        return False


def explain_processes(runtime, values):
    """A line where the original's keys, among a YAML file's `values`, say other than what torchrun does."""
    asked = str(values.get("world_size") or runtime.world)
    if str(values.get("ddp")).lower() == "true" and not runtime.processes.torchrun:
        runtime.say("ddp=True, but torchrun did not start this: training on one device; "
                    "on several: torchrun --nproc_per_node=2 train.py …")
    elif asked != str(runtime.world):
        runtime.say(f"world_size={asked} is ignored: there {'is 1 process' if runtime.world == 1 else f'are {runtime.world} processes'}")


def pick_device(name, processes):
    """The torch device that a setting means here; where there is no GPU the CPU, with a line."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", name):
        raise UserError(f"device={name} is not one of auto, cpu, cuda, cuda:N, mps")
    kind, _, index = name.partition(":")
    mps = torch.backends.mps.is_available() and processes.world == 1  # gloo does not exchange its tensors
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if kind == "cuda" and not torch.cuda.is_available() or kind == "mps" and not mps:
        if processes.rank == 0:
            print(f"device={name} is not there: using the CPU", file=sys.stderr, flush=True)
        return torch.device("cpu")
    if kind == "cuda":
        if index and processes.local_world > 1:
            raise UserError(f"device={name} is one GPU for all processes; use device=cuda")
        number = int(index) if index else processes.local_rank
        if number >= torch.cuda.device_count():
            raise UserError(f"there is no cuda:{number} here (GPUs: {torch.cuda.device_count()}): use a lower number, or fewer "
                            "processes")
        return torch.device("cuda", number)
    return torch.device(kind)


def pick_dtype(name, device, processes):
    """The torch dtype that a setting means on this device."""
    if name != "auto":
        if name == "float16" and device.type == "cpu":
            if processes.rank == 0:
                print("dtype=float16 is not for CPUs: using bfloat16", file=sys.stderr, flush=True)
            return torch.bfloat16
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "mps":
        return torch.float32
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("amx_bf16") or able.get("avx512_bf16") else torch.float32


def seed_step(seed, step, rank):
    """All random numbers of a training step follow from (seed, step, rank), so nothing need be saved to resume."""
    torch.manual_seed((seed * 1_000_003 + step) * 4099 + rank)


def add_up(runtime, *values):
    """Sums of numbers over all processes."""
    if runtime.world == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return tuple(total.tolist())


class _Output(io.FileIO):
    """Output that may fail: a terminal that is closed, a pipe to `tee`, which Ctrl-C ends too, or a file on a full disk. What is written
    then is lost without an error."""

    def write(self, content):
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE, *FULL) and os.name == "posix":
                raise
            return len(content)


class StopSignal:
    """Ctrl-C, SIGTERM and the terminal's end as a wish, looked at between steps: `if stopping: …`. A second Ctrl-C leaves at once.

    The end of the parent is such a wish under torchrun: without it nothing would ever end this process.
    """

    def __init__(self, processes):
        self.asked, self.parent = False, processes.parent
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)  # a notebook has its own, and Windows writes to a console otherwise
            if stream is getattr(sys, f"__{name}__") and (os.name == "posix" or not stream.isatty()):
                output = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
                setattr(sys, name, io.TextIOWrapper(output, stream.encoding, "replace", line_buffering=True))
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP, and nohup ignores it
            if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                signal.signal(number, self._notice)

    def _notice(self, number, frame):
        if self.asked and number == signal.SIGINT:
            with contextlib.suppress(OSError):  # as for _Output
                os.write(2, b"\nleaving at once\n")
            os._exit(130)
        self.asked = True

    def __bool__(self):
        return self.asked or self.parent is not None and self.parent != os.getppid()


@contextlib.contextmanager
def undisturbed(wish=True):
    """Programs and threads started within get no Ctrl-C (if `wish`): a terminal sends it to all its programs, and a linker that it
    ended would leave half a file in PyTorch's cache, on which every later run would fail."""
    wish = wish and os.name == "posix"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)) if wish else None
    try:
        yield
    finally:
        if wish:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def peak_flops(runtime):
    """FLOP/s that MFU is measured against: the data sheet's, or what a product reaches here."""
    if runtime.device.type == "cuda" and runtime.dtype != torch.float32:
        name = torch.cuda.get_device_name(runtime.device)
        for part, peak in PEAKS.items():
            if re.search(rf"{part}\b", name):
                return peak
    return matmul_rate(runtime.device, runtime.dtype)


def matmul_rate(device, dtype, size=None, seconds=0.2):
    """FLOP/s of the product of two (size, size) matrices, the best of those that fit into `seconds`, at least three."""
    size, rate = size or (2048 if device.type == "cpu" else 8192), 0.0
    for n in (256, size):  # bfloat16 without hardware for it would take a minute for the large one
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        times, end = 0, time.perf_counter() + seconds / 2
        while times < 3 or time.perf_counter() < end:  # the first is slow, and another program may take the cores from one
            begin = time.perf_counter()
            (a @ b)[0, 0].item()
            rate, times = max(rate, 2 * n ** 3 / (time.perf_counter() - begin)), times + 1
        if 2 * size ** 3 / rate > 1:
            break
    return rate


def distribute(runtime, model):
    """`model` wrapped so that processes share gradients; None for a process alone."""
    if not dist.is_initialized():
        return None
    return DistributedDataParallel(model, device_ids=[runtime.device.index] if runtime.device.type == "cuda" else None,
                                   gradient_as_bucket_view=True)


def can_record(runtime, settings, pieces):
    """Whether a step of so many `pieces` is recorded as a CUDA graph: on one GPU, compiled, where launching kernels counts."""
    return (runtime.device.type == "cuda" and not dist.is_initialized() and settings.compile and not settings.checkpointing
            and pieces <= 16)


def exchange(distributed, last):
    """The context of a backward pass: gradients are exchanged after a step's last one only."""
    return contextlib.nullcontext() if distributed is None or last else distributed.no_sync()


def step_bar(runtime, **options):
    return tqdm(disable=not runtime.main, dynamic_ncols=True, unit="step", mininterval=0.5 if sys.stderr.isatty() else 15, **options)


def tensorboard(runtime, path, step=0):
    """TensorBoard's Log in the main process; elsewhere, and without a path, one that writes nothing. Events there from
    after `step` are hidden; at step 0 all of them move into a folder of their own and remain a curve."""
    if path is None or not runtime.main:
        return Log(None)
    with warnings.catch_warnings(action="ignore"):
        from torch.utils.tensorboard import SummaryWriter
    before = os.path.join(path, time.strftime("before-%Y%m%d-%H%M%S"))
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # an error of the writer's would be its thread's, with a traceback
        with contextlib.suppress(UserError):  # another run is writing there: it opens its file by name, which must not move
            runtime.processes.claim(path)
            for name in glob.glob("events.out.tfevents.*", root_dir=path) if step == 0 else []:
                os.renames(os.path.join(path, name), os.path.join(before, name))
        return Log(SummaryWriter(path, purge_step=step + 1))
    except OSError as error:
        raise UserError(f"tensorboard_path={path} cannot be written: {error.strerror}")


class Log:
    """A SummaryWriter that, once it cannot write (a full disk, say), prints one line and lets the run go on."""

    def __init__(self, writer):
        self.writer = writer

    def __getattr__(self, name):
        def method(*arguments):
            if self.writer is None:
                return
            try:
                getattr(self.writer, name)(*arguments)
            except OSError as error:
                print(f"TensorBoard's log in {self.writer.log_dir} ends here: {error.strerror}", file=sys.stderr, flush=True)
                self.writer = None
        return method
