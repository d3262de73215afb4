"""Run a step's tasks on a cluster, as a Slurm array or on Ray, through datatrove's executors (`crystalcoder[cluster]`).

Every node sees the same file system. The stages of a step and their tasks lie in `OUT/.tasks/launch-<k>`; whoever does
a task writes its record, as a local process does, so the output is the same bytes and any engine takes up what another
has left. The command that launched waits, adds the records up and writes the manifest. If it is interrupted, Slurm's
jobs go on, and the same command again waits for them.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.engine import FAILED, JOBS, Cluster, LostTasks, Stage, write_json
from data_prep.errors import InputError

POLL_SECONDS = 5.0
REACH_SECONDS = 20.0
GRACE_SECONDS = 60.0  # a network file system may show a record this much later than it was written
MAX_ARRAY_SIZE = 1000  # Slurm's default limit is 1001
SLURM_OPTIONS = ("time", "qos", "cpus_per_task", "mem_per_cpu_gb", "max_array_size", "env_command")
RAY_OPTIONS = ("address", "cpus_per_task", "mem_per_cpu_gb")


class RunTask:
    """One step of a datatrove pipeline: rank r does task r of a stage and writes its record."""

    def __init__(self, stage_file: Path, records: Path) -> None:
        self.stage_file = str(stage_file)
        self.records = str(records)
        self.working_directory = os.getcwd()  # paths on the command line are relative to it

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """Do task `rank`.

        Raises:
            RuntimeError: another task has failed already.
        """
        os.chdir(self.working_directory)
        os.environ.update({"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"})
        records = Path(self.records)
        if (records / FAILED).exists():
            raise RuntimeError(f"not started: another task has failed, see {records / FAILED}")
        stage: Stage = pickle.loads(Path(self.stage_file).read_bytes())
        task = stage.tasks[rank]
        try:
            record = stage.work(task.argument)
        except Exception as error:
            message = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            write_json(records / FAILED, {"task": task.name, "message": message})
            raise
        write_json(records / f"{task.name}.json", record)


def run_stages(cluster: Cluster, records: Path, stages: Sequence[Stage], processes: int) -> Iterator[int]:
    """Do the tasks of all stages, one stage after the other, `processes` tasks at a time.

    Yields how many more records have come in to the folder `records`, which is `OUT/.tasks`.

    Raises:
        InputError: the extra or the cluster's commands are missing, an option is wrong, or a task met bad input.
        LostTasks: the jobs ended and left tasks without a record.
    """
    try:
        import datatrove  # noqa: F401
    except ImportError:
        raise InputError(
            f"--engine {cluster.kind}: needs datatrove: pip install 'crystalcoder[cluster]', on every node"
        ) from None
    records = records.absolute()
    (records / FAILED).unlink(missing_ok=True)
    launch = records / f"launch-{len(list(records.glob('launch-*')))}"
    folders = []
    for number, stage in enumerate(stages):
        folder = launch / f"stage-{number}"
        folder.mkdir(parents=True)
        (folder / "tasks.pickle").write_bytes(pickle.dumps(stage))
        folders.append(folder)
    run = _run_slurm if cluster.kind == "slurm" else _run_ray
    with _quiet():
        yield from run(cluster.options, records, list(zip(folders, stages, strict=True)), processes)
    missing = _missing(records, stages)
    if (records / FAILED).exists():
        raise InputError(json.loads((records / FAILED).read_bytes())["message"])
    if missing:
        raise LostTasks(
            f"{records.parent}: {len(missing)} tasks ended without a record ({', '.join(missing[:3])} …): "
            f"see the logs in {launch}, then launch the same command again"
        )


def _missing(records: Path, stages: Sequence[Stage]) -> list[str]:
    return [task.name for stage in stages for task in stage.tasks if not (records / f"{task.name}.json").exists()]


@contextmanager
def _quiet() -> Iterator[None]:
    """datatrove's own words go to its logs, not between ours."""
    from datatrove.utils.logging import logger

    logger.disable("datatrove")
    try:
        yield
    finally:
        logger.enable("datatrove")


def _number(options: dict[str, str], name: str, default: float) -> float:
    try:
        return float(options.get(name, default))
    except ValueError:
        raise InputError(f"--engine-option {name}={options[name]}: is not a number") from None


def _run_slurm(
    options: dict[str, str],
    records: Path,
    stages: Sequence[tuple[Path, Stage]],
    processes: int,
) -> Iterator[int]:
    for command in ("sbatch", "squeue", "scancel"):
        if shutil.which(command) is None:
            raise InputError(f"--engine slurm: there is no {command} here: launch from a node that submits to Slurm")
    if "partition" not in options:
        raise InputError("--engine slurm: needs --engine-option partition=NAME (`sinfo` lists them)")
    from datatrove.executor import SlurmPipelineExecutor

    class Executor(SlurmPipelineExecutor):
        """With this Python in the jobs, and without a job of its own that adds up datatrove's statistics."""

        def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
            module = f"{sys.executable} -m datatrove.tools.launch_pickled_pipeline"
            contents: str = super().get_launch_file_contents(
                sbatch_args, run_script.replace("launch_pickled_pipeline", module)
            )
            return contents

        def launch_merge_stats(self) -> None:
            pass

    limit = int(_number(options, "max_array_size", MAX_ARRAY_SIZE))
    jobs: list[str] = []
    previous: Any = None
    for folder, stage in stages:
        executor = Executor(
            pipeline=[RunTask(folder / "tasks.pickle", records)],
            tasks=len(stage.tasks),
            tasks_per_job=-(-len(stage.tasks) // limit),
            time=options.get("time", "24:00:00"),
            partition=options["partition"],
            qos=options.get("qos", ""),
            cpus_per_task=int(_number(options, "cpus_per_task", 1)),
            mem_per_cpu_gb=int(_number(options, "mem_per_cpu_gb", 2)),
            workers=processes,
            job_name=f"crystalcoder-{records.parent.name}",
            env_command=options.get("env_command"),
            sbatch_args={k.replace("_", "-"): v for k, v in options.items() if k not in (*SLURM_OPTIONS, "partition")},
            max_array_size=limit,
            depends_job_id=previous.job_id if previous else None,
            logging_dir=str(folder),
        )
        try:
            executor.run()
        except subprocess.CalledProcessError as error:
            if jobs:
                subprocess.run(["scancel", *jobs], check=False)
            raise InputError(f"sbatch refused the job (exit {error.returncode}): its words are above") from None
        jobs.append(executor.job_id)
        write_json(records / JOBS, jobs)
        previous = executor
    yield from _wait(jobs, records, [stage for _, stage in stages])


def _wait(jobs: list[str], records: Path, stages: Sequence[Stage]) -> Iterator[int]:
    """Until all records are there, a task has failed, or the jobs are gone."""
    total = sum(len(stage.tasks) for stage in stages)
    seen, gone_since = 0, None
    while True:
        missing = _missing(records, stages)
        yield total - len(missing) - seen
        seen = total - len(missing)
        if (records / FAILED).exists():
            subprocess.run(["scancel", *jobs], check=False)
        elif missing and (gone_since is None or time.monotonic() - gone_since < GRACE_SECONDS):
            if gone_since is None and not is_running(jobs):
                gone_since = time.monotonic()
            time.sleep(POLL_SECONDS)
            continue
        (records / JOBS).unlink(missing_ok=True)
        return


def is_running(jobs: Sequence[str]) -> bool:
    """Whether Slurm still knows one of these jobs as waiting or running."""
    if shutil.which("squeue") is None:
        return False
    listed = subprocess.run(["squeue", "-h", "-o", "%A", "-j", ",".join(jobs)], capture_output=True, text=True)
    if listed.returncode:
        return "Invalid job id" not in listed.stderr  # else Slurm was too busy to answer
    return bool(listed.stdout.strip())


def wait_for_earlier(records: Path) -> None:
    """Wait for the jobs of an earlier launch, so that nobody does their tasks a second time beside them."""
    marker = records / JOBS
    if not marker.exists():
        return
    jobs = json.loads(marker.read_bytes())
    if is_running(jobs):
        names = " ".join(jobs)
        print(f"{records.parent}: jobs {names} of an earlier launch go on: waiting (scancel {names} ends them)",
              file=sys.stderr, flush=True)  # fmt: skip
        while is_running(jobs):
            time.sleep(POLL_SECONDS)
    marker.unlink()


def _reach(address: str) -> None:
    """Knock at host:port first: Ray itself tries for many minutes where nobody is."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():  # "auto", "local"
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--engine ray: no cluster at {address} ({error}): is `ray start --head` running?") from None


def _run_ray(
    options: dict[str, str],
    records: Path,
    stages: Sequence[tuple[Path, Stage]],
    processes: int,
) -> Iterator[int]:
    try:
        import ray
    except ImportError:
        raise InputError("--engine ray: needs ray: pip install 'crystalcoder[cluster]', on every node") from None
    from datatrove.executor.ray import RayPipelineExecutor

    for name in options:
        if name not in RAY_OPTIONS:
            raise InputError(f"--engine-option {name}: Ray has {', '.join(RAY_OPTIONS)}")
    address = options.get("address") or os.environ.get("RAY_ADDRESS")
    if address:
        _reach(address)
    is_ours = not ray.is_initialized()
    if is_ours:
        quietly: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        try:
            # Without an address: a cluster of this machine alone.
            here: dict[str, Any] = {"address": "local", "num_cpus": processes, "include_dashboard": False}
            ray.init(**({"address": address} if address else here), **quietly)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"--engine ray: no cluster at {address} ({str(error).splitlines()[0]})") from None
    try:
        for folder, stage in stages:
            RayPipelineExecutor(
                pipeline=[RunTask(folder / "tasks.pickle", records)],
                tasks=len(stage.tasks),
                workers=processes,
                cpus_per_task=int(_number(options, "cpus_per_task", 1)),
                mem_per_cpu_gb=_number(options, "mem_per_cpu_gb", 1),
                logging_dir=str(folder),
            ).run()
            missing = _missing(records, [stage])
            yield len(stage.tasks) - len(missing)
            if missing:
                return
    finally:
        if is_ours:
            ray.shutdown()
