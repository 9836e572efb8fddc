"""Runs the studies of a comparison in parallel processes, and records each as it ends.

A record is one line of JSON, written by the process that was started; whatever is killed loses the
studies that were running. A record counts as long as the sampler's code, options and weights and
the problem are the same.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import asdict
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version
from pathlib import Path

import numpy as np
import optuna
import torch

import optuna_lora_rl
from optuna_lora_rl.errors import UserError
from studies.comparison import peers
from studies.comparison.importing import imported
from studies.comparison.importing import source
from studies.comparison.problem import Problem
from studies.comparison.problems import build
from studies.comparison.protocol import Protocol
from studies.comparison.protocol import SamplerEntry

# A study: its sampler's label, its problem's name, its seed.
Key = tuple[str, str, int]
# Regret before the first trial that does not fail, and the most that any can have.
MOST = 3.0
_PACKAGE = Path(optuna_lora_rl.__file__).parent


@dataclass(frozen=True)
class Record:
    """One study.

    Args:
        sampler: its entry's name.
        problem: its name.
        seed: of the sampler and of the noise.
        made_by: changes with the sampler and the problem.
        regret: of the best configuration after each trial, without its noise.
        chosen: of the configuration with the best observed score after each trial.
        failed: trials that failed.
        seconds: of processor time, the problem's included.
    """

    sampler: str
    problem: str
    seed: int
    made_by: str
    regret: list[float]
    chosen: list[float]
    failed: int
    seconds: float


def study(problem: Problem, entry: SamplerEntry, key: Key, made_by: str, trials: int) -> Record:
    """Runs one study of a problem with an entry's sampler."""
    seed = key[2]
    started = time.process_time()
    sampler = peers.create(entry, problem, seed=seed, trials=trials)
    opening = peers.opening(entry, problem)
    run = optuna.create_study(direction="maximize", sampler=sampler)
    opened: list[float | None] | None = []
    regret, chosen = np.full(trials, MOST), np.full(trials, MOST)
    best, worst, failed = -np.inf, np.inf, 0
    for number in range(trials):
        first = None if opened is None else opening(opened)
        if first is None:
            opened = None
        else:
            run.enqueue_trial(first)
        trial = run.ask()
        score: float | None = None
        try:
            # Every sampler meets the same noise.
            score, true = problem.run(trial, np.random.default_rng([seed, number]))
            run.tell(trial, score)
            worst = min(worst, score)
            regret[number] = min(true, MOST)
            if score > best:
                best = score
                chosen[number:] = regret[number]
        except FloatingPointError:
            failed += 1
            if entry.failures == "worst" and np.isfinite(worst):
                run.tell(trial, worst)
            else:
                run.tell(trial, state=optuna.trial.TrialState.FAIL)
        if opened is not None:
            opened.append(score)
    return Record(
        *key,
        made_by,
        [round(float(r), 5) for r in np.minimum.accumulate(regret)],
        [round(float(r), 5) for r in chosen],
        failed,
        round(time.process_time() - started, 2),
    )


def made_by(entry: SamplerEntry) -> str:
    """Changes with a sampler's options, weights and code; of other libraries with the version."""
    # Records from before there were imports stay what they were.
    left_out = {"import_"} if entry.import_ is None else set()
    said = [entry.model_dump_json(exclude=left_out)]
    if entry.import_ is not None:
        build = imported(f"samplers.{entry.name}.import", entry.import_)
        said.append(hashlib.sha256(source(build)).hexdigest())
    if entry.name in ("rl", "bandit"):
        files = [f for room in ("policy", "samplers") for f in (_PACKAGE / room).rglob("*")]
        weights = entry.options.get("weights")
        files = sorted(f for f in files if f.suffix in (".py", ".safetensors"))
        files += [Path(str(weights))] if weights and Path(str(weights)).is_file() else []
        said += [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    packages = {"cmaes": "cmaes", "smac": "smac"}
    for package in ("optuna", packages.get(entry.name, "numpy")):
        try:
            said.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            said.append(f"{package} from a folder")
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:12]


def read(file: Path) -> list[Record]:
    """The records of a file; what a kill left of a last line is cut off.

    Raises:
        UserError: another line is no record.
    """
    if not file.exists():
        return []
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with file.open("r+b") as stream:
            stream.truncate(whole)
    records = []
    for number, line in enumerate(content[:whole].decode().splitlines(), 1):
        try:
            records.append(Record(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            raise UserError(f"{file}, line {number} is no record of a study; remove it") from None
    return records


def run(
    protocol: Protocol,
    file: Path,
    *,
    before: Callable[[int, int], None] = lambda done, total: None,
    after: Callable[[Record], None] = lambda record: None,
) -> dict[Key, Record]:
    """Runs the studies that are missing in ``file``.

    Args:
        protocol: the comparison.
        file: of the records, one line of JSON each; made where it does not exist.
        before: is told how many studies are recorded already, and how many there are.
        after: is told of every record that is made.

    Returns:
        The records by sampler, problem and seed.

    Raises:
        UserError: a sampler cannot be made.
        KeyboardInterrupt: once the studies that were running are recorded.
    """
    problems = build(protocol.problems)
    wanted = _wanted(protocol, problems)
    found: dict[Key, Record] = {}
    for record in read(file):
        key = (record.sampler, record.problem, record.seed)
        if wanted.get(key) == record.made_by and len(record.regret) >= protocol.trials:
            found[key] = record
    before(len(found), len(wanted))
    missing = {key: made for key, made in wanted.items() if key not in found}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        for record in _in_parallel(protocol, missing):
            stream.write(json.dumps(asdict(record)) + "\n")
            stream.flush()
            found[record.sampler, record.problem, record.seed] = record
            after(record)
    return found


def _wanted(protocol: Protocol, problems: Sequence[Problem]) -> dict[Key, str]:
    """What makes each study, seed by seed, so that an early look at the records is a fair one."""
    for entry in protocol.samplers.values():
        peers.create(entry, problems[0], seed=0, trials=protocol.trials)
    makers = {label: made_by(entry) for label, entry in protocol.samplers.items()}
    fingerprints = {problem.name: problem.fingerprint() for problem in problems}
    return {
        (label, problem.name, seed): makers[label] + fingerprints[problem.name]
        for seed in range(protocol.seeds)
        for problem in problems
        for label in protocol.samplers
    }


def _in_parallel(protocol: Protocol, missing: Mapping[Key, str]) -> Iterator[Record]:
    if not missing:
        return
    with (
        _one_thread_each(),
        ProcessPoolExecutor(
            min(protocol.workers, len(missing)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(protocol.model_dump_json(by_alias=True),),
        ) as pool,
    ):
        left = {pool.submit(_study, *one) for one in missing.items()}
        try:
            for future in as_completed(list(left)):
                left.remove(future)
                yield future.result()
        except KeyboardInterrupt:
            # What is running may end, and is recorded.
            for future in as_completed([future for future in left if not future.cancel()]):
                yield future.result()
            raise
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_protocol: Protocol
_problems: dict[str, Problem]


def _begin(protocol: str) -> None:
    """Prepares a worker's process."""
    global _protocol, _problems
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    _protocol = Protocol.model_validate_json(protocol)
    _problems = {problem.name: problem for problem in build(_protocol.problems)}


def _study(key: Key, made_by: str) -> Record:
    label, problem, seed = key
    entry = _protocol.samplers[label]
    try:
        return study(_problems[problem], entry, key, made_by, _protocol.trials)
    except Exception as error:
        error.add_note(f"sampler {label}, problem {problem}, seed {seed}")
        raise


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes that are started meanwhile calculate with one thread."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
