"""A rank for each layer in the place of one for all: probed once a study, shared out for each run.

``lora_rank`` is then the mean rank. What the layers need is measured on the untuned model by one
probe for each kind of importance, over all linear modules, and kept; each run shares its own
budget out among the modules that it adapts. Every such run is charged the whole probe, as if it
had made it: what a configuration costs must not depend on which trials came before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.activity import counted
from optuna_lora_rl.activity import unseen
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import cost
from optuna_lora_rl.finetuning import sft
from optuna_lora_rl.finetuning.architecture import LinearModule
from optuna_lora_rl.finetuning.cache import once
from optuna_lora_rl.finetuning.configuration import Configuration
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.finetuning.isolation import collected
from optuna_lora_rl.finetuning.isolation import failures
from optuna_lora_rl.finetuning.isolation import own_randomness
from optuna_lora_rl.finetuning.isolation import quiet
from optuna_lora_rl.finetuning.lora import attached
from optuna_lora_rl.finetuning.lora import lora_config
from optuna_lora_rl.finetuning.lora import restored
from optuna_lora_rl.finetuning.preparation import Prepared
from optuna_lora_rl.finetuning.rank_options import RankChangeOptions
from optuna_lora_rl.rank import allocation
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank import probe
from optuna_lora_rl.rank import spectrum
from optuna_lora_rl.rank.callback import GradientRankCallback
from optuna_lora_rl.rank.callback import LossRankCallback
from optuna_lora_rl.rank.callback import RankChange
from optuna_lora_rl.rank.deciders import GradientSpectrum
from optuna_lora_rl.rank.deciders import Limit
from optuna_lora_rl.rank.deciders import LossCurve
from optuna_lora_rl.rank.deciders import Steps

if TYPE_CHECKING:
    from optuna_lora_rl.finetuning.options import TrainingOptions


# Training sequences that a probe reads, and how many at once.
SEQUENCES = 32
_AT_ONCE = 8
# Steps of the short run whose updates `delta` looks at.
DELTA_STEPS = 20
_SEED = 0
# Width of the sketches of gradients: only their energy is asked for.
_COLUMNS = 128
# Largest components of a layer's inputs that are kept; a share of the budget beyond it is rare.
_COMPONENTS = 512


@dataclass(frozen=True)
class Allocated:
    """The ranks of one run's layers, and what finding them costs.

    Attributes:
        ranks: By module; empty where every layer has ``lora_rank``.
        flops: Counted cost of the probe.
        seconds: What the probe took where it was made.
    """

    ranks: Mapping[str, int]
    flops: float = 0.0
    seconds: float = 0.0


class Allocator:
    """Shares ranks out.

    Args:
        prepared: Model and data.
        training: How every run trains.
        reference: The configuration whose short run ``delta`` looks at, on all linear modules.
        facts: Gives all that a look at the untuned model depends on; asked for by probes only.
        folder: Where probes are kept; None for nowhere.
    """

    def __init__(
        self,
        prepared: Prepared,
        training: TrainingOptions,
        reference: Configuration,
        facts: Callable[[], Mapping[str, Any]],
        folder: Path | None,
    ) -> None:
        self._prepared = prepared
        self._training = training
        self._facts = facts
        self._folder = folder
        self._delta = replace(
            reference,
            target_modules="all-linear",
            layers="all",
            init_lora_weights="default",
            bias="none",
            use_dora=False,
            rank_allocation="uniform",
            max_steps=DELTA_STEPS,
        )
        self._probed: dict[str, dict[str, Any]] = {}

    def share(
        self,
        wanted: Configuration,
        chosen: Sequence[LinearModule],
        on_activity: OnActivity = unseen,
    ) -> Allocated:
        """Returns the ranks of a configuration's layers.

        Args:
            wanted: The configuration.
            chosen: The modules that it adapts.
            on_activity: Told how far the probe is, where one has to be made.

        Raises:
            FineTuningError: When the layers cannot take so many ranks, or the probe fails.
        """
        kind = wanted.rank_allocation
        if kind == "uniform":
            return Allocated({})
        if kind not in self._probed:
            self._probed[kind] = self._probe(kind, on_activity)
        probed = self._probed[kind]
        budget = wanted.lora_rank * len(chosen)
        values = {module.name: probed["layers"][module.name] for module in chosen}
        if kind == "activation":
            values = _shares_of(values, budget)
        by_parameters = self._training.rank_budget == "parameters"
        parameters = wanted.lora_rank * sum(m.outputs + m.inputs for m in chosen)
        try:
            found = allocation.allocate(
                values,
                budget=parameters if by_parameters else budget,
                unit="parameters" if by_parameters else "rank",
                shapes={m.name: (m.outputs, m.inputs) for m in chosen},
            )
        except UserError as error:
            raise FineTuningError("configuration", f"rank_allocation {kind}: {error}") from None
        return Allocated(found.ranks, self._flops(kind), probed["seconds"])

    def _probe(self, kind: str, on_activity: OnActivity) -> dict[str, Any]:
        def tell(activity: Activity) -> None:
            on_activity(replace(activity, what=f"probing the layers: {activity.what}"))

        facts = {**self._facts(), "kind": kind, "sequences": SEQUENCES, "seed": _SEED}
        if kind == "delta":
            facts["run"] = asdict(self._delta)
        return once(self._folder, "probes", facts, lambda: self._measured(kind, tell))

    def _measured(self, kind: str, tell: OnActivity) -> dict[str, Any]:
        model = self._prepared.base.model
        start = time.perf_counter()
        with quiet(), collected(), failures(lambda error: False), own_randomness(_SEED):
            if kind == "delta":
                found: Mapping[str, Any] = allocation.importance_of_spectra(self._updates(tell))
            else:
                with restored(model, {}):
                    found = self._looked_at(kind, tell)
        return {"layers": dict(found), "seconds": time.perf_counter() - start}

    def _looked_at(self, kind: str, tell: OnActivity) -> Mapping[str, Any]:
        prepared, model = self._prepared, self._prepared.base.model
        names = [module.name for module in prepared.base.architecture.linears]
        if kind == "weight":
            modules = layers.linear_modules(model)
            return allocation.importance_of_spectra(
                {
                    name: spectrum.of_matrix(layers.weight_of(modules[name], name))
                    for name in counted(names, "decomposing", "weights", tell)
                }
            )
        batches = counted(list(self._batches()), kind, "batches", tell)
        if kind == "gradient":
            spectra = probe.gradients(model, batches, _loss, names=names, columns=_COLUMNS)
            return allocation.importance_of_gradients(spectra)
        spectra = probe.activations(
            model, batches, _loss, names=names, mask=lambda batch: batch["attention_mask"]
        )
        # Shares of the energy, largest first: of them EVA counts the largest of all layers.
        return {
            name: (one.values[:_COMPONENTS] ** 2 / (one.energy or 1.0)).tolist()
            for name, one in spectra.items()
        }

    def _updates(self, tell: OnActivity) -> dict[str, spectrum.Spectrum]:
        prepared, wanted = self._prepared, self._delta
        training = self._training.model_copy(update={"report_to": ()})
        architecture = prepared.base.architecture
        chosen = architecture.linears
        plan = sft.Plan.of(wanted, training, len(prepared.lengths))
        config = lora_config(wanted, architecture, chosen)
        with attached(prepared.base.model, config, chosen) as adapter:
            sft.train(
                adapter.model,
                prepared.base.tokenizer,
                prepared.tokens.train,
                {plan.steps: prepared.tokens.validation},
                wanted,
                replace(plan, evaluated={}),
                training,
                device=prepared.device,
                seed=_SEED,
                folder=Path("runs"),
                run_name=None,
                on_evaluation=lambda step, epoch, metrics: False,
                on_activity=tell,
                call=prepared.base.call,
            )
            return spectrum.of_adapter(adapter.model)

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        prepared = self._prepared
        dataset, pad = prepared.tokens.train, prepared.base.tokenizer.pad_token_id
        count = min(SEQUENCES, len(dataset))
        chosen = np.random.default_rng(_SEED).permutation(len(dataset))[:count].tolist()
        collate = DataCollatorForLanguageModeling(pad_token_id=pad)
        for start in range(0, count, _AT_ONCE):
            rows = [dataset[index] for index in chosen[start : start + _AT_ONCE]]
            batch = collate([{k: row[k] for k in ("input_ids", "labels")} for row in rows])
            yield {name: tensor.to(prepared.device) for name, tensor in batch.items()}

    def _flops(self, kind: str) -> float:
        architecture, lengths = self._prepared.base.architecture, self._prepared.lengths
        if kind == "weight":
            return sum(cost.decomposition_flops(m) for m in architecture.linears)
        if kind == "delta":
            plan = sft.Plan.of(self._delta, self._training, len(lengths))
            work = cost.Work(
                steps=plan.steps,
                sequences=min(self._delta.batch_size, len(lengths)),
                micro_batch_size=plan.micro_batch_size,
                length=cost.expected_padded_length(lengths, plan.micro_batch_size),
                checkpointing=self._training.gradient_checkpointing,
            )
            return cost.estimate(self._delta, architecture, architecture.linears, work).flops
        length = cost.expected_padded_length(lengths, _AT_ONCE)
        count = min(SEQUENCES, len(lengths))
        return count * cost.look_flops(architecture, length, backward=kind == "gradient")


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch, use_cache=False).loss
    return loss


def _shares_of(components: Mapping[str, Sequence[float]], budget: int) -> dict[str, float]:
    spectra = {}
    for name, shares in components.items():
        values = torch.tensor(shares, dtype=torch.float64).sqrt()
        # What was not kept is the rest of the layer's energy, which is 1.
        rest = max(0.0, 1.0 - math.fsum(shares))
        spectra[name] = spectrum.of_values(values, (len(shares), len(shares)), tail=rest)
    return allocation.importance_of_activations(spectra, budget)


def changing_callback(
    kind: str,
    options: RankChangeOptions,
    seed: int,
    costs: Mapping[str, int],
    changed: Callable[[RankChange], None],
) -> LossRankCallback | GradientRankCallback | None:
    """Makes the trainer's callback, or None where ranks stay.

    Args:
        kind: ``none``, ``loss`` or ``gradient``.
        options: Its thresholds.
        seed: Of the rows that a growing layer gets.
        costs: What one rank of each layer costs, in parameters.
        changed: Called with each change when it has happened.
    """
    # What is not said here is a threshold, and bears the decider's own name for it.
    steps = Steps(**options.model_dump(exclude={"loss", "gradient", "mean_rank"}))
    limit = None
    if options.mean_rank is not None:
        limit = Limit(options.mean_rank * sum(costs.values()), costs)
    if kind == "loss":
        loss = options.loss
        thresholds = loss.model_dump(exclude={"source", "every"})
        curve = LossCurve(**thresholds, steps=steps, limit=limit)
        return LossRankCallback(curve, source=loss.source, seed=seed, changed=changed)
    if kind == "gradient":
        gradient = options.gradient
        thresholds = gradient.model_dump(exclude={"every", "columns"})
        spectrum = GradientSpectrum(**thresholds, steps=steps, limit=limit)
        return GradientRankCallback(
            spectrum,
            every=gradient.every,
            columns=gradient.columns,
            seed=seed,
            changed=changed,
        )
    return None


def spells(
    ranks: Mapping[str, int], changes: Sequence[RankChange], steps: int
) -> list[tuple[int, dict[str, int]]]:
    """Returns for how many steps which ranks were in place, in order.

    Args:
        ranks: Ranks at the start.
        changes: What changed, in order.
        steps: Steps of the run.
    """
    found: list[tuple[int, dict[str, int]]] = []
    now, since = dict(ranks), 0
    for change in changes:
        if change.step > since:
            found.append((change.step - since, dict(now)))
            since = change.step
        now[change.layer] = change.after
    return [*found, (steps - since, now)]
