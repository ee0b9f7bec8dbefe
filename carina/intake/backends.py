"""Who does the work of prepare: processes of this machine, or a Dask or Ray cluster, all through joblib."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from multiprocessing import TimeoutError  # what joblib raises; it is not the built-in one
from typing import Any

from joblib import Parallel, delayed, effective_n_jobs, parallel_config
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError

from carina.errors import CarinaError
from carina.intake.images import Prepared, Settings, prepare_files, prepare_isolated
from carina.intake.items import Item
from carina.isolation import hush

CHUNK = 16  # files a worker takes at a time: small enough for a smooth bar, large enough to hide the hand-over
CHUNK_SECONDS = 180  # after this a decoder is taken to hang, and the files are tried one by one
_WAITING = 2**28  # bytes of results that may wait for the one who writes them


def _in_our_process(items: Sequence[Item], settings: Settings) -> list[Prepared]:
    hush()
    return prepare_files(items, settings)


class Backend:
    """``with Backend("processes", workers) as backend: for result in backend.results(items, settings): ...``

    name: processes, dask or ray. workers: how many at most; None takes every core, or what the cluster has. cluster: the
    address of a running one; without it one is started on this machine. Results come in the order of the items. A file
    that takes its worker down, or hangs, costs that file: what is left of the items then goes through one process that is
    replaced.
    """

    def __init__(self, name: str = "processes", workers: int | None = None, cluster: str | None = None):
        self.name, self.wanted, self.cluster = name, workers, cluster
        if cluster and name == "processes":
            raise CarinaError("cluster= is the address of a Dask or Ray cluster; give backend=dask or backend=ray too")

    def __enter__(self) -> Backend:
        self.stack = contextlib.ExitStack()
        try:
            start = {"processes": self._processes, "dask": self._dask, "ray": self._ray}[self.name]
            self.workers, self.crashes = start()
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def results(self, items: Sequence[Item], settings: Settings) -> Iterator[Prepared]:
        """One result an item, in order. Memory holds a few chunks, however many items there are."""
        done = 0
        weight = sum(scale * scale * encoding.bits // 8 for scale, encoding in settings.encodings.items())
        # Many workers get shorter chunks, so that all have work until the end of a shard.
        length = max(1, min(CHUNK, len(items) // (4 * self.workers)))
        if self.workers > 1 and (self.name != "processes" or len(items) > CHUNK):
            chunks = [items[i : i + length] for i in range(0, len(items), length)]
            try:
                for chunk in self._chunks(chunks, settings, _WAITING // (weight * length)):
                    for result in chunk:
                        yield result
                        done += 1
            except self.crashes:
                if self.name == "processes":
                    get_reusable_executor().shutdown(kill_workers=True)
        # One file at a time in one process that is replaced when it dies: joblib alone would read in this very one.
        yield from prepare_isolated(items[done:], settings)

    def _chunks(self, chunks: list[Sequence[Item]], settings: Settings, waiting: int) -> Iterator[list[Prepared]]:
        """The results of the chunks, of which at most `waiting` (but two a worker) are in work or wait."""
        work = _in_our_process if self.name == "processes" else prepare_files
        group = max(2 * self.workers, waiting)
        for i in range(0, len(chunks), group):
            # Ray's pool gives back lists alone.
            form = "list" if self.name == "ray" else "generator"
            parallel = Parallel(n_jobs=self.workers, return_as=form, timeout=CHUNK_SECONDS)
            yield from parallel(delayed(work)(chunk, settings) for chunk in chunks[i : i + group])

    def _processes(self) -> tuple[int, tuple[type[BaseException], ...]]:
        return self.wanted or effective_n_jobs(-1), (TerminatedWorkerError, TimeoutError)

    def _dask(self) -> tuple[int, tuple[type[BaseException], ...]]:
        try:
            from dask.distributed import Client, KilledWorker, LocalCluster
        except ImportError:
            raise CarinaError("backend=dask needs Dask: pip install 'carina-cxr[cluster]'") from None
        if self.cluster:
            try:
                client = self.stack.enter_context(Client(self.cluster, timeout=20))
            except (OSError, ValueError) as error:
                raise CarinaError(f"no Dask scheduler answers at cluster={self.cluster} ({error})") from None
        else:
            count = self.wanted or effective_n_jobs(-1)
            # joblib does the work of a single thread in this very process: one worker therefore gets two.
            local = LocalCluster(n_workers=count, threads_per_worker=max(1, 3 - count), dashboard_address=None)
            client = self.stack.enter_context(Client(self.stack.enter_context(local)))
        threads = sum(client.nthreads().values())
        self.stack.enter_context(parallel_config(backend="dask"))
        return threads, (KilledWorker, TimeoutError)

    def _ray(self) -> tuple[int, tuple[type[BaseException], ...]]:
        # Ray reports usage over the network unless it is told not to before it is imported.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            import ray
            from ray.util.joblib import register_ray
        except ImportError:
            raise CarinaError("backend=ray needs Ray: pip install 'carina-cxr[cluster]'") from None
        if not ray.is_initialized():
            # Two at least, as with Dask: joblib does the work of one in this very process.
            local = {} if self.cluster else {"num_cpus": max(2, self.wanted or effective_n_jobs(-1))}
            try:
                ray.init(
                    address=self.cluster, include_dashboard=False, log_to_driver=False, logging_level="ERROR", **local
                )
            except ConnectionError as error:
                raise CarinaError(f"no Ray cluster answers at cluster={self.cluster} ({error})") from None
            self.stack.callback(ray.shutdown)
        register_ray()
        cores = int(ray.cluster_resources().get("CPU", 1))
        self.stack.enter_context(parallel_config(backend="ray"))
        return min(max(2, self.wanted or cores), cores), (ray.exceptions.RayError, TimeoutError)
