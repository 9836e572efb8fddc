"""What the benchmarks share: fresh processes, records, the machine, intervals, counted tokens.

A benchmark's file is also its worker. ``launch`` starts it as ``python FILE --worker``, hands it
a job in JSON, and waits until it has imported and prepared everything; then all workers of one
arm are told to go at the same time. The clock runs from there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import numpy as np

if TYPE_CHECKING:
    from optuna_lora_rl.finetuning.options import DataOptions
    from optuna_lora_rl.finetuning.options import TrainingOptions

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
PACKAGES = ("optuna", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy")
RESAMPLES = 10_000

Job = dict[str, Any]
Result = dict[str, Any]


def launch(file: str, jobs: Sequence[Job]) -> list[Result]:
    """Run jobs in fresh processes that begin to work at the same time.

    Args:
        file: The benchmark's file.
        jobs: One for each process.

    Raises:
        SystemExit: When one of them fails, with the end of what it wrote.
    """
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["HF_HUB_DISABLE_TELEMETRY"] = "1"
    paths = [str(FOLDER.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{i}.log" for i in range(len(jobs))]
        workers = [
            subprocess.Popen(
                [sys.executable, file, "--worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log.open("w"),
                env=environment,
                text=True,
            )
            for log in logs
        ]
        try:
            return _converse(workers, jobs)
        except (ValueError, BrokenPipeError) as error:
            written = "\n".join(log.read_text(encoding="utf-8")[-3000:] for log in logs)
            raise SystemExit(f"a worker failed ({error}):\n{written}") from None
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()


def _converse(workers: Sequence[subprocess.Popen[str]], jobs: Sequence[Job]) -> list[Result]:
    for worker, job in zip(workers, jobs, strict=True):
        _says(worker, json.dumps(job))
    for worker in workers:
        _hears(worker)
    for worker in workers:
        _says(worker, "go")
    return [json.loads(_hears(worker)) for worker in workers]


def _says(worker: subprocess.Popen[str], line: str) -> None:
    assert worker.stdin is not None
    worker.stdin.write(line + "\n")
    worker.stdin.flush()


def _hears(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise ValueError("it ended without a result")
    return line


def serve(prepare: Callable[[Job], Callable[[], Result]]) -> None:
    """The worker's side of ``launch``.

    Args:
        prepare: Does what is not measured, and returns what is.
    """
    # Trainers print; the channel is for the result alone.
    channel, sys.stdout = sys.stdout, sys.stderr
    work = prepare(json.loads(sys.stdin.readline()))
    print("ready", file=channel, flush=True)
    sys.stdin.readline()
    print(json.dumps(work()), file=channel, flush=True)


def timed(work: Callable[[], Result]) -> Result:
    """Return what ``work`` returns, with its seconds and the peak of the process's memory.

    The processor's seconds, over all threads, tell a busy machine from a slow arm.
    """
    began, cpu_began = time.monotonic(), time.process_time()
    result = work()
    took = {
        "seconds": round(time.monotonic() - began, 3),
        "cpu_seconds": round(time.process_time() - cpu_began, 3),
    }
    return {**took, **result, **_peaks()}


def _peaks() -> dict[str, int]:
    import torch

    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peaks["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return peaks


def own_threads(model: str, wanted: int | None) -> int | None:
    """Threads that the package's runner takes for a model, unless others are wanted."""
    return wanted or (1 if model == "tiny" else None)


def set_threads(threads: int | None) -> None:
    """Set torch's threads; None leaves torch's own choice."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def rows(options: DataOptions, folder: Path) -> tuple[Path, Path]:
    """Write the splits that the package makes as JSONL, for the naive arm."""
    from optuna_lora_rl.finetuning import data

    splits = data.load(options)
    paths = []
    for name, split in (("train", splits.train), ("validation", splits.validation)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in split), encoding="utf-8")
        paths.append(path)
    return paths[0], paths[1]


def training_options(job: Job) -> TrainingOptions:
    """The package's options of a job, the same as ``naive.Setup`` has."""
    from optuna_lora_rl.finetuning.options import TrainingOptions

    return TrainingOptions(
        evaluations=job["evaluations"],
        use_cpu=not on_gpu(job["device"]),
        seed=job.get("seed", 0),
        # As the naive arm evaluates, unless the job says otherwise.
        **{"first_evaluation": 1.0, **job.get("training", {})},
    )


def on_gpu(device: str) -> bool:
    """Whether a job runs on a GPU: ``auto`` takes one where there is one."""
    import torch

    return device != "cpu" and torch.cuda.is_available()


@dataclass
class Tokens:
    """Tokens that were processed, counted as they pass.

    Attributes:
        trained: In training, without padding.
        padded: In training, with the padding of their own batch.
        evaluated: In evaluations, without padding.
    """

    trained: int = 0
    padded: int = 0
    evaluated: int = 0


@contextmanager
def counted() -> Iterator[Tokens]:
    """Count the tokens of all trainers in this process, whoever made them."""
    from trl import SFTTrainer

    tokens = Tokens()
    own = SFTTrainer.compute_loss

    @wraps(own)
    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        count = ids.numel() if mask is None else int(mask.sum())
        if model.training:
            tokens.trained += count
            tokens.padded += ids.numel()
        else:
            tokens.evaluated += count
        return own(self, model, inputs, *args, **kwargs)

    SFTTrainer.compute_loss = compute_loss
    try:
        yield tokens
    finally:
        SFTTrainer.compute_loss = own


class Records:
    """Finished measurements, one JSON object a line, so that a stopped benchmark goes on.

    Args:
        path: The file.

    Attributes:
        revisions: Of the code, by which the measurements were made that were asked for so far.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        # The last line of a killed process may be half a line.
        self._known = [entry for entry in map(_parsed, lines) if entry is not None]
        self.revisions: set[str] = set()

    def find(self, key: Mapping[str, Any]) -> Result | None:
        """Return the measurement made under a key, or None."""
        wanted = json.loads(json.dumps(key))
        entry = next((entry for entry in self._known if entry["key"] == wanted), None)
        if entry is None:
            return None
        self.revisions.add(entry["revision"])
        return dict(entry["result"])

    def add(self, key: Mapping[str, Any], result: Result) -> None:
        """Write a measurement down."""
        written = {"key": key, "revision": revision(), "result": result}
        entry = json.loads(json.dumps(written))
        self._known.append(entry)
        self.revisions.add(entry["revision"])
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._is_torn() + json.dumps(entry) + "\n")

    def _is_torn(self) -> bool:
        content = self._path.read_bytes() if self._path.exists() else b""
        return bool(content) and not content.endswith(b"\n")


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def revision() -> str:
    """The code's commit; of code that is not as committed this ends in ``-dirty``."""
    asked = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    found = subprocess.run(asked, cwd=FOLDER, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def program(
    main: Callable[[Sequence[str]], None], prepare: Callable[[Job], Callable[[], Result]]
) -> None:
    """What a benchmark's file does when it is run: benchmark, or work for ``launch``."""
    if sys.argv[1:] == ["--worker"]:
        serve(prepare)
    else:
        main(sys.argv[1:])


def add_recording(parser: argparse.ArgumentParser, records: Path) -> None:
    """Add the options for where measurements and results are written, and for a note on them."""
    parser.add_argument(
        "--note", help="what the page has to say, such as that the machine was shared"
    )
    parser.add_argument("--records", type=Path, default=records)
    parser.add_argument("--output", type=Path, default=RESULTS)


def words(text: str) -> list[str]:
    """An option's names, separated by commas."""
    return text.split(",")


def stay_offline(model: str) -> None:
    """Ask no hub where the model is built in."""
    if not Path(model).is_dir() and "/" not in model:
        os.environ["HF_HUB_OFFLINE"] = "1"


def machine() -> dict[str, Any]:
    """Where a benchmark runs."""
    found: dict[str, Any] = {"processor": _processor(), "cores": len(os.sched_getaffinity(0))}
    asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        found["gpu"] = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        found["gpu"] = found["gpu"].strip().replace("\n", "; ")
    except (OSError, subprocess.CalledProcessError):
        pass
    return found


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    found: dict[str, str] = {}
    for line in facts.read_text().splitlines() if facts.exists() else []:
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    # Some hosts hide the name; family and model still tell the generation.
    return f"{name} (family {found.get('cpu family')}, model {found.get('model')})"


def versions() -> dict[str, str]:
    return {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def command(file: str, arguments: Sequence[str]) -> str:
    return shlex.join(["python", f"studies/{Path(file).name}", *arguments])


def circumstances(
    file: str, arguments: Sequence[str], revisions: Iterable[str] | None = None
) -> dict[str, Any]:
    """Returns the facts that ``provenance`` writes out.

    Args:
        file: The benchmark's file.
        arguments: Its command line.
        revisions: Of the code that the measurements were made by; the present one by default.
    """
    return {
        "command": command(file, arguments),
        "versions": versions(),
        "machine": machine(),
        "revisions": [revision()] if revisions is None else sorted(revisions),
    }


def provenance(facts: Mapping[str, Any]) -> list[str]:
    """Markdown lines on how a result was made."""
    where = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    with_what = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    of = ", ".join(facts["revisions"])
    return [f"`{facts['command']}`", "", f"{where}. {with_what}. Revision {of}.", ""]


def interval(values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> list[float]:
    """Return a statistic and its 95% bootstrap interval.

    Args:
        values: (observations, ...); whole rows are drawn, so what stands in a row stays paired.
        statistic: Reduces the last but one axis: takes (..., observations, k), gives (...).
    """
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(statistic(values[drawn]), [0.025, 0.975])
    return [float(statistic(values)), float(low), float(high)]


def ratio_of_medians(pairs: np.ndarray) -> np.ndarray:
    """Median of the first column over that of the second; pairs: (..., observations, 2)."""
    medians = np.median(pairs, axis=-2)
    return np.asarray(medians[..., 0] / medians[..., 1])


def geometric_mean_ratio(pairs: np.ndarray) -> np.ndarray:
    """Geometric mean of first over second column; pairs: (..., observations, 2)."""
    logs = np.log(pairs)
    return np.asarray(np.exp((logs[..., 0] - logs[..., 1]).mean(axis=-1)))


def shown(found: Sequence[float], digits: int = 2) -> str:
    """A value with its interval."""
    value, low, high = (f"{number:.{digits}f}" for number in found)
    return f"{value} [{low}, {high}]"


def publish(
    stem: Path, name: str, entry: Mapping[str, Any], page: Callable[[dict[str, Any]], str]
) -> str:
    """Put an entry among those of a results file, and write its page.

    Args:
        stem: The results file without its suffix: ``.json`` and ``.md`` are written.
        name: The entry's; one of the same name is replaced.
        entry: What was found.
        page: Makes the page of all entries.
    """
    file = stem.with_suffix(".json")
    entries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    entries[name] = json.loads(json.dumps(entry))
    stem.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    text = page(entries)
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    return text
