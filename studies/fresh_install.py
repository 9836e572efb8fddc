"""Tries a wheel and an sdist as a user meets them, in a fresh environment.

    make dist

First the core alone: its packages and their size, an ask of both samplers, and what the command
line says without the rest. Then ``[finetune]``, and three trials of the quickstart in a folder
that has nothing of the clone. The sdist takes the wheel's place there, and runs the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
ASK = """
import optuna
from optuna_lora_rl import BanditSampler, LoraSpace, RLSampler

space = LoraSpace({"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, "lora_rank": [4, 8]})
for sampler in (RLSampler(seed=0), BanditSampler(seed=0)):
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: -space.suggest(trial)["learning_rate"], n_trials=3)
try:
    from optuna_lora_rl import tune
except ModuleNotFoundError as error:
    assert "pip install 'optuna_lora_rl[finetune]'" in str(error), error
else:
    raise AssertionError("tune was imported without its packages")
"""


def try_out(wheel: Path, sdist: Path, folder: Path) -> None:
    """Install a wheel, core first, and run it; then the sdist.

    Args:
        wheel: the wheel.
        sdist: the sdist.
        folder: an empty one, for the environment and the study.

    Raises:
        subprocess.CalledProcessError: something did not install or run.
        AssertionError: something ran otherwise than it should.
    """
    home = folder / "env"
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    python = str(home / "bin" / "python")
    # The clone must not be found, and no package but those of the environment.
    clean = {
        name: v for name, v in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }

    def run(*command: str, **options: bool) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, *command], cwd=folder, env=clean, text=True, **{"check": True, **options}
        )

    # torch by itself: see the Makefile.
    pins = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    (torch,) = (pin for pin in pins if pin.startswith("torch=="))
    run("-m", "pip", "install", "-q", torch)
    run("-m", "pip", "install", "-q", "-c", str(CONSTRAINTS), str(wheel))
    _report(home, f"{wheel.name}, core")
    run("-c", ASK)
    said = run("-m", "optuna_lora_rl", "--version", check=False, capture_output=True)
    assert said.returncode == 2 and "optuna_lora_rl[finetune]" in said.stderr, said
    run("-m", "pip", "install", "-q", "-c", str(CONSTRAINTS), f"{wheel}[finetune]")
    _report(home, f"{wheel.name}, [finetune]")
    for name in ("wheel", "sdist"):
        if name == "sdist":
            run("-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", str(sdist))
        study = ("--set", "budget.trials=3", "--set", f"output={name}")
        run("-m", "optuna_lora_rl", "run", "quickstart", "--plain", *study)
        assert (folder / name / "best" / "adapter_model.safetensors").is_file()


def _report(home: Path, name: str) -> None:
    """Print how many packages an environment holds, and how large it is."""
    (packages,) = home.glob("lib/python*/site-packages")
    count = len(list(packages.glob("*.dist-info")))
    size = sum(f.stat().st_size for f in packages.rglob("*") if f.is_file() and not f.is_symlink())
    print(f"{name}: {count} packages, {size / 1e6:.0f} MB", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        try_out(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), Path(temporary))
