"""Train in several processes, on one host or more, with the bits of one: MLX's engine over MPI.

`LAUNCHER="mpirun -np 2"` in the environment makes a stage start itself that way (docs/scale.md).
"""

import ctypes
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from stages.shared.cli import error_line
from stages.shared.errors import UserError

EXIT_ALREADY_REPORTED = 3  # the exit code of a process that has said why it ends

LossAndGrad = Callable[..., Any]


class Ranks:
    """The processes that a launcher has started, of which this is number `rank` of `size`."""

    def __init__(self) -> None:
        # Open MPI, Slurm and MPICH, the last to refuse it.
        names = ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "PMI_SIZE")
        self.size = int(next(filter(None, map(os.environ.get, names)), 1))
        names = ("OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK")
        self.rank = int(next(filter(None, map(os.environ.get, names)), 0)) if self.size > 1 else 0
        self.pairs: list[mx.distributed.Group] = []
        self.joined = self.agreed = False

    def join(self) -> None:
        """Connect the processes. Raises `UserError` if they do not find each other."""
        if sys.platform == "linux":  # where libmpi.so may be missing, or a linker's script
            wheel = Path(sys.prefix) / "lib/libmpi.so.40"
            os.environ.setdefault("MLX_MPI_LIBNAME", str(wheel) if wheel.exists() else wheel.name)
        if not mx.distributed.is_available("mpi"):
            raise UserError(
                "LAUNCHER: MLX finds no Open MPI here; docs/scale.md says how to get it"
            )
        self.group = mx.distributed.init(backend="mpi")
        if self.group.size() != self.size:  # each would train by itself, and write
            raise UserError(
                f"LAUNCHER: started {self.size} processes, of which {self.group.size()} found each"
                " other; use the mpirun of the same Open MPI, or srun --mpi=pmix"
            )
        # In the group of each level a process and its partner add what 1, 2, 4, ... have summed up.
        levels = range(self.size.bit_length() - 1)
        self.pairs = [self.group.split(self.rank & ~(1 << level)) for level in levels]
        self.joined = True

    def gather(self, value: Any) -> list[Any]:
        """What each process has for `value`, in their order; all must call this."""
        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = np.array(self._all_gather(np.array([len(data)])))
        padded = np.pad(data, (0, sizes.max() - len(data)))
        rows = np.array(self._all_gather(padded[None]))
        return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]

    def _all_gather(self, values: Any) -> mx.array:
        return mx.distributed.all_gather(mx.array(values), group=self.group, stream=mx.cpu)

    def agree(self, facts: dict[str, str]) -> None:
        """Raise the same `UserError` everywhere unless all processes have the same `facts`.

        A process that cannot go on has its "error" as a fact.
        """
        every = self.gather((os.uname().nodename, facts))
        self.agreed = True
        errors = [(facts.get("error"), host) for host, facts in every]
        for error, host in errors:
            if error:
                alone = any(other != error for other, _ in errors)
                raise UserError(f"{error} (on {host})" if alone else error)
        first = every[0]
        for name, fact in first[1].items():
            for host, facts in every:
                if facts[name] != fact:
                    raise UserError(
                        f"{host}: the {name} there and on {first[0]} differ; make them the same"
                    )


class Shards:
    """The parts that each minibatch is cut into, whose gradients are added as a binary tree.

    So the sum is the same to the last bit, however many processes take a share of them. With one
    shard all is as if there were none. Raises `UserError` if the processes cannot share evenly.
    """

    def __init__(self, count: int, ranks: Ranks) -> None:
        if count % ranks.size:
            raise UserError(
                f"params.yaml: train.shards is {count}, which {ranks.size} processes cannot share"
                " evenly; it must be a multiple of their number"
            )
        share = count // ranks.size
        self.count = count
        self.own = range(ranks.rank * share, (ranks.rank + 1) * share)
        self.pairs = ranks.pairs
        self.last = mx.array(0.0)  # that was summed over processes

    def seed(self, seed: int) -> None:
        """Seed MLX's random numbers, which each shard of each step draws anew."""
        mx.random.seed(seed)
        self.random = np.random.default_rng(seed)

    def sum(self, loss_and_grad_fn: LossAndGrad, model: nn.Module) -> LossAndGrad:
        """Turn a loss-and-gradient function of a shard into one of the whole minibatch."""

        def of_all(pixels: mx.array, labels: mx.array) -> Any:
            return loss_and_grad_fn(model, pixels, labels, len(labels))

        def of_shards(pixels: mx.array, labels: mx.array) -> Any:
            seeds = self.random.integers(2**64, size=self.count, dtype=np.uint64)
            size = -(-len(labels) // self.count)
            terms: list[Any] = []
            for shard in self.own:
                part = slice(shard * size, (shard + 1) * size)
                if shard * size < len(labels):
                    mx.random.seed(int(seeds[shard]))
                    terms.append(loss_and_grad_fn(model, pixels[part], labels[part], len(labels)))
                else:  # of no examples, which MLX refuses
                    grads = tree_map(mx.zeros_like, model.trainable_parameters())
                    terms.append((mx.array(0.0), grads))
            while len(terms) > 1:
                pairs = zip(terms[::2], terms[1::2], strict=True)
                terms = [tree_map(mx.add, *pair) for pair in pairs]
            return self._add_up(terms[0])

        return of_all if self.count == 1 else of_shards

    def _add_up(self, term: Any) -> Any:
        """The sum of what all processes have, one array after another in the same order in each."""

        def add(pair: mx.distributed.Group, array: mx.array) -> mx.array:
            (array,) = mx.depends([array], [self.last])
            self.last = mx.distributed.all_sum(array, group=pair, stream=mx.cpu)
            return self.last

        for pair in self.pairs:
            term = tree_map(partial(add, pair), term)
        return term


def in_ranks(last: Path) -> Callable[[Callable[[Ranks], None]], Callable[[], None]]:
    """Let a stage's `main`, which writes `last` at its end, be one of the processes of LAUNCHER."""

    def decorate(main: Callable[[Ranks], None]) -> Callable[[], None]:
        @wraps(main)
        def start() -> None:
            ranks, launcher = Ranks(), os.environ.get("LAUNCHER", "")
            if ranks.size > 1:
                _run_one(main, ranks)
            elif shlex.split(launcher):
                spec = sys.modules[main.__module__].__spec__
                assert spec
                _launch(launcher, spec.name, last)
            else:
                main(ranks)

        return start

    return decorate


def _run_one(main: Callable[[Ranks], None], ranks: Ranks) -> None:
    """Run `main` as one of several processes, the first of which speaks for all."""
    try:
        with redirect_stdout(io.StringIO() if ranks.rank else sys.stdout):
            line = error_line(ranks.join) or error_line(partial(main, ranks))
            if line and ranks.joined and not ranks.agreed:
                error = line.removeprefix("error: ")
                line = error_line(partial(ranks.agree, {"error": error})) or line
    except BaseException:
        line = traceback.format_exc()
    else:
        if line is None:
            return
        if ranks.rank:  # the launcher ends this process when the first has told
            signal.signal(
                signal.SIGTERM, lambda *_: os._exit(EXIT_ALREADY_REPORTED)
            )  # for srun, which returns it
            time.sleep(10)
    # Not in an orderly way: MLX would wait for the others for ever.
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)
    os._exit(EXIT_ALREADY_REPORTED)


def _launch(launcher: str, module: str, last: Path) -> None:
    """Run `module` by means of `launcher`. Raises `UserError` if it does not write `last`."""

    def end_with_parent() -> None:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    command = [*shlex.split(launcher), sys.executable, "-m", module]
    environment = {name: value for name, value in os.environ.items() if name != "LAUNCHER"}
    before = last.stat().st_mtime_ns if last.exists() else None
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
    except OSError as error:
        raise UserError(
            f"LAUNCHER: {command[0]}: {error.strerror}; docs/scale.md shows some"
        ) from None
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.terminate()  # which a network that is cut may keep from ending
        with suppress(subprocess.TimeoutExpired):
            process.wait(3)
        process.kill()
        raise
    if status == EXIT_ALREADY_REPORTED:
        sys.exit(1)
    if status or not last.exists() or last.stat().st_mtime_ns == before:
        raise UserError(
            f"LAUNCHER: `{launcher}` ended before training was done; fix that and rerun, which"
            " goes on after the last whole epoch"
        )
